"""Weight files: wrappers' prefixes, types, damage of every kind, hostile pickles, hashes, atomic writing, heads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from models import ModelError
from models.heads import load_head, save_head
from models.weights import load_into, misfit, read_weights, state_sha256, write_safetensors

STATE = {"conv1.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "fc.bias": torch.tensor([0.5, -1.0])}


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- Reading what others wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapped", "research"),
    [
        ("{}", False),
        ("module.{}", False),
        ("_orig_mod.{}", False),
        ("module._orig_mod.{}", False),
        ("_orig_mod.module.{}", False),
        ("model.{}", True),
        ("module.model.{}", True),
        ("model.module.{}", True),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_wrappers_prefixes_are_stripped(tmp_path: Path, wrapped: str, research: bool, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    state = {wrapped.format(name): tensor for name, tensor in STATE.items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, file)  # type: ignore[operator]
    weights = read_weights(file)
    assert weights.state.keys() == STATE.keys()
    assert all(torch.equal(weights.state[name], STATE[name]) for name in STATE)
    assert weights.research_prefix is research


def test_a_prefix_of_some_names_only_is_part_of_the_name(tmp_path: Path) -> None:
    torch.save({"model.weight": torch.ones(1), "head.weight": torch.ones(1)}, tmp_path / "w.pt")
    weights = read_weights(tmp_path / "w.pt")
    assert set(weights.state) == {"model.weight", "head.weight"}
    assert not weights.research_prefix


def test_compile_prefix_is_removed_inside_names_and_collisions_are_told(tmp_path: Path) -> None:
    torch.save({"visual._orig_mod.proj": torch.ones(1)}, tmp_path / "w.pt")
    assert set(read_weights(tmp_path / "w.pt").state) == {"visual.proj"}
    torch.save({"_orig_mod.proj": torch.ones(1), "proj": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError) as error:
        read_weights(tmp_path / "w.pt")
    assert "_orig_mod." in one_line(error)


@pytest.mark.parametrize("nested", ["state_dict", "model_state_dict", "model"])
def test_weights_nested_in_a_training_checkpoint(tmp_path: Path, nested: str) -> None:
    torch.save({"epoch": 3, nested: STATE, "name": "run"}, tmp_path / "checkpoint.pth")
    assert torch.equal(read_weights(tmp_path / "checkpoint.pth").state["fc.bias"], STATE["fc.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_becomes_float32_and_integers_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.tensor([0.5, -2.0], dtype=dtype), "steps": torch.tensor(7)}, tmp_path / "w.safetensors")
    state = read_weights(tmp_path / "w.safetensors").state
    assert state["w"].dtype == torch.float32
    assert state["w"].tolist() == [0.5, -2.0]
    assert state["steps"].dtype == torch.int64


# --- Damage and malice ------------------------------------------------------------------------------------------------


class Hostile:
    """Unpickling this runs a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_executed(tmp_path: Path, suffix: str, zipped: bool) -> None:
    marker, file = tmp_path / "executed", tmp_path / f"weights{suffix}"
    torch.save({"state_dict": {**STATE, "x": Hostile(marker)}}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError) as error:
        read_weights(file)
    message = one_line(error)
    assert str(file) in message
    assert "refused" in message
    assert "system" in message
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the file is as hostile as meant
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_tensors_without_plain_data_are_refused(tmp_path: Path) -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        torch.save({"w": tensor}, tmp_path / "odd.pt")
        with pytest.raises(ModelError, match=r"odd.pt: tensor w is sparse or without data|odd.pt is not a readable"):
            read_weights(tmp_path / "odd.pt")


def test_tied_parameters_are_written_twice(tmp_path: Path) -> None:
    tied = torch.ones(3)
    write_safetensors(tmp_path / "w.safetensors", {"a": tied, "b": tied}, {})
    assert torch.equal(read_weights(tmp_path / "w.safetensors").state["b"], tied)


