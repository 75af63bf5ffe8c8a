"""Checkpoints are read without running anything of theirs: extras become stubs, hostile pickles are refused."""

from __future__ import annotations

import builtins
import functools
import operator
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_files import extras, lightning, resnet, save
from torch import Tensor, nn

from coss_eval.checkpoints.files import read_checkpoint
from coss_eval.checkpoints.flat_keys import flatten
from coss_eval.checkpoints.load import load_model
from coss_eval.checkpoints.unpickle import HostileCheckpoint, PlainDict, Stub
from coss_eval.errors import CossError

TENSORS: dict[str, Tensor] = {
    "float": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "slice": torch.arange(10.0)[3:7:2],
    "half": torch.ones(3, dtype=torch.float16),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "uint16": torch.ones(3, dtype=torch.uint16),
    "int64": torch.arange(4),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "empty": torch.ones(0, 4),
    "parameter": nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("stubbed", [False, True])
def test_tensors_of_every_kind_survive(stubbed: bool, legacy: bool, tmp_path: Path) -> None:
    younger = {"float8", "uint16"} if legacy else set()  # than the old format, which torch cannot read them from
    tensors = OrderedDict((name, tensor) for name, tensor in TENSORS.items() if name not in younger)
    content = {"state_dict": tensors, **(extras() | lightning() if stubbed else {})}
    found = read_checkpoint(save(content, tmp_path / "file.pth", legacy=legacy))["state_dict"]
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].float(), tensor.detach().float()), name


def test_shared_storage_is_read_once(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    content = {"a": weight, "b": weight, "row": weight[1], "extra": extras()["args"]}
    found = read_checkpoint(save(content, tmp_path / "file.pth"))
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert torch.equal(found["row"], weight[1])


def test_extras_become_stubs_that_remember_their_state(tmp_path: Path) -> None:
    found = read_checkpoint(save(extras() | lightning(), tmp_path / "file.pth"))
    for name in ("args", "cfg", "scheduler", "best", "counts", "phase", "hyper_parameters"):
        assert isinstance(found[name], Stub), name
    assert found["args"].state["lr"] == 0.3
    assert found["cfg"].state["_content"]["method"] == "byol"
    assert repr(found["args"]) == "<stub for argparse.Namespace>"
    assert torch.equal(found["history"], torch.arange(3.0, dtype=torch.float64))  # an array, of its bytes alone
    assert found["epoch"] == 9


def test_a_whole_pickled_module_gives_its_state_dict(tmp_path: Path) -> None:
    net = resnet(0)
    found = read_checkpoint(save(net, tmp_path / "net.pth"))["state_dict"]
    assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_archives_zipped_again_are_read_uncompressed(tmp_path: Path) -> None:
    save({"weight": TENSORS["float"]}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert torch.equal(read_checkpoint(tmp_path / "small.pth")["weight"], TENSORS["float"])


def test_safetensors_bring_their_metadata(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    assert read_checkpoint(tmp_path / "a.safetensors")["__metadata__"] == {"format": "pt"}
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert torch.equal(read_checkpoint(tmp_path / "b.bin")["weight"], torch.ones(2))


class Calls:
    """Pickles as a call of ``function``; unpickled by the ordinary pickle it would run."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def shell(path: Path) -> Any:
    return Calls(os.system, f"touch {path}")


def nested(path: Path) -> Any:
    return OrderedDict({"weight": torch.ones(2), "inner": [{"deep": (shell(path),)}]})


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "os.system": shell,
    "nested": nested,
    "eval": lambda path: Calls(eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Calls(exec, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Calls(open, str(path), "w"),
    "__import__": lambda path: Calls(builtins.__import__, "os"),
    "torch.load": lambda path: Calls(torch.load, str(path)),
    "torch.hub": lambda path: Calls(torch.hub.load, "owner/repository", "model"),
    "pickle.loads": lambda path: Calls(pickle.loads, pickle.dumps(shell(path))),
    "as a state": lambda path: {"args": Stateful(shell(path))},
    "as a key": lambda path: {"state_dict": {("key", 1): {shell(path): 1}}},
}
HARMLESS_AS_STUBS: dict[str, Callable[[Path], Any]] = {
    "Path.touch": lambda path: Calls(Path.touch, path),
    "functools.partial": lambda path: Calls(functools.partial(Path.touch, path)),
    "operator": lambda path: Calls(operator.methodcaller("touch"), path),
    "numpy.load": lambda path: Calls(np.save, str(path), np.zeros(3)),
    "torch.save": lambda path: Calls(torch.save, {}, str(path)),
    "load_from_bytes": lambda path: Calls(torch.storage._load_from_bytes, pickle.dumps(shell(path))),
    "a class of tests": lambda path: Stateful(str(path)),
}


class Stateful:
    """Writes a file when its state is set."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["path"]).touch()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line(name: str, legacy: bool, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    content = {"state_dict": {"weight": torch.ones(2), "payload": HOSTILE[name](marker)}}
    path = save(content, tmp_path / "file.pth", legacy=legacy)
    with pytest.raises(HostileCheckpoint, match="nothing was run") as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HARMLESS_AS_STUBS)
def test_what_is_not_known_to_be_hostile_does_not_run_either(name: str, legacy: bool, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    content = {"state_dict": {"weight": torch.ones(2)}, "payload": HARMLESS_AS_STUBS[name](marker)}
    path = save(content, tmp_path / "file.pth", legacy=legacy)
    assert isinstance(read_checkpoint(path)["payload"], Stub)
    assert not marker.exists()
    assert not marker.with_suffix(".npy").exists()


def test_a_plain_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"x": shell(marker)}, protocol))
        with pytest.raises(CossError):
            read_checkpoint(tmp_path / "plain.pkl")
    assert not marker.exists()


