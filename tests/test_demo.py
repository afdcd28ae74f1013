"""The built-in data set: how it is built and what is in it; its teacher."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from data import DataError, demo, demo_images
from data.stream import open_stream
from data.tar import ShardReader, find_shards
from data.transforms import EvalTransform
from train import demo_teacher

SHIFTS = [split for split in demo.DEMO_SPLITS if split not in ("train", "val")]


def build(cache: Path, said: Path) -> None:
    """What `python data/demo.py` does, with its output in a file."""
    os.environ["SHIFTLENS_CACHE"] = str(cache)
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        sys.exit(demo.main([]))


@contextlib.contextmanager
def few_digits(every: int) -> Iterator[None]:
    """Only every so many digits are there to be drawn."""
    parts = demo_images.load_digits(seed=demo.VERSION)
    few = {name: part.take(np.arange(0, len(part.labels), every)) for name, part in parts.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_images, "load_digits", lambda seed: few)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sets, of a fifth of the digits, built by two processes at once."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / f"demo-v{demo.VERSION}"
    fork = multiprocessing.get_context("fork")  # with all that takes long to import
    said = [cache.with_name(f"said_{number}") for number in range(2)]
    both = [fork.Process(target=build, args=(cache, file)) for file in said]
    with few_digits(5):
        for process in both:
            process.start()
    try:
        for process, file in zip(both, said, strict=True):
            process.join(240)
            assert process.exitcode == 0
            assert file.read_text().startswith(f"{folder}\ntrain      1,200 images, classes zero, one, two")
    finally:
        for process in both:
            process.kill()
            process.join()
    assert [entry.name for entry in cache.iterdir()] == [folder.name], "something was left behind"
    return folder


@pytest.fixture(scope="module")
def drawn_here() -> dict[str, demo.Drawn]:
    """What those two processes draw."""
    with few_digits(5):
        return demo.draw_demo()


@pytest.fixture(scope="module")
def drawn() -> dict[str, demo.Drawn]:
    return demo.draw_demo()


@pytest.mark.parametrize("split", list(demo.DEMO_SPLITS))
def test_shards_hold_what_is_drawn(split: str, built: Path, drawn_here: dict[str, demo.Drawn]) -> None:
    """Pixels, labels and counts, read back one by one; another process draws the same pixels."""
    pictures, layout = drawn_here[split], demo.DEMO_SPLITS[split]
    assert sorted(os.listdir(built / split))[-2:] == ["_info.json", "sizes.json"]
    shards = find_shards(str(built / split))
    assert shards.classes == layout.folders
    records = [record for shard in shards.shards for record in ShardReader(shard.url).read()]
    number_of = {record.key: int(record.key[-5:]) for record in records}
    assert sorted(number_of.values()) == np.flatnonzero(pictures.labels != demo.NO_CLASS).tolist()
    for record in records:
        number = number_of[record.key]
        assert record.image is not None
        assert record.label is not None
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(record.image))), pictures.images[number])
        assert pictures.labels[number] in layout.accepts[int(record.label)]
    # Neighbours in a shard are of all classes.
    assert len({record.label for record in records[:60]}) == len(layout.folders)


def test_no_digit_in_two_parts(drawn: dict[str, demo.Drawn]) -> None:
    truth = sklearn_digits().target
    used = {}
    for split, pictures in drawn.items():
        known = pictures.labels != demo.NO_CLASS
        assert (truth[pictures.numbers[known]] == pictures.labels[known]).all()
        assert (pictures.numbers[~known] == demo.NO_CLASS).all()
        used[split] = set(pictures.numbers[known].tolist())
    held_out = set.union(*(used[split] for split in SHIFTS))
    assert not used["train"] & used["val"]
    assert not (used["train"] | used["val"]) & held_out
    assert len(used["train"] | used["val"] | held_out) == len(truth)


def test_sets_mirror_the_protocols(drawn: dict[str, demo.Drawn]) -> None:
    for split, layout in demo.DEMO_SPLITS.items():
        assert sorted(set(drawn[split].labels.tolist()) - {demo.NO_CLASS}) == layout.classes
        assert len(layout.folders) == len(layout.accepts) == len(set(layout.folders))
    assert demo.DEMO_SPLITS["v2"].folders == tuple(map(str, range(10)))
    assert len(demo.DEMO_SPLITS["r"].classes) == len(demo.DEMO_SPLITS["a"].classes) == 6
    objectnet = demo.DEMO_SPLITS["objectnet"]
    assert list(objectnet.folders) == sorted(objectnet.folders)
    assert objectnet.accepts[objectnet.folders.index("six_or_nine")] == (6, 9)
    assert (drawn["objectnet"].labels == demo.NO_CLASS).sum() == 120
    framed = drawn["objectnet"].images
    assert framed.shape[1:] == (36, 36, 3)
    inner = np.s_[:, 2:-2, 2:-2]
    assert (framed.astype(int).sum(axis=(1, 2, 3)) - framed[inner].astype(int).sum(axis=(1, 2, 3)) == 255 * 272).all()
    assert (demo.nearest_neighbour(drawn["train"], drawn["a"].images) != drawn["a"].labels).all()
    # The filter is worth its name only if the classifier is good on plain pictures.
    assert (demo.nearest_neighbour(drawn["train"], drawn["val"].images) == drawn["val"].labels).mean() > 0.85


def test_the_surroundings_say_nothing_about_the_class(drawn: dict[str, demo.Drawn]) -> None:
    def corners(images: np.ndarray) -> np.ndarray:
        return images[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(len(images), -1).astype(float)

    train, val = drawn["train"], drawn["val"]
    distance = ((corners(val.images)[:, None] - corners(train.images)[None]) ** 2).sum(axis=-1)
    hits = (train.labels[distance.argmin(axis=1)] == val.labels).mean()
    assert abs(hits - 0.1) < 4 * (0.09 / len(val.labels)) ** 0.5  # chance, within four standard errors


@pytest.mark.parametrize("style", list(demo_images.STYLES))
def test_styles_are_functions_of_glyphs_and_generator(style: str) -> None:
    digits = demo_images.load_digits()["val"].take(np.arange(8))
    one, other = (demo.draw(digits, (style,), np.random.default_rng(3)).images for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert one.shape == (8, 32, 32, 3)
    assert one.dtype == np.uint8
    without = demo_images.STYLES[style](np.zeros_like(digits.glyphs), np.random.default_rng(3))
    assert without.dtype == np.float32
    assert 0 <= without.min() <= without.max() <= 1
    contrast = np.abs(one.astype(int) - demo_images.to_uint8(without).astype(int)).max(axis=(1, 2, 3))
    assert (contrast > 40).all(), "a digit cannot be seen"


def test_upside_down_turns_by_half_a_circle() -> None:
    glyphs = demo_images.load_digits()["val"].glyphs[:4]
    still: dict[str, Any] = {"angle": 0.0, "scale": (1.0, 1.0), "shift": 0.0}
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(demo_images.place(glyphs, rng, **still), glyphs, atol=1e-6)
    turned = demo_images.place(glyphs, rng, upside_down=np.array([True, True, False, False]), **still)
    np.testing.assert_allclose(turned[:2], glyphs[:2, ::-1, ::-1], atol=1e-4)
    np.testing.assert_allclose(turned[2:], glyphs[2:], atol=1e-6)


def test_streams_through_the_real_path(built: Path) -> None:
    transform = EvalTransform(32, border=demo.DEMO_SPLITS["objectnet"].border)
    with open_stream(str(built / "objectnet"), global_batch=64, transform=transform) as stream:
        batch = next(stream)
    assert batch["image"].shape == (64, 3, 32, 32)
    red = (batch["image"][:, 0] == 255) & (batch["image"][:, 1:] == 0).all(dim=1)
    assert red[:, 0].float().mean() < 0.01, "the frame was not cut off"


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(DataError, match=r"no set 'vall': choose one of train, val, v2, r, objectnet, sketch, a$"):
        demo.demo_shards("vall")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHIFTLENS_CACHE", str(tmp_path / "file"))
    assert demo.main([]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: cannot build the demo in {tmp_path / 'file'}: File exists; set SHIFTLENS_CACHE to another folder"
    ]
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--figur", "x.png"])
    assert capsys.readouterr().err.count("\n") == 1


def test_contact_sheet(tmp_path: Path, drawn: dict[str, demo.Drawn]) -> None:
    demo.contact_sheet(drawn, str(tmp_path / "sheet.png"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = sheet.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 10_000  # pictures, not empty axes
    with pytest.raises(DataError, match="cannot write the figure"):
        demo.contact_sheet(drawn, str(tmp_path / "sheet.nonsense"))


def test_captions_become_tokens() -> None:
    templates = [template for templates in demo.STYLE_TEMPLATES.values() for template in templates]
    assert list(demo.STYLE_TEMPLATES) == list(demo_images.STYLES)
    captions = [template.format(name) for template in templates for name in demo.CLASSES]
    assert len(set(captions)) == 160
    tokens = demo.caption_tokens(captions)
    for caption, row in zip(captions, tokens, strict=True):
        end = int(row.argmax())
        assert row[end] == 127
        assert bytes(row[:end].tolist()).decode() == caption
        assert not row[end + 1 :].any()
    with pytest.raises(ValueError, match="does not fit"):
        demo.caption_tokens(["x" * 32])


# ---------------------------------------------------------------------------------------------------------- teacher


def test_shipped_teacher(drawn: dict[str, demo.Drawn]) -> None:
    """It is small, says of itself what is true, and holds up under every shift."""
    folder = Path(demo.DEMO_TEACHER.removeprefix("local-dir:"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2e6
    accuracy_of = demo_teacher.measure(demo.DEMO_TEACHER, drawn)
    assert accuracy_of["val"] >= 0.95
    assert min(accuracy_of.values()) >= 0.85
    card = (folder / "README.md").read_text()
    for split, accuracy in accuracy_of.items():
        stated = float(card.split(f"| {split} | ")[1].split(" |")[0])
        # Float32 sums differ between processors: allow three pictures of a thousand.
        assert stated == pytest.approx(100 * accuracy, abs=0.3)


def test_teacher_loads_as_encoder_and_in_open_clip(drawn: dict[str, demo.Drawn]) -> None:
    import open_clip
    import torch

    from data.transforms import unit_interval
    from models.encoders import load_encoder

    encoder = load_encoder(demo.DEMO_TEACHER).eval()
    assert (encoder.feature_dim, encoder.image_size, encoder.num_blocks) == (64, 32, 4)
    pictures = torch.from_numpy(drawn["val"].images[:16]).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = open_clip.create_model(demo.DEMO_TEACHER).eval().encode_image(demo_teacher.prepare(pictures))
        torch.testing.assert_close(encoder(unit_interval(pictures)), theirs, rtol=1e-5, atol=1e-5)


def test_teacher_script_trains_writes_and_measures(tmp_path: Path) -> None:
    """The whole script on a tenth of the digits: it learns, and what it wrote scores what it reports."""
    import torch
    from safetensors.torch import load_file

    config = demo_teacher.Config(out=str(tmp_path / "teacher"), epochs=1, batch_size=64)
    with few_digits(10):
        accuracy_of = demo_teacher.main(config)
        assert list(accuracy_of) == list(demo.DEMO_SPLITS)
        assert demo_teacher.measure(f"local-dir:{config.out}", demo.draw_demo()) == accuracy_of
    state = load_file(tmp_path / "teacher" / "open_clip_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    settings = json.loads((tmp_path / "teacher" / "open_clip_config.json").read_text())
    assert settings["model_cfg"]["embed_dim"] == 64


def test_teacher_calls_an_upside_down_six_a_nine() -> None:
    """Angles are small enough here that a digit's own caption is right unless it stands on its head."""
    digits = demo_images.load_digits()["train"].take(np.arange(0, 1198, 3))
    images, labels, styles = demo_teacher.draw_epoch(digits, np.random.default_rng(0))
    assert len(images) == len(labels) == len(styles) == len(digits.labels) * sum(demo_teacher.RENDERINGS.values())
    own = np.concatenate([np.tile(digits.labels, times) for times in demo_teacher.RENDERINGS.values()])
    changed = labels.numpy() != own
    turned = list(demo_teacher.RENDERINGS).index("turned")
    assert set(styles[changed].tolist()) == {turned}
    assert set(own[changed]) == {6, 9}
    assert (labels.numpy()[changed] + own[changed] == 15).all()
    share = changed.sum() / np.isin(own[styles.numpy() == turned], (6, 9)).sum()
    assert 0.15 < share < 0.35
