"""eval/report.py: every number on the page is a row's, nothing on it runs or loads anything, faults are one line."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data import DataError
from data.demo import demo_shards
from data.rows import append_row
from data.shifts import SUITES, Suite
from data.tar import find_shards
from eval import figures, shifts
from eval.evidence import Said, choose, newest, place_of, read_predictions, read_rows
from eval.report import PAGE, Config, main, run
from eval.robustness import baseline
from eval.scoring import Answers, compare_sets, rows_of, summarise
from eval.sections import CLIP_TABLE, Origins, Published, Shown, class_drops, class_names, main_table, mistakes, remarks
from models.heads import save_head

IMAGENET, DEMO = SUITES["imagenet"], SUITES["demo"]
COUNTS = {"imagenet": 3000, "imagenet_v2": 2000, "imagenet_r": 400, "objectnet": 339, "imagenet_sketch": 1000}
COUNTS |= {"imagenet_a": 400, "val": 100, "v2": 90, "r": 60, "sketch": 80, "a": 60}
STUDENT = {"imagenet": 0.58, "imagenet_v2": 0.46, "imagenet_r": 0.25, "objectnet": 0.2, "imagenet_sketch": 0.15}
STUDENT |= {"imagenet_a": 0.03, "val": 0.9, "v2": 0.8, "r": 0.5, "sketch": 0.3, "a": 0.6}
TEACHER = {name: share + (1 - share) / 3 for name, share in STUDENT.items()}
HOSTILE = "<script>alert(1)</script> $x_2$ & \"quoted\" 'name' --> \x00\x1b[31m \ud800 </svg>"


# ----------------------------------------------------------------------------------------------------------------------
# Rows and predictions, by the code that writes them, of models that never were
# ----------------------------------------------------------------------------------------------------------------------


def invent(num_classes: int, n: int, share: float, seed: int) -> Answers:
    """Answers to n images with about this share right, some classes being easier than others."""
    generator = np.random.default_rng([seed, n])
    label = np.arange(n) % num_classes
    easy = np.clip(share + generator.normal(0, 0.15, num_classes), 0, 1)
    right = generator.random(n) < easy[label]
    predicted = np.where(right, label, (label + generator.integers(1, num_classes, n)) % num_classes)
    confidence = generator.uniform(0.2, 1, n).round(6)
    rank = np.where(right, 0, generator.integers(1, num_classes, n))
    return Answers(np.arange(n), label, predicted, rank, right, generator.uniform(0, 3, n), confidence)


def restrict(answers: Answers, columns: Sequence[int], num_logits: int) -> Answers:
    """Those about classes of a control, under its labels."""
    label_of = np.full(num_logits, -1)
    label_of[list(columns)] = np.arange(len(columns))
    kept = label_of[answers.label] >= 0
    parts: dict[str, NDArray[Any]] = {name: getattr(answers, name)[kept] for name in Answers.__dataclass_fields__}
    parts["label"] = label_of[parts["label"]]
    wrong = (parts["label"] + 1) % len(columns)
    parts["predicted"] = np.where(parts["rank"] == 0, parts["label"], wrong)
    return Answers(**parts)


def write_run(
    folder: Path,
    suite: Suite,
    models: Mapping[str, Mapping[str, float]],
    *,
    sets: Sequence[str] = (),
    weights: str = "",
    alphas: Mapping[str, float] | None = None,
    partial: bool = False,
    fingerprints: Mapping[str, str] | None = None,
    config: Any = None,
    key: str = "key",
) -> list[dict[str, Any]]:
    """results.jsonl and predictions.csv of models with such accuracies; returns the rows."""
    rows = []
    names = [name for name in (suite.in_distribution, *suite.shifts) if not sets or name in sets]
    lines = {} if suite is DEMO else {name: baseline(name, suite.in_distribution) for name in suite.shifts}
    folder.mkdir(parents=True, exist_ok=True)
    predictions = shifts.Predictions(folder / "predictions.csv")
    for number, (model, shares) in enumerate(models.items()):
        scores = {}
        about: dict[str, Any] = {
            "suite": suite.name,
            "model": model,
            "encoder": f"local-dir:{model}",
            "encoder_sha256": f"{weights or model}-encoder",
            "head": "head.safetensors",
            "head_sha256": f"{weights or model}-head",
            "precision": "no",
            "preprocessing": "none",
        }
        if alphas is not None:
            about["alpha"] = alphas[model]
        of_run: dict[str, Any] = {"config": config, "device": "cpu"}
        for name in names:
            count = COUNTS.get(name, 90)
            answers = invent(suite.sets[name].num_classes, count, shares.get(name, 0.4), number)
            predictions.add(model, name, [f"{key}{i}" for i in range(count)], answers)
            protocols = [one for one in suite.sets.values() if name in (one.name, one.part_of)]
            for one in protocols:
                columns = [accepted[0] for accepted in one.accepts]
                own = restrict(answers, columns, one.num_logits) if one.part_of else answers
                scores[one.name] = score = summarise(own, one)
                of_set: dict[str, Any] = {
                    "partial": partial,
                    "data_fingerprint": (fingerprints or {}).get(name, f"{name}-data"),
                }
                rows += [
                    append_row(folder / "results.jsonl", **row, **of_set, **about, **of_run)
                    for row in rows_of(score, one)
                ]
        found = compare_sets(scores, suite, lines, set() if partial else set(names), "testbed_top1.csv")
        rows += [append_row(folder / "results.jsonl", **row, **about, **of_run) for row in found.rows]
    predictions.finish()
    return rows


def value(rows: Sequence[Mapping[str, Any]], model: str, name: str, metric: str = "official_top1") -> float:
    """The last such row's."""
    return [row["value"] for row in rows if (row["model"], row["set"], row["metric"]) == (model, name, metric)][-1]


