"""Faults that concern several parts at once: what one process meets ends all, and what no part lets through."""

import io
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.order import count_streams, global_order
from data.stream import open_pass, open_stream
from data.tar import Shard, ShardSet
from data.transforms import EvalTransform, TrainTransform, unit_interval
from eval.scoring import Model, Pair
from models import ModelError
from models.encoders import load_encoder
from models.heads import Head
from tests.ranks import Script
from tests.test_distill import flags

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet"]
LAUNCHER += ["--config_file", "train/launch/cpu_2_processes.yaml"]


def write_shard(folder: Path, count: int, bad: Collection[int] = ()) -> str:
    """One shard of 8x8 images in five classes, those numbered in `bad` being none."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "000000.tar", "w") as archive:
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            image = b"no image" if number in bad else buffer.getvalue()
            for suffix, content in (("png", image), ("cls", str(number % 5).encode())):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "sizes.json").write_text(json.dumps({"000000.tar": count}))
    return str(folder)


# ----------------------------------------------------------------------------------------------------------------------
# One process of several
# ----------------------------------------------------------------------------------------------------------------------


def test_a_rank_whose_samples_are_all_bad_ends_all_ranks_within_seconds(tiny_vit: str, tmp_path: Path) -> None:
    """From step 3 on, with a worker. Rank 0, whose images are good, must neither wait for rank 1 nor train on alone."""
    shards = ShardSet((Shard("", 128, 0),), 128, None, None, "")
    streams = count_streams(16, 2, 64)
    later = list(global_order(shards, global_batch=16, streams=streams, seed=0, epoch=0, start_step=3))
    of_rank_1 = {int(number) for batch in later for number in batch[8:]}
    settings = {"data": write_shard(tmp_path / "shards", 128, of_rank_1), "teacher": tiny_vit, "batch_size": 16}
    settings |= {"steps": 1000, "workers": 1, "log_every": 1, "max_bad_fraction": 1.0, "out": str(tmp_path / "run")}
    with Script("train/distill.py", settings, tmp_path / "said", world=2) as run:
        run.wait_for("error: ")
        assert run.wait(20) == [1, 1], "gloo's time-outs, and the project's, are minutes and hours"
    said = run.said()
    assert said.count("error: ") == 1, said
    assert "[rank 1] error: rank 1: all samples of step 3, epoch 0 are bad (8 undecodable image); first: " in said
    assert "Traceback" not in said
    assert "step 3/1000" in said
    assert "step 4/" not in said


def test_a_part_of_bad_images_ends_the_extraction_on_all_ranks(tiny_vit: str, tmp_path: Path) -> None:
    """2100 images are three parts: rank 1's first is good for nothing while rank 0's are good."""
    data = write_shard(tmp_path / "shards", 2100, range(700, 1400))
    settings = {"data": data, "encoder": tiny_vit, "cache": str(tmp_path / "cache"), "out": str(tmp_path / "run")}
    settings |= {"workers": "1", "lr": "[0.1]", "weight_decay": "[0.0]"}
    with Script("train/probe.py", settings, tmp_path / "said", world=2) as run:
        run.wait_for("3 of 3 parts to compute")
        assert run.wait(60) == [1, 1]
    said = run.said()
    assert said.count("error: ") == 1, said
    assert "[rank 1] error: rank 1: " in said
    assert "bad records exceed max_bad_fraction (7.0 records)" in said
    assert not (tmp_path / "run" / "results.jsonl").exists()


@pytest.mark.launch
def test_a_killed_rank_ends_the_run(tiny_vit: str, tmp_path: Path) -> None:
    """As the system kills a process that takes too much memory: it has no last word, and the other, which may be at a
    vote or in the middle of a step, has one for it. tests/test_elastic.py has it the other way round, too.
    """
    import psutil

    settings = {"data": write_shard(tmp_path / "shards", 128), "teacher": tiny_vit, "batch_size": 16}
    settings |= {"steps": 100_000, "workers": 0, "log_every": 1, "out": str(tmp_path / "run")}
    command = [*LAUNCHER, "train/distill.py", *flags(settings)]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert launcher.stderr is not None
    for line in launcher.stderr:
        if line.startswith("step 5/"):
            break
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(launcher.pid).children(recursive=True)}
    assert sorted(ranks) == [0, 1]
    ranks[1].kill()
    start = time.monotonic()
    said = launcher.stderr.read()
    assert launcher.wait(timeout=60) != 0
    assert time.monotonic() - start < 40
    # The vote notices first, and the heartbeat where a rank takes long to come out of what it is at.
    noticed = r"\[rank 0\] error: (another process ended without a word|rank 1 on \S+ ended)"
    assert re.search(noticed, said), said
    assert said.count("Traceback") == 1, "only the launcher's own, which it prints whenever a rank fails"
    assert "ChildFailedError" in said
    assert not any(rank.is_running() for rank in ranks.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_more_ranks_and_workers_than_shards(workers: int, tmp_path: Path) -> None:
    """One shard for four ranks: all have batches at every step, and together they have each sample once."""
    data, seen = write_shard(tmp_path / "shards", 50), []
    for rank in range(4):
        with open_stream(
            data, global_batch=8, rank=rank, world=4, workers=workers, transform=TrainTransform(8)
        ) as stream:
            batches = list(stream)
        assert [len(batch["label"]) for batch in batches] == [2] * (50 // 8)
        seen += [number for batch in batches for number in batch["index"].tolist()]
    assert len(seen) == len(set(seen)) == 48


# ----------------------------------------------------------------------------------------------------------------------
# Pixels that are none
# ----------------------------------------------------------------------------------------------------------------------


def test_the_data_path_gives_no_pixel_outside_0_to_1(tmp_path: Path) -> None:
    """Bicubic interpolation overshoots at the edges between black and white; what reaches an encoder does not."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[::2, ::3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    with tarfile.open(tmp_path / "000000.tar", "w") as archive:
        for name, content in (("a.png", buffer.getvalue()), ("a.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "sizes.json").write_text('{"000000.tar": 1}')
    for decoder in ("torchvision", "pil"):
        for transform in (EvalTransform(37, decoder=decoder), TrainTransform(37, decoder=decoder)):
            with open_pass(str(tmp_path), batch_size=1, transform=transform) as batches:
                (batch,) = batches
            assert batch["image"].dtype == torch.uint8
            images = unit_interval(batch["image"])
            assert (images.min().item(), images.max().item()) == (0.0, 1.0)
            with pytest.raises(TypeError, match="takes uint8"):  # a second time, or what is no image of the data
                unit_interval(images)


@pytest.mark.parametrize("name", ["tiny_vit", "cifar_resnet20", "lenet"])
def test_one_pixel_that_is_nan_is_never_an_answer(name: str, request: pytest.FixtureRequest) -> None:
    """It reaches every feature of its image, no other image, and evaluation refuses what comes of it.

    Compared with NaN, no class is better than the label's: counted without a look it would be a right answer.
    """
    encoder = load_encoder(request.getfixturevalue(name) if name == "tiny_vit" else name, weights=name == "tiny_vit")
    encoder.eval()
    images = torch.rand(3, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    images[1, 2, 9, 11] = torch.nan
    with torch.no_grad():
        features = encoder(images)
    assert torch.isnan(features[1]).all()
    assert torch.isfinite(features[[0, 2]]).all()
    head = Head(torch.ones(4, encoder.feature_dim), torch.zeros(4), tuple("abcd"), True, {})
    model = Model(Pair("mine", name, "head"), encoder, head, "", "")
    with pytest.raises(ModelError, match="^mine: logits that are not finite") as caught:
        model.logits(features)
    assert "\n" not in str(caught.value)
    assert model.logits(features[[0, 2]]).shape == (2, 4)
