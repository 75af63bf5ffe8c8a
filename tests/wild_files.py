"""Files as people have them, small: other containers, archives, formats and folders around a narrow ResNet-18."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def randomised(network: nn.Module, seed: int = 0) -> Any:
    """Weights and running statistics that differ from layer to layer, in eval mode: nothing matches by accident."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            tensor.uniform_(-0.2, 0.2, generator=generator)
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.8, 1.2, generator=generator)
        elif tensor.ndim > 1 and tensor.is_floating_point():
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5 if tensor.shape[0] > 1 else 0.2, generator=generator)
    return network.eval()


def _torch(wrap: Callable[[State], Any]) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        torch.save(wrap(state), folder / "net.pth")
        return folder / "net.pth"

    return write


def _pickle(convert: Callable[[State], Any], protocol: int) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        (folder / "net.pkl").write_bytes(pickle.dumps(convert(state), protocol))
        return folder / "net.pkl"

    return write


def _arrays(state: State) -> dict[str, Any]:
    return {"model": {key: value.numpy() for key, value in state.items()}, "__author__": "somebody"}


def _npz(state: State, folder: Path) -> Path:
    np.savez_compressed(folder / "net.npz", **{key: value.numpy() for key, value in state.items()})
    return folder / "net.npz"


def _bytes(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer)
    return buffer.getvalue()


def _zip(state: State, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "net.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("run/readme.txt", "weights")
        archive.writestr("run/best.pth", _bytes(state))
    return folder / "net.zip"


def _tar(mode: str, name: str) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        content = _bytes(state)
        with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
            info = tarfile.TarInfo("run/best.pth")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return folder / name

    return write


def _folder(state: State, folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "run" / "args.json").write_text("{}")
    (folder / "run" / "best.pth").write_bytes(_bytes(state))
    return folder / "run"


def _sharded(state: State, folder: Path) -> Path:
    keys = list(state)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, part in parts.items():
        safetensors.torch.save_file({key: state[key].contiguous() for key in part}, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class _OfCode(nn.Module):
    """Pickled as a class of a package called ``code``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def _from_package_code(network: nn.Module) -> Callable[[State, Path], Path]:
    def write(_state: State, folder: Path) -> Path:
        package, module = ModuleType("code"), ModuleType("code.nets")
        module.Net = _OfCode  # type: ignore[attr-defined]
        replaced = {name: sys.modules.get(name) for name in ("code", "code.nets")}
        sys.modules |= {"code": package, "code.nets": module}
        kept = _OfCode.__module__, _OfCode.__qualname__
        _OfCode.__module__, _OfCode.__qualname__ = "code.nets", "Net"
        try:
            torch.save({"net": _OfCode(network), "epoch": 1}, folder / "net.pth")
        finally:
            _OfCode.__module__, _OfCode.__qualname__ = kept
            for name, former in replaced.items():
                sys.modules.pop(name)
                if former is not None:
                    sys.modules[name] = former
        return folder / "net.pth"

    return write


def containers(network: nn.Module) -> dict[str, Callable[[State, Path], Path]]:
    """Every way to keep one network's state dict: name to a function that writes it and says where."""
    return {
        "a list of one": _torch(
            lambda state: {"state_dict": [OrderedDict(state)], "rng_state": [torch.get_rng_state()]}
        ),
        "a list alone": _torch(lambda state: [state, {"lr": 0.1}]),
        "optimal_state_dict": _torch(lambda state: {"optimal_state_dict": state, "epoch": 3}),
        "best_loss_model": _torch(lambda state: {"best_loss_model": state, "losses": [0.5, 0.4]}),
        "three deep": _torch(lambda state: {"run": {"best": {"model": state}}, "optimizer": {"state": state}}),
        "a class of a package called code": _from_package_code(network),
        "pickle.dump": _pickle(dict, 4),
        "pickle.dump, protocol 5": _pickle(dict, 5),
        "pickled arrays": _pickle(_arrays, 4),
        "pickled arrays, protocol 5": _pickle(_arrays, 5),
        "arrays in a torch file": _torch(_arrays),
        "npz": _npz,
        "zip": _zip,
        "tar": _tar("w", "net.tar"),
        "tar.gz": _tar("w:gz", "net.tar.gz"),
        "a folder": _folder,
        "shards": _sharded,
    }


def _zip_of(*names: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"1")
        return path

    return write


def _starts_with(content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content + bytes(200))
        return path

    return write


def _torchscript(path: Path) -> Path:
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), str(path))
    return path


def _exported(path: Path) -> Path:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), str(path))
    return path


OTHER_FORMATS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "TorchScript": ("net.pt", _torchscript, r"TorchScript archive.*torch\.jit\.load.*state_dict.*--arch"),
    "torch.export": ("net.pt2", _exported, r"torch\.export wrote.*state_dict.*--arch"),
    "ONNX": ("net.onnx", _starts_with(b"\x08\x07\x12\x07pytorch"), "ONNX file.*state_dict.*--arch"),
    "HDF5": ("net.h5", _starts_with(b"\x89HDF\r\n\x1a\n"), "HDF5 file.*Keras.*PyTorch"),
    "Keras": ("net.keras", _zip_of("metadata.json", "config.json", "model.weights.h5"), "Keras archive.*PyTorch"),
    "gzip": ("net.pth.gz", _starts_with(b"\x1f\x8b\x08"), "gzip: unpack it"),
    "a web page": ("net.pth", _starts_with(b"<!DOCTYPE html><html>"), "web page.*download the file itself"),
    "an image": ("net.png", _starts_with(b"\x89PNG\r\n"), "an image.*--data"),
    "GGUF": ("net.gguf", _starts_with(b"GGUF\x03"), "GGUF"),
    "two in a zip": (
        "net.zip",
        _zip_of("a.pth", "b.pth"),
        "an archive that holds several checkpoints .a.pth, b.pth.: unpack it",
    ),
    "none in a zip": ("net.zip", _zip_of("a.txt"), "an archive that holds no checkpoint: give the file"),
}


def hugging_face_resnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's tensors under transformers' names."""
    parts = {"conv": "convolution", "bn": "normalization"}
    result = {}
    for key, value in state.items():
        name = re.sub(r"^(conv|bn)1\.", lambda m: f"embedder.embedder.{parts[m[1]]}.", key)
        name = re.sub(
            r"^layer(\d)\.(\d)\.(conv|bn)(\d)\.",
            lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.layer.{int(m[4]) - 1}.{parts[m[3]]}.",
            name,
        )
        name = re.sub(
            r"^layer(\d)\.(\d)\.downsample\.(\d)\.",
            lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut.{list(parts.values())[int(m[3])]}.",
            name,
        )
        result[f"classifier.1.{name[3:]}" if name.startswith("fc.") else f"resnet.{name}"] = value
    return result
