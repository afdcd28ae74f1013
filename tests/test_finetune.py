"""Fine-tuning: the step against one written by hand, exact resume, equal worlds, the exported pair, faults."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from data import DataError
from data.shifts import SUITES
from data.stream import open_stream
from data.transforms import TrainTransform, unit_interval
from eval.scoring import Pair, load_models
from models import ModelError
from models.checkpoints import newest_checkpoint, save_checkpoint
from models.encoders import Encoder, load_encoder
from models.featurisers import Featuriser
from models.heads import Head, load_head, save_head
from models.weights import state_sha256
from tests.ranks import Script, run_two
from tests.test_distill import rows, small_weights, weights_after
from tests.test_probe import NAMES, write_shards
from train import finetune
from train.common import RECIPES, ConfigError, StopRequested, parse_config
from train.finetune import Config, main, make_classifier

ROOT = Path(__file__).resolve().parents[1]
VOLATILE = ("images_per_second", "data_wait_share", "seconds_left", "memory_mib")
DRAW = finetune.draw_loss


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """136 samples of five classes that colour tells apart, in two shards."""
    folder = tmp_path_factory.mktemp("finetune") / "shards"
    return write_shards(folder, [i * i % 5 and i % 5 for i in range(136)], NAMES)


def make_head(
    file: Path, width: int, *, normalize: bool = True, classes: list[str] = NAMES, seed: int = 0, **metadata: Any
) -> str:
    generator = torch.Generator().manual_seed(seed)
    weight = 3 * torch.randn(len(classes), width, generator=generator) / width**0.5
    bias = 0.1 * torch.randn(len(classes), generator=generator)
    save_head(file, weight, bias, classes, normalize=normalize, metadata=metadata)
    return str(file)


@pytest.fixture
def settings(shards: Path, tiny_vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """8 steps of 16 images in this process, without the figure, which would take longer than they do."""
    monkeypatch.setattr(finetune, "draw_loss", lambda *_: None)
    return {
        "data": str(shards),
        "encoder": tiny_vit,
        "head": make_head(tmp_path / "head.safetensors", 24),
        "batch_size": 16,
        "steps": 8,
        "lr": 1e-3,
        "warmup_steps": 2,
        "workers": 0,
        "log_every": 1,
        "save_every": 4,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def with_batch_norm(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    encoder = f"cifar_resnet20/{small_weights(tmp_path)}"
    return settings | {"encoder": encoder, "head": make_head(tmp_path / "head64.safetensors", 64), "batch_size": 32}


# ----------------------------------------------------------------------------------------------------------------------
# What a step does, and what a run leaves
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "normalize", "smoothing"), [("vit", True, 0.0), ("vit", False, 0.1), ("resnet", True, 0.1)]
)
def test_one_step_is_the_one_written_by_hand(
    kind: str,
    normalize: bool,
    smoothing: float,
    settings: dict[str, Any],
    with_batch_norm: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Mirrored crops of the stream, softmax cross-entropy, clipping, AdamW with decay on every parameter."""
    settings = settings if kind == "vit" else with_batch_norm
    settings["head"] = make_head(tmp_path / "own.safetensors", 24 if kind == "vit" else 64, normalize=normalize)
    settings |= {"steps": 1, "warmup_steps": 0, "label_smoothing": smoothing, "flip": 0.25, "clip": 0.5}
    result = main(Config(**settings, weight_decay=0.3))
    found = {
        name.removeprefix("model/"): tensor
        for name, tensor in weights_after(settings["out"]).items()
        if name.startswith("model/")
    }

    transform = TrainTransform(32, scale=(0.9, 1.0), flip=0.25)
    with open_stream(settings["data"], global_batch=settings["batch_size"], transform=transform) as stream:
        batch = next(iter(stream))
    encoder = load_encoder(settings["encoder"]).train()
    head = load_head(settings["head"], NAMES)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    features = encoder(unit_interval(batch["image"]))
    if normalize:
        features = features / features.square().sum(dim=1, keepdim=True).sqrt()
    log_likelihoods = (features @ weight.T + bias).log_softmax(dim=1)
    of_labels = log_likelihoods.gather(1, batch["label"][:, None]).mean()
    loss = -(1 - smoothing) * of_labels - smoothing * log_likelihoods.mean()
    parameters = {**{f"encoder.{n}": p for n, p in encoder.named_parameters()}, "weight": weight, "bias": bias}
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
    assert norm > 0.5, "clipping must have something to do"
    torch.optim.AdamW(list(parameters.values()), lr=1e-3, weight_decay=0.3, foreach=False).step()

    assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert result["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert found.keys() == {*(f"encoder.{name}" for name in encoder.state_dict()), "weight", "bias"}
    moved = 0
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        # Where a gradient is near 0 (keys' biases have none at all) the first step is its sign: rounding decides.
        sure = parameter.grad.abs() > 1e-6
        assert (found[name] - parameter.detach())[sure].abs().max() <= 1e-6 if sure.any() else True, name
        assert (found[name] - parameter.detach()).abs().max() <= 2e-3, name
        moved += int(sure.sum())
    assert moved > 0.9 * sum(parameter.numel() for parameter in parameters.values())
    for name, buffer in encoder.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert torch.allclose(found[f"encoder.{name}"], buffer, atol=1e-6), name


def test_run_learns_and_its_pair_is_the_trained_module(
    settings: dict[str, Any], tiny_vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "draw_loss", DRAW)
    before = state_sha256(load_encoder(tiny_vit).state_dict())
    settings["head"] = make_head(tmp_path / "fitting.safetensors", 24, encoder_sha256=before, encoder=tiny_vit)
    result = main(Config(**{**settings, "steps": 60, "log_every": 5}))
    out, logged = Path(settings["out"]), rows(settings["out"])
    assert logged[-1]["loss"] < 0.4 * logged[0]["loss"]
    assert logged[-1]["accuracy"] > 0.8 > logged[0]["accuracy"]
    assert {"lr", "gradient_norm", "epoch", "data_wait_share", "memory_mib"} <= logged[0].keys()
    assert result["loss"] == logged[-1]["loss"]
    for name in ("config.yaml", "env.json", "loss.png", "loss.svg", "export/student.safetensors", "export/README.md"):
        assert (out / name).stat().st_size > 0, name

    page = (out / "export" / "README.md").read_text()
    assert "fine-tuned" in page
    assert "distilled" not in page
    assert "teacher" not in page.partition("## Use")[0]
    encoder = load_encoder(f"local-dir:{out / 'export'}").eval()
    head = load_head(out / "head.safetensors", NAMES, encoder.feature_dim)
    assert head.normalize
    (row,) = results(out)
    assert row["metric"] == "finetune_last_epoch_loss"
    for name, key in (("value", "loss"), ("accuracy", "accuracy"), ("n", "n")):
        assert row[name] == result[f"last_epoch_{key}"]
    assert row["start"]["encoder_sha256"] == head.metadata["start"]["encoder_sha256"] == before
    assert row["weights_sha256"] == head.metadata["encoder_sha256"] == state_sha256(encoder.state_dict()) != before
    assert {"commit", "versions", "date", "config", "seed", "data_fingerprint", "data_reports"} <= row.keys()

    trained = {
        name.removeprefix("model/"): tensor for name, tensor in weights_after(out).items() if name.startswith("model/")
    }
    inner = load_encoder(tiny_vit, weights=False)
    module = make_classifier(inner, head).eval()
    module.load_state_dict(trained)
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 5
    with torch.no_grad():
        features = encoder(images)
        logits = features / features.norm(dim=1, keepdim=True) @ head.weight.T + head.bias
        values = module(images, labels)
        assert torch.equal(inner(images), features)
    assert torch.equal(module.get_parameter("weight"), head.weight)
    assert torch.equal(module.get_parameter("bias"), head.bias)
    assert values["loss"].item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert values["accuracy"].item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def results(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("steps", [16, 19, 5])
def test_the_result_is_the_mean_over_the_last_epoch(steps: int, settings: dict[str, Any]) -> None:
    """An epoch is 8 steps of 16 images; --steps may end the last one early. Rows hold means of single batches."""
    result = main(Config(**{**settings, "steps": steps}))
    last = rows(settings["out"])[(steps - 1) // 8 * 8 :]
    assert len(last) == (steps - 1) % 8 + 1
    assert result["last_epoch_n"] == 16 * len(last)
    for name in ("loss", "accuracy"):
        assert result[f"last_epoch_{name}"] == pytest.approx(sum(row[name] for row in last) / len(last), rel=1e-6)
    assert result["last_epoch_loss"] != result["loss"] == last[-1]["loss"]
    right = result["last_epoch_accuracy"] * result["last_epoch_n"]
    assert right == pytest.approx(round(right), abs=1e-3), "a count of images"


def test_images_that_trained_nothing_are_not_in_the_result(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that lost rows counts those it has, a skipped step none at all."""
    damaged = tmp_path / "damaged"
    shutil.copytree(settings["data"], damaged)
    shard = bytearray((damaged / "000000.tar").read_bytes())
    first_image = shard.index(b"\x89PNG")
    shard[first_image : first_image + 8] = b"no image"
    (damaged / "000000.tar").write_bytes(shard)
    settings |= {"data": str(damaged), "max_bad_fraction": 0.5, "log_every": 1}
    assert main(Config(**settings))["last_epoch_n"] == 8 * 16 - 1

    original, calls = Encoder.forward, [0]

    def overflow(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return original(self, images) * float("inf") if calls[0] in skipped else original(self, images)

    monkeypatch.setattr(Encoder, "forward", overflow)
    skipped = {3}
    settings |= {"out": str(tmp_path / "skipped")}
    result = main(Config(**settings))
    kept = [row for row in rows(settings["out"]) if row["loss"] is not None]
    assert (len(kept), result["skipped_steps"]) == (7, 1)
    assert result["last_epoch_n"] in (7 * 16, 7 * 16 - 1)
    assert result["last_epoch_loss"] == pytest.approx(sum(row["loss"] for row in kept) / 7, rel=0.02)

    skipped, calls[0] = set(range(100)), 0
    settings |= {"out": str(tmp_path / "nothing")}
    result = main(Config(**settings))
    assert (result["skipped_steps"], result["last_epoch_n"]) == (8, 0)
    assert not (tmp_path / "nothing" / "results.jsonl").exists(), "no image, no result"


def test_evaluation_takes_the_pair_and_no_mixture_of_old_and_new(settings: dict[str, Any], tiny_vit: str) -> None:
    suite = dataclasses.replace(SUITES["demo"], classes=tuple(NAMES))
    main(Config(**settings))
    out = Path(settings["out"])
    head = str(out / "head.safetensors")
    (model,) = load_models([Pair("new", f"local-dir:{out / 'export'}", head)], suite, torch.device("cpu"))
    assert model.encoder_sha256 == model.head.metadata["encoder_sha256"]
    with pytest.raises(ModelError, match="was trained on features of"):
        load_models([Pair("mixed", tiny_vit, head)], suite, torch.device("cpu"))


def test_accumulation_does_not_change_the_step(settings: dict[str, Any], tmp_path: Path) -> None:
    main(Config(**{**settings, "batch_size": 48, "accumulate": 3, "out": str(tmp_path / "a")}))
    main(Config(**{**settings, "batch_size": 48, "accumulate": 1, "out": str(tmp_path / "b")}))
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["accuracy"] == pytest.approx(b["accuracy"])
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale(
    with_batch_norm: dict[str, Any], tmp_path: Path
) -> None:
    before = load_encoder(with_batch_norm["encoder"]).tower.state_dict()
    for norm_stats in ("own", "frozen"):
        out = tmp_path / norm_stats
        main(Config(**{**with_batch_norm, "steps": 3, "out": str(out)}, norm_stats=norm_stats))  # type: ignore[arg-type]
        after = load_encoder(f"local-dir:{out / 'export'}").tower.state_dict()
        statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
        assert len(statistics) == 2 * 21
        kept = [torch.equal(before[name], after[name]) for name in statistics]
        assert all(kept) if norm_stats == "frozen" else not any(kept)
        assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_bf16_encoder_with_a_float32_head(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"steps": 3, "out": str(tmp_path / "bf16")}
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    with Script("train/finetune.py", settings, tmp_path / "said", environment=bf16) as run:
        assert run.wait(120) == [0], run.said()
    assert json.loads((tmp_path / "bf16" / "env.json").read_text())[-1]["mixed_precision"] == "bf16"
    main(Config(**{**settings, "out": str(tmp_path / "float32")}))
    exact, rounded = rows(tmp_path / "float32"), rows(tmp_path / "bf16")
    assert exact[0]["loss"] != rounded[0]["loss"]
    for a, b in zip(exact, rounded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02), a["step"]


def test_head_and_loss_are_float32_under_autocast() -> None:
    """Cosines times 100, of features that bf16 holds exactly: the loss is that of float32 to its last digits."""

    class Flat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(7, 48, generator=generator), dim=1) * 100
    head = Head(weight, torch.zeros(7), tuple("abcdefg"), True, {})
    module = make_classifier(Flat(), head)  # type: ignore[arg-type]
    images = torch.randn(9, 3, 4, 4, generator=generator).bfloat16()
    labels = torch.arange(9) % 7
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(images, labels)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(module(images.float(), labels)["loss"].item(), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Interruption, and processes
# ----------------------------------------------------------------------------------------------------------------------


def strip(out: str | Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows(out)]


def test_resume_is_bit_for_bit(
    with_batch_norm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 steps = 5 + 3 with batch norm and an epoch's end in the middle; SIGTERM arrives during step 5."""
    settings = with_batch_norm
    whole = main(Config(**settings))
    halves = settings | {"out": str(tmp_path / "halves")}
    original = finetune.cosine_lr

    def lr_and_signal(step: int, *rest: Any) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "cosine_lr", lr_and_signal)
        with pytest.raises(StopRequested, match="saved at step 5 of 8") as stopped:
            main(Config(**halves))
    assert stopped.value.code == 143
    resumed = main(Config(**halves))
    for name in ("loss", "last_epoch_loss", "last_epoch_accuracy", "last_epoch_n"):
        assert resumed[name] == whole[name], name  # the last epoch is the steps 4 to 7, the stop after 4
    assert whole["last_epoch_n"] == 4 * 32
    first, second = weights_after(settings["out"]), weights_after(halves["out"])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert strip(settings["out"]) == strip(halves["out"])
    pairs = [Path(out, "head.safetensors") for out in (settings["out"], halves["out"])]
    assert torch.equal(load_head(pairs[0]).weight, load_head(pairs[1]).weight)

    again = main(Config(**settings))  # all is done: the same files again, no second result
    assert again["last_epoch_loss"] == whole["last_epoch_loss"]
    assert strip(settings["out"]) == strip(halves["out"])
    assert len(Path(settings["out"], "results.jsonl").read_text().splitlines()) == 1


def test_two_processes_equal_one(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"steps": 30, "save_every": 100, "label_smoothing": 0.1}
    one, two = settings | {"out": str(tmp_path / "one")}, settings | {"out": str(tmp_path / "two")}
    main(Config(**one))
    run_two(main, Config(**two), tmp_path)
    assert json.loads((tmp_path / "two" / "env.json").read_text())[-1]["world"] == 2
    first, second = rows(one["out"]), rows(two["out"])
    assert len(first) == len(second) == 30
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["accuracy"] == pytest.approx(b["accuracy"]), a["step"]
    (first_result,), (second_result,) = results(one["out"]), results(two["out"])
    assert first_result["n"] == second_result["n"] == 6 * 16
    assert first_result["value"] == pytest.approx(second_result["value"], rel=1e-5)
    assert first_result["accuracy"] == pytest.approx(second_result["accuracy"])


def test_a_non_finite_step_is_skipped_and_leaves_no_trace(
    with_batch_norm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Encoder.forward, [0]

    def overflow(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return original(self, images * float("inf") if calls[0] == 3 else images)

    monkeypatch.setattr(Encoder, "forward", overflow)
    assert main(Config(**with_batch_norm))["skipped_steps"] == 1
    assert sum(row["loss"] is None for row in rows(with_batch_norm["out"])) == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights_after(with_batch_norm["out"]).values())


def test_steps_that_stay_non_finite_end_the_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: original(self, images) * float("inf"))
    with pytest.raises(ModelError, match="not finite in 25 steps in a row"):
        main(Config(**{**settings, "steps": 50, "log_every": 50, "save_every": 50}))


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({"width": 24, "classes": NAMES[::-1]}, "the same classes in another order than the data: row 0 is 'eel'"),
        (
            {"width": 24, "classes": [*NAMES[:4], "fox"]},
            "other classes than the data: row 4 is 'fox', label 4 is 'eel'",
        ),
        ({"width": 24, "classes": [*NAMES, "fox"]}, "has 6 classes, the data 5"),
        ({"width": 25}, "takes 25 features, the encoder gives 24"),
        ({"width": 24, "encoder": "open_clip:RN50/openai", "encoder_sha256": "0" * 64}, "was made for open_clip:RN50"),
    ],
)
def test_a_head_that_does_not_fit_is_one_line(
    head: dict[str, Any], expected: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["head"] = make_head(tmp_path / "other.safetensors", **head)
    with pytest.raises(ModelError, match=expected) as caught:
        main(Config(**settings))
    assert one_line(caught)


def test_a_head_with_layers_of_its_own_is_refused(settings: dict[str, Any]) -> None:
    """Trained as a linear head, it would lose them in silence."""
    save_head(Path(settings["head"]), torch.zeros(5, 24), None, NAMES, featuriser=Featuriser(24, layers=1))
    with pytest.raises(ModelError, match=r"head.safetensors has layers .*; train/finetune.py takes linear") as caught:
        main(Config(**settings))
    assert one_line(caught)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"encoder": "cifar_resnet20"}, ModelError, "cifar_resnet20"),
        ({"encoder": "open_clip:RN50"}, ModelError, "open_clip:RN50"),
        ({"encoder": "local-dir:/no/such/folder"}, ModelError, "/no/such/folder"),
        ({"head": "/no/head.safetensors"}, ModelError, "no such file; train/zero_shot.py or train/probe.py makes one"),
        ({"data": "/no/such/shards"}, DataError, "/no/such/shards"),
        ({"norm_stats": "frozen"}, ConfigError, "--norm_stats frozen: .* has no batch norms to take over; use own"),
        ({"batch_size": 15, "accumulate": 2}, ConfigError, "not divisible"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    change: dict[str, Any], error: type[Exception], expected: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=expected) as caught:
        main(Config(**{**settings, **change}))
    assert one_line(caught)