def assemble(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def global_(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


STATE = b"}X\x01\x00\x00\x00x\x8a\x01\x05s"  # {"x": 5}
SLOTS = b"N" + STATE + b"\x86"  # (None, {"x": 5}): what BUILD sets attribute by attribute


def raw(path: Path, *opcodes: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", assemble(*opcodes))
        archive.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize("name", ["getattr", "__import__"])
def test_a_chain_of_calls_runs_nothing(name: str, tmp_path: Path) -> None:
    """getattr(__import__("os"), "system")("touch it-ran"), and the same with getattr for __import__."""
    text = b"X\x02\x00\x00\x00os"
    module = (
        global_(f"builtins.{name}")
        + text
        + (text if name == "getattr" else b"")
        + (b"\x86R" if name == "getattr" else b"\x85R")
    )
    call = b"X%b" % len(command := f"touch {tmp_path}/it-ran".encode()).to_bytes(4, "little") + command
    chain = global_("builtins.getattr") + module + b"X\x06\x00\x00\x00system\x86R" + call + b"\x85R"
    path = raw(tmp_path / "file.pth", b"}X\x01\x00\x00\x00x", chain, b"s")
    if name == "getattr":
        assert isinstance(read_checkpoint(path)["x"], Stub)
    else:
        with pytest.raises(HostileCheckpoint, match=r"builtins\.__import__"):
            read_checkpoint(path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("state", [STATE, SLOTS], ids=["state", "slots"])
@pytest.mark.parametrize(
    "target",
    [
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.storage.UntypedStorage",
        "torch.float32",
        "torch.Size",
        "collections.OrderedDict",
        "argparse.Namespace",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
    ],
)
def test_a_pickle_cannot_change_what_it_names(target: str, state: bytes, tmp_path: Path) -> None:
    """BUILD on a class or function would set attributes on it, for the whole process."""
    path = raw(tmp_path / "file.pth", global_(target), state, b"b")
    with pytest.raises(CossError):
        read_checkpoint(path)
    for holder in (torch.Tensor, nn.Parameter, torch.UntypedStorage, torch.Size, OrderedDict, Stub, PlainDict):
        assert not hasattr(holder, "x")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "x")


def test_a_pickle_cannot_hide_methods_of_its_dictionaries(tmp_path: Path) -> None:
    ordered = (
        global_("collections.OrderedDict") + b")R" + STATE.replace(b"x", b"items").replace(b"\x01", b"\x05", 1) + b"b"
    )
    path = raw(tmp_path / "file.pth", b"}X\x01\x00\x00\x00d", ordered, b"s")
    found = read_checkpoint(path)
    assert found["d"].items == 5
    assert flatten(found) == {}
    with pytest.raises(CossError, match="no tensors"):
        load_model(path)


def test_what_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"weight": torch.ones(2)}
    content["state_dict"] = content
    with pytest.raises(CossError, match="holds itself"):
        load_model(save(content, tmp_path / "dict.pth"))
    module = nn.Module()
    module._modules["child"] = module
    with pytest.raises(CossError, match="holds itself"):
        load_model(save({"model": module}, tmp_path / "module.pth"))


def bad(kind: str, folder: Path) -> Path:
    path = folder / "file.pth"
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("truncated"):
        legacy = "legacy" in kind
        save({"state_dict": resnet(0).state_dict(), **({} if "plain" in kind else extras())}, path, legacy=legacy)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * float(kind.rpartition(" ")[2]))])
    elif kind == "TorchScript":
        with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save lays it out
            for name in ("data.pkl", "constants.pkl", "version", "code/__torch__.py"):
                archive.writestr(f"archive/{name}", b"3\n")
    elif kind == "safetensors":
        safetensors.torch.save_file({"weight": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "tensor":
        torch.save(torch.ones(3), path)
    elif kind != "missing":
        texts = {"text": b"import torch\n", "empty": b"", "git-lfs": b"version https://git-lfs.github.com/spec/v1\n"}
        path.write_bytes(texts.get(kind, b"\x80\x02\xff\xff\xff"))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder that holds no checkpoint: give the file"),
        ("text", "is not a checkpoint: expected a torch file or .safetensors, it starts with b'import torch"),
        ("empty", "is empty"),
        ("git-lfs", "git lfs pull"),
        ("truncated 0.001", "truncated or damaged"),
        ("truncated 0.5", "truncated or damaged"),
        ("truncated 0.99", "truncated or damaged"),
        ("truncated plain 0.5", "truncated or damaged"),
        ("truncated legacy 0.001", "truncated or damaged"),
        ("truncated legacy 0.5", "truncated or damaged"),
        ("truncated legacy plain 0.99", "truncated or damaged"),
        ("garbage", "truncated or damaged"),
        ("safetensors", "truncated or damaged"),
        ("TorchScript", "TorchScript"),
        ("tensor", "holds a Tensor; expected a dictionary"),
    ],
)
def test_what_is_no_checkpoint_says_so_in_one_line(kind: str, message: str, tmp_path: Path) -> None:
    path = bad(kind, tmp_path)
    with pytest.raises(CossError, match=message) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)
    assert "file.pth" in str(raised.value)
