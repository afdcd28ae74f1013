"""Zero-shot heads against the original's figures and open_clip's own function, the script, and its error lines."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data import DataError, demo
from data.shifts import SUITES
from data.stream import open_pass
from data.tar import find_shards
from data.transforms import EvalTransform, unit_interval
from models import ModelError
from models.encoders import load_encoder
from models.export import export_student
from models.heads import load_head, save_head
from models.weights import read_weights, state_sha256
from models.zero_shot import TextEncoder, load_text_encoder, zero_shot_head
from train import zero_shot as script

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 2},
}
CAPTIONS = [["abcd", "ba", "ccc"], ["d"], ["dab", "cab"], ["a", "b", "c", "dd", "abba"]]


def letters(captions: list[str]) -> Tensor:
    """Tokens for TINY: letters from 1, then 15, the largest, as end of text."""
    rows = [[*(ord(letter) - 96 for letter in caption), 15] for caption in captions]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def write_clip(folder: Path, config: dict[str, Any]) -> str:
    """A random CLIP in open_clip's folder layout."""
    arguments = {key: copy.deepcopy(value) for key, value in config.items() if key != "custom_text"}
    torch.manual_seed(3)
    model = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at 0 or 1, where a mistake would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return f"local-dir:{folder}"


class Table(nn.Module):
    """A text tower whose captions are row numbers of given embeddings."""

    context_length = 1

    def __init__(self, embeddings: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.embeddings, self.logit_scale, self.vocab_size = embeddings, logit_scale, len(embeddings)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.embeddings[tokens[:, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_figures_of_the_original_code(goldens: Path, tmp_path: Path) -> None:
    figures = {name: torch.from_numpy(value) for name, value in np.load(goldens / "heads.npz").items()}
    embeddings = figures["text_embeddings"]
    classes, templates, width = embeddings.shape
    tower = Table(embeddings.reshape(-1, width), figures["logit_scale"])
    texts = TextEncoder("golden", tower, lambda captions: torch.tensor([[int(caption)] for caption in captions]))
    captions = [[str(row * templates + column) for column in range(templates)] for row in range(classes)]
    weight = zero_shot_head(texts, captions, batch_size=16)
    torch.testing.assert_close(weight, figures["zeroshot_weights"], rtol=0, atol=1e-5)

    save_head(tmp_path / "head.safetensors", weight, None, list(map(str, range(classes))), normalize=True)
    head = load_head(tmp_path / "head.safetensors")
    assert head.normalize
    logits = F.linear(figures["x"] / figures["x"].norm(dim=1, keepdim=True), head.weight, head.bias)
    torch.testing.assert_close(logits, figures["zeroshot_logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True, "init_logit_bias": -10},
        {"custom_text": True, "nonscalar_logit_scale": True},
    ],
    ids=["clip", "quick_gelu", "custom_text", "nonscalar"],
)
def test_equals_open_clip(changes: dict[str, Any], tmp_path: Path) -> None:
    name = write_clip(tmp_path / "clip", {**TINY, **changes})
    templates, words = ["a{}", "b{}d", "{}"], ["ab", "c", "dd", "bca", "d"]
    model = open_clip.create_model(name).eval()
    theirs = open_clip.build_zero_shot_classifier(model, letters, words, templates, num_classes_per_batch=2).T
    captions = [[template.format(word) for template in templates] for word in words]
    ours = zero_shot_head(load_text_encoder(load_encoder(name), letters), captions)
    scale = model.logit_scale.detach().exp()
    assert scale > 10
    torch.testing.assert_close(ours / scale, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(theirs[0], theirs[1], atol=0.01)


def test_batches_do_not_matter(tiny_vit: str) -> None:
    texts = load_text_encoder(load_encoder(tiny_vit), letters)
    whole = zero_shot_head(texts, CAPTIONS)
    for size in (1, 2, 3, 10, 11):
        done: list[int] = []
        found = zero_shot_head(texts, CAPTIONS, batch_size=size, advance=done.append)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)  # rows are 14.3 long
        assert sum(done) == 11
        assert max(done) == min(size, 11)
    for row, own in zip(whole, CAPTIONS, strict=True):
        expected = F.normalize(F.normalize(texts(own), dim=1).mean(dim=0), dim=0) / 0.07
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
    assert not whole.requires_grad


@pytest.mark.parametrize(("captions", "size"), [([], 4), ([["a"], []], 4), ([["a"]], 0)])
def test_nothing_to_embed(captions: list[list[str]], size: int, tiny_vit: str) -> None:
    with pytest.raises(ValueError, match="needs one"):
        zero_shot_head(load_text_encoder(load_encoder(tiny_vit), letters), captions, batch_size=size)


# ---------------------------------------------------------------------------------------------------------------------
# The text tower
# ---------------------------------------------------------------------------------------------------------------------


def test_architecture_with_a_file(tmp_path: Path) -> None:
    """The same weights by folder and as open_clip:ARCH/FILE, with the tokenizer that open_clip names for either."""
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 20, "vocab_size": 49408}}
    name = write_clip(tmp_path / "clip", config)
    (tmp_path / "tiny-zero-shot.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-zero-shot.json")
    names = [name, f"open_clip:tiny-zero-shot/{tmp_path}/clip/open_clip_model.safetensors"]
    captions = [["a photo of a tench.", "a tench"], ["a photo of a goldfish."]]
    first, second = (zero_shot_head(load_text_encoder(load_encoder(each)), captions) for each in names)
    assert torch.equal(first, second)
    assert first.shape == (2, 24)


@pytest.mark.parametrize("name", ["torchvision:resnet50", "timm:resnet18", "lenet"])
def test_no_text_tower(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^{name}: has no text tower; zero-shot heads need a CLIP"):
        load_text_encoder(load_encoder(name, weights=False))


def test_random_weights(tiny_vit: str) -> None:
    with pytest.raises(ModelError, match="has random weights"):
        load_text_encoder(load_encoder(tiny_vit, weights=False))


def test_files_without_a_text_tower(tiny_vit: str, tmp_path: Path) -> None:
    student = load_encoder(tiny_vit, weights=False)
    export_student(student, tmp_path / "student", card={}, source=None)
    with pytest.raises(ModelError, match=r"student.safetensors is an image tower alone"):
        load_text_encoder(load_encoder(f"local-dir:{tmp_path}/student"))

    name = write_clip(tmp_path / "clip", TINY)
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    state = read_weights(file).state
    save_file({key: value for key, value in state.items() if key.startswith("visual.")}, file)
    with pytest.raises(ModelError, match="open_clip_model.safetensors holds no text tower"):
        load_text_encoder(load_encoder(name))
    save_file({key: value for key, value in state.items() if key != "text_projection"}, file)
    with pytest.raises(ModelError, match=r"of its 30 tensors 1 missing \(text_projection\)"):
        load_text_encoder(load_encoder(name), letters)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"multimodal_cfg": {}}, "is not open_clip's own text tower"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "is not open_clip's own text tower"),
        ({"text_cfg": {**TINY["text_cfg"], "layers": "many"}}, "cannot build the text tower of this configuration"),
        ({"text_cfg": {**TINY["text_cfg"], "hf_tokenizer_name": "none/such"}}, "cannot make its tokenizer"),
    ],
)
def test_other_text_sides(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    name = write_clip(tmp_path / "clip", TINY)
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, **changes}}))
    with pytest.raises(ModelError, match=said) as error:
        load_text_encoder(load_encoder(name))
    assert "\n" not in str(error.value)