def change(file: Path, **fields: Any) -> None:
    """Sets fields of all rows of a file."""
    rows = [json.loads(line) | fields for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on the six ImageNet sets and its page, without images."""
    folder = tmp_path_factory.mktemp("imagenet")
    rows = write_run(folder / "run", IMAGENET, {"teacher": TEACHER, "student": STUDENT})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = main(Config(results=[str(folder / "run")], out=str(folder / "page"), examples=2))
    return {"rows": rows, "folder": folder, "html": result["page"].read_text(), "printed": printed.getvalue(), **result}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run of two models on two of the demo's sets, without shards; drawing more takes longer than all the rest."""
    write_run(tmp_path / "run", DEMO, {"teacher": TEACHER, "student": STUDENT}, sets=["val", "v2"])
    return tmp_path / "run"


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures with nothing on them, for tests of what stands beside them; but curves, which one test has, are whole."""
    save = figures._save

    def save_blank(figure: Any, out: Path, name: str, text: str) -> Any:
        if not name.endswith("_curves"):
            figure.clear()
        return save(figure, out, name, text)

    monkeypatch.setattr(figures, "_save", save_blank)


# ----------------------------------------------------------------------------------------------------------------------
# The page as a reader has it
# ----------------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Elements of a page, with attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self._style = self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._style = tag == "style"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._style = False
        self._cell = False if tag in ("td", "th") else self._cell

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text += data
            if self._cell:
                self.tables[-1][-1][-1] += f" {data.strip()} "

    def row(self, table: int, name: str) -> list[str]:
        """Cells of the line that begins with `name`, white space folded."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]
        return next(row for row in rows if row[0] == name)


def assert_self_contained(html: str) -> Reader:
    """No element that runs, nothing but pictures within the page, every link to an id that is there once."""
    page = Reader(html)
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "svg",
    }
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        if "href" in attributes:
            assert tag == "a"
            assert (attributes["href"] or "")[:1] == "#"
            assert (attributes["href"] or "")[1:] in ids
        if "src" in attributes:
            assert tag == "img"
            assert re.match(r"data:image/(svg\+xml|png|jpeg);base64,", attributes["src"] or "")
            assert attributes["alt"]
    assert not re.search(r"url\(|@import|https?:", re.sub(r'src="data:[^"]*"', "", html))
    policy = [attributes for tag, attributes in page.elements if attributes.get("http-equiv")]
    assert (policy[0]["content"] or "").startswith("default-src 'none'; img-src data:;")
    for vector in vectors(page):
        for element in ElementTree.fromstring(vector).iter():
            assert not element.tag.endswith(("script", "foreignObject"))
            assert all(text[:1] == "#" for name, text in element.attrib.items() if name.endswith("href"))
    return page


def vectors(page: Reader) -> list[bytes]:
    sources = [attributes["src"] or "" for tag, attributes in page.elements if tag == "img"]
    return [base64.b64decode(source.partition(",")[2]) for source in sources if "svg" in source[:20]]


def test_the_page_needs_nothing_but_itself(imagenet: dict[str, Any]) -> None:
    page = assert_self_contained(imagenet["html"])
    assert len(vectors(page)) == 1 + len(IMAGENET.shifts)
    assert "What breaks when the data shift" in page.text


def test_every_number_of_the_main_table_is_a_row(imagenet: dict[str, Any]) -> None:
    page, rows = Reader(imagenet["html"]), imagenet["rows"]
    names = [IMAGENET.in_distribution, *IMAGENET.shifts]
    for model in ("teacher", "student"):
        cells = page.row(0, model)[1:]
        for name, cell in zip((*names, "mean"), cells, strict=False):
            row = next(r for r in rows if (r["model"], r["set"], r["metric"]) == (model, name, "official_top1"))
            ends = "\u2026".join(f"{100 * end:.1f}" for end in row.get("interval", []))
            assert cell == f"{100 * row['value']:.2f} {ends}".strip()
        low, high = next(
            r for r in rows if r["model"] == model and r["metric"] == "effective_robustness" and r["set"] == "mean"
        )["interval"]
        gain = value(rows, model, "mean", "effective_robustness")
        assert cells[-1] == f"{100 * gain:+.2f} {100 * low:+.1f}\u2026{100 * high:+.1f}"
    printed = imagenet["printed"].splitlines()
    assert printed[0].split("  ")[0] == "top-1, % (imagenet)"
    assert printed[1].split()[0] == "teacher"
    assert float(printed[1].split()[1]) == round(100 * value(rows, "teacher", "imagenet"), 2)
    assert printed[2].split()[-2:] == [
        f"{100 * value(rows, 'student', 'mean'):.2f}",
        f"{100 * value(rows, 'student', 'mean', 'effective_robustness'):+.2f}",
    ]
    assert printed[3] == f"report   {imagenet['folder'] / 'page' / PAGE}"
    assert len(printed) == 4


