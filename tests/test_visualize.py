"""eval/visualize.py: the original's images, batches against single searches, known answers about colours, faults."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.demo import DEMO_TEACHER
from eval.activation import (
    OUTPUT,
    Layer,
    Objective,
    Published,
    Robust,
    Search,
    choose_layer,
    draw_starts,
    find_layers,
    objective_of,
)
from eval.colours import chroma, chroma_of, compare, draw_sheet, lab, own_shift
from eval.visualize import Config, load, main, read_channels, visualize
from models import ModelError
from models.classifiers import Classifier, load_classifier, save_classifier
from models.weights import read_weights
from tests.ranks import run_two
from train.common import RECIPES, ConfigError, StopRequested, parse_config
from train.launching import StopSignals

CPU = torch.device("cpu")
BRICK = (150, 50, 50)  # the padding of Feature Contamination


@pytest.fixture(scope="module")
def resnet20(goldens: Path) -> Classifier:
    return load_classifier(f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}")


def layer_of(model: Classifier, name: str = "") -> Layer:
    return choose_layer(find_layers(model, (model.channels, model.image_size, model.image_size)), name)


def run(
    model: nn.Module, layer: Layer, search: Search, starts: Tensor, channels: list[int], fold: bool | None = None
) -> Any:
    with objective_of(model, layer, CPU, fold=search.fold if fold is None else fold) as objective:
        return search(objective, starts, torch.tensor(channels), 0, lambda: None)


# ----------------------------------------------------------------------------------------------------------------------
# Searches
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_the_published_search_repeats_the_original(
    resnet20: Classifier, goldens: Path, dtype: torch.dtype, tolerance: float
) -> None:
    golden = np.load(goldens / "featurevis.npz")
    size, rounds, steps, blur = golden["params"].tolist()
    search = Published(steps=steps, rounds=rounds, lr=float(golden["lr"]), blur=blur)
    model = load_classifier("cifar_resnet20", weights=False)
    model.load_state_dict(resnet20.state_dict())
    starts = torch.from_numpy(golden["init_f64"]).permute(0, 3, 1, 2)
    found = run(model.to(dtype), layer_of(model), search, starts, golden["filters"].tolist())
    assert found.images.shape == (2, 3, size, size)
    assert np.abs(found.images.permute(0, 2, 3, 1).numpy() - golden["output"]).max() < tolerance
    activation = np.stack([found.before.numpy(), found.after.numpy()], 1)
    np.testing.assert_allclose(activation, golden["activation"][:, :2], rtol=1e-3)


def test_the_published_schedule() -> None:
    search = Published()
    assert [search.steps_of(number) for number in range(10)] == [200] * 6 + [260] * 4
    assert (search.total, search.lr, search.blur, search.pull) == (2240, 0.05, 5, 0.01)
    start = search.start((3, 32, 32), torch.Generator().manual_seed(0))
    assert 128 / 255 <= start.min() < 0.51 < 0.57 < start.max() < 148 / 255


@pytest.mark.parametrize("search", [Published(steps=3, rounds=2), Robust(steps=4)])
def test_a_batch_makes_the_images_of_single_searches(resnet20: Classifier, search: Search) -> None:
    """In float64, where roundings of different batch sizes are not magnified to anything."""
    model = load_classifier("cifar_resnet20", weights=False)
    model.load_state_dict(resnet20.state_dict())
    model.double()
    layer = layer_of(model, "layer1.1.conv2")
    items = [(0, 3), (0, 11), (1, 3)]
    starts = draw_starts(search, (3, 32, 32), items, seed=5)
    together = run(model, layer, search, starts, [channel for _, channel in items])
    for place, item in enumerate(items):
        alone = run(model, layer, search, draw_starts(search, (3, 32, 32), [item], seed=5), [item[1]])
        assert (alone.images[0] - together.images[place]).abs().max() < 1e-9
        assert abs(alone.after[0] - together.after[place]) < 1e-9
    assert (together.after > together.before).all()


def test_robust_images_are_pixels_that_excite_their_channel_wherever_they_are_shifted(resnet20: Classifier) -> None:
    layer, search, channels = layer_of(resnet20), Robust(steps=24), [2, 12]
    starts = draw_starts(search, (3, 32, 32), [(0, channel) for channel in channels], seed=0)
    found = run(resnet20, layer, search, starts, channels)
    assert found.images.shape == (2, 3, 32, 32)
    assert 0 <= found.images.min() < 0.45 < 0.55 < found.images.max() <= 1
    with objective_of(resnet20, layer, CPU, fold=False) as objective, torch.no_grad():
        for shift in (-2, 1):
            moved = objective(found.images.roll((shift, -shift), (2, 3)), torch.tensor(channels))
            assert (moved > found.before + 0.5 * (found.after - found.before)).all()


def test_a_folded_model_is_searched_for_the_same_objective(resnet20: Classifier) -> None:
    """The layer comes before its batch norm, which folding would have put into it."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    channels = torch.tensor([0, 1])
    for name in (
        "conv1",
        "bn1",
        "layer2.1.conv2",
        "layer2.1",
        "layer3.2.conv2",
        "layer3.2.bn2",
        "layer3",
        "fc",
        OUTPUT,
    ):
        layer = layer_of(resnet20, name)
        with objective_of(resnet20, layer, CPU, fold=True) as folded, torch.no_grad():
            value = folded(images, channels)
        kept: list[Tensor] = []
        hook = layer.module.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        with torch.no_grad():
            resnet20(images)
        hook.remove()
        expected = torch.stack([kept[0][place, place].mean() for place in (0, 1)])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_only_the_part_up_to_the_layer_runs_and_the_model_stays_as_it_was(resnet20: Classifier) -> None:
    model = load_classifier("cifar_resnet20", weights=False).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = layer_of(model, "layer1.1.conv1")
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
        for name, module in model.net.named_modules()
    ]
    found = run(model, layer, Robust(steps=2), draw_starts(Robust(), (3, 32, 32), [(0, 0)], 0), [0], fold=False)
    for hook in hooks:
        hook.remove()
    assert found.images.isfinite().all()
    assert "layer1.0" in ran
    assert not any(name.startswith(("layer1.1", "layer2", "layer3", "fc")) for name in ran)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_starts_depend_on_seed_start_and_channel_alone() -> None:
    items = [(0, 0), (0, 1), (1, 0)]
    starts = draw_starts(Robust(), (1, 28, 28), items, seed=3)
    assert starts.shape == (3, 1, 30, 30)
    assert torch.equal(starts[[2]], draw_starts(Robust(), (1, 28, 28), [(1, 0)], seed=3))
    assert len({float(start.sum()) for start in starts}) == 3
    assert not torch.equal(starts, draw_starts(Robust(), (1, 28, 28), items, seed=4))


# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "last", "shape"),
    [
        ("cifar_resnet32", "layer3.4.conv2", (64, 8, 8)),
        ("lenet", "conv2", (16, 10, 10)),
        ("torchvision:resnet50", "layer4.2.conv3", (2048, 7, 7)),
    ],
)
def test_the_last_convolution_is_the_default(name: str, last: str, shape: tuple[int, ...]) -> None:
    model = load_classifier(name, weights=False)
    layers = find_layers(model, (model.channels, model.image_size, model.image_size))
    layer = choose_layer(layers, "")
    assert (layer.name, layer.shape, layer.channels) == (last, shape, shape[0])
    assert layers[OUTPUT].shape == (model.num_classes,)
    if name == "torchvision:resnet50":
        assert "layer4.2.relu" not in layers  # it runs three times
        with pytest.raises(ModelError, match=r"no layer layer4.2.relu .*did you mean layer4"):
            choose_layer(layers, "layer4.2.relu")


def test_an_unknown_layer_is_answered_with_those_there_are_close_ones_first(resnet20: Classifier) -> None:
    with pytest.raises(ModelError) as caught:
        layer_of(resnet20, "layer3.2.conv3")
    text = str(caught.value)
    assert "\n" not in text
    assert text.index("did you mean layer3.2.conv2") < text.index("Others: conv1, bn1, ")
    for name in ("layer1.0.conv1", "layer2.0.downsample.0", "fc", OUTPUT):
        assert name in text
    with pytest.raises(ModelError, match="there are conv1, "):
        layer_of(load_classifier("lenet", weights=False), "???")


