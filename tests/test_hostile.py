"""Files from strangers: each is refused in one line or left out and counted, in bounded memory and time.

The corpus is made here, each file small: what it asks for is large, endless, or not its to ask.
"""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import coss_eval as ce
from coss_eval.checkpoints.load import make_model, save_model
from coss_eval.data.batches import Geometry
from coss_eval.errors import CossError
from coss_eval.models.zoo import network
from coss_eval.store import Store

Write = Callable[[Path], Any]
ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b"  # sets a terminal's title and colours


class Case(NamedTuple):
    """A file and what reading it has to come to: ``says`` is a pattern of the one line, or of what was left out."""

    action: str
    says: str
    write: Write


CASES: dict[str, Case] = {}


def case(action: str, says: str) -> Callable[[Write], Write]:
    """Enter a writer into the corpus: it writes into an empty folder and gives what to open."""

    def enter(write: Write) -> Write:
        CASES[write.__name__] = Case(action, says, write)
        return write

    return enter


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved(at: Path, content: Any, **options: Any) -> Path:
    torch.save(content, at / "a.pth", **options)
    return at / "a.pth"


def pickled(at: Path, content: Any) -> Path:
    (at / "a.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return at / "a.pkl"


def opcodes(at: Path, body: bytes) -> Path:
    (at / "a.pkl").write_bytes(b"\x80\x02" + body + b".")
    return at / "a.pkl"


def shared(leaf: Any, levels: int = 40) -> Any:
    for _ in range(levels):
        leaf = {"a": leaf, "b": leaf}
    return leaf


def rezipped(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """A torch file written again with other records."""
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, content in records.items():
            new.writestr(name, change(name, content))
    return path


def weights(width: int = 8) -> dict[str, torch.Tensor]:
    return network("resnet18", stem="cifar", width=width, num_classes=3).state_dict()


@case("model", "places")
def shared_dicts(at: Path) -> Path:
    return saved(at, shared({"conv1.weight": torch.zeros(2)}))


@case("model", "places")
def shared_lists(at: Path) -> Path:
    leaf: Any = [torch.zeros(2)]
    for _ in range(40):
        leaf = [leaf, leaf]
    return saved(at, {"state_dict": leaf})


@case("model", "places")
def shared_plain_pickle(at: Path) -> Path:
    return pickled(at, shared({"conv1.weight": np.zeros(2)}))


@case("model", "places")
def shared_modules(at: Path) -> Path:
    module: nn.Module = nn.Linear(2, 2)
    for _ in range(40):
        module = nn.ModuleDict({"a": module, "b": module})
    return saved(at, module)


@case("model", "as keys|tuples")
def keys_that_take_ages_to_hash(at: Path) -> Path:
    body = b"}(K\x01"  # {, MARK, 1; then (x, x) of it, 60 times
    return opcodes(at, body[:2] + b"K\x01" + b"2\x86" * 60 + b"K\x02u")


@case("model", "damaged|no checkpoint|refers")
def memo_of_gigabytes(at: Path) -> Path:
    return opcodes(at, b"}r\xff\xff\xff\x1f")


@case("model", "truncated|damaged")
def text_of_gigabytes(at: Path) -> Path:
    return opcodes(at, b"\x8e" + struct.pack("<Q", 2**42))


@case("model", "damaged|no checkpoint|holds a")
def lists_in_lists(at: Path) -> Path:
    return opcodes(at, b"]" * 200_000 + b"a" * 199_999)


@case("model", "no tensors")
def huge_integer_keys(at: Path) -> Path:
    return pickled(at, {10**5000: 1, "b": {10**5000: 2}})


@case("model", "says that")
def storage_larger_than_its_record(at: Path) -> Path:
    """A tensor over bytes that are not there: read, they would be those of the process's own memory."""
    path = saved(at, {"conv1.weight": torch.zeros(1000)})
    return rezipped(path, lambda name, content: content[:64] if name.endswith("data/0") else content)


@case("model", "says that")
def storage_larger_than_its_record_deflated(at: Path) -> Path:
    path = saved(at, {"conv1.weight": torch.zeros(1000)})
    return rezipped(
        path, lambda name, content: content[:64] if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED
    )


@case("model", "says that|truncated")
def old_format_with_a_storage_of_terabytes(at: Path) -> Path:
    path = saved(at, {"w": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"M\xe8\x03N", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"N", 1))
    return path


@case("model", "would unpack")
def deflated_to_gigabytes(at: Path) -> Path:
    """A gigabyte of zeros for each megabyte: still fewer than the records say in all."""
    with zipfile.ZipFile(at / "a.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        inner = io.BytesIO()
        torch.save({f"w{i}": torch.zeros(1) for i in range(6)}, inner)
        with zipfile.ZipFile(inner) as old:
            for info in old.infolist():
                large = "/data/" in info.filename
                archive.writestr(info.filename, bytes(60 * 2**20) if large else old.read(info))
    return at / "a.pth"


@case("model", "twice")
def two_records_of_one_name(at: Path) -> Path:
    path = saved(at, weights())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("A/DATA.PKL", b"\x80\x02}.")
    return path


@case("model", "flipped|checksum|CRC|damaged")
def flipped_bytes(at: Path) -> Path:
    path = saved(at, weights())
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 400, 4):
        content[place + 3] ^= 0x40
    path.write_bytes(content)
    return path


@case("model", "no weight|implausible")
def weights_of_1e37(at: Path) -> Path:
    state = weights()
    state["layer1.0.conv1.weight"].view(-1)[3] = 7e37
    safetensors.torch.save_file(state, at / "a.safetensors")
    return at / "a.safetensors"


@case("model", "giant|larger than the file")
def names_a_giant_of_timm(at: Path) -> Path:
    safetensors.torch.save_file({"blocks.0.odd.weight": torch.zeros(4, 4), "x.y": torch.zeros(3)}, at / "a.safetensors")
    (at / "config.json").write_text(json.dumps({"architecture": "vit_giant_patch14_dinov2"}))
    return at / "a.safetensors"


@case("model", "loaded resnet18")
def looks_like_a_giant_of_timm(at: Path) -> Path:
    """A ResNet-18 whose file is said to be another network: it is built to compare the two."""
    torch.save({"arch": "vit_giant_patch14_dinov2", "state_dict": weights()}, at / "a.pth")
    return at / "a.pth"


def own_file(at: Path, **fields: Any) -> Path:
    save_model(make_model("resnet18", stem="cifar", width=8), at / "a.safetensors")
    with safetensors.safe_open(at / "a.safetensors", "pt") as file:
        config = json.loads(file.metadata()["coss_eval"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config["architecture"] |= {name: value for name, value in fields.items() if name in config["architecture"]}
    config |= {name: value for name, value in fields.items() if name in config}
    safetensors.torch.save_file(state, at / "a.safetensors", {"coss_eval": json.dumps(config)})
    return at / "a.safetensors"


@case("model", "width|larger than the file")
def own_width_of_100000(at: Path) -> Path:
    return own_file(at, width=100_000)


@case("model", "larger than the file|blocks|at most")
def own_vit_of_a_million_blocks(at: Path) -> Path:
    return own_file(at, arch="vit_d64_l1000000_h1_p16", width=64, stem="imagenet", img_size=32)


@case("model", "metadata")
def own_vit_for_images_of_a_kilometre(at: Path) -> Path:
    return own_file(at, arch="vit_d64_l1_h1_p1", width=64, stem="imagenet", img_size=1_000_000)


@case("model", "metadata")
def own_width_of_text(at: Path) -> Path:
    return own_file(at, width="wide")


@case("model", "metadata")
def own_preprocessing_of_text(at: Path) -> Path:
    return own_file(at, preprocessing={"mean": "a", "std": [None], "img_size": "x", "crop_pct": {}})


@case("model", "metadata")
def own_metadata_of_lists(at: Path) -> Path:
    return own_file(at, classes=7, architecture=["resnet18"])


@case("model", "would take")
def tensor_of_one_number_repeated(at: Path) -> Path:
    """Stride 0: a convolution of a trillion weights that is four bytes in the file."""
    state = dict(weights())
    state["conv1.weight"] = torch.zeros(1).expand(100_000, 3, 1000, 1000)
    return saved(at, state)


@case("model", "would take")
def sparse_tensor_of_terabytes(at: Path) -> Path:
    huge = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6))
    return saved(at, {**weights(), "fc.weight": huge})


@case("model", "stem")
def sparse_tensor_in_odd_layout(at: Path) -> Path:
    return saved(at, {**weights(), "conv1.weight": torch.eye(8).to_sparse_csr()})


@case("model", "quantised")
def quantised_tensor(at: Path) -> Path:
    return saved(
        at, {**weights(), "conv1.weight": torch.quantize_per_tensor(torch.ones(8, 3, 3, 3), 0.1, 0, torch.qint8)}
    )


@case("model", "meta device")
def meta_tensor(at: Path) -> Path:
    return saved(at, {**weights(), "conv1.weight": torch.ones(8, 3, 3, 3, device="meta")})


@case("model", "complex")
def complex_tensor(at: Path) -> Path:
    return saved(at, {**weights(), "conv1.weight": torch.ones(8, 3, 3, 3, dtype=torch.complex64)})


class Odd:
    """A module's class that is not there when it is read."""

    def __init__(self, **state: Any) -> None:
        self.__dict__ |= state


@case("model", "no tensors|tensors")
def module_with_odd_fields(at: Path) -> Path:
    odd = Odd(_modules={3: Odd(_modules=[1], _parameters=7), "a": Odd(_modules={}, _parameters=[1], _buffers="x")})
    return saved(at, odd)


@case("model", "no tensors|tensors")
def module_with_odd_keys(at: Path) -> Path:
    odd = Odd(_modules={"": Odd(_modules={}, _parameters={4: torch.ones(3), None: torch.ones(2)})}, _parameters={})
    return saved(at, {"state_dict": odd})


@case("model", "refers to itself|names itself|index")
def index_that_names_itself(at: Path) -> Path:
    (at / "a.index.json").write_text(json.dumps({"weight_map": {"x": "a.index.json"}}))
    return at / "a.index.json"


@case("model", "index|larger")
def index_of_gigabytes(at: Path) -> Path:
    (at / "a.index.json").touch()
    os.truncate(at / "a.index.json", 8 * 2**30)
    return at / "a.index.json"


@case("model", "config.json|cannot be read")
def config_beside_of_brackets(at: Path) -> Path:
    (at / "config.json").write_text("[" * 200_000)
    return saved(at, weights())


@case("model", "no known network")
def config_beside_of_junk(at: Path) -> Path:
    config = {"architecture": "resnet18", "pretrained_cfg": {name: [[{}]] for name in ("mean", "std", "input_size")}}
    config["pretrained_cfg"] |= {"crop_pct": "x", "interpolation": []}
    (at / "config.json").write_text(json.dumps(config))
    return saved(at, weights())


@case("model", "regular file|no file")
def pipe_as_checkpoint(at: Path) -> Path:
    os.mkfifo(at / "a.pth")
    return at / "a.pth"


@case("model", "regular file|no file")
def device_as_checkpoint(at: Path) -> Path:
    (at / "a.pth").symlink_to("/dev/zero")
    return at / "a.pth"


@case("model", "does not exist|leads|loop")
def link_to_itself_as_checkpoint(at: Path) -> Path:
    (at / "a.pth").symlink_to("a.pth")
    return at / "a.pth"


@case("model", "would unpack|header")
def tar_with_a_header_of_gigabytes(at: Path) -> Path:
    """A pax header is read whole, before its file is looked at."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 3 * 2**30
    packer = zlib.compressobj(9, wbits=31)
    with (at / "a.tar").open("wb") as file:
        file.write(packer.compress(info.tobuf(tarfile.USTAR_FORMAT)))
        file.write(packer.compress(bytes(2**24)))
        file.write(packer.flush())
    return at / "a.tar"


@case("model", "holds more than|members")
def tar_of_a_million_files(at: Path) -> Path:
    info = tarfile.TarInfo("x")
    with gzip.open(at / "a.tar.gz", "wb", compresslevel=1) as file:
        for number in range(11_000):
            info.name = f"x/{number}"
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
    return at / "a.tar.gz"


@case("model", "holds no checkpoint|no checkpoint")
def tar_of_links_and_devices(at: Path) -> Path:
    with tarfile.open(at / "a.tar", "w") as tar:
        for name, kind, link in (
            ("a.pth", tarfile.SYMTYPE, "/etc/passwd"),
            ("b.pth", tarfile.LNKTYPE, "../../etc/passwd"),
            ("c.pth", tarfile.FIFOTYPE, ""),
            ("d.pth", tarfile.CHRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    return at / "a.tar"


@case("model", "would unpack")
def tar_with_a_hole_of_terabytes(at: Path) -> Path:
    info = tarfile.TarInfo("a.pth")
    info.size = 2**42
    (at / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    return at / "a.tar"


@case("model", "holds more than|members")
def zip_of_many_files(at: Path) -> Path:
    with zipfile.ZipFile(at / "a.zip", "w") as archive:
        for number in range(10_500):
            archive.writestr(f"{number}.txt", b"")
    return at / "a.zip"


@case("model", "no checkpoint")
def zip_with_names_that_lead_out(at: Path) -> Path:
    with zipfile.ZipFile(at / "a.zip", "w") as archive:
        archive.writestr("../../../../tmp/coss-eval-was-here.txt", b"x")
        archive.writestr(f"{ESCAPE}.txt", b"x")
    return at / "a.zip"


@case("model", "leads out of it")
def tar_with_names_that_lead_out(at: Path) -> Path:
    with tarfile.open(at / "a.tar", "w") as tar:
        for name in ("/a.txt", f"../../{ESCAPE}.pth"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return at / "a.tar"


@case("model", "truncated|damaged|header")
def safetensors_with_a_header_of_exabytes(at: Path) -> Path:
    (at / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + b'{"')
    return at / "a.safetensors"


@case("model", "damaged|tensors|no numbers")
def npz_with_a_shape_of_exabytes(at: Path) -> Path:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"
    header += b" " * (127 - 10 - len(header) % 64) + b"\n"
    with zipfile.ZipFile(at / "a.npz", "w") as archive:
        archive.writestr("conv1.weight.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    return at / "a.npz"


# --- images -----------------------------------------------------------------------------------------------------------


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A grey PNG of a size, all zeros, packed as well as can be; ``more`` chunks come before its pixels."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height if width * height < 2**29 else 0))
    rows += packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


GOOD = png(np.random.default_rng(0).integers(0, 255, (40, 48, 3)))


def folder_with(at: Path, name: str, content: bytes | None = None) -> Path:
    """A set of two good images, and one that is not; the place of the third, to be filled, where it has no content."""
    for label in ("a", "b"):
        (at / "test" / label).mkdir(parents=True)
        (at / "test" / label / "good.png").write_bytes(GOOD)
    place = at / "test" / "a" / name
    if content is not None:
        place.write_bytes(content)
    return place


IMAGES: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "thin_png": ("x.png", "pixels", lambda: png_of(1, 60_000)),
    "wide_png": ("x.png", "pixels", lambda: png_of(60_000, 1)),
    "png_of_billions": ("x.png", "pixels|size", lambda: png_of(2**31 - 1, 2**31 - 1)[:2000]),
    "png_of_300_million": ("x.png", "pixels|size", lambda: png_of(17_500, 17_500)),
    "png_cut_short": ("x.png", "truncated|not", lambda: GOOD[:100]),
    "png_with_text_of_gigabytes": (
        "x.png",
        "text|[Ll]arge",
        lambda: png_of(9, 9, *(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**23), 9)) for _ in range(8))),
    ),
    "png_with_profile_of_gigabytes": (
        "x.png",
        "",
        lambda: png_of(9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**25), 9))),
    ),
    "eps_named_png": (
        "x.png",
        "not an image",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n",
    ),
    "eps_in_a_binary_wrapper": (
        "x.jpg",
        "not an image",
        lambda: (
            b"\xc5\xd0\xd3\xc6"
            + struct.pack("<II", 30, 60)
            + bytes(18)
            + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n"
        ),
    ),
    "postscript_named_tif": ("x.tif", "not an image", lambda: b"%!PS\n" * 50),
    "svg_named_png": ("x.png", "not an image", lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="1e9"/>'),
    "html_named_jpg": ("x.jpg", "not an image", lambda: b"<script>alert(1)</script>"),
    "wmf_named_bmp": ("x.bmp", "not an image", lambda: b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(80)),
    "psd_named_png": (
        "x.png",
        "not an image",
        lambda: b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 40, 40, 8, 3) + bytes(60),
    ),
    "ico_of_many": ("x.png", "not an image", lambda: b"\0\0\1\0\xff\xff" + bytes(16 * 100)),
    "fits_named_png": ("x.png", "not an image", lambda: b"SIMPLE  =                    T".ljust(80) * 40),
    "pdf_named_png": ("x.png", "not an image", lambda: b"%PDF-1.7\n" * 20),
    "pickle_named_png": ("x.png", "not an image", lambda: pickle.dumps(Odd)),
    "empty": ("x.png", "not an image", lambda: b""),
    "one_byte": ("x.png", "not an image", lambda: b"\x89"),
    "zeros": ("x.jpg", "not an image", lambda: bytes(1000)),
    "ppm_of_billions": ("x.ppm", "pixels|size|truncated", lambda: b"P6\n99999 99999\n255\n"),
    "ppm_with_endless_header": ("x.ppm", "", lambda: b"P6\n" + b"9" * 100_000),
    "ppm_of_100_million_and_no_pixels": ("x.ppm", "truncated|fewer", lambda: b"P6\n12000 12000\n255\n" + bytes(12)),
    "pgm_of_100_million_and_no_pixels": ("x.pgm", "truncated|fewer", lambda: b"P5\n12000 12000\n65535\n" + bytes(12)),
    "bmp_of_billions": (
        "x.bmp",
        "pixels|size|truncated",
        lambda: b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
    ),
    "bmp_of_100_million_and_no_pixels": (
        "x.bmp",
        "pixels|truncated|fewer",
        lambda: b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, 12_000, 12_000, 1, 24, 0, 0, 0, 0, 0, 0),
    ),
    "gif_of_billions": (
        "x.gif",
        "pixels|size",
        lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(20),
    ),
    "tiff_of_billions": ("x.tif", "pixels|size|not|tag", lambda: tiff(2**31 - 1, 2**31 - 1)),
    "tiff_of_100_million_and_no_pixels": ("x.tif", "truncated|fewer|not", lambda: tiff(12_000, 12_000)),
    "tiff_with_a_billion_tags": (
        "x.tif",
        "not an image|tag|unpack",
        lambda: b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 100,
    ),
    "tiff_that_points_to_itself": ("x.tif", "", lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    "tiff_with_values_of_gigabytes": ("x.tif", "", lambda: tiff(40, 40, count=2**30)),
    "webp_of_billions": (
        "x.webp",
        "not an image|pixels|cannot be decoded",
        lambda: b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff" + bytes(8),
    ),
    "jpeg_of_billions": ("x.jpg", "pixels|size|truncated|not", lambda: jpeg_of(65500, 65500)),
    "jpeg_thin": ("x.jpg", "pixels|truncated", lambda: jpeg_of(1, 65500)),
    "jpeg_2000_of_billions": ("x.png", "pixels|size|not|broken", lambda: jp2(2**31 - 1, 2**31 - 1)),
}


def tiff(width: int, height: int, count: int = 1) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, count, 8)]
    tags += [(277, 3, 1, 1), (278, 4, 1, height), (279, 4, count, 12)]
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4)


def jpeg_of(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(buffer, "jpeg")
    content = bytearray(buffer.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def jp2(width: int, height: int) -> bytes:
    head = struct.pack(">I", 22) + b"ihdr" + struct.pack(">IIHBBBB", height, width, 3, 7, 7, 0, 0)
    boxes = struct.pack(">I", 8 + len(head)) + b"jp2h" + head
    return b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 " + boxes


def _enter(name: str, file: str, says: str, content: Callable[[], bytes]) -> None:
    def write(at: Path) -> Path:
        folder_with(at, file, content())
        return at

    CASES[name] = Case("images", says, write)


for _name, (_file, _says, _content) in IMAGES.items():
    _enter(_name, _file, _says, _content)


@case("images", "regular file")
def pipe_among_images(at: Path) -> Path:
    os.mkfifo(folder_with(at, "x.png"))
    return at


@case("images", "No such device|regular file")
def socket_among_images(at: Path) -> Path:
    place = folder_with(at, "x.png")
    before = os.getcwd()
    os.chdir(place.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x.png")
    finally:
        os.chdir(before)
    return at


@case("images", "regular file")
def link_to_dev_zero(at: Path) -> Path:
    folder_with(at, "x.png").symlink_to("/dev/zero")
    return at


@case("images", "no such file|loop|symbolic")
def image_that_links_to_itself(at: Path) -> Path:
    folder_with(at, "x.png").symlink_to("x.png")
    return at


@case("images", "larger")
def image_of_a_terabyte(at: Path) -> Path:
    place = folder_with(at, "x.png", GOOD)
    os.truncate(place, 2**40)
    return at


@case("folders", "")
def folders_that_link_to_each_other(at: Path) -> Path:
    """Each of six folders links to all six: a path for every number in base six, of any length."""
    folder_with(at, "y.png", GOOD)
    for one in "012345":
        (at / "test" / "a" / one).mkdir()
        for other in "012345":
            (at / "test" / "a" / one / f"to{other}").symlink_to(f"../{other}")
    return at


@case("folders", "")
def folders_that_double_at_every_depth(at: Path) -> Path:
    """No loop, but twice as many paths at each of 30 depths."""
    folder_with(at, "y.png", GOOD)
    for depth in range(30):
        (at / f"d{depth}").mkdir()
        for side in "lr":
            (at / f"d{depth}" / side).symlink_to(f"../d{depth + 1}")
    (at / "d30").mkdir()
    (at / "d30" / "z.png").write_bytes(GOOD)
    (at / "test" / "a" / "in").symlink_to("../../d0")
    return at


# --- tables, arrays ---------------------------------------------------------------------------------------------------


def parquet(at: Path, rows: list[bytes], labels: Any, metadata: Any = None, **options: Any) -> Path:
    image = pa.array(
        [{"bytes": row, "path": None} for row in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    table = pa.table({"image": image, "label": labels})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, at / "test.parquet", **options)
    return at


@case("data", "description|huggingface|metadata")
def parquet_with_metadata_that_is_no_json(at: Path) -> Path:
    return parquet(at, [GOOD, GOOD], [0, 1], b"{")


@case("data", "description|huggingface|metadata")
def parquet_with_metadata_of_lists(at: Path) -> Path:
    return parquet(at, [GOOD, GOOD], [0, 1], b'{"info": [1], "features": 3}')


@case("data", "description|huggingface|metadata")
def parquet_with_names_of_numbers(at: Path) -> Path:
    features = {"label": {"names": [1, None], "_type": "ClassLabel"}}
    return parquet(at, [GOOD, GOOD], [0, 1], json.dumps({"info": {"features": features}}).encode())


@case("data", "rows")
def parquet_of_a_hundred_million_rows(at: Path) -> Path:
    """The same label over and over packs to nothing."""
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(at / "test.parquet", schema) as file:
        part = pa.table({"image": pa.nulls(10**7, pa.binary()), "label": np.zeros(10**7, np.int64)}, schema)
        for _ in range(10):
            file.write_table(part)
    return at


@case("images", "unpack|larger")
def parquet_of_one_image_repeated(at: Path) -> Path:
    """A dictionary of one value of 4 MB, named by each of 200 rows."""
    image = pa.DictionaryArray.from_arrays(np.zeros(200, np.int32), pa.array([bytes(2**22)], pa.binary()))
    pq.write_table(
        pa.table({"image": image, "label": np.arange(200) % 2}),
        at / "test.parquet",
        compression="zstd",
        dictionary_pagesize_limit=2**30,
        store_schema=False,
    )
    return at


@case("images", "unpack|larger")
def parquet_that_unpacks_to_gigabytes(at: Path) -> Path:
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(at / "test.parquet", schema, compression="zstd", use_dictionary=False) as file:
        file.write_table(pa.table({"image": [bytes(2**24)] * 30, "label": [0, 1] * 15}, schema))
    return at


@case("data", "cannot read")
def parquet_cut_short(at: Path) -> Path:
    parquet(at, [GOOD, GOOD], [0, 1])
    content = (at / "test.parquet").read_bytes()
    (at / "test.parquet").write_bytes(content[:40] + content[-40:])
    return at


@case("data", "regular file|cannot read|no dataset")
def parquet_that_is_a_pipe(at: Path) -> Path:
    os.mkfifo(at / "test.parquet")
    return at


@case("data", "column")
def parquet_with_columns_named_by_escapes(at: Path) -> Path:
    pq.write_table(pa.table({ESCAPE: [1]}), at / "test.parquet")
    return at


@case("data", "damaged|cannot read")
def arrow_with_offsets_that_lead_out(at: Path) -> Path:
    table = pa.table({"image": [GOOD, GOOD], "label": [0, 1]})
    with pa.OSFile(str(at / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    given = np.array([0, len(GOOD), 2 * len(GOOD)], np.int32).tobytes()
    content = (at / "x.arrow").read_bytes()
    assert given in content
    (at / "x.arrow").write_bytes(content.replace(given, np.array([0, 2**30, 2**30 + 5], np.int32).tobytes()))
    (at / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    return at


@case("data", "cannot read|damaged|unpack")
def arrow_packed_to_exabytes(at: Path) -> Path:
    table = pa.table({"image": [bytes(10_000)] * 2, "label": [0, 1]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(at / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as stream:
        stream.write_table(table)
    content = (at / "x.arrow").read_bytes()
    (at / "x.arrow").write_bytes(content.replace(struct.pack("<q", 20_000), struct.pack("<q", 2**60)))
    (at / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    return at


@case("data", "unpacks to")
def npz_of_gigabytes_of_zeros(at: Path) -> Path:
    np.savez_compressed(at / "a.npz", x_test=np.zeros((140_000, 64, 64), np.uint8), y_test=np.zeros(140_000, int))
    return at / "a.npz"


@case("data", "cannot read|says")
def npz_with_a_shape_that_it_does_not_hold(at: Path) -> Path:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 64, 64), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    with zipfile.ZipFile(at / "a.npz", "w") as archive:
        archive.writestr("x_test.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"1")
        archive.writestr("y_test.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"1")
    return at / "a.npz"


@case("data", "unpacks to")
def idx_packed_to_gigabytes(at: Path) -> Path:
    for name, sizes in (("t10k-images-idx3-ubyte", (140_000, 64, 64)), ("t10k-labels-idx1-ubyte", (140_000,))):
        head = np.array([2051 if len(sizes) == 3 else 2049, *sizes], ">u4").tobytes()
        with gzip.open(at / f"{name}.gz", "wb", compresslevel=1) as file:
            file.write(head)
            file.write(bytes(int(np.prod(sizes))))
    return at


@case("data", "classes.json|cannot read")
def titles_of_brackets(at: Path) -> Path:
    folder_with(at, "y.png", GOOD)
    (at / "classes.json").write_text("[" * 200_000)
    return at


@case("data", "labels.csv|field|cannot read|no dataset")
def table_with_a_field_of_megabytes(at: Path) -> Path:
    (at / "a.png").write_bytes(GOOD)
    (at / "labels.csv").write_text("filename,label\na.png,x\na.png," + "y" * 2**22)
    return at


# --- YAML, stores, names ----------------------------------------------------------------------------------------------


def told(*words: str) -> Write:
    """A command line, with AT in the place of the folder."""
    return lambda at: [word.replace("AT", str(at)) for word in words]


def configured(at: Path, text: str) -> list[str]:
    (at / "a.yaml").write_text(text)
    return ["probe", "--config", str(at / "a.yaml"), "--ckpt", "pixels:8", "--out", str(at / "out"), "--dry-run"]


def hollow(at: Path, words: list[str]) -> list[str]:
    """The same with a file of gigabytes that take no room on the disk."""
    os.truncate(at / "a.yaml", 8 * 2**30)
    return words


@case("command", "a.yaml")
def yaml_with_a_tag(at: Path) -> list[str]:
    return configured(at, "limit: !!python/object/apply:os.system ['touch /tmp/coss-eval-was-here']")


@case("command", "a.yaml")
def yaml_that_does_not_end(at: Path) -> list[str]:
    return configured(at, "limit: [1, 2")


@case("command", "a.yaml")
def yaml_of_a_billion_laughs(at: Path) -> list[str]:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return configured(at, "\n".join(lines))


@case("command", "a.yaml")
def yaml_of_brackets(at: Path) -> list[str]:
    return configured(at, "[" * 20_000)


@case("command", "a.yaml")
def yaml_of_one_word(at: Path) -> list[str]:
    return configured(at, "hello")


@case("command", "a.yaml")
def yaml_in_latin_1(at: Path) -> list[str]:
    (at / "a.yaml").write_bytes(b"limit: \xe9\xff")
    return ["probe", "--config", str(at / "a.yaml"), "--ckpt", "pixels:8", "--out", str(at / "out"), "--dry-run"]


@case("command", "a.yaml")
def yaml_of_gigabytes(at: Path) -> list[str]:
    return hollow(at, configured(at, ""))


@case("command", "a.yaml|sweep")
def sweep_with_a_tag(at: Path) -> list[str]:
    (at / "a.yaml").write_text("data: !!python/object/apply:os.system ['true']")
    return ["sweep", str(at / "a.yaml"), "--list", "--out", str(at / "out")]


def swept(at: Path, text: str) -> list[str]:
    (at / "a.yaml").write_text(f"data: digits\nmethods: [byol]\n{text}")
    return ["sweep", str(at / "a.yaml"), "--list", "--out", str(at / "out")]


@case("command", "aliases")
def sweep_of_a_billion_laughs(at: Path) -> list[str]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return swept(at, "\n".join(lines))


@case("command", "nested")
def sweep_of_brackets(at: Path) -> list[str]:
    return swept(at, f"fixed: {'[' * 100_000}")


@case("command", "a.yaml")
def sweep_of_gigabytes(at: Path) -> list[str]:
    return hollow(at, swept(at, ""))


@case("command", "grid smaller")
def sweep_of_a_trillion_runs(at: Path) -> list[str]:
    names = ("crop_min_scale", "lr", "weight_decay", "momentum", "ema", "trust")
    values = ", ".join(f"0.{i}" for i in range(100, 200))
    return swept(at, "grid:\n" + "".join(f"  {name}: [{values}]\n" for name in names))


@case("command", "digits")
def sweep_of_a_number_of_a_million_digits(at: Path) -> list[str]:
    return swept(at, f"seeds: [{'9' * 100_000}]")


@case("command", "sizes")
def sweep_of_sizes_that_are_none(at: Path) -> list[str]:
    return swept(at, "sizes: [gpu]")


def loose(at: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run with one loose cell, and what is in it."""
    folder = at / "run"
    (record, *_) = Store(folder).records()
    (folder / "cells").mkdir(exist_ok=True)
    path = folder / "cells" / f"{record['key']}.json"
    (folder / "cells.jsonl.gz").unlink(missing_ok=True)
    path.write_text(json.dumps(record))
    return path, record


def report_of(path: Path) -> list[str]:
    return ["report", str(path.parents[1])]


@case("stored", "damaged|no finished cells")
def cell_without_protocol(at: Path) -> list[str]:
    path, record = loose(at)
    del record["protocol"]
    path.write_text(json.dumps(record))
    return report_of(path)


@case("stored", "damaged|no finished cells")
def cell_with_measurements_of_text(at: Path) -> list[str]:
    path, record = loose(at)
    record["measurements"] = ["x", {"metric": 3}, {"metric": "a", "value": "b", "n": None, "condition": 4}]
    path.write_text(json.dumps(record))
    return report_of(path)


@case("stored", "damaged|no finished cells")
def cell_with_params_of_numbers(at: Path) -> list[str]:
    path, record = loose(at)
    record |= {"params": 3, "task": ["crops"], "model": None}
    path.write_text(json.dumps(record))
    return report_of(path)


@case("stored", "damaged|no finished cells")
def cell_of_brackets(at: Path) -> list[str]:
    path, _ = loose(at)
    path.write_text("[" * 200_000)
    return report_of(path)


@case("stored", "report.md")
def runs_of_junk(at: Path) -> list[str]:
    path, _ = loose(at)
    (path.parents[1] / "run.json").write_text(
        json.dumps({"format": 2, "runs": [3, None, "x", {"data": 4}, {"models": {}}]})
    )
    return report_of(path)


@case("stored", "run.json")
def runs_of_junk_described(at: Path) -> list[str]:
    return ["info", runs_of_junk(at)[1]]


@case("stored", "report.md")
def runs_of_brackets(at: Path) -> list[str]:
    path, _ = loose(at)
    (path.parents[1] / "run.json").write_text("[" * 200_000)
    return report_of(path)


@case("stored", "report.md")
def runs_of_another_format(at: Path) -> list[str]:
    path, _ = loose(at)
    (path.parents[1] / "run.json").write_text(json.dumps({"format": "x", "runs": 7}))
    return report_of(path)


@case("command", "log")
def log_of_junk(at: Path) -> list[str]:
    lines = [
        '{"kind": 3}',
        "[]",
        "7",
        '{"kind": "train", "step": "x", "epoch": null}',
        "{}",
        "\x00{}",
        "[" * 10_000 + "}",
    ]
    (at / "log.jsonl").write_text("\n".join(lines))
    return ["figures", "curves", str(at), "--out", str(at / "out")]


@case("command", "")
def thirty_checkpoints(at: Path) -> list[str]:
    words = ["probe", "--limit", "20"]
    for number in range(30):
        path = at / f"checkpoint-with-a-name-of-some-length-{number:04d}.safetensors"
        safetensors.torch.save_file(
            {k: v + number * 1e-3 if v.is_floating_point() else v for k, v in weights().items()}, path
        )
        words += ["--ckpt", str(path)]
    os.chdir(at)
    return [*words, "--no-probe"]


def escaped_class(at: Path) -> Path:
    (at / "test" / f"<b>{ESCAPE}").mkdir(parents=True)
    (at / "test" / f"<b>{ESCAPE}" / f"{ESCAPE}.png").write_bytes(b"no image")
    (at / "test" / "b").mkdir()
    (at / "test" / "b" / "good.png").write_bytes(GOOD)
    return at


@case("command", "owned")
def escapes_in_names_of_classes_and_files(at: Path) -> list[str]:
    return ["check", "--ckpt", "pixels:8", "--data", str(escaped_class(at))]


@case("command", "2 classes")
def escapes_in_names_of_classes_in_info(at: Path) -> list[str]:
    return ["info", str(escaped_class(at))]


@case("command", "owned")
def escapes_in_keys(at: Path) -> list[str]:
    safetensors.torch.save_file(
        {f"{ESCAPE}.weight": torch.ones(3, 3), "x": torch.ones(1), "y": torch.ones(1)}, at / "a.safetensors"
    )
    return ["info", str(at / "a.safetensors")]


@case("command", "owned")
def escapes_in_the_name_of_a_model(at: Path) -> list[str]:
    path = at / f"{ESCAPE}.safetensors"
    safetensors.torch.save_file(weights(), path)
    return ["info", str(path)]


@case("command", "owned")
def escapes_in_yaml(at: Path) -> list[str]:
    return configured(at, f'"{ESCAPE}": 3'.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\x9b", "\\x9b"))


@case("latin-1", "3x3 stem|normalisation")
def terminal_in_latin_1(at: Path) -> list[str]:
    path = at / "λ-模型.safetensors"
    safetensors.torch.save_file(weights(), path)
    return ["info", str(path)]


# --- the tests ---

MEMORY = 2 * 2**30  # bytes of address space beyond what the imports have taken
SECONDS = 20.0
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

PROCESSES = multiprocessing.get_context("forkserver")  # one process imports torch, each case is a fork of it
PRELOADED = ["test_hostile", "coss_eval.cli", "coss_eval.checkpoints.load", "timm", "pandas"]


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> Iterator[None]:
    """A fork server of these tests' own: the process's one, which other tests may have begun, has not the imports."""
    own = forkserver.ForkServer()
    own.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "connect_to_new_process", own.connect_to_new_process)
        yield


def opened(action: str, given: Any) -> str:
    """What a person is told of it; anything but a CossError is raised."""
    if action == "model":
        try:
            return f"loaded {ce.load_model(given).arch}"
        except CossError as error:
            return str(error)
    if action in ("command", "stored", "latin-1"):
        return commanded(given, "latin-1" if action == "latin-1" else "utf-8")
    try:
        data = ce.load_dataset(given, skip_bad_images=True)
        n = sum(len(batch.labels) for batch in data.test.batches(Geometry(64, 0.875, "bilinear"), batch_size=64))
        _ = data.test.fingerprint
    except CossError as error:
        return str(error)
    return f"{n} images; {data.test.left_out()}"


def commanded(words: list[str], encoding: str) -> str:
    from coss_eval.cli import main

    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    sys.argv = ["coss-eval", *words]
    sys.stdout, sys.stderr = streams
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    return f"exit {code}: {texts[1]} {texts[0]}"


def confined(name: str, folder: Path, answer: Connection) -> None:
    """In a process of its own, with no more memory than that: what is told, and how much more was in use at most."""
    given = CASES[name].write(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.environ["COSS_CACHE_DIR"] = str(folder / "cache")
    try:
        said = opened(CASES[name].action, given)
    except BaseException as error:  # noqa: BLE001 - a traceback for the person: what no case may come to
        said = f"TRACEBACK {type(error).__name__}: {error}"
    answer.send((said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024))


def outcome(name: str, folder: Path, seconds: float = SECONDS) -> tuple[str, int, float]:
    """What a case says, the bytes and the seconds that it took."""
    ours, theirs = PROCESSES.Pipe(False)
    process = PROCESSES.Process(target=confined, args=(name, folder, theirs))
    started = time.monotonic()
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return "STILL RUNNING", 0, time.monotonic() - started
        said, memory = ours.recv()
        return said, memory, time.monotonic() - started
    except EOFError:
        process.join(5)
        return f"DIED with {process.exitcode}", 0, time.monotonic() - started
    finally:
        process.kill()
        process.join()


def finished_run(folder: Path) -> Path:
    """A run of two cells."""
    ce.evaluate("pixels:4", "digits", ["crops"], out=folder, limit=20, cache=False, quiet=True)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished") / "run")


def complaint(name: str, said: str, memory: int) -> str | None:
    """Why what came of a case is not what has to come of it; None where it is."""
    case = CASES[name]
    if "Traceback" in said or said.startswith(("TRACEBACK", "STILL RUNNING", "DIED")):
        return "no line for a person"
    if not re.search(case.says, said):
        return f"expected {case.says}"
    if CONTROL.search(said) if case.action in ("command", "stored", "latin-1") else "\n" in said:
        return "control characters or several lines"
    return None if memory < MEMORY // 2 else f"took {memory / 2**20:.0f} MiB"


SLOW = {"thirty_checkpoints", "own_vit_of_a_million_blocks", *(n for n, c in CASES.items() if c.action == "stored")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_a_hostile_file_costs_a_line(name: str, finished: Path, tmp_path: Path) -> None:
    case = CASES[name]
    shutil.copytree(finished, tmp_path / "run") if case.action == "stored" else None
    said, memory, _ = outcome(name, tmp_path)
    assert complaint(name, said, memory) is None, said