def test_torchscript_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "RN50.pt")
    with pytest.raises(ModelError, match=r"TorchScript archive.*open_clip:NAME/openai"):
        read_weights(tmp_path / "RN50.pt")


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
OVERLAP = {**GOOD, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a readable safetensors"),
        (b"<html>404</html>", "not a readable safetensors"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "not a readable safetensors"),
        (safetensors_bytes(GOOD, b"\0" * 7), "not a readable safetensors"),
        (safetensors_bytes(OVERLAP, b"\0" * 12), "not a readable safetensors"),
        (safetensors_bytes(b"{not json", b""), "not a readable safetensors"),
        (safetensors_bytes({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 1]}}, b"\0"), "not a readable"),
        (
            safetensors_bytes({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"\0\0"),
            "float8_e4m3fn",
        ),
        (safetensors_bytes({}, b""), "holds no tensors"),
        (safetensors_bytes({**GOOD, "__metadata__": {"shiftlens": "[1"}}, b"\0" * 8), "no JSON object"),
        (safetensors_bytes({**GOOD, "__metadata__": {"shiftlens": "[1]"}}, b"\0" * 8), "no JSON object"),
    ],
)
def test_broken_safetensors_names_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError) as error:
        read_weights(file)
    assert str(file) in one_line(error)
    assert said in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@given(data=st.data())
def test_damaged_bytes_load_or_raise_our_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(STATE, file)  # type: ignore[operator]
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    message = f"{file} is fine"
    try:
        read_weights(file)
    except ModelError as error:
        message = str(error)
    assert str(file) in message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_name_the_tensor(tmp_path: Path, bad: float) -> None:
    save_file({**STATE, "layer4.bn.running_var": torch.tensor([1.0, bad, bad])}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"layer4\.bn\.running_var has 2 NaN or Inf of 3"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"epoch": 3, "lr": 0.1}, "entry 'epoch' is a int"),
        ({}, "holds no tensors"),
    ],
)
def test_torch_files_that_are_no_weights(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=said):
        read_weights(tmp_path / "w.pt")


def test_paths_that_are_no_weight_files(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"x")
    for path, said in ((tmp_path / "none.pt", "no weight file at"), (tmp_path, "no weight file at")):
        with pytest.raises(ModelError, match=said):
            read_weights(path)
    with pytest.raises(ModelError, match="unknown kind of weight file"):
        read_weights(tmp_path / "weights.npz")


# --- Fitting, hashing, writing ----------------------------------------------------------------------------------------


def test_misfit_is_one_short_line(tmp_path: Path) -> None:
    module = nn.Sequential(*[nn.Linear(3, 3) for _ in range(10)])
    state = {**module.state_dict(), **{f"extra.{i}": torch.ones(1) for i in range(9)}, "0.weight": torch.ones(4, 3)}
    del state["3.bias"]
    before = state_sha256(module.state_dict())
    with pytest.raises(ModelError) as error:
        load_into(module, state, "w.pt")
    assert one_line(error) == (
        "w.pt does not fit Sequential: of its 20 tensors 1 missing (3.bias), "
        "9 unexpected (extra.0, extra.1, extra.2, ...), 1 of another shape (0.weight [4, 3] instead of [3, 3])"
    )
    assert state_sha256(module.state_dict()) == before


def test_batch_counters_of_old_files_may_be_absent() -> None:
    module = nn.BatchNorm2d(3)
    state = {name: torch.rand(3) for name in ("weight", "bias", "running_mean", "running_var")}
    load_into(module, state, "w.pt")
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())
    assert misfit(module, {}) == "of its 5 tensors 4 missing (weight, bias, running_mean, ...)"