def test_every_linked_number_stands_where_it_comes_from(imagenet: dict[str, Any]) -> None:
    """The line that a number links to holds the row's unrounded value, its line in the file, and hashes."""
    html, rows = imagenet["html"], imagenet["rows"]
    assert len(re.findall(r'<a href="#imagenet-origin', html)) > 100
    for model, name in (("student", "objectnet"), ("teacher", "mean")):
        row = next(r for r in rows if (r["model"], r["set"], r["metric"]) == (model, name, "official_top1"))
        line = rows.index(row) + 1
        link = re.search(rf'<a href="#([\w-]+)">{100 * row["value"]:.2f}</a>', html)
        assert link is not None
        origin = html[html.index(f'<tr id="{link[1]}"') :].partition("</tr>")[0]
        assert f"official_top1 {row['value']}\n" in origin
        assert f"line&nbsp;{line}<" in origin
        for text in (name, model, row["encoder_sha256"], row["commit"][:12], "results.jsonl", "cpu"):
            assert text in origin
    page = Reader(html)
    shown = page.row(1, "ImageNet-R")
    assert shown[1] == "teacher"
    assert shown[3].split()[0] == f"{100 * value(rows, 'teacher', 'imagenet_r'):.2f}"
    assert shown[7].split()[0] == f"{100 * value(rows, 'teacher', 'imagenet_on_r_classes'):.2f}"
    assert shown[9:] == [
        f"{100 * value(rows, 'teacher', 'imagenet_r', 'calibration_error'):.2f}",
        f"{value(rows, 'teacher', 'imagenet_r', 'loss'):.3f}",
    ]


@pytest.mark.parametrize(
    ("model", "accuracies", "mean", "robustness"),
    [  # top-1 on the six sets, their means and the mean effective robustness as published, to the digits given there
        ("CLIP RN50", (59.82, 52.84, 60.73, 41.41, 35.44, 23.27), 42.7, 22.8),
        ("CLIP RN101", (62.28, 56.12, 68.17, 45.15, 41.06, 29.44), 48.0, 26.5),
        ("CLIP RN50x4", (66.27, 59.44, 72.74, 51.41, 44.68, 41.45), 53.9, 29.8),
        ("CLIP RN50x16", (70.72, 64.20, 79.33, 60.71, 50.63, 57.24), 62.4, 34.7),
        ("CLIP ViT-B/32", (63.32, 55.92, 69.33, 44.31, 42.29, 31.55), 48.7, 26.5),
        ("CLIP ViT-B/16", (68.34, 61.88, 77.70, 55.31, 48.24, 49.95), 58.6, 32.9),
        ("CLIP ViT-L/14", (75.54, 69.83, 87.84, 68.89, 59.59, 70.75), 71.4, 38.9),
        ("CLIP ViT-L/14@336", (76.56, 70.89, 89.05, 71.83, 61.00, 77.48), 74.0, 40.4),
        ("resnet18", (69.76, 57.31, 33.06, 26.74, 20.23, 1.15), None, None),
        ("resnet50", (76.13, 63.21, 36.17, 35.75, 24.09, 0.00), None, None),
        ("resnet101", (77.37, 65.45, 39.31, 38.38, 26.97, 4.72), None, None),
        ("resnet152", (78.31, 66.84, 41.34, 40.07, 28.53, 6.05), None, None),
    ],
)
def test_published_anchors(
    model: str, accuracies: Sequence[float], mean: float | None, robustness: float | None, imagenet: dict[str, Any]
) -> None:
    cells = [float(cell) for cell in Reader(imagenet["html"]).row(0, model)[1:]]
    assert cells[:6] == list(accuracies)
    assert cells[6] == pytest.approx(mean if mean is not None else np.mean(accuracies[1:]), abs=0.051)
    if robustness is not None:
        assert cells[7] == pytest.approx(robustness, abs=0.1)
    else:
        assert abs(cells[7]) < 3, "supervised models lie near the line"


def test_clip_table_holds_nothing_else() -> None:
    lines = CLIP_TABLE.read_text().splitlines()
    assert lines[0] == "model,type,imagenet,imagenet_v2,imagenet_r,objectnet,imagenet_sketch,imagenet_a"
    assert [line.split(",")[1] for line in lines[1:]] == ["zero_shot"] * 8