def test_tokenizer_of_another_model(tiny_vit: str) -> None:
    encoder = load_encoder(tiny_vit)
    short = load_text_encoder(encoder, lambda captions: letters(captions)[:, :5])
    with pytest.raises(ModelError, match=r"takes 8 tokens a caption, the tokenizer gives \[2, 5\] for 2 captions"):
        short(["ab", "c"])
    large = load_text_encoder(encoder, lambda captions: 2 * letters(captions))
    with pytest.raises(ModelError, match="has tokens 0 to 15, the tokenizer gives 0 to 30"):
        large(["ab", "c"])
    own = load_text_encoder(encoder)  # the configuration names none, which means CLIP's
    with pytest.raises(ModelError, match="has tokens 0 to 15, the tokenizer gives"):
        own(["a photo"])


# ---------------------------------------------------------------------------------------------------------------------
# Classes and templates
# ---------------------------------------------------------------------------------------------------------------------


def test_imagenet_words_follow_the_wnids(shared_data: Path) -> None:
    facts = json.loads((shared_data.parent / "goldens" / "shift_classes.json").read_text())
    assert script.read_classes("imagenet", "") == (facts["wnids"], facts["classnames_openai"])


def test_templates_by_name() -> None:
    openai, simple = script.read_templates("openai"), script.read_templates("simple")
    assert (len(openai), len(simple), len(script.read_templates("demo"))) == (80, 7, 16)
    assert simple[0] == "itap of a {}."
    for templates, makers in (
        (openai, open_clip.OPENAI_IMAGENET_TEMPLATES),
        (simple, open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [template.replace("{}", "tench") for template in templates] == [make("tench") for make in makers]


def test_files_of_words(tmp_path: Path) -> None:
    lines, listed, mapped = tmp_path / "a.txt", tmp_path / "b.json", tmp_path / "c.json"
    words = [name.upper() for name in demo.CLASSES]
    lines.write_text("\n".join(words) + "\n\n")
    listed.write_text(json.dumps(words))
    mapped.write_text(json.dumps(dict(sorted(zip(demo.CLASSES, words, strict=True)))))
    for file in (lines, listed, mapped):
        assert script.read_classes("demo", str(file)) == (list(demo.CLASSES), words)
    assert script.read_classes("none", str(lines)) == (words, words)
    # as data/shards.py numbers the classes of such a file
    assert script.read_classes("none", str(mapped)) == (sorted(demo.CLASSES), [n.upper() for n in sorted(demo.CLASSES)])
    braces = tmp_path / "templates.txt"
    braces.write_text("{} in a box\nthe {}, {x}\n")  # a brace at the start is no JSON, and other braces stay
    assert script.read_templates(str(braces)) == ["{} in a box", "the {}, {x}"]


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def test_demo_head_knows_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "head.safetensors"
    assert script.run(["--out", str(file), "--check", "demo"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["captions", "written", "check"]
    assert printed[0].startswith("captions 160: 10 classes x 16 templates")

    encoder = load_encoder(demo.DEMO_TEACHER).eval()
    head = load_head(file, classes=SUITES["demo"].classes, feature_dim=encoder.feature_dim)
    assert head.normalize
    assert not head.bias.any()
    correct = n = 0
    with (
        torch.no_grad(),
        open_pass(demo.demo_shards("val"), batch_size=100, transform=EvalTransform(encoder.image_size)) as batches,
    ):
        for batch in batches:
            features = F.normalize(encoder(unit_interval(batch["image"])), dim=1)
            correct += int(((features @ head.weight.T).argmax(dim=1) == batch["label"]).sum())
            n += len(batch["label"])
    assert n == 1000
    assert correct > 950  # chance: 100
    assert f"{100 * correct / n:.2f} % ({correct} of {n} images" in printed[2]

    stated = head.metadata
    text_state = read_weights(Path(demo.DEMO_TEACHER.removeprefix("local-dir:")) / "open_clip_model.safetensors").state
    text_state = {key: value for key, value in text_state.items() if not key.startswith("visual.")}
    assert stated["text_sha256"] == state_sha256(text_state)
    assert stated["encoder_sha256"] == state_sha256(encoder.state_dict())
    assert stated["templates"] == [template for own in demo.STYLE_TEMPLATES.values() for template in own]
    assert (stated["suite"], stated["encoder"], stated["words"]) == ("demo", "demo", list(demo.CLASSES))


def test_student_takes_its_teachers_head(tmp_path: Path) -> None:
    teacher = load_encoder(demo.DEMO_TEACHER)
    student = load_encoder(demo.DEMO_TEACHER, weights=False)
    assert export_student(student, tmp_path / "export", card={}, source=teacher) == []
    heads, stated = [], []
    for name in ("demo", f"local-dir:{tmp_path}/export"):
        stated.append(script.main(script.Config(encoder=name, out=str(tmp_path / "head.safetensors"))))
        heads.append(load_head(tmp_path / "head.safetensors"))
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert stated[0]["text_sha256"] == stated[1]["text_sha256"]
    assert stated[0]["encoder_sha256"] != stated[1]["encoder_sha256"]


def test_imagenet_head_of_a_model_with_clips_tokens(tmp_path: Path) -> None:
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 24, "vocab_size": 49408}}
    name = write_clip(tmp_path / "clip", config)
    templates = tmp_path / "templates.json"
    templates.write_text(json.dumps(["a photo of a {}.", "the {}"]))
    out = tmp_path / "head.safetensors"
    script.main(script.Config(encoder=name, suite="imagenet", templates=str(templates), out=str(out)))
    head = load_head(out, classes=SUITES["imagenet"].classes, feature_dim=24)
    assert head.classes[:2] == ("n01440764", "n01443537")
    model = open_clip.create_model(name).eval()
    words = [open_clip.IMAGENET_CLASSNAMES[row] for row in (0, 1, 517, 999)]
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(name), words, ["a photo of a {}.", "the {}"]
    )
    scale = model.logit_scale.detach().exp()
    torch.testing.assert_close(head.weight[[0, 1, 517, 999]] / scale, theirs.T, rtol=0, atol=1e-6)


def test_class_map_for_a_set_of_ones_own(tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"b2": "eight", "a1": "zero"}))
    out = tmp_path / "head.safetensors"
    script.main(script.Config(suite="none", class_names=str(names), templates="demo", out=str(out)))
    head = load_head(out)
    assert head.classes == ("a1", "b2")
    script.main(script.Config(out=str(tmp_path / "all.safetensors")))
    torch.testing.assert_close(head.weight, load_head(tmp_path / "all.safetensors").weight[[0, 8]], rtol=0, atol=1e-5)


