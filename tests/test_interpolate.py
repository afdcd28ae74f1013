"""eval/interpolate.py: averages against ones written by hand, end points against eval/shifts.py, faults in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data import DataError
from data.demo import DEMO_TEACHER
from data.shifts import SUITES, project
from data.stream import open_pass
from data.transforms import EvalTransform, unit_interval
from eval import shifts
from eval.interpolate import Config, label, main
from eval.scoring import load_models
from models import ModelError
from models.averages import average, first_difference
from models.encoders import load_encoder
from models.export import export_student
from models.featurisers import Featuriser
from models.heads import load_head, save_head
from models.weights import state_sha256, write_safetensors
from tests.ranks import run_two
from tests.test_eval_shifts import COUNTS, pictures, write_set
from train.common import RECIPES, ConfigError, parse_config

ROOT = Path(__file__).resolve().parents[1]
IMAGENET = SUITES["imagenet"]
ALPHAS = [0.0, 0.3, 0.5, 1.0]


# ----------------------------------------------------------------------------------------------------------------------
# Two ends and six small sets
# ----------------------------------------------------------------------------------------------------------------------


def noisy(state: Mapping[str, Tensor], seed: int, scale: float) -> dict[str, Tensor]:
    """Another end, not far away; variances stay above 0, and counts of batches differ."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            moved[name] = tensor + 7
            continue
        noise = scale * torch.randn(tensor.shape, generator=generator) * (tensor.std() if tensor.numel() > 1 else 1.0)
        moved[name] = (tensor + noise).abs() + 0.1 if name.endswith("running_var") else tensor + noise
    return moved


def make_ends(folder: Path, encoders: tuple[str, str], *, normalize: bool = True) -> dict[str, str]:
    """Heads that answer differently for different pictures, the second not far from the first."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    weight = torch.empty(0)
    for which, name in zip(("start", "end"), encoders, strict=True):
        encoder = load_encoder(name).eval()
        if which == "start":
            weight = 40 * torch.randn(1000, encoder.feature_dim, generator=generator)
        else:
            weight = weight + 12 * torch.randn(1000, encoder.feature_dim, generator=generator)
        images = torch.stack([torch.rand(3, encoder.image_size, encoder.image_size, generator=generator)] * 2)
        with torch.no_grad():
            known = encoder(images)[0]
        bias = -(known / known.norm() if normalize else known) @ weight.T
        file = folder / f"{which}.safetensors"
        metadata = {"encoder": name, "encoder_sha256": state_sha256(encoder.state_dict()), "data": "somewhere"}
        save_head(file, weight, bias, IMAGENET.classes, normalize=normalize, metadata=metadata)
        found[f"{which}_head"] = str(file)
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six sets of as many pictures as the tests of eval/shifts.py have, with labels drawn at random."""
    root = tmp_path_factory.mktemp("sets")
    for number, (name, count) in enumerate(COUNTS.items()):
        one = IMAGENET.sets[name]
        labels = torch.randint(one.num_classes, (count,), generator=torch.Generator().manual_seed(number))
        write_set(root / name, pictures(count, number), labels.tolist(), one.classes)
    return str(root)


@pytest.fixture(scope="module")
def vit_ends(tmp_path_factory: pytest.TempPathFactory, tiny_vit: str) -> dict[str, str]:
    """A ViT and what noise made of it, as an exported folder."""
    folder = tmp_path_factory.mktemp("vit")
    start, end = load_encoder(tiny_vit), load_encoder(tiny_vit)
    end.tower.load_state_dict(noisy(end.tower.state_dict(), 1, 0.4))
    export_student(end, folder / "end", card={}, source=start, origin="fine-tuned")
    return make_ends(folder, (tiny_vit, f"local-dir:{folder / 'end'}"))