def test_tokens_and_units_are_objectives_too() -> None:
    class Tokens(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(2).mT  # [N, T, C]

    tokens = Tokens()
    images = torch.rand(2, 3, 4, 4)
    layer = find_layers(tokens, (3, 4, 4))[OUTPUT]
    assert (layer.shape, layer.channels) == ((16, 3), 3)
    with objective_of(tokens, layer, CPU, fold=True) as objective:
        torch.testing.assert_close(objective(images, torch.tensor([2, 0])), images.mean((2, 3))[[0, 1], [2, 0]])


# ----------------------------------------------------------------------------------------------------------------------
# Colours
# ----------------------------------------------------------------------------------------------------------------------


def test_cielab_of_known_colours() -> None:
    """Values of the sRGB primaries and of greys that colour tables give, for D65."""
    table = {
        (255, 255, 255): (100.0, 0.0, 0.0),
        (0, 0, 0): (0.0, 0.0, 0.0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (119, 119, 119): (50.03, 0.0, 0.0),
    }
    np.testing.assert_allclose(lab(np.array(list(table)) / 255), np.array(list(table.values())), atol=0.02)
    a, b = chroma_of(BRICK)
    assert 20 < math.degrees(math.atan2(b, a)) < 40
    with pytest.raises(ValueError, match="grey"):
        chroma_of((120, 121, 120))


def coloured(values: list[tuple[float, ...]], starts: int = 2, size: int = 16) -> np.ndarray:
    """Images [starts, channels, 3, size, size] of one colour each."""
    images = np.array(values)[None, :, :, None, None]
    return np.broadcast_to(images, (starts, len(values), 3, size, size))


def test_numbers_of_known_colours() -> None:
    brick = np.array(BRICK) / 255
    length = float(np.hypot(*chroma_of(BRICK)))
    reds = chroma(coloured([tuple(brick)] * 6))
    greys = chroma(coloured([(v, v, v) for v in (0.1, 0.3, 0.5, 0.9)]))
    found = {number.metric: number for number in compare(reds, greys, BRICK, seed=0)}
    for region in ("whole", "border", "centre"):
        number = found[f"colour_shift_{region}"]
        assert number.value == pytest.approx(length, abs=1e-2)
        assert number.low <= number.value <= number.high
        assert number.by_start == pytest.approx((length, length), abs=1e-2)
    assert found["border_minus_centre"].value == pytest.approx(0, abs=1e-9)
    assert found["nearer_in_hue"].value == 1
    swapped = {number.metric: number for number in compare(greys, reds, BRICK, seed=0)}
    assert swapped["colour_shift_whole"].value == pytest.approx(-length, abs=1e-2)
    assert swapped["nearer_in_hue"].value == 0
    same = {number.metric: number for number in compare(reds, reds, BRICK, seed=0)}
    assert (same["colour_shift_whole"].value, same["nearer_in_hue"].value) == (0, 0.5)
    assert own_shift(reds, BRICK, seed=0).value == pytest.approx(length, abs=1e-2)
    # Being dark is no step toward brick red, nor is its complement.
    assert abs(own_shift(chroma(coloured([(0.05, 0.05, 0.05)])), BRICK, 0).value) < 0.1
    assert own_shift(chroma(coloured([(0.2, 0.6, 0.6)])), BRICK, 0).value < -10


def test_a_coloured_frame_is_seen_at_the_border_only() -> None:
    framed = coloured([(0.5, 0.5, 0.5)] * 3, size=32).copy()
    for edge in (np.s_[:4, :], np.s_[-4:, :], np.s_[:, :4], np.s_[:, -4:]):
        framed[(..., *edge)] = np.broadcast_to(np.array(BRICK)[:, None, None] / 255, framed[(..., *edge)].shape)
    found = {n.metric: n.value for n in compare(chroma(framed), chroma(coloured([(0.5,) * 3])), BRICK, seed=0)}
    length = float(np.hypot(*chroma_of(BRICK)))
    assert found["colour_shift_border"] == pytest.approx(length, abs=1e-2)
    assert found["colour_shift_centre"] == pytest.approx(0, abs=1e-2)
    assert found["border_minus_centre"] == pytest.approx(length, abs=2e-2)
    assert found["colour_shift_whole"] == pytest.approx(length * (1 - 24**2 / 32**2), abs=1e-2)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Two networks of 40 channels each whose shifts differ by 3 on average: 95 % of intervals should hold 3."""
    generator = np.random.default_rng(0)
    toward = chroma_of(BRICK) / np.hypot(*chroma_of(BRICK))
    held = 0
    for trial in range(60):
        a, b = generator.normal(3, 8, (1, 40)), generator.normal(0, 8, (1, 40))
        first, second = (np.repeat(of[..., None, None], 3, 2) * toward for of in (a, b))
        number = compare(first, second, BRICK, seed=trial)[0]
        held += number.low <= 3 <= number.high
    assert 52 <= held <= 60


class OneLayer(nn.Module):
    """Channels that prefer given colours: a 3x3 convolution of images minus grey, and a classifier."""

    def __init__(self, colours: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, len(colours), 3, padding=1, bias=False)
        self.conv.weight.data = colours[:, :, None, None].expand(-1, -1, 3, 3) / 9

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images - 0.5).mean((2, 3))


@pytest.mark.parametrize("search", [Robust(steps=40), Published(steps=15, rounds=2)])
def test_a_network_that_prefers_red_is_found_to_do_so_in_rgb(search: Search) -> None:
    """A channel that prefers brick red is drawn in it: no channel order is swapped on the way to the number."""
    generator = torch.Generator().manual_seed(0)
    brick = torch.tensor([1.0, -0.6, -0.6]) + 0.1 * torch.randn(12, 3, generator=generator)
    others = torch.randn(10, 3, generator=generator)
    chromas = []
    for colours in (brick, others):
        model = OneLayer(colours)
        layer = choose_layer(find_layers(model, (3, 32, 32)), "")
        items = [(start, channel) for start in (0, 1) for channel in range(len(colours))]
        starts = draw_starts(search, (3, 32, 32), items, seed=0)
        images = run(model, layer, search, starts, [channel for _, channel in items]).images
        chromas.append(chroma(images.clamp(0, 1).unflatten(0, (2, -1)).numpy()))
    found = {number.metric: number for number in compare(chromas[0], chromas[1], BRICK, seed=0)}
    assert found["colour_shift_whole"].low > 10
    assert found["nearer_in_hue"].low > 0.6
    assert own_shift(chromas[0], BRICK, 0).value > 20
    assert own_shift(chromas[0], (50, 50, 150), 0).value < own_shift(chromas[0], BRICK, 0).value / 4


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    names = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"net_{seed}")
        save_classifier(folder, load_classifier("cifar_resnet20", weights=False), {})
        names.append(f"local-dir:{folder}")
    return names[0], names[1]


def small(two_nets: tuple[str, str], out: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {"model": two_nets[0], "compare": two_nets[1], "layer": "layer1.0", "channels": "0-2,7"}
    settings |= {"color": "150,50,50", "steps": 3, "starts": 2, "batch_size": 3, "name": "a", "compare_name": "b"}
    return Config(**{**settings, "out": str(out), **changes})


def test_a_run_writes_images_sheets_and_rows_and_two_processes_write_the_same(
    two_nets: tuple[str, str], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    result = main(small(two_nets, one))
    run_two(main, small(two_nets, two), tmp_path)
    for prefix in ("", "compare_"):
        stored = read_weights(one / f"{prefix}images.safetensors")
        assert stored.state["images"].shape == (2, 4, 3, 32, 32)
        assert stored.state["activations"].shape == (2, 4, 2)
        assert stored.state["channels"].tolist() == [0, 1, 2, 7]
        other = read_weights(two / f"{prefix}images.safetensors")
        assert all(torch.equal(tensor, other.state[name]) for name, tensor in stored.state.items())
        assert (one / f"{prefix}channels.png").read_bytes() == (two / f"{prefix}channels.png").read_bytes()
    rows = [json.loads(line) for line in (one / "results.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (two / "results.jsonl").read_text().splitlines()]
    assert [row["value"] for row in rows] == [row["value"] for row in others] == [r["value"] for r in result["rows"]]
    assert [(row["metric"], row["model"], row.get("compare_model")) for row in rows] == [
        ("activation", "a", None),
        ("shift", "a", None),
        ("activation", "b", None),
        ("shift", "b", None),
        ("colour_shift_whole", "a", "b"),
        ("colour_shift_border", "a", "b"),
        ("colour_shift_centre", "a", "b"),
        ("border_minus_centre", "a", "b"),
        ("nearer_in_hue", "a", "b"),
    ]
    for row in rows:
        assert row["commit"]
        assert row["layer"] == "layer1.0"
        assert row["model_sha256"]
        assert (row["n"], row["starts"], row["seed"], row["preset"]) == (4, 2, 0, "robust")
        if row["metric"] != "activation":
            assert row["interval"][0] <= row["value"] <= row["interval"][1]
            assert len(row["by_start"]) == 2
    assert rows[4]["value"] == pytest.approx(rows[1]["value"] - rows[3]["value"])
    assert Image.open(one / "colours.png").size[0] > 400


def test_the_batch_size_changes_roundings_only(two_nets: tuple[str, str], tmp_path: Path) -> None:
    images = [
        main(small(two_nets, tmp_path / str(size), compare="", color="", batch_size=size))["images"][0].images
        for size in (8, 5)
    ]
    assert (images[0] - images[1]).abs().max() < 1e-3


def test_grey_images_and_classes(tmp_path: Path) -> None:
    save_classifier(tmp_path / "net", load_classifier("lenet", weights=False), {})
    config = Config(
        model=f"local-dir:{tmp_path / 'net'}", layer=OUTPUT, channels="3,5", steps=2, out=str(tmp_path / "r")
    )
    images = main(config)["images"][0].images
    assert images.shape == (1, 2, 1, 28, 28)
    sheet = np.asarray(Image.open(tmp_path / "r" / "channels.png"))
    assert (sheet[..., 0] == sheet[..., 2]).all()
    for changes, text in (({"color": "150,50,50"}, "grey images"), ({"preset": "published"}, "three colours")):
        with pytest.raises(ConfigError, match=text):
            main(Config(**{**vars(config), **changes}))


def test_encoders_have_layers_too(tmp_path: Path) -> None:
    config = Config(model=DEMO_TEACHER, channels="0,1", steps=2, out=str(tmp_path / "run"))
    assert main(config)["images"][0].images.shape == (1, 2, 3, 32, 32)


def test_red_is_written_as_red(tmp_path: Path) -> None:
    images = np.zeros((3, 3, 32, 32))
    images[0, 0], images[1, 1], images[2, 2] = 1, 1, 1
    draw_sheet(tmp_path / "sheet.png", images, [4, 5, 60], "title", BRICK)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), BRICK} <= colours
    red = (pixels == [255, 0, 0]).all(-1)
    assert red.sum() == 96 * 96  # enlarged three times
    assert red.nonzero()[1].max() < (pixels == [0, 0, 255]).all(-1).nonzero()[1].min()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"color": ""}, ConfigError, "--compare compares colours: give --color"),
        ({"color": "150,50"}, ConfigError, "three values in 0..255"),
        ({"color": "red"}, ConfigError, "expected R,G,B"),
        ({"color": "90,90,90"}, ConfigError, "is grey"),
        ({"color": "300,0,0"}, ConfigError, "three values in 0..255"),
        ({"channels": "a-b"}, ConfigError, "expected all, or numbers and ranges"),
        ({"batch_size": 0}, ConfigError, "--batch_size must be at least 1"),
        ({"name": "b"}, ConfigError, "same name"),
        ({"channels": "3,16"}, ModelError, "layer layer1.0 has channels 0-15"),
        ({"channels": "9-7"}, ModelError, "--channels 9-7"),
        ({"layer": "layer9"}, ModelError, "no layer layer9 .*did you mean layer"),
        ({"model": "cifar_resnet20"}, ModelError, "cifar_resnet20"),
    ],
)
def test_what_cannot_work_is_one_line(
    two_nets: tuple[str, str], tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        main(small(two_nets, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_activations_that_are_not_finite_name_their_channel(tmp_path: Path) -> None:
    model = load_classifier("lenet", weights=False)
    model.net.get_parameter("conv2.weight").data[3] = 3e38
    save_classifier(tmp_path / "net", model, {})
    config = Config(model=f"local-dir:{tmp_path / 'net'}", steps=2, channels="2,3", out=str(tmp_path / "run"))
    with pytest.raises(ModelError, match="channel 3 are not finite"):
        main(config)


def test_channels_are_numbers_and_ranges(resnet20: Classifier) -> None:
    layer = layer_of(resnet20)
    assert read_channels("all", layer) == list(range(64))
    assert read_channels("7,0-3,2", layer) == [0, 1, 2, 3, 7]


def test_a_stop_signal_ends_all_within_ten_steps_and_nothing_is_written(
    two_nets: tuple[str, str], tmp_path: Path
) -> None:
    signals = StopSignals()
    signals.received = signal.SIGTERM
    with contextlib.ExitStack() as resources, pytest.raises(StopRequested) as stopped:
        visualize(small(two_nets, tmp_path, steps=11), signals, resources)
    assert stopped.value.code == 143
    assert not list(tmp_path.glob("*.png")) + list(tmp_path.glob("*.safetensors"))


def test_the_demo_recipe_and_flags() -> None:
    config = parse_config(Config, ["--steps", "5"], "test", "visualize_demo.yaml")
    assert (config.model, config.out, config.steps) == (Config().model, "runs/visualize", 5)
    assert (RECIPES / "visualize_demo.yaml").is_file()


def test_objectives_and_subjects_are_importable(two_nets: tuple[str, str]) -> None:
    subject = load(two_nets[0], "a", Config(channels="1"), CPU)
    assert (subject.layer.name, subject.channels, subject.size) == ("layer3.2.conv2", [1], (3, 32, 32))
    with objective_of(subject.model, subject.layer, CPU, fold=True) as objective:
        assert isinstance(objective, Objective)
        assert objective(torch.rand(2, 3, 32, 32), torch.tensor([0, 1])).shape == (2,)


@pytest.mark.parametrize("script", ["visualize", "certify"])
def test_a_bare_command_names_the_one_that_comes_first(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"eval.{script}")
    monkeypatch.chdir(tmp_path)
    config = parse_config(module.Config, [], "", f"{script}_demo.yaml")
    with pytest.raises(ModelError, match="no runs/demo_adversarial/export here yet: run `accelerate launch train"):
        module.main(config)
