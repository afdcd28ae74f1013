"""The throughput measurement of attacks: that the loops it compares are the published ones, and its rows."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from attacks.pgd import draw_from_ball, pgd
from data import DataError
from eval import attacking
from tests.test_pgd import example, smooth_net

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"device": "cpu", "models": ("cifar_resnet20",), "batch_size": 2, "steps": 2, "rounds": 2}


@pytest.fixture(autouse=True)
def denormals() -> Any:
    """Left as every other test expects them."""
    yield
    torch.set_flush_denormal(False)


# --- The published loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["linf", "l2"])
def test_torchattacks_loop_is_the_packages(attack: str) -> None:
    package = pytest.importorskip("torchattacks", reason="torchattacks, which this loop is written after, is missing")
    net, (images, labels) = smooth_net(), example(6)
    settings = attacking.settings(attacking.Case("", attack, 8, 6), 5)
    make = {"linf": package.PGD, "l2": package.PGDL2}[attack]
    theirs = make(net, settings["eps"], settings["step_size"], settings["steps"], random_start=False)
    found = attacking.torchattacks(net, images, labels, images.clone(), settings)
    assert torch.equal(found, theirs(images, labels))
    assert not torch.equal(found, images)


@pytest.mark.parametrize("attack", attacking.ATTACKS)
def test_published_loops_are_ours_in_float64(attack: str) -> None:
    """On the measured network too, where float32 leaves room for kinks."""
    case = attacking.Case("cifar_resnet20", attack, 32, 3)
    model, images, labels = attacking.build(case, CPU)
    model, images = model.double(), images.double()
    settings = attacking.settings(case, 3)
    ours = pgd(model, images, labels, **settings, generator=torch.Generator().manual_seed(1))
    if attack == "smoothadv":
        published = attacking.smoothadv(model, images, labels, settings)
    else:
        start = draw_from_ball(images, settings["eps"], settings["norm"], torch.Generator().manual_seed(1))
        published = attacking.torchattacks(model, images, labels, start, settings)
    assert (ours - images).abs().max() > 1e-4
    assert (ours - published).abs().max() <= 1e-9


def test_only_the_loop_that_is_not_frozen_computes_weight_gradients() -> None:
    case = attacking.Case("cifar_resnet20", "smoothadv", 32, 2)
    model, images, labels = attacking.build(case, CPU)
    ways = attacking.competitors(case, model, images, labels, attacking.Config(**{**SMALL, "bf16": "yes"}))
    assert list(ways) == [
        attacking.FROZEN,
        attacking.NOT_FROZEN,
        attacking.NOT_FOLDED,
        attacking.OURS,
        attacking.BF16,
    ]
    for name, way in ways.items():
        way()
        attacked = way.args[0]  # type: ignore[attr-defined]
        computed = [weight.grad is not None for weight in attacked.parameters()]
        assert all(computed) if name == attacking.NOT_FROZEN else not any(computed), name
        assert not any(part.training for part in attacked.modules())


# --- The measurement --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_rows_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every attack of every competitor that a CPU has; table and figure are made from the rows."""
    config = attacking.Config(
        **SMALL, bf16="no", rows=str(tmp_path / "rows.jsonl"), figure=str(tmp_path / "figure.png")
    )
    rows = attacking.main(config)
    assert [json.loads(line) for line in Path(config.rows).read_text().splitlines()] == json.loads(json.dumps(rows))
    assert len({(row["metric"], row["attack"], row["competitor"], row["against"]) for row in rows}) == len(rows)
    ours = {attacking.OURS, attacking.NOT_FOLDED}
    for attack in attacking.ATTACKS:
        loops = {attacking.FROZEN, attacking.NOT_FROZEN} if attack == "smoothadv" else {"torchattacks"}
        own = [row for row in rows if row["attack"] == attack]
        rates = {row["competitor"]: row for row in own if row["metric"] == "attacked images/s"}
        assert set(rates) == ours | loops
        ratios = [row for row in own if row["metric"] == "speed-up"]
        assert {(row["competitor"], row["against"]) for row in ratios} == {
            (one, loop) for one in ours for loop in loops
        }
        judged = {(row["competitor"], row["against"]): row for row in ratios if "verdict" in row}
        musts = {loop: 1.4 if loop == attacking.NOT_FROZEN else 1.1 for loop in loops}
        assert {pair: row["must"] for pair, row in judged.items()} == {
            (attacking.OURS, loop): must for loop, must in musts.items()
        }
        assert all(row["verdict"] == ("must" if row["value"] >= row["must"] else "missed") for row in judged.values())
        shares = [row for row in own if row["metric"] == "share of the steps, %"]
        assert {row["competitor"] for row in shares} == {attacking.OURS, next(iter(rates))}
        assert all(0 < row["value"] < 50 for row in shares)
        same = [
            row
            for row in own
            if row["metric"].startswith("distance from") and row["competitor"] == attacking.NOT_FOLDED
        ]
        assert same[0]["value"] <= 100 * attacking.DISTANCE
    for row in rows:
        assert row["p20"] <= row["value"] <= row["p80"]
        assert row["n"] == (2 if row["metric"] in ("attacked images/s", "speed-up", "share of the steps, %") else 1)
        assert {"commit", "versions", "processor", "date", "config", "threads"} <= set(row)
        assert (row["model"], row["batch_size"], row["side"]) == ("cifar_resnet20", 2, 32)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 + sum(row["metric"] == "speed-up" for row in rows) + 4  # and the loops' own lines
    with Image.open(config.figure) as figure:
        assert figure.size[0] > 500