def test_figures_are_files_and_repeat_bit_for_bit(imagenet: dict[str, Any], small: Path, tmp_path: Path) -> None:
    first = imagenet["folder"] / "page"
    names = {"imagenet_line", *(f"imagenet_drops_{name}" for name in IMAGENET.shifts)}
    assert {path.name for path in first.iterdir()} == {PAGE, *(f"{n}.{s}" for n in names for s in ("png", "svg"))}
    for name in names:
        with Image.open(first / f"{name}.png") as image:
            assert image.width > 800
    for out in ("one", "two"):
        main(Config(results=[str(small)], out=str(tmp_path / out), examples=0))
    for name in ("demo_line.svg", "demo_drops_v2.svg", "demo_line.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    drawn = (first / "imagenet_line.svg").read_text()  # text is drawn as outlines, beside which stands what it is
    for text in ("teacher", "student", "published: zero-shot CLIP", "ObjectNet, %", "line of standard training"):
        assert f"<!-- {text}" in drawn


def test_the_demo_has_no_line(small: Path, tmp_path: Path) -> None:
    page = Reader(main(Config(results=[str(small)], out=str(tmp_path / "page")))["page"].read_text())
    assert "No line is drawn" in page.text
    assert "effective robustness" not in page.text
    assert "published" not in (tmp_path / "page" / "demo_line.svg").read_text().replace("nobody has published", "")
    assert [" ".join(cell.split()) for cell in page.tables[0][0]] == [
        "top-1, %", "val", "v2", "r", "objectnet", "sketch", "a", "mean of shifts"
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Classes and mistakes
# ----------------------------------------------------------------------------------------------------------------------


def test_drops_of_classes(imagenet: dict[str, Any]) -> None:
    """Against loops over ObjectNet's map: the images before are those of all ImageNet classes that a label accepts."""
    rows = imagenet["rows"]
    shown = Shown.of(IMAGENET, [*newest(read_rows(imagenet["folder"] / "run" / "results.jsonl")[0]).values()])
    found = class_drops(shown, "student", "objectnet")
    assert found is not None
    one, control = IMAGENET.sets["objectnet"], IMAGENET.control_of("objectnet")
    after, before = (
        next(r for r in rows if (r["model"], r["set"], r["metric"]) == ("student", name, "official_class_mean"))
        for name in ("objectnet", control.name)
    )
    drops = {}
    for label, folder in enumerate(one.classes):
        own = [k for k, accepted in enumerate(control.accepts) if accepted[0] in one.accepts[label]]
        right, n = (sum(before[count][k] for k in own) for count in ("class_correct", "class_n"))
        drops[folder] = right / n - after["class_correct"][label] / after["class_n"][label]
    assert max(len(accepted) for accepted in one.accepts) > 1
    assert len(found) == 10
    assert [drop.points for drop in found] == sorted(drops.values(), reverse=True)[:10]
    assert all(drop.points == drops[drop.name] for drop in found)
    assert class_names(IMAGENET, IMAGENET.sets["imagenet_a"])[0] == "stingray"  # n01498041
    assert class_names(DEMO, DEMO.sets["objectnet"])[-2:] == ["two", "zero"]


@pytest.mark.usefixtures("blank")
def test_a_class_without_images_and_sets_without_control_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run", IMAGENET, {"m": STUDENT}, sets=["imagenet_r", "objectnet"])
    result = main(Config(results=[str(tmp_path / "run")], out=str(tmp_path / "page"), examples=0))
    assert not result["sections"][0]["drops"]
    page = Reader(result["page"].read_text())
    assert page.row(0, "m")[1:3] == ["\u2013", "\u2013"]
    assert "None were asked for" in page.text


def said(predicted: Sequence[int], confidence: Sequence[float], label: Sequence[int]) -> Said:
    n = len(label)
    keys = tuple(f"k{i}" for i in range(n))
    return Said(np.arange(n), np.array(label), np.array(predicted), np.array(confidence), keys)


def test_mistakes_are_chosen_by_what_they_tell() -> None:
    label = [0, 0, 0, 1, 1, 2, 2, 3]
    models = {
        "a": said([0, 0, 0, 1, 2, 1, 2, 3], [0.9, 0.5, 0.5, 0.5, 0.99, 0.5, 0.5, 0.5], label),
        "b": said([1, 2, 1, 0, 3, 2, 2, 3], [0.8, 0.8, 0.7, 0.6, 0.2, 1.0, 0.5, 0.5], label),
    }
    chosen = choose(models, DEMO.sets["val"], 9)
    # One right and one wrong: 0 (0.8) and 1 (0.8), 2 (0.7), 3 (0.6), 5 (0.5 by a); class 0 comes back last. Both: 4.
    assert [one.index for one in chosen] == [0, 3, 5, 1, 2, 4]
    assert chosen[0].answers == {"a": (0, 0.9), "b": (1, 0.8)}
    assert (chosen[0].key, chosen[0].label) == ("k0", 0)
    assert [one.index for one in choose({"a": models["a"]}, DEMO.sets["val"], 9)] == [4, 5]
    assert choose({"a": said(label, [0.5] * 8, label)}, DEMO.sets["val"], 9) == []
    with pytest.raises(DataError, match="other images"):
        choose({**models, "c": said([0], [0.5], [0])}, DEMO.sets["val"], 9)
    with pytest.raises(DataError, match="classes that demo r does not have"):
        choose({"a": said([6], [0.5], [0])}, DEMO.sets["r"], 9)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_vit: str) -> dict[str, Any]:
    """eval/shifts.py itself on the demo's sets, two random heads, and the page of it."""
    from models.encoders import load_encoder

    folder = tmp_path_factory.mktemp("real")
    pairs = []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        head = folder / f"{name}.safetensors"
        save_head(head, torch.randn(10, load_encoder(tiny_vit).feature_dim), None, DEMO.classes, normalize=False)
        pairs.append({"name": name, "encoder": tiny_vit, "head": str(head)})
    (folder / "models.yaml").write_text(json.dumps(pairs))
    run_folder = folder / "run"
    files: dict[str, Any] = {"models": str(folder / "models.yaml"), "predictions": str(run_folder / "predictions.csv")}
    shifts.main(shifts.Config(suite="demo", data="demo", workers=0, out=str(run_folder), **files))
    result = main(Config(results=[str(run_folder)], out=str(folder / "page"), examples=6))
    return {"folder": folder, "html": result["page"].read_text(), **result}


def test_images_of_mistakes_are_those_in_the_shards(real: dict[str, Any]) -> None:
    """Pixel for pixel, by plain tarfile; of ObjectNet's stand-in without its red frame."""
    assert real["notes"] == []
    page = assert_self_contained(real["html"])
    views = {view["title"]: view for view in real["sections"][0]["mistakes"]}
    assert list(views) == [DEMO.sets[name].title for name in (DEMO.in_distribution, *DEMO.shifts)]
    for name in ("sketch", "objectnet"):
        view, one = views[f"demo {name}"], DEMO.sets[name]
        assert view["note"] == ""
        assert len(view["cards"]) == 6
        members: list[tuple[str, bytes, str]] = []
        for shard in sorted(Path(demo_shards(name)).glob("*.tar")):
            with tarfile.open(shard) as archive:
                content = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
            stems = [file.rpartition(".")[0] for file in content if file.endswith(".png")]
            members += [(stem, content[f"{stem}.png"], content[f"{stem}.cls"].decode()) for stem in stems]
        for card in view["cards"]:
            number, key = card["place"].split(": ")
            stem, pixels, label = members[int(number)]
            assert (stem, one.classes[int(label)]) == (key, card["true"])
            original = np.array(Image.open(io.BytesIO(pixels)).convert("RGB"))
            shown = np.array(Image.open(io.BytesIO(base64.b64decode(card["image"].partition(",")[2]))))
            edge = one.border
            assert np.array_equal(shown, original[edge : len(original) - edge, edge : len(original) - edge])
            assert card["true"] in page.text
            assert {answer["right"] for answer in card["answers"]} == {True, False}


def test_answers_on_the_page_are_those_of_the_file(real: dict[str, Any]) -> None:
    given = read_predictions(real["folder"] / "run" / "predictions.csv")
    for view, name in zip(real["sections"][0]["mistakes"], (DEMO.in_distribution, *DEMO.shifts), strict=True):
        for card in view["cards"]:
            index = int(card["place"].split(":")[0])
            for answer in card["answers"]:
                of = given[answer["model"], name]
                assert answer["class"] == DEMO.sets[name].classes[of.predicted[index]]
                assert answer["sure"] == of.confidence[index]
                assert answer["right"] == (of.predicted[index] == of.label[index])


def write_shards(folder: Path, count: int, size: tuple[int, int]) -> str:
    """Photographs under the keys that write_run's predictions have; returns the fingerprint."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    cut = count // 3
    for shard, part in (("000000.tar", range(cut)), ("000001.tar", range(cut, count))):
        with tarfile.open(folder / shard, "w") as archive:
            for i in part:
                buffer = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "JPEG")
                for ending, content in (("jpg", buffer.getvalue()), ("cls", b"0")):
                    member = tarfile.TarInfo(f"key{i}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    (folder / "sizes.json").write_text(json.dumps({"000000.tar": cut, "000001.tar": count - cut}))
    return find_shards(str(folder)).fingerprint


@pytest.mark.usefixtures("blank")
def test_shards_that_moved_changed_or_are_elsewhere_leave_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page says so and shows the answers without images; --data finds the shards in their new place."""
    fingerprint = write_shards(tmp_path / "old" / "a", 60, (300, 200))
    options: dict[str, Any] = {"sets": ["val", "a"], "fingerprints": {"a": fingerprint}}
    where = {"data": str(tmp_path / "old"), "sets": {"val": f"pipe:touch {tmp_path}/ran"}}
    write_run(tmp_path / "run", DEMO, {"m": STUDENT, "n": TEACHER}, config=where, **options)
    settings: dict[str, Any] = {"results": [str(tmp_path / "run")], "out": str(tmp_path / "page"), "examples": 3}

    found = main(Config(**settings))["sections"][0]
    own, other = found["mistakes"]
    assert own["note"].startswith("no images: its shards are not on this machine (pipe:touch")
    assert not (tmp_path / "ran").exists()
    assert found["notes"] == [f"mistakes on demo val: {own['note']}"]
    for card in other["cards"]:
        image = Image.open(io.BytesIO(base64.b64decode(card["image"].partition(",")[2])))
        assert (image.format, image.size) == ("JPEG", (144, 144))

    (tmp_path / "old").rename(tmp_path / "new")
    capsys.readouterr()
    result = main(Config(**settings))
    other = result["sections"][0]["mistakes"][1]
    assert other["note"].startswith("no images: ")
    assert [card["image"] for card in other["cards"]] == ["", "", ""]
    assert result["page"].read_text().count(">no image<") == 6
    assert len(capsys.readouterr().err.splitlines()) == 1

    shown = Shown.of(DEMO, [*newest(read_rows(tmp_path / "run" / "results.jsonl")[0]).values()])
    given = read_predictions(tmp_path / "run" / "predictions.csv")
    assert mistakes(shown, given, 3, str(tmp_path / "new"), [])[1]["note"] == ""
    shutil.rmtree(tmp_path / "new")
    write_shards(tmp_path / "new" / "a", 59, (20, 20))
    note = mistakes(shown, given, 3, str(tmp_path / "new"), [])[1]["note"]
    assert note.endswith("are not those that were scored (another fingerprint)")


@pytest.mark.parametrize("config", [None, [], {}, {"data": 3, "sets": []}, {"data": "x", "sets": {"val": 1}}])
def test_rows_that_do_not_say_where_their_shards_are(config: Any) -> None:
    with pytest.raises(DataError, match="do not say where"):
        place_of("val", config, "")


@pytest.mark.parametrize("place", ["s3://bucket/val", "a.tar::pipe:touch ran", "https://host/val"])
def test_nothing_is_fetched_or_run(place: str) -> None:
    with pytest.raises(DataError, match="not on this machine"):
        place_of("val", {"data": "x", "sets": {"val": place}}, "")


@pytest.mark.usefixtures("blank")
def test_keys_that_differ_from_the_predictions_are_no_images(tmp_path: Path) -> None:
    fingerprint = write_shards(tmp_path / "sets" / "a", 60, (20, 20))
    options: dict[str, Any] = {"sets": ["a"], "fingerprints": {"a": fingerprint}, "key": "other"}
    write_run(tmp_path / "run", DEMO, {"m": STUDENT}, config={"data": str(tmp_path / "sets"), "sets": {}}, **options)
    result = main(Config(results=[str(tmp_path / "run")], out=str(tmp_path / "page")))
    assert re.search(r"no images: .*record \d+ has key 'key\d+', 'other\d+' in the", result["sections"][0]["notes"][0])


@pytest.mark.usefixtures("blank")
def test_predictions_of_another_run_are_left_out_aloud(small: Path, tmp_path: Path) -> None:
    file = small / "predictions.csv"
    lines = file.read_text().splitlines()
    i = next(i for i, line in enumerate(lines) if line.startswith("teacher,v2,"))
    file.write_text("\n".join(lines[:i] + lines[i + 1 :]) + "\nstranger,val,0,k,1,1,1,0.5\n")
    result = main(Config(results=[str(small)], out=str(tmp_path / "page")))
    assert result["notes"] == [
        f"{file}: predictions of teacher on v2 are not those of the rows; left out",
        f"{file}: predictions of stranger on val are not those of the rows; left out",
    ]
    views = {view["title"]: view for view in result["sections"][0]["mistakes"]}
    assert [len(views[title]["cards"][0]["answers"]) for title in ("demo val", "demo v2")] == [2, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Which rows count
# ----------------------------------------------------------------------------------------------------------------------


def test_the_newest_row_counts_and_of_equally_old_ones_the_last(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", DEMO, {"m": STUDENT})
    new = write_run(tmp_path / "new", DEMO, {"m": TEACHER})
    change(tmp_path / "old" / "results.jsonl", date="2026-01-02T00:30:00+00:00")
    change(tmp_path / "new" / "results.jsonl", date="2026-01-02T00:59:00+01:00")  # earlier, by half an hour

    def shown(*folders: str) -> float:
        found = newest([row for folder in folders for row in read_rows(tmp_path / folder / "results.jsonl")[0]])
        return found["demo", "m", "val", "official_top1"].value

    assert value(old, "m", "val") != value(new, "m", "val")
    assert shown("old", "new") == shown("new", "old") == value(old, "m", "val")
    change(tmp_path / "new" / "results.jsonl", date="2026-01-02T00:30:00+00:00")
    assert shown("old", "new") == value(new, "m", "val")
    assert shown("new", "old") == value(old, "m", "val")


@pytest.mark.usefixtures("blank")
def test_one_name_for_several_weights_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", DEMO, {"m": STUDENT, "other": TEACHER})
    write_run(tmp_path / "run", DEMO, {"m": TEACHER}, sets=["v2"], weights="retrained", fingerprints={"v2": "redrawn"})
    change(tmp_path / "run" / "results.jsonl", date="2026-01-02T00:00:00+00:00")
    (tmp_path / "run" / "predictions.csv").unlink()
    result = main(Config(results=[str(tmp_path / "run")], out=str(tmp_path / "page")))
    weights, data, mean = result["sections"][0]["notes"]
    assert weights.startswith("m stands for 2 different weights (encoder/head m-encode/m-head: val, ")
    assert weights.endswith("; retraine/retraine: v2)")
    assert data == "v2 was not the same data for all models (fingerprint redrawn: m; v2-data: other)"
    assert mean.startswith("m: the mean over the shifts is of other rows")
    printed = capsys.readouterr().err
    text = Reader(result["page"].read_text()).text
    for note in (weights, data, mean):
        assert note in text
        assert f"note     {note}\n" in printed


@pytest.mark.usefixtures("blank")
def test_several_suites_have_a_section_each(small: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", IMAGENET, {"m": STUDENT}, sets=["imagenet"])
    places = [str(small), str(tmp_path / "other"), str(small / "results.jsonl")]
    result = main(Config(results=places, out=str(tmp_path / "page"), examples=0))
    page = assert_self_contained(result["page"].read_text())
    assert [of["suite"].name for of in result["sections"]] == ["imagenet", "demo"]
    assert "ImageNet and its shifts" in page.text
    assert "The demo and its shifts" in page.text
    lines = [line for file in tmp_path.glob("*/results.jsonl") for line in file.read_text().splitlines()]
    assert f"{len(lines)} results from" in page.text, "a file that is named twice counts once"


@pytest.mark.usefixtures("blank")
def test_rows_between_two_weights_are_a_curve(tmp_path: Path) -> None:
    """Only the ends are in tables and figures of models; a curve needs all of its sets."""
    alphas = {f"tuned alpha {alpha:.2f}": alpha for alpha in (0.0, 0.25, 0.5, 1.0)}
    models = {name: {key: share * (1 - alpha / 2) for key, share in STUDENT.items()} for name, alpha in alphas.items()}
    rows = write_run(tmp_path / "between", DEMO, models, alphas=alphas)
    write_run(tmp_path / "run", DEMO, {"student": STUDENT}, sets=["val"])
    places = [str(tmp_path / "run"), str(tmp_path / "between")]
    result = main(Config(results=places, out=str(tmp_path / "page")))
    found = result["sections"][0]
    assert [line["model"] for line in found["groups"][0]["models"]] == [
        "student",
        "tuned alpha 0.00",
        "tuned alpha 1.00",
    ]
    assert [line["model"] for line in found["points"]] == list(alphas)
    for line in found["points"]:
        own, mean = (float(cell["text"]) for cell in line["cells"])
        assert own == round(100 * value(rows, line["model"], "val"), 2)
        assert mean == round(100 * value(rows, line["model"], "mean"), 2)
    assert (tmp_path / "page" / "demo_curves.png").is_file()
    assert_self_contained(result["page"].read_text())
    main(Config(results=[str(tmp_path / "run")], out=str(tmp_path / "page")))
    assert not [*(tmp_path / "page").glob("demo_curves.*")], "a figure of an earlier report"


@pytest.mark.usefixtures("blank")
def test_points_between_alone_are_no_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", DEMO, {"tuned alpha 0.50": STUDENT}, alphas={"tuned alpha 0.50": 0.5})
    found = main(Config(results=[str(tmp_path / "run")], out=str(tmp_path / "page")))["sections"][0]
    assert (found["groups"][0]["models"], found["details"], found["drops"], found["curve"]) == ([], [], [], None)
    assert [line["model"] for line in found["points"]] == ["tuned alpha 0.50"]
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.usefixtures("blank")
def test_samples_have_a_star(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", DEMO, {"m": STUDENT}, sets=["val", "a"], partial=True)
    result = main(Config(results=[str(tmp_path / "run")], out=str(tmp_path / "page"), examples=0))
    cells = [cell["text"] for cell in result["sections"][0]["groups"][0]["models"][0]["cells"]]
    assert [cell.endswith("*") for cell in cells] == [True, False, False, False, False, True, False, False]
    assert "\n* measured on a sample of the set\n" in capsys.readouterr().out
    assert "* measured on a sample" in Reader(result["page"].read_text()).text


def test_a_line_from_elsewhere_is_said(imagenet: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(imagenet["folder"] / "run", tmp_path / "run")
    change(tmp_path / "run" / "results.jsonl", table="mine.csv")
    for folder, expected in ((imagenet["folder"], []), (tmp_path, ["mine.csv", "mine.csv"])):
        rows = newest(read_rows(folder / "run" / "results.jsonl")[0])
        notes = remarks(Shown.of(IMAGENET, [*rows.values()]))
        assert [note.rpartition(" against the line of ")[2] for note in notes] == expected


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def test_hostile_names_are_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Markup, mathematics, control characters and half characters in names and keys, in the page, figures and table."""
    plain = HOSTILE.replace("\ud800", "")
    models = {"m": STUDENT, "_hidden": TEACHER}
    write_run(tmp_path / "run", DEMO, models, sets=["val", "v2"], key=plain.replace("\x00", ""))
    text = (tmp_path / "run" / "results.jsonl").read_text()
    (tmp_path / "run" / "results.jsonl").write_text(text.replace('"model": "m"', f'"model": {json.dumps(HOSTILE)}'))
    main(Config(results=[str(tmp_path / "run")], out=str(tmp_path / "page")))
    html = (tmp_path / "page" / PAGE).read_text()
    page = assert_self_contained(html)
    assert "<script" not in html
    assert "<script>alert(1)</script> $x_2$ & \"quoted\" 'name' -->" in page.text
    assert f"0: {plain.replace(chr(0), '')}"[:60] in page.text or "_hidden" in page.text
    drawn = (tmp_path / "page" / "demo_line.svg").read_text()
    assert "_hidden" in drawn
    ElementTree.fromstring(drawn)
    printed = capfd.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "\x00" not in printed.out + printed.err


@pytest.mark.usefixtures("blank")
def test_a_last_line_cut_short_is_passed_over_aloud(small: Path, tmp_path: Path) -> None:
    file = small / "results.jsonl"
    file.write_text(file.read_text() + '{"metric": "loss", "val')
    append_row(small / "own.jsonl", metric="probe_accuracy", value=0.5)
    file.write_text((small / "own.jsonl").read_text() + file.read_text())
    result = main(Config(results=[str(small)], out=str(tmp_path / "page"), examples=0))
    assert result["notes"] == [
        f"{file}: its last line was cut short, as by a kill, and is left out",
        f"{file}: 1 rows of other scripts are left out",
    ]
    assert "cut short" in Reader(result["page"].read_text()).text


ROW = {"metric": "loss", "value": 1.0, "set": "val", "suite": "demo", "model": "m", "date": "2026-01-02T00:00:00+00:00"}
TOP1 = ROW | {"metric": "official_top1"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no results"),
        ('{"metric": "loss", "value": 1}\n', "holds no results"),
        ("[1]\nnull\n", "holds no results"),
        ('{"metric": \n' + json.dumps(ROW) + "\n", "line 1: no JSON"),
        ("[" * 100_000 + "\n\n", "line 1: no JSON"),
        (b"\xff\xfe", "cannot be read"),
        (ROW | {"suite": "cifar"}, "line 1: suite 'cifar' is not one of imagenet, demo"),
        (ROW | {"suite": ["demo"]}, "suite is ['demo']"),
        (ROW | {"set": "imagenet_a"}, "the suite demo has no set 'imagenet_a'"),
        (ROW | {"value": float("nan")}, "value is nan"),
        (ROW | {"value": True}, "value is True"),
        (ROW | {"value": "1"}, "value is '1'"),
        (ROW | {"date": "yesterday"}, "date is 'yesterday'"),
        (ROW | {"date": "2026-01-02"}, "has no time zone"),
        (ROW | {"model": None}, "model is None"),
        (ROW | {"alpha": 2}, "alpha is 2"),
        (ROW | {"interval": [1]}, "interval is [1]"),
        (TOP1, "None of None images are correct"),
        (TOP1 | {"correct": 3, "n": 2}, "3 of 2 images"),
        (TOP1 | {"correct": 1, "n": 2}, "value is 1.0 where 1 of 2 images"),
        (ROW | {"metric": "official_class_mean", "class_n": "x"}, "class_correct is no list"),
        (ROW | {"metric": "official_class_mean", "class_correct": [2], "class_n": [1]}, "more correct answers"),
        (ROW | {"metric": "official_class_mean", "class_correct": [1], "class_n": [1]}, "another class map"),
        (ROW | {"class_map_sha256": "0"}, "val was scored with another class map than this version has"),
    ],
)
def test_broken_results_are_one_line(
    content: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    text = json.dumps(content) + "\n" if isinstance(content, dict) else content
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run(["--results", str(file), "--out", str(tmp_path / "page")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: {re.escape(str(file))}[:,].*{re.escape(expected)}.*\n", printed.err)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no predictions of eval/shifts.py"),
        ("a,b\n1,2\n", "no predictions of eval/shifts.py"),
        ("{header}\n", "holds no predictions"),
        ("{header}\nm,val,0,k,1,1,1,0.5\nm,val,1,k,1\n", "line 3: no prediction"),
        ("{header}\nm,val,0,k,1,1,1,high\n", "line 2: no prediction"),
        ("{header}\nm,val,0,k,1,2,1,0.5\n", "line 2: no prediction (values that contradict"),
        ("{header}\nm,val,-1,k,1,1,1,0.5\n", "line 2: no prediction"),
        ("{header}\nm,val,0,k,1,1,1,nan\n", "line 2: no prediction"),
        ("{header}\nm,val,0,\udcff,1,1,1,0.5\n", "no prediction"),
    ],
)
def test_broken_predictions_are_one_line(
    content: str, expected: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.csv"
    header = "model,set,index,key,label,predicted,correct,confidence"
    file.write_bytes(content.replace("{header}", header).encode("utf-8", "surrogateescape"))
    out = tmp_path / "page"
    assert run(["--results", str(small), "--predictions", str(file), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: {re.escape(str(file))}[:,].*{re.escape(expected)}.*\n", printed.err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--examples", "-1"], "--examples -1: must not be negative"),
        (["--examples", "many"], "examples"),
        (["--examples", "0"], "this script is one process"),
        (["--theme", "dark"], "theme"),
        (["--results", "nowhere"], "--results nowhere: no nowhere here (working folder"),
        ([], "no runs/demo_shifts"),
        (["--results", "RUN", "--predictions", "nowhere.csv"], "--predictions nowhere.csv: no such file"),
        (["--results", "RUN", "--out", "RUN/results.jsonl"], "cannot be written"),
        (["--results", "RUN", "--out", "own"], "its report.html is no page of this script"),
    ],
)
def test_wrong_settings_are_one_line(
    arguments: list[str],
    expected: str,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / PAGE).write_text("<h1>precious</h1>")
    if arguments == ["--examples", "0"]:
        monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        code = run([argument.replace("RUN", str(small)) for argument in arguments])
    except SystemExit as error:  # the parser's own
        code = int(str(error.code))
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert expected in printed.err
    assert (tmp_path / "own" / PAGE).read_text() == "<h1>precious</h1>"


@pytest.mark.usefixtures("blank")
def test_defaults_are_the_demos(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    small.rename(tmp_path / "runs" / "demo_shifts")
    assert run(["--examples", "0"]) == 0
    assert run(["--examples", "0"]) == 0, "its own page may be written over"
    assert (tmp_path / "runs" / "demo_report" / PAGE).is_file()
    assert not [*tmp_path.rglob(".tmp-*")]


@pytest.mark.usefixtures("blank")
def test_ctrl_c_and_a_full_disk(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(error: BaseException) -> Any:
        def write(*_: Any) -> None:
            raise error

        return write

    arguments = ["--results", str(small), "--out", str(tmp_path / "page"), "--examples", "0"]
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)):
        monkeypatch.setattr("eval.report.write_synced", failing(error))
        assert run(arguments) == code
        assert capsys.readouterr().err.count("\n") == 1


def test_tables_are_read_once_for_all_models() -> None:
    """What is compared with depends on the suite alone, and the demo has nothing."""
    assert Published.of(DEMO) == Published()
    published = Published.of(IMAGENET)
    assert [len(group.names) for group in published.anchors] == [8, 5]
    groups = main_table(Shown.of(IMAGENET, []), published, Origins("imagenet"))
    assert [len(group["models"]) for group in groups] == [0, 8, 5]
    assert asdict(Config())["results"] == ["runs/demo_shifts"]


# ----------------------------------------------------------------------------------------------------------------------
# A browser
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    if not found:
        pytest.skip("no chromium on this machine")
    return found


def test_a_browser_without_a_network_shows_figures_and_images(
    real: dict[str, Any], chromium: str, tmp_path: Path
) -> None:
    """The first model's colour is on the screen, which only the figures have, and the picture of a mistake."""
    shot = tmp_path / "shot.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,3000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={shot}", real["page"].resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.is_file(), done.stderr[-2000:]
    pixels = np.array(Image.open(shot).convert("RGB"))
    assert (pixels == (0x00, 0x72, 0xB2)).all(axis=2).sum() > 1000
    card = real["sections"][0]["mistakes"][0]["cards"][0]
    image = np.array(Image.open(io.BytesIO(base64.b64decode(card["image"].partition(",")[2]))))
    weights = (1 << 16, 1 << 8, 1)
    assert np.isin(image.astype(int) @ weights, pixels.astype(int) @ weights).mean() > 0.5
