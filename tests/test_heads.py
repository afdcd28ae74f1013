"""Linear heads: many at once against torch's training of each, L-BFGS against scikit-learn, which samples are taken."""

import dataclasses
import gzip
import itertools
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from data.features import Features, Identity
from models import ModelError
from models.encoders import Encoder, load_encoder
from models.featurisers import Featuriser
from train import probing
from train.common import cosine_lr, step_seed
from train.heads import Arithmetic, HeadBlock, Point, cut_into_blocks, few_shots, held_out, score, solve

CPU = Arithmetic(torch.device("cpu"))


def stored(rows: Tensor, labels: Tensor, classes: int) -> Features:
    """Features as a cache gives them, of any type, in memory."""
    names = tuple(f"class {c}" for c in range(classes))
    identity = Identity({}, "", "", len(rows), names, rows.shape[1], "fp32", "no")
    return Features(identity, [rows], labels, torch.arange(len(rows)))


def problem(n: int = 300, width: int = 16, classes: int = 7, seed: int = 0, noise: float = 1.0) -> Features:
    """Gaussian clouds around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=generator)
    return stored(centres[labels] + noise * torch.randn(n, width, generator=generator), labels, classes)


# ----------------------------------------------------------------------------------------------------------------------
# Many heads by AdamW
# ----------------------------------------------------------------------------------------------------------------------


def grid_of(**axes: Sequence[Any]) -> list[Point]:
    return [Point(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def trained_alone(point: Point, data: Features, schedule: probing.Schedule) -> tuple[Tensor, Tensor]:
    """One head the plain way: torch.nn.Linear, cross_entropy, clip_grad_norm_, AdamW, a loop over rows."""
    assert point.lr is not None
    assert point.weight_decay is not None
    classes = len(data.identity.classes)
    torch.manual_seed(schedule.seed)
    head = nn.Linear(data.width, classes, bias=point.bias)  # draws its weight first
    if point.bias:
        nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=point.lr, weight_decay=point.weight_decay)
    total = schedule.epochs * -(-data.rows // schedule.batch_size)
    step = 0
    for epoch in range(schedule.epochs):
        generator = torch.Generator().manual_seed(step_seed(schedule.seed, epoch, 0))
        for chosen in torch.randperm(data.rows, generator=generator).split(schedule.batch_size):
            rows = F.normalize(data.pieces[0][chosen]) if point.normalize else data.pieces[0][chosen]
            loss = F.cross_entropy(head(rows), data.labels[chosen], label_smoothing=point.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), schedule.clip)
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(step, point.lr, schedule.warmup_steps, total)
            optimizer.step()
            step += 1
    return head.weight.detach(), head.bias.detach() if point.bias else torch.zeros(classes)


LINEAR = probing.Form()


class OneProcess:
    """Stands for Agreement and StopSignals of a single process."""

    rank, world, received = 0, 1, 0

    def settle(self, error: Exception | None, signal_number: int = 0) -> int:
        return signal_number


def fit(
    points: Sequence[Point],
    rows: probing.Rows,
    schedule: probing.Schedule,
    arithmetic: Arithmetic = CPU,
    form: probing.Form = LINEAR,
) -> Any:
    alone: Any = OneProcess()
    found = probing.fit_by_adamw(points, rows, schedule, form, arithmetic, alone, alone, lambda row: None)
    return sorted(found, key=lambda each: each.number)


def all_rows(data: Features) -> probing.Rows:
    rows = torch.arange(data.rows)
    return probing.Rows(data, rows, rows[:0], data.identity.classes)


FORTY_EIGHT = grid_of(
    normalize=[False, True],
    bias=[True, False],
    label_smoothing=[0.0, 0.1],
    lr=[1e-3, 1e-2, 1e-1],
    weight_decay=[0.0, 0.5],
)


@pytest.mark.parametrize(("clip", "max_logit_bytes"), [(0.3, 2**28), (float("inf"), 20_000)])
def test_48_heads_at_once_are_48_separate_trainings(clip: float, max_logit_bytes: int) -> None:
    """Weights to 1e-5, also where a batch has to be cut for memory; 300 rows do not divide by 64."""
    assert len(FORTY_EIGHT) == 48
    data = problem()
    schedule = probing.Schedule(batch_size=64, epochs=4, warmup_steps=5, clip=clip, seed=3)
    arithmetic = dataclasses.replace(CPU, max_logit_bytes=max_logit_bytes)
    assert (arithmetic.rows(4, 7, 16) < 64) == (max_logit_bytes < 2**20)
    fits = fit(FORTY_EIGHT, all_rows(data), schedule, arithmetic)
    assert [each.number for each in fits] == list(range(48))
    for each, point in zip(fits, FORTY_EIGHT, strict=True):
        weight, bias = trained_alone(point, data, schedule)
        assert (each.weight - weight).abs().max() <= 1e-5, point
        assert (each.bias - bias).abs().max() <= 1e-5, point
        assert point.bias or not each.bias.any()
        inputs = F.normalize(data.pieces[0]) if point.normalize else data.pieces[0]
        logits = inputs @ each.weight.T + each.bias
        assert each.correct == int((logits.argmax(1) == data.labels).sum())
        assert each.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert len({each.weight.sum().item() for each in fits}) == 48


def test_blocks_hold_every_head_once_and_do_not_mix_normalisation() -> None:
    for device, most, count in (("cpu", 4, 10), ("cuda", 16, 4)):
        blocks = cut_into_blocks(FORTY_EIGHT[6:42], torch.device(device))
        assert sorted(itertools.chain(*blocks)) == list(range(36))
        assert max(map(len, blocks)) == most
        assert len(blocks) == count
        for block in blocks:
            assert len({FORTY_EIGHT[6 + number].normalize for number in block}) == 1


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    data = problem()
    points = grid_of(normalize=[False], bias=[True], label_smoothing=[0.0], lr=[1e-2, 1e38], weight_decay=[0.0])
    schedule = probing.Schedule(batch_size=64, epochs=2, warmup_steps=2, clip=float("inf"), seed=0)
    good, bad = fit(points, all_rows(data), schedule)
    (alone,) = fit(points[:1], all_rows(data), schedule)
    assert not np.isfinite(bad.loss)
    assert (good.weight - alone.weight).abs().max() <= 1e-6
    assert probing.best_of([bad.summary, good.summary]) == 0
    with pytest.raises(ModelError, match="none of 1 heads has a finite loss"):
        probing.best_of([bad.summary])


def test_scores_count_no_nan_and_do_not_depend_on_chunks() -> None:
    data = problem(n=101)
    weight = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    weight[1] = float("nan")
    found = [
        score(weight, torch.zeros(3, 7), True, data, torch.arange(5, 101), Arithmetic(torch.device("cpu"), None, limit))
        for limit in (1, 2**28)
    ]
    logits = torch.einsum("nd,hcd->nhc", F.normalize(data.pieces[0][5:]), weight)
    expected = (logits[:, [0, 2]].argmax(2) == data.labels[5:, None]).sum(0)
    for correct, loss in found:
        assert correct.tolist() == [expected[0], 0, expected[1]]
        assert loss[1].isnan()
        assert loss[2].item() == pytest.approx(F.cross_entropy(logits[:, 2], data.labels[5:]).item(), rel=1e-5)


def test_features_in_bf16_and_products_in_bf16_stay_near() -> None:
    data = problem(noise=0.3)
    point = Point(False, True, 0.0, lr=1e-2, weight_decay=0.0)
    schedule = probing.Schedule(batch_size=64, epochs=5, warmup_steps=5, clip=1.0, seed=0)
    (exact,) = fit([point], all_rows(data), schedule)
    low = stored(data.pieces[0].bfloat16(), data.labels, 7)
    (rounded,) = fit([point], all_rows(low), schedule, dataclasses.replace(CPU, autocast=torch.bfloat16))
    assert rounded.loss == pytest.approx(exact.loss, rel=0.03)
    assert rounded.weight.dtype == torch.float32
    assert not torch.equal(rounded.weight, exact.weight)


def test_kernels_train_as_the_reference_does() -> None:
    """The Triton kernels themselves (in their interpreter where there is no GPU)."""
    pytest.importorskip("triton")
    data = problem(n=60)
    points = grid_of(normalize=[False], bias=[True, False], label_smoothing=[0.0, 0.1], lr=[1e-2], weight_decay=[0.1])
    schedule = probing.Schedule(batch_size=32, epochs=1, warmup_steps=1, clip=1.0, seed=0)
    plain = fit(points, all_rows(data), schedule, dataclasses.replace(CPU, kernel="reference"))
    kernels = fit(points, all_rows(data), schedule, dataclasses.replace(CPU, kernel="triton"))
    for a, b in zip(plain, kernels, strict=True):
        assert (a.weight - b.weight).abs().max() <= 1e-5


def mlp_trained_alone(
    point: Point, kind: Any, data: Features, schedule: probing.Schedule
) -> tuple[nn.Module, nn.Linear]:
    """Layers and head the plain way: one torch module, cross_entropy, AdamW on all its parameters."""
    torch.manual_seed(schedule.seed)
    layers = Featuriser(data.width, kind=kind, layers=2)
    torch.manual_seed(schedule.seed)
    head = nn.Linear(data.width, len(data.identity.classes), bias=point.bias)
    if point.bias:
        nn.init.zeros_(head.bias)
    module = nn.Sequential(layers, head)
    parameters = list(module.parameters())
    assert point.lr is not None
    assert point.weight_decay is not None
    optimizer = torch.optim.AdamW(parameters, lr=point.lr, weight_decay=point.weight_decay)
    steps = -(-data.rows // schedule.batch_size)
    for epoch in range(schedule.epochs):
        generator = torch.Generator().manual_seed(step_seed(schedule.seed, epoch, 0))
        for step, rows in enumerate(torch.randperm(data.rows, generator=generator).split(schedule.batch_size)):
            module.train(len(rows) > 1)
            hidden = layers(data.pieces[0][rows])
            logits = head(F.normalize(hidden) if point.normalize else hidden)
            loss = F.cross_entropy(logits, data.labels[rows], label_smoothing=point.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(epoch * steps + step, point.lr, schedule.warmup_steps, schedule.epochs * steps)
            optimizer.step()
    return layers.eval(), head


@pytest.mark.parametrize("kind", ["basic", "residual", "reversible"])
def test_heads_with_layers_are_separate_trainings(kind: Any) -> None:
    """129 rows: the last batch of 64 has one row, for which batch norm has no statistics of its own."""
    data = problem(n=129)
    points = grid_of(
        normalize=[False, True], bias=[True, False], label_smoothing=[0.0, 0.1], lr=[1e-3, 1e-2], weight_decay=[0.1]
    )
    schedule = probing.Schedule(batch_size=64, epochs=2, warmup_steps=2, clip=0.5, seed=3)
    form = probing.Form(mlp_kind=kind, mlp_layers=2)
    fits = fit(points, all_rows(data), schedule, form=form)
    for each, point in zip(fits, points, strict=True):
        layers, head = mlp_trained_alone(point, kind, data, schedule)
        assert (each.weight - head.weight).abs().max() <= 1e-5, point
        with torch.no_grad():
            hidden = layers(data.pieces[0])
            logits = head(F.normalize(hidden) if point.normalize else hidden)
            own = each.featuriser(data.pieces[0])
            found = (F.normalize(own) if point.normalize else own) @ each.weight.T + each.bias
        assert (found - logits).abs().max() <= 1e-4, point
        assert each.correct == int((logits.argmax(1) == data.labels).sum())
        assert each.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-4)


def test_layers_learn_what_a_linear_head_cannot() -> None:
    """The class is the product of two signs."""
    features = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    data = stored(features, (features[:, 0] * features[:, 1] > 0).long(), 2)
    point = Point(False, True, 0.0, lr=3e-2, weight_decay=0.0)
    schedule = probing.Schedule(batch_size=100, epochs=15, warmup_steps=2, clip=1.0, seed=0)
    (linear,) = fit([point], all_rows(data), schedule)
    (layers,) = fit([point], all_rows(data), schedule, form=probing.Form(mlp_layers=2))
    assert linear.correct / linear.n < 0.65
    assert layers.correct / layers.n > 0.95


def test_a_transform_stands_before_all_heads_of_either_solver() -> None:
    data = problem()
    transform = probing.draw_transform(all_rows(data), 2, seed=0)
    there = stored(transform(data.pieces[0]), data.labels, 7)
    arithmetic = dataclasses.replace(CPU, transform=transform)
    points = grid_of(normalize=[False, True], bias=[True], label_smoothing=[0.0], lr=[1e-2], weight_decay=[0.1])
    schedule = probing.Schedule(batch_size=64, epochs=2, warmup_steps=2, clip=1.0, seed=0)
    before = fit(points, all_rows(there), schedule)
    for a, b in zip(fit(points, all_rows(data), schedule, arithmetic), before, strict=True):
        assert torch.allclose(a.weight, b.weight, atol=1e-6)
        assert a.correct == b.correct
    rows = torch.arange(data.rows)
    solved = solve(Point(False, True, 0.0, penalty=1e-2), data, rows, 7, arithmetic)
    expected = solve(Point(False, True, 0.0, penalty=1e-2), there, rows, 7, CPU)
    assert solved.objective == pytest.approx(expected.objective, rel=1e-6)


def test_heads_start_from_a_given_one() -> None:
    data = problem()
    weight, bias = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)), torch.arange(7.0)
    point = Point(False, True, 0.0, lr=1e-2, weight_decay=0.1)
    schedule = probing.Schedule(batch_size=64, epochs=0, warmup_steps=2, clip=1.0, seed=0)
    form = probing.Form(initial=(weight, bias))
    found = fit([point, point], all_rows(data), schedule, form=form)
    assert all(torch.equal(each.weight, weight) and torch.equal(each.bias, bias) for each in found)
    (trained,) = fit([point], all_rows(data), dataclasses.replace(schedule, epochs=3), form=form)
    assert trained.loss < found[0].loss
    assert torch.equal(weight, torch.randn(7, 16, generator=torch.Generator().manual_seed(1))), "the start was changed"


@pytest.mark.parametrize("batches", [1, 3, 16])
def test_how_many_batches_a_block_takes_at_a_time_changes_nothing(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = problem()
    points = FORTY_EIGHT[:10]
    schedule = probing.Schedule(batch_size=32, epochs=2, warmup_steps=2, clip=1.0, seed=0)
    expected = fit(points, all_rows(data), schedule)
    monkeypatch.setattr(probing, "_GROUP_BATCHES", batches)
    for a, b in zip(fit(points, all_rows(data), schedule), expected, strict=True):
        assert torch.equal(a.weight, b.weight)
        assert a.summary == b.summary


def test_all_heads_begin_as_torchs_linear_does() -> None:
    block = HeadBlock(FORTY_EIGHT[:3], 7, 16, seed=5, clip=1.0, arithmetic=CPU)
    torch.manual_seed(5)
    expected = nn.Linear(16, 7).weight
    assert all(torch.equal(weight, expected) for weight in block.weight)
    assert not block.bias.any()


# ----------------------------------------------------------------------------------------------------------------------
# Logistic regression to its optimum
# ----------------------------------------------------------------------------------------------------------------------


def sklearn_optimum(data: Features, point: Point, iterations: int = 10_000) -> LogisticRegression:
    assert point.penalty is not None
    rows = F.normalize(data.pieces[0]) if point.normalize else data.pieces[0]
    model = LogisticRegression(
        C=1 / (point.penalty * data.rows), fit_intercept=point.bias, tol=1e-8, max_iter=iterations
    )
    return model.fit(rows.double().numpy(), data.labels.numpy())


def objective(data: Features, point: Point, weight: Any, bias: Any) -> float:
    assert point.penalty is not None
    weight, bias = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
    rows = data.pieces[0].double()
    rows = F.normalize(rows) if point.normalize else rows
    penalty = 0.5 * point.penalty * weight.square().sum()
    return float(F.cross_entropy(rows @ weight.T + bias, data.labels) + penalty)


@pytest.mark.parametrize("penalty", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lbfgs_finds_scikit_learns_optimum(penalty: float, normalize: bool, bias: bool) -> None:
    data = problem(n=500, noise=1.5)
    point = Point(normalize, bias, 0.0, penalty=penalty)
    found = solve(point, data, torch.arange(500), 7, CPU)
    theirs = sklearn_optimum(data, point)
    best = objective(data, point, theirs.coef_, theirs.intercept_)
    ours = objective(data, point, found.weight, found.bias)
    assert abs(ours - best) <= 1e-4
    assert ours - best <= found.gap + 1e-6, "the bound holds"
    assert found.gap <= 1e-5
    assert found.objective == pytest.approx(ours, rel=1e-5)
    assert bias or not found.bias.any()


def test_lbfgs_in_chunks_on_a_share_of_the_rows_and_with_smoothing() -> None:
    data = problem(n=400, noise=1.5)
    rows = torch.arange(0, 400, 2)
    point = Point(False, True, 0.1, penalty=1e-3)
    whole = solve(point, data, rows, 7, CPU)
    chunked = solve(point, data, rows, 7, dataclasses.replace(CPU, max_logit_bytes=10_000))
    half = stored(data.pieces[0][rows], data.labels[rows], 7)
    copied = solve(point, half, torch.arange(200), 7, CPU)
    assert whole.objective == pytest.approx(chunked.objective, abs=2e-5)
    assert torch.equal(whole.weight, copied.weight)
    # at the optimum of a smoothed loss no single coordinate can be improved
    smoothed = F.cross_entropy(half.pieces[0] @ whole.weight.T + whole.bias, half.labels, label_smoothing=0.1)
    assert whole.objective == pytest.approx(smoothed.item() + 5e-4 * whole.weight.square().sum().item(), rel=1e-5)


def test_lbfgs_says_when_it_was_stopped_early() -> None:
    data = problem(n=400, noise=3.0)
    calls = iter([False, True])
    found = solve(Point(False, True, 0.0, penalty=1e-7), data, torch.arange(400), 7, CPU, stopped=lambda: next(calls))
    assert found.iterations == 25
    assert found.gap > 1e-5


@torch.no_grad()
def features_of(encoder: Encoder, images: Tensor) -> Tensor:
    encoder.eval()
    return torch.cat([encoder(batch.float() / 255) for batch in images.split(500)])


def check_against_scikit_learn(train: Features, test: Features, penalty: float) -> None:
    """Test accuracy of both optima within 0.2 points, training losses within 1e-4."""
    point = Point(False, True, 0.0, penalty=penalty)
    found = solve(point, train, torch.arange(train.rows), 10, CPU)
    theirs = sklearn_optimum(train, point, iterations=3000)
    best = objective(train, point, theirs.coef_, theirs.intercept_)
    assert abs(objective(train, point, found.weight, found.bias) - best) <= 1e-4
    correct, _ = score(found.weight[None], found.bias[None], False, test, torch.arange(test.rows), CPU)
    accuracy = theirs.score(test.pieces[0].double().numpy(), test.labels.numpy())
    assert abs(correct.item() / test.rows - accuracy) <= 0.002


def test_mnist_features_give_scikit_learns_accuracy(shared_data: Path, goldens: Path) -> None:
    encoder = load_encoder(f"lenet/{goldens / 'lenet_mnist.safetensors'}")
    sets = []
    for name, count in (("train", 4000), ("t10k", 2000)):
        pixels = gzip.decompress((shared_data / "mnist" / f"{name}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((shared_data / "mnist" / f"{name}-labels-idx1-ubyte.gz").read_bytes())
        images = torch.frombuffer(bytearray(pixels[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)[:count]
        target = torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8)[:count].long()
        size = encoder.image_size
        images = F.pad(images, [(size - 28) // 2] * 4)
        sets.append(stored(features_of(encoder, images.expand(-1, 3, -1, -1)), target, 10))
    check_against_scikit_learn(sets[0], sets[1], penalty=1e-4)


def test_cifar_features_give_scikit_learns_accuracy(shared_data: Path, goldens: Path) -> None:
    from data.transforms import decode

    encoder = load_encoder(f"cifar_resnet20/{goldens / 'cifar_resnet20.safetensors'}")
    every = {"train": 50, "test": 20}  # one image of so many: 100 and 50 of each class
    found: dict[str, list[tuple[Tensor, int]]] = {"train": [], "test": []}
    classes: list[str] = []
    with tarfile.open(shared_data / "cifar10.tar.xz") as archive:
        for member in archive:
            split, _, rest = member.name.partition("/")
            if not member.isfile() or int(Path(rest).stem) % every[split]:
                continue
            if (name := rest.partition("/")[0]) not in classes:
                classes.append(name)
            content = archive.extractfile(member)
            assert content is not None
            found[split].append((decode(content.read()), classes.index(name)))
    sets = []
    for pairs in found.values():
        images, labels = zip(*pairs, strict=True)
        sets.append(stored(features_of(encoder, torch.stack(images)), torch.tensor(labels), 10))
    assert [each.rows for each in sets] == [1000, 500]
    check_against_scikit_learn(sets[0], sets[1], penalty=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Which samples
# ----------------------------------------------------------------------------------------------------------------------


def test_held_out_samples_depend_on_their_number_alone() -> None:
    index = torch.arange(100_000)
    for fraction in (0.0, 0.01, 0.1, 0.5, 0.999):
        out = held_out(index, fraction)
        assert out.float().mean().item() == pytest.approx(fraction, abs=0.004)
        chosen = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))[:500]
        assert torch.equal(held_out(index[chosen], fraction), out[chosen])
    smaller, larger = held_out(index, 0.1), held_out(index, 0.2)
    assert not (smaller & ~larger).any()
    for period in (2, 10, 64):  # no pattern along the shards
        rates = larger.view(-1)[: 100_000 // period * period].view(-1, period).float().mean(0)
        assert (rates - 0.2).abs().max() < 5 * (0.16 * period / 100_000) ** 0.5


def test_shots_are_k_of_every_class_nested_and_seeded() -> None:
    labels = torch.arange(3000) % 7
    index = torch.arange(3000) * 3 + 11
    chosen = {k: few_shots(index, labels, k, seed=0) for k in (1, 5, 6, 600)}
    for k, mask in chosen.items():
        assert labels[mask].bincount(minlength=7).tolist() == [min(k, int(c)) for c in labels.bincount()]
    assert not (chosen[5] & ~chosen[6]).any()
    assert not torch.equal(few_shots(index, labels, 5, seed=1), chosen[5])
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(few_shots(index[order], labels[order], 5, seed=0), chosen[5][order])