@pytest.fixture(scope="module")
def resnet_ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A network with batch norm, whose statistics and counts of batches differ between the ends; heads as they are."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    network = load_encoder("cifar_resnet20", weights=False)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 32, 32))  # training mode: statistics move
    names = []
    for which, state in (("start", network.tower.state_dict()), ("end", noisy(network.tower.state_dict(), 2, 0.2))):
        write_safetensors(folder / f"{which}_net.safetensors", state, {})
        names.append(f"cifar_resnet20/{folder / f'{which}_net.safetensors'}")
    return make_ends(folder, (names[0], names[1]), normalize=False)


@pytest.fixture
def settings(sets: str, vit_ends: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        "data": sets,
        "partial": [*COUNTS],
        **vit_ends,
        "alphas": ALPHAS,
        "name": "pair",
        "decoder": "pil",
        "images": 5,
        "workers": 0,
        "out": str(tmp_path / "run"),
    }


def results(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def numbers(rows: list[dict[str, Any]], model: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured, without who measured it and what it is called."""
    kept = {"value", "n", "correct", "interval", "class_correct", "class_n", "bin_n", "bin_confidence", "bin_correct"}
    kept |= {"encoder_sha256", "head_sha256", "line", "partial", "data_fingerprint", "over", "projection"}
    found = {}
    for row in rows:
        if row["model"] == model:
            found[row["set"], row["metric"]] = {name: value for name, value in row.items() if name in kept}
    return found


def plain_forward(
    data: str, name: str, encoder: torch.nn.Module, weight: Tensor, bias: Tensor, normalize: bool
) -> tuple[int, int]:
    """How many images of a set an encoder and a head get right under the official protocol, and their number."""
    one = IMAGENET.sets[name]
    transform = EvalTransform(32, border=one.border, decoder="pil")
    correct = n = 0
    with torch.no_grad(), open_pass(f"{data}/{name}", batch_size=5, transform=transform) as batches:
        for batch in batches:
            features = encoder(unit_interval(batch["image"]))
            if normalize:
                features = features / features.square().sum(dim=1, keepdim=True).sqrt()
            logits = project(features @ weight.T + bias, one)
            correct += int((logits.argmax(dim=1) == batch["label"]).sum())
            n += len(logits)
    return correct, n


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_every_alpha_is_the_average_written_by_hand(
    kind: str, settings: dict[str, Any], vit_ends: dict[str, str], resnet_ends: dict[str, str]
) -> None:
    """State dicts averaged here, loaded into a network of its own, and a plain forward."""
    ends = vit_ends if kind == "vit" else resnet_ends
    result = main(Config(**settings | ends | {"name": ""}))
    heads = [load_head(ends[f"{which}_head"]) for which in ("start", "end")]
    states = [load_encoder(head.metadata["encoder"]).state_dict() for head in heads]
    name = heads[1].metadata["encoder"]
    assert {row["model"] for row in result["rows"]} == {f"{name} alpha {label(alpha)}" for alpha in ALPHAS}
    totals = []
    for alpha in ALPHAS:
        encoder = load_encoder(heads[0].metadata["encoder"])
        state = {}
        for key, first in states[0].items():
            second = states[1][key]
            # Integers, such as batch norm's count of batches, are those of the nearer end.
            mixed = (1 - alpha) * first.double() + alpha * second.double()
            state[key] = mixed.float() if first.is_floating_point() else (first if alpha < 0.5 else second)
        encoder.load_state_dict(state)
        weight, bias = (
            ((1 - alpha) * getattr(heads[0], part).double() + alpha * getattr(heads[1], part).double()).float()
            for part in ("weight", "bias")
        )
        found = numbers(result["rows"], f"{name} alpha {label(alpha)}")
        for set_name, count in COUNTS.items():
            row = found[set_name, "official_top1"]
            expected = plain_forward(settings["data"], set_name, encoder.eval(), weight, bias, kind == "vit")
            assert (row["correct"], row["n"]) == expected
            assert row["n"] == count
            assert row["encoder_sha256"] == state_sha256(encoder.state_dict())
        totals.append([found[set_name, "loss"]["value"] for set_name in COUNTS])
    assert len({tuple(total) for total in totals}) == len(ALPHAS), "the alphas must differ in something"
    if kind == "resnet":
        assert any(key.endswith("running_mean") for key in states[0])
        counts = [key for key in states[0] if key.endswith("num_batches_tracked")]
        assert counts
        assert all(states[0][key] != states[1][key] for key in counts)


def test_end_points_are_what_eval_shifts_says(
    settings: dict[str, Any], resnet_ends: dict[str, str], tmp_path: Path
) -> None:
    """Every number of every set and control, integer for integer, and the hashes."""
    for number, ends in enumerate(({name: settings[name] for name in ("start_head", "end_head")}, resnet_ends)):
        here = settings | ends | {"alphas": [0.0, 1.0], "out": str(tmp_path / f"line{number}")}
        rows = main(Config(**here))["rows"]
        shared = {name: here[name] for name in ("data", "partial", "decoder", "images", "workers")}
        for which, alpha in (("start", "0.00"), ("end", "1.00")):
            out = str(tmp_path / f"{which}{number}")
            alone = shifts.main(shifts.Config(**shared, head=here[f"{which}_head"], name=which, out=out))["rows"]
            expected = numbers(alone, which)
            assert len(expected) > 40
            assert numbers(rows, f"pair alpha {alpha}") == expected


def test_average() -> None:
    """Halfway and at the ends, -0.0 included; rounding is that of float64; integers come from the nearer end."""
    start, end = torch.tensor([1.0, -0.0, 1e-8, 0.1]), torch.tensor([3.0, 5.0, 1.0, 0.1])
    assert average(start, end, 0.5).tolist() == [2.0, 2.5, pytest.approx(0.5), start[3].item()]
    assert torch.equal(torch.signbit(average(start, end, 0)), torch.tensor([False, True, False, False]))
    assert torch.equal(average(start, end, 1), end)
    assert average(start, end, 0) is not start
    for alpha in (0.1, 0.3, 0.7, 0.9):
        assert torch.equal(average(start, start, alpha), start), "what both ends share is kept"
    numbers = torch.tensor(3), torch.tensor(9)
    assert [int(average(*numbers, alpha)) for alpha in (0, 0.49, 0.5, 1)] == [3, 3, 9, 9]
    assert average(start.half(), end.half(), 0.3).dtype == torch.float16


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves
# ----------------------------------------------------------------------------------------------------------------------


def test_rows_table_figure_and_saved_pairs(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each saved pair, scored by eval/shifts.py, has the numbers that the curve has at its alpha."""
    rows = main(Config(**settings, save=[0.0, 0.3, 1.0]))["rows"]
    out = Path(settings["out"])
    written = results(out)
    assert len(written) == len(rows)
    assert {row["alpha"] for row in written} == {*ALPHAS}
    assert all(row["start"]["head"] == settings["start_head"] for row in written)
    assert all(row["versions"]["torch"] and row["config"]["alphas"] == ALPHAS for row in written)
    means = {row["alpha"]: row["value"] for row in written if row["set"] == "mean"}
    assert means.keys() == {*ALPHAS}

    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("0.30 "))
    accuracy = numbers(rows, "pair alpha 0.30")["imagenet", "official_top1"]["value"]
    assert line.split()[1] == f"{100 * accuracy:.2f}"
    assert line.split()[-1] == f"{100 * means[0.3]:.2f}"
    assert "0.50 (published choice)" in shown
    with Image.open(out / "interpolation.png") as figure:
        assert figure.width > 1000
        assert len(figure.convert("RGB").getcolors(2**24) or []) > 100
    assert (out / "interpolation.svg").read_text().count("<path") > 50

    assert sorted(path.name for path in out.glob("alpha_*")) == ["alpha_0.00", "alpha_0.30", "alpha_1.00"]
    shared = {name: settings[name] for name in ("data", "partial", "decoder", "images", "workers")}
    for alpha in ("0.00", "0.30", "1.00"):
        folder = out / f"alpha_{alpha}"
        page = (folder / "export" / "README.md").read_text()
        assert "interpolated" in page
        assert "| data | somewhere |" in page
        assert (folder / "export" / "open_clip_config.json").is_file(), "the text tower is the start's"
        head = load_head(folder / "head.safetensors")
        assert head.metadata["alpha"] == float(alpha)
        config = shifts.Config(
            **shared, head=str(folder / "head.safetensors"), name="saved", out=str(tmp_path / f"saved_{alpha}")
        )
        assert numbers(shifts.main(config)["rows"], "saved") == numbers(rows, f"pair alpha {alpha}")


def test_the_same_run_adds_no_rows_and_missing_sets_end_it_late(settings: dict[str, Any], tmp_path: Path) -> None:
    """Without a shift set there is no mean and no curve, but a line for each set that is there."""
    present = {name: f"{settings['data']}/{name}" for name in COUNTS if name != "objectnet"}
    settings |= {"data": str(tmp_path), "sets": present}
    with pytest.raises(DataError, match=r"^missing: objectnet; the other sets are scored") as caught:
        main(Config(**settings))
    assert "\n" not in str(caught.value)
    once = results(settings["out"])
    assert not [row for row in once if row["set"] == "mean"]
    assert Path(settings["out"], "interpolation.png").stat().st_size > 0
    assert main(Config(**settings, allow_missing=True))["missing"] == ["objectnet"]
    assert results(settings["out"]) == once


def test_two_processes_equal_one(settings: dict[str, Any], resnet_ends: dict[str, str], tmp_path: Path) -> None:
    """Every number to the last digit, and the saved weights."""
    settings |= {**resnet_ends, "alphas": [0.3, 1.0], "save": [0.3]}
    one, two = settings | {"out": str(tmp_path / "one")}, settings | {"out": str(tmp_path / "two")}
    main(Config(**one))
    run_two(main, Config(**two), tmp_path)
    assert json.loads((tmp_path / "two" / "env.json").read_text())[-1]["world"] == 2
    differing = ("config", "date", "commit", "device")  # the last is "cpu:0" in a world of several
    first, second = (
        [{key: value for key, value in row.items() if key not in differing} for row in results(run["out"])]
        for run in (one, two)
    )
    assert first == second
    assert len(first) > 80
    saved = [load_encoder(f"local-dir:{tmp_path / run}/alpha_0.30/export").state_dict() for run in ("one", "two")]
    assert state_sha256(saved[0]) == state_sha256(saved[1])


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def test_ends_that_are_not_one_network_are_refused(
    settings: dict[str, Any], vit_ends: dict[str, str], resnet_ends: dict[str, str], tmp_path: Path
) -> None:
    vit = load_head(vit_ends["start_head"])
    other = tmp_path / "other.safetensors"

    def fails(message: str, **change: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            main(Config(**settings | change))
        assert "\n" not in str(caught.value)

    fails(
        r"cannot be averaged: .*; give a pair of encoder and head, and what train/finetune.py made of it",
        end_head=resnet_ends["end_head"],
    )
    save_head(other, vit.weight, vit.bias, vit.classes, normalize=False, metadata=vit.metadata)
    fails("cannot be averaged: `normalize` of the head is True in the first, False in the second", end_head=str(other))
    save_head(other, vit.weight, vit.bias, vit.classes[::-1], normalize=True, metadata=vit.metadata)
    fails("other.safetensors has the same classes in another order than the data: row 0", end_head=str(other))
    save_head(
        other,
        vit.weight,
        vit.bias,
        vit.classes,
        normalize=True,
        featuriser=Featuriser(24, layers=1),
        metadata=vit.metadata,
    )
    fails("other.safetensors has layers between .* eval/interpolate.py takes linear heads only", end_head=str(other))
    save_head(other, vit.weight, vit.bias, vit.classes, normalize=True)
    fails("other.safetensors does not say which encoder it was trained on", end_head=str(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocess_cfg": {"mean": [0.5, 0.5, 0.4]}}, r"the mean of pixels is \[0.5, 0.5, 0.5\] in the first, "),
        ({"preprocess_cfg": {"std": [0.5, 0.5, 0.4]}}, "the standard deviation of pixels is "),
        ({"image_size": 64}, "images are of 32 px in the first, 64 px in the second"),
        ({"layers": 3}, r"layers of transformer .* is 2 in the first, 3 in the second"),
        ({"head_width": 16}, r"head_dim of .*attn .* is 32 in the first, 16 in the second"),
        ({"quick_gelu": True}, r"where the first has .*gelu \(GELU\), the second has .*gelu \(QuickGELU\)"),
        ({"embed_dim": 32}, r"output_dim of the tower .* is 24 in the first, 32 in the second"),
        ({}, ""),
    ],
)
def test_the_first_difference_is_named(change: dict[str, Any], message: str, tiny_vit: str, tmp_path: Path) -> None:
    """Also where all tensors have the same shapes: the number of attention heads, the activation."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_vit.removeprefix("local-dir:"), folder)
    content = json.loads((folder / "open_clip_config.json").read_text())
    model = content["model_cfg"]
    content["preprocess_cfg"] |= change.get("preprocess_cfg", {})
    model["vision_cfg"] |= {key: change[key] for key in ("image_size", "layers", "head_width") if key in change}
    model |= {key: change[key] for key in ("quick_gelu", "embed_dim") if key in change}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    encoders = load_encoder(tiny_vit), load_encoder(f"local-dir:{folder}", weights=False)
    found = first_difference(*encoders)
    assert re.match(message, found) if message else found == "", found


def test_settings_that_cannot_work(settings: dict[str, Any], tmp_path: Path) -> None:
    for change, message in (
        ({"alphas": []}, "one at least"),
        ({"alphas": [0.5, 1.5]}, r"each in \[0, 1\]"),
        ({"alphas": [float("nan")]}, r"each in \[0, 1\]"),
        ({"alphas": [0.5, 0.5]}, "one is there twice"),
        ({"save": [0.4]}, r"--save \[0.4\]: not among --alphas"),
        ({"end_head": ""}, "--start_head or --end_head is missing"),
        ({"data": ""}, "--data is missing"),
        ({"start_head": str(tmp_path / "no"), "end_head": str(tmp_path / "none")}, "no .*/no and no .*/none here: run"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            main(Config(**settings | change))
        assert "\n" not in str(caught.value)


def test_bare_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It joins what the demos of train/zero_shot.py and train/finetune.py leave; without them one line says so."""
    config = parse_config(Config, [], "", "interpolate_demo.yaml")
    assert config.alphas == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    finetune = (RECIPES / "finetune_demo.yaml").read_text()
    assert f"head: {config.start_head}\n" in finetune
    assert f"out: {Path(config.end_head).parent}\n" in finetune
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"run first `python train/zero_shot.py`, then `accelerate launch train/fine"):
        main(config)

    demo = SUITES["demo"]
    encoder = load_encoder(DEMO_TEACHER)
    for file, seed in ((config.start_head, 0), (config.end_head, 1)):
        weight = torch.randn(10, encoder.feature_dim, generator=torch.Generator().manual_seed(seed))
        Path(file).parent.mkdir(parents=True)
        save_head(Path(file), weight, None, demo.classes, normalize=True, metadata={"encoder": "demo"})
    rows = main(parse_config(Config, ["--alphas", "[0.5]"], "", "interpolate_demo.yaml"))["rows"]
    assert {row["n"] for row in rows if row["set"] == "val"} == {1000}
    assert Path(config.out, "interpolation.png").is_file()
    (model,) = load_models([shifts_pair(config.start_head)], demo, torch.device("cpu"))
    assert model.pair.encoder == model.pair.name == "demo"


def shifts_pair(head: str) -> Any:
    """A pair as eval/shifts.py makes it of --head alone."""
    (pair,) = shifts.read_pairs(shifts.Config(data="x", head=head))
    return pair