def test_state_hash_sees_names_types_shapes_and_values_but_not_order() -> None:
    first = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int64)}
    changed: list[dict[str, Tensor]] = [
        {**first, "a": torch.tensor([1.0, 2.5])},
        {**first, "a": torch.tensor([[1.0, 2.0]])},
        {**first, "a": torch.tensor([1.0, 2.0]).to(torch.bfloat16)},
        {"c": first["a"], "b": first["b"]},
        {"a": first["a"]},
    ]
    hashes = [state_sha256(state) for state in (first, *changed)]
    assert len(set(hashes)) == len(hashes)
    assert state_sha256(dict(reversed(first.items()))) == hashes[0]
    assert state_sha256({**first, "a": torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]}) == hashes[0]


def test_written_files_are_equal_bytes_and_read_back(tmp_path: Path) -> None:
    header = {"name": "x", "mean": [0.5], "nested": {"a": 1}, "size": 32, "flag": True}
    write_safetensors(tmp_path / "a.safetensors", STATE, header)
    write_safetensors(tmp_path / "b.safetensors", STATE, header)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    weights = read_weights(tmp_path / "a.safetensors")
    assert weights.metadata == header
    assert state_sha256(weights.state) == state_sha256(STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: the write fails half-way."""
    program = """
import resource, sys, torch
from pathlib import Path
from models import ModelError
from models.weights import write_safetensors
file = Path(sys.argv[1])
write_safetensors(file, {"a": torch.ones(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_safetensors(file, {"a": torch.ones(100_000)}, {})
except ModelError as error:
    print(error)
"""
    file = tmp_path / "w.safetensors"
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, "-c", program, str(file)], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.startswith(f"cannot write {file}: ")
    assert read_weights(file).state["a"].shape == (10,)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_writing_into_a_missing_folder_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot write"):
        write_safetensors(tmp_path / "absent" / "w.safetensors", STATE, {})


# --- Heads ------------------------------------------------------------------------------------------------------------

CLASSES = ["n01", "n02", "n03"]


def test_head_round_trip(tmp_path: Path) -> None:
    weight, bias = torch.randn(3, 5), torch.randn(3)
    save_head(tmp_path / "h.safetensors", weight, bias, CLASSES, normalize=True, metadata={"encoder": "abc"})
    head = load_head(tmp_path / "h.safetensors", CLASSES, feature_dim=5)
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert head.classes == tuple(CLASSES)
    assert head.normalize
    assert head.metadata == {"encoder": "abc"}
    save_head(tmp_path / "h.safetensors", weight, None, CLASSES)
    head = load_head(tmp_path / "h.safetensors")
    assert head.bias.tolist() == [0, 0, 0]
    assert not head.normalize


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["n01", "n03", "n02"], "the same classes in another order than the data: row 1 is 'n02', label 1 is 'n03'"),
        (["n01", "n02", "n09"], "other classes than the data: row 2 is 'n03', label 2 is 'n09'"),
        (["n01", "n02"], "3 classes, the data 2"),
    ],
)
def test_head_of_another_class_order_names_the_first_difference(tmp_path: Path, classes: list[str], said: str) -> None:
    save_head(tmp_path / "h.safetensors", torch.zeros(3, 5), None, CLASSES)
    with pytest.raises(ModelError) as error:
        load_head(tmp_path / "h.safetensors", classes)
    assert said in one_line(error)


def test_head_of_another_width_and_files_that_are_no_heads(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    save_head(file, torch.zeros(3, 5), None, CLASSES)
    with pytest.raises(ModelError, match="takes 5 features, the encoder gives 512"):
        load_head(file, CLASSES, feature_dim=512)
    save_file(STATE, file)
    with pytest.raises(ModelError, match="is no head of this project"):
        load_head(file)
    write_safetensors(file, {"weight": torch.zeros(3, 5), "bias": torch.zeros(2)}, {"classes": CLASSES})
    with pytest.raises(ModelError, match="do not agree"):
        load_head(file)
    for weight, bias, classes in (
        (torch.zeros(3), None, CLASSES),
        (torch.zeros(3, 5), torch.zeros(2), CLASSES),
        (torch.zeros(3, 5), None, ["n01", "n01", "n02"]),
    ):
        with pytest.raises(ValueError, match="do not agree"):
            save_head(file, weight, bias, classes)