# fmt: off
WRONG = {  # arguments, exit code, part of the one line; {} is a folder of files
    "suite":            ("--suite cifar", 2, '"suite": Expected'),
    "no classes":       ("--suite none", 2, "--suite none takes its classes from --class_names FILE"),
    "batch":            ("--batch_size 0", 2, "--batch_size must be at least 1, not 0"),
    "unknown flag":     ("--encodr x", 2, "encodr"),
    "ending":           ("--out {}/head.pt", 2, "must end in .safetensors"),
    "out":              ("--out {}/templates.txt/h.safetensors", 1, "cannot be written"),
    "encoder":          ("--encoder open_clip:RN5/openai", 1, "did you mean open_clip:RN50"),
    "no text tower":    ("--encoder lenet/{}/lenet.safetensors", 1, "has no text tower"),
    "no weights":       ("--encoder torchvision:resnet50", 1, "an architecture without weights"),
    "template file":    ("--templates {}/absent.txt", 1, "absent.txt: No such file or directory"),
    "no placeholder":   ("--templates {}/templates.txt", 1, "'a photo' must hold {} once, where the class goes"),
    "two placeholders": ("--templates {}/twice.json", 1, "'a {} and a {}' must hold {} once"),
    "template object":  ("--templates {}/words.json", 1, "a JSON object; expected a list"),
    "empty":            ("--templates {}/empty.txt", 1, "must hold texts, one at least"),
    "no text":          ("--templates {}/numbers.json", 1, "must hold texts, one at least"),
    "broken":           ("--templates {}/broken.json", 1, "cannot be read"),
    "not text":         ("--templates {}/lenet.safetensors", 1, "cannot be read"),
    "long caption":     ("--templates {}/long.txt", 1, "does not fit into 31 printable ASCII characters"),
    "class file":       ("--class_names {}/absent.txt", 1, "--class_names"),
    "class count":      ("--class_names {}/nine.txt", 1, "words for 9 classes, demo has 10"),
    "imagenet count":   ("--suite imagenet --class_names {}/nine.txt", 1, "words for 9 classes, imagenet has 1000"),
    "class map":        ("--class_names {}/words.json", 1, "2 classes, demo has 10; first that only one has: 'a'"),
    "repeated class":   ("--suite none --class_names {}/repeated.txt", 1, "'crane' twice"),
    "check folder":     ("--check {}/absent", 1, "absent"),
    "check classes":    ("--check {}/packed", 1, "has other classes than the head, or another order"),
}
# fmt: on


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line(
    case: str, goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code, said = WRONG[case]
    for file, text in {
        "templates.txt": "a {}\na photo\n",
        "twice.json": '["a {} and a {}"]',
        "words.json": '{"a": "x", "zero": "y"}',
        "empty.txt": "\n \n",
        "numbers.json": "[1, 2]",
        "broken.json": "[",
        "long.txt": "a picture of the following digit: {}",
        "nine.txt": "\n".join("abcdefghi"),
        "repeated.txt": "crane\nheron\ncrane\n",
    }.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "lenet.safetensors").write_bytes((goldens / "lenet_mnist.safetensors").read_bytes())
    (tmp_path / "packed").symlink_to(demo.demo_shards("r"))
    monkeypatch.chdir(tmp_path)  # where the default of --out goes
    with pytest.raises(SystemExit) as stop:
        sys.exit(script.run(arguments.replace("{}", str(tmp_path)).split()))
    lines = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(lines)) == (code, 1), lines
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert not list(tmp_path.rglob("head.safetensors"))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert script.run([]) == 2
    assert capsys.readouterr().err == (
        "error: this script is one process: start it with python, not with accelerate launch\n"
    )


def test_label_beyond_the_head(tmp_path: Path, tiny_shards: Path, tiny_vit: str) -> None:
    with pytest.raises(DataError, match=r"label [3-9], the head 3 classes"):
        script.count_correct(load_encoder(tiny_vit).eval(), torch.zeros(3, 24), find_shards(str(tiny_shards)), 64)