@pytest.mark.timeout(120)
def test_bf16_and_a_compiled_model_make_the_same_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are measured where they are asked for; the check lets them pass. (Inductor would take minutes here.)"""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = attacking.Case("cifar_resnet20", "l2", 32, 2)
    model, images, labels = attacking.build(case, CPU)
    config = attacking.Config(**{**SMALL, "steps": 1}, bf16="yes", compile="yes")
    ways = attacking.competitors(case, model, images, labels, config)
    assert list(ways)[-2:] == [attacking.BF16, attacking.COMPILED]
    figures = attacking.check(case, model, images, labels, ways)
    gained = {figure.competitor: figure.value.median for figure in figures if figure.metric == "loss gained"}
    assert set(gained) == set(ways)
    assert all(0.9 * gained["torchattacks"] < value < 1.1 * gained["torchattacks"] for value in gained.values())


@pytest.mark.parametrize("name", [attacking.OURS, attacking.NOT_FOLDED])
def test_another_attack_is_not_timed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours in balls a fifth larger."""

    def competitors(case: Any, model: Any, images: Tensor, labels: Tensor, config: Any) -> Any:
        settings = attacking.settings(case, config.steps)
        settings["eps"], settings["step_size"] = 1.2 * settings["eps"], 1.2 * settings["step_size"]
        found = original(case, model, images, labels, config)
        generator = torch.Generator()
        found[name] = lambda: pgd(model, images, labels, **settings, generator=generator.manual_seed(0))
        return found

    original = attacking.competitors
    monkeypatch.setattr(attacking, "competitors", competitors)
    rows = tmp_path / "rows.jsonl"
    config = attacking.Config(**{**SMALL, "attacks": ("l2",)}, bf16="no", rows=str(rows))
    with pytest.raises(DataError, match=rf"cifar_resnet20, l2: {name} is not the attack of torchattacks: .* not timed"):
        attacking.main(config)
    assert not rows.exists()


def test_verdicts() -> None:
    case = attacking.Case("m", "l2", 32, 2)
    spread = attacking.spread
    for value, verdict in ((1.9, "missed"), (2.1, "must"), (2.5, "stretch")):
        row = attacking.Figure(case, "speed-up", spread([value]), "ours", "torchattacks", 2.1, 2.5).row()
        assert row["verdict"] == verdict
    assert attacking.Figure(case, "x", spread([2.2]), "ours", "", 2.0).row()["verdict"] == "must"
    assert "verdict" not in attacking.Figure(case, "x", spread([2.2]), "ours").row()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ("resnet51",)}, "--models: no model resnet51; known are cifar_resnet20, "),
        ({"attacks": ("l2", "l1")}, "--attacks: no attack l1; known are linf, l2, smoothadv"),
        ({"figure": "attack.txt"}, r"must end in \.png"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"rows": "/proc/rows.jsonl"}, "cannot write /proc/rows.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DataError, match=said) as error:
        attacking.main(attacking.Config(**{**SMALL, "rows": str(tmp_path / "rows.jsonl"), **change}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "rows.jsonl").exists()
