"""Facts about weights that others saved: what is read, what is refused, and that nothing of them is run."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsi_anomaly.checkpoints import fill, read_state_dict
from wsi_anomaly.errors import ModelError

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


class Command:
    """An object whose pickle makes a folder when it is loaded without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def network() -> nn.Module:
    """Takes what `WEIGHTS` holds; it lies on the meta device and so has no numbers of its own."""
    with torch.device("meta"):
        return nn.Sequential(OrderedDict(layer=nn.Linear(3, 2)))


def save_plain(content: object, path: Path) -> None:
    """A pickle as Python writes it."""
    path.write_bytes(pickle.dumps(content))


def save_old(content: object, path: Path) -> None:
    """A pickle as PyTorch wrote it before 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_safetensors_are_read_whatever_their_name(name: str, tmp_path: Path) -> None:
    """The content decides."""
    save_file(WEIGHTS, tmp_path / name)
    assert_same(read_state_dict(tmp_path / name))


@pytest.mark.parametrize("save", [torch.save, save_old])
def test_pickles_of_pytorch_are_read(save: Callable[..., None], tmp_path: Path) -> None:
    """The one of today, which is read through a memory map, and the one before it, which cannot be."""
    save(WEIGHTS, tmp_path / "model.bin")
    assert_same(read_state_dict(tmp_path / "model.bin"))


def test_a_state_dict_of_parallel_training_is_found(tmp_path: Path) -> None:
    """Below its key, and without the prefix that every name has."""
    content = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}}
    torch.save(content, tmp_path / "model.bin")
    assert_same(read_state_dict(tmp_path / "model.bin"))


def test_a_prefix_that_only_some_names_have_is_part_of_them(tmp_path: Path) -> None:
    """It is dropped from all or from none."""
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.bin")
    assert list(read_state_dict(tmp_path / "model.bin")) == ["module.a", "b"]


@pytest.mark.parametrize("save", [torch.save, save_old, save_plain])
def test_a_pickle_that_carries_code_is_refused_and_not_run(save: Callable[..., None], tmp_path: Path) -> None:
    """The message says how to convert a file that one trusts."""
    save({"layer.weight": Command(tmp_path / "was-run")}, tmp_path / "model.bin")
    with pytest.raises(ModelError, match=r"model\.bin: carries .*would run it.*as safetensors.*convert it"):
        read_state_dict(tmp_path / "model.bin")
    assert not (tmp_path / "was-run").exists()


def test_code_that_a_pickle_carries_is_named(tmp_path: Path) -> None:
    """A whole network, say, saved instead of its state dict."""
    torch.save(nn.Linear(2, 2), tmp_path / "model.bin")
    with pytest.raises(ModelError, match=r"carries code \(torch\.nn\.modules\.linear\.Linear\)"):
        read_state_dict(tmp_path / "model.bin")


def test_a_compiled_program_is_refused(tmp_path: Path) -> None:
    """TorchScript is code too; only the names inside the archive tell it from weights."""
    torch.save(WEIGHTS, tmp_path / "weights.bin")
    content = io.BytesIO((tmp_path / "weights.bin").read_bytes())
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("weights/constants.pkl", b"")
    (tmp_path / "model.bin").write_bytes(content.getvalue())
    with pytest.raises(ModelError, match="carries more than tensors"):
        read_state_dict(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("content", "described"),
    [
        ([torch.ones(1)], "but a list"),
        ({}, "but an empty table"),
        ({"a": torch.ones(1), "epoch": 3}, r"1 other entries \('epoch': int\)"),
        ({1: torch.ones(1)}, r"1 other entries \(1: Tensor\)"),
        ({"state_dict": {"a": 1, "b": 2, "c": 3, "d": 4}}, r"4 other entries \('a': int, 'b': int, 'c': int, \.\.\.\)"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused(content: object, described: str, tmp_path: Path) -> None:
    """The message says what it is instead."""
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(ModelError, match=f"is no state dict, .*{described}.* Give the file"):
        read_state_dict(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 7, 60, -1, -100])
def test_cut_off_files_are_refused(name: str, size: int, tmp_path: Path) -> None:
    """Wherever they end."""
    save = save_file if name == "model.safetensors" else torch.save
    save(WEIGHTS, tmp_path / "whole")
    (tmp_path / name).write_bytes((tmp_path / "whole").read_bytes()[:size])
    with pytest.raises(ModelError, match=f"{name}: is damaged, or no file of weights .*fetch it again"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1", "some text"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    """What a failed download leaves: a page, a pointer, anything."""
    (tmp_path / "model.bin").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="is damaged, or no file of weights"):
        read_state_dict(tmp_path / "model.bin")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    """And a folder in its place cannot be read."""
    with pytest.raises(ModelError, match=r"model\.bin: the weights are missing"):
        read_state_dict(tmp_path / "model.bin")
    with pytest.raises(ModelError, match="the weights cannot be read"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_cast_to_what_the_network_computes_in(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half precision is common in files."""
    layer = network()
    fill(layer, {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}, path=tmp_path, remedy="")
    assert_same(layer.state_dict())


def test_filled_in_weights_are_copies(tmp_path: Path) -> None:
    """A file that is replaced later does not change a loaded model."""
    weights, layer = {name: tensor.clone() for name, tensor in WEIGHTS.items()}, network()
    fill(layer, weights, path=tmp_path, remedy="")
    weights["layer.bias"].zero_()
    assert_same(layer.state_dict())


def test_only_what_is_ignored_may_be_left_over(tmp_path: Path) -> None:
    """The ends of names do not count, their beginnings do."""
    extra = WEIGHTS | {"decoder.weight": torch.ones(1)}
    fill(network(), extra, path=tmp_path, ignored=("decoder.",), remedy="")
    with pytest.raises(ModelError, match=r"architecture: 1 unexpected \(decoder\.weight\)\. Do this\.$"):
        fill(network(), extra, path=tmp_path, ignored=("weight",), remedy="Do this.")


def test_every_kind_of_difference_is_counted_and_named(tmp_path: Path) -> None:
    """The first three of each."""
    wrong = {"layer.weight": torch.ones(2, 4)} | {f"other.{number}": torch.ones(1) for number in range(4)}
    expected = (
        r"1 missing \(layer\.bias\); 4 unexpected \(other\.0, other\.1, other\.2, \.\.\.\); "
        r"1 of another shape \(layer\.weight is \[2, 4\], not \[2, 3\]\)"
    )
    with pytest.raises(ModelError, match=expected):
        fill(network(), wrong, path=tmp_path, remedy="")


def assert_same(found: dict[str, torch.Tensor]) -> None:
    """The very numbers of `WEIGHTS`, in single precision."""
    assert found.keys() == WEIGHTS.keys()
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