def test_shards_without_class_names_must_fit_the_head_in_number(
    settings: dict[str, Any], tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings |= {"data": str(tiny_shards), "steps": 2}
    with pytest.raises(DataError, match=r"label 9, .*head.safetensors has 5 classes") as caught:
        main(Config(**settings))
    assert one_line(caught)
    settings |= {"head": make_head(tmp_path / "ten.safetensors", 24, classes=list("abcdefghij"))}
    main(Config(**{**settings, "out": str(tmp_path / "fits")}))
    assert "the shards do not name their classes: label 0 is taken for 'a'" in capfd.readouterr().err


def test_resume_with_breaking_changes_is_refused(settings: dict[str, Any]) -> None:
    main(Config(**settings))

    def refused(change: dict[str, Any], expected: str) -> None:
        with pytest.raises(ConfigError, match=expected) as caught:
            main(Config(**{**settings, "steps": 12, **change}))
        assert one_line(caught)

    refused({"label_smoothing": 0.1}, "label_smoothing 0.0 -> 0.1")
    refused({"steps": 4}, "beyond the 4 steps")
    refused({"resume": "none"}, "holds a run already")
    head = Path(settings["head"]).read_bytes()
    make_head(Path(settings["head"]), 24, seed=1)  # another head under the same name
    refused({}, "not the weights that the checkpoint began with")
    Path(settings["head"]).write_bytes(head)
    checkpoint, _ = newest_checkpoint(Path(settings["out"]) / "checkpoints")
    assert checkpoint is not None
    del checkpoint.state["epoch_sums"]
    save_checkpoint(checkpoint.path.parent, checkpoint.step + 1, checkpoint.tensors, checkpoint.state)
    refused({}, "^the checkpoint is of an earlier version, which kept no sums of the epoch; use another --out$")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"label_smoothing": 1.5}, "--label_smoothing must lie in"),
        ({"flip": -0.1}, "--flip must lie in"),
        ({"lr": float("nan")}, "--lr must be"),
        ({"clip": 0.0}, "--clip must be above 0"),
        ({"epochs": 0}, "give --epochs or --steps"),
        ({"data": ""}, "--data is missing"),
        ({"head": ""}, "--encoder or --head is missing"),
    ],
)
def test_impossible_settings_are_refused_at_once(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Config(**{"data": "x", "encoder": "y", "head": "z", **change})


def test_recipes() -> None:
    """WiSE-FT's settings, which are the script's defaults too, and what a bare command runs."""
    argv = ["--config", str(RECIPES / "finetune_clip.yaml"), "--data", "x", "--head", "y"]
    config = parse_config(Config, argv, "test", "finetune_demo.yaml")
    assert (config.lr, config.weight_decay, config.epochs, config.batch_size) == (3e-5, 0.1, 10, 512)
    assert (config.warmup_steps, config.clip, config.label_smoothing, config.flip) == (500, 1.0, 0.0, 0.0)
    defaults = Config(data="x", encoder=config.encoder, head="y", save_every=2500, out=config.out)
    assert config == defaults
    assert load_encoder(config.encoder, weights=False).feature_dim == 512
    bare = parse_config(Config, [], "test", "finetune_demo.yaml")
    assert (bare.data, bare.encoder) == ("demo", "demo")
