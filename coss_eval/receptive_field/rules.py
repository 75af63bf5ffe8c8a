"""What each operation does to a theoretical receptive field; applied while a network really runs.

Every function call on a tensor is seen by a TorchFunctionMode, so control flow, functional calls and residual sums need
no symbolic trace. A field is kept per axis as jump and the interval of unit 0:
jump' = jump s, low' = low - p jump, high' = high + (d (k - 1) - p) jump for kernel k, stride s, padding p, dilation d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coss_eval.errors import CossError


@dataclass(frozen=True)
class Axis:
    """Along one axis, unit i depends on the pixels low + i jump ... high + i jump of the (unbounded) image."""

    jump: int = 1
    low: int = 0
    high: int = 0

    @property
    def size(self) -> int:
        return self.high - self.low + 1

    def window(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Axis:
        reach = dilation * (kernel - 1) - padding
        return Axis(self.jump * stride, self.low - padding * self.jump, self.high + reach * self.jump)

    def shifted(self, start: int, step: int) -> Axis:
        """Units start, start + step, ... of this axis."""
        return Axis(self.jump * step, self.low + start * self.jump, self.high + start * self.jump)


@dataclass(frozen=True)
class Field:
    """The receptive field of each unit of a map; ``dims`` are the tensor's dimensions along its rows and columns.

    Both are the same dimension in a sequence of locations. A tensor whose units see the whole image has ``WHOLE``.
    """

    rows: Axis
    columns: Axis
    dims: tuple[int, int] = (2, 3)


WHOLE = "whole image"
Reach = Field | str


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions by name, without the underscores of in-place and operator variants
ACTIVATIONS = _names(
    "relu relu6 leaky_relu prelu elu selu celu gelu silu mish sigmoid tanh hardswish hardsigmoid hardtanh softplus"
)
_POINTWISE = ACTIVATIONS | _names(
    "exp log sqrt rsqrt square pow abs neg erf clamp clip clamp_min dropout dropout1d dropout2d alpha_dropout "
    "batch_norm local_response_norm add radd iadd sub rsub isub mul rmul imul div rdiv truediv rtruediv idiv "
    "maximum minimum where lerp addcmul float half double to type_as contiguous clone detach fill masked_fill"
)
_RESHAPING = _names(
    "permute transpose swapaxes swapdims movedim reshape view reshape_as view_as flatten unflatten squeeze unsqueeze "
    "getitem expand expand_as chunk split tensor_split unbind narrow select"
)
_REDUCING = _names("mean sum amax amin max min std var norm softmax log_softmax cumsum")
_MIXING = _names(
    "matmul rmatmul bmm mm einsum baddbmm addmm scaled_dot_product_attention multi_head_attention_forward roll "
    "_transformer_encoder_layer_fwd _native_multi_head_attention group_norm instance_norm"
)


class FieldTracer(TorchFunctionMode):
    """While it is on, follows ``image`` (1, 3, H, W) through every function and keeps each result's reach."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        # results are kept alive, so that no other tensor can take over an id
        self._reach: dict[int, tuple[Tensor, Reach]] = {id(image): (image, Field(Axis(), Axis()))}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) in self._reach]
        before = [self._reach[id(tensor)][1] for tensor in inputs]
        shape = inputs[0].shape if inputs else torch.Size()
        result = func(*args, **kwargs)
        results = list(_tensors(result))
        if inputs and results:
            name = func.__name__.removeprefix("__").rstrip("_")
            reaches = _after(name, func, args, kwargs, before, shape, results)
            self._reach |= {id(tensor): (tensor, reach) for tensor, reach in zip(results, reaches, strict=True)}
        return result

    def of(self, tensor: Tensor) -> Reach | None:
        """The reach of a tensor; None where it does not depend on the image."""
        return self._reach[id(tensor)][1] if id(tensor) in self._reach else None


def _after(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    before: list[Reach],
    shape: torch.Size,
    results: list[Tensor],
) -> list[Reach]:
    """The reach of each result of one function, from that of its inputs."""
    one = _union(before)
    if not isinstance(one, Field) or name in _MIXING:
        return [WHOLE] * len(results)
    if name in _WINDOWS:
        return [_WINDOWS[name](one, args, kwargs, shape)]
    if name in _POINTWISE:
        return [one] * len(results)
    if name == "cat":
        dim = argument(args, kwargs, 1, "dim", 0) % len(shape)
        return [WHOLE if dim in one.dims else one]
    if name == "linear":
        return [WHOLE if len(shape) - 1 in one.dims else one]
    if name == "layer_norm":
        normalised = len(argument(args, kwargs, 1, "normalized_shape", ()))
        return [WHOLE if max(one.dims) >= len(shape) - normalised else one]
    if name in _REDUCING:
        return [_reduced(one, args, kwargs, shape, len(results[0].shape))] * len(results)
    if name in _RESHAPING:
        return _reshaped(one, func, args, kwargs, shape)
    raise CossError(f"what {name!r} does to a receptive field is not known; take the effective field (--data)")


def _union(reaches: list[Reach]) -> Reach:
    """The smallest field that holds them all; the whole image where their grids differ."""
    fields = [reach for reach in reaches if isinstance(reach, Field)]
    if len(fields) < len(reaches) or len({(f.dims, f.rows.jump, f.columns.jump) for f in fields}) > 1:
        return WHOLE
    rows, columns = ([getattr(f, axis) for f in fields] for axis in ("rows", "columns"))
    return replace(fields[0], rows=_hull(rows), columns=_hull(columns))


def _hull(axes: list[Axis]) -> Axis:
    return Axis(axes[0].jump, min(axis.low for axis in axes), max(axis.high for axis in axes))


def _windowed(field: Field, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Field:
    per_axis = zip(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True)
    rows, columns = (axis.window(*step) for axis, step in zip((field.rows, field.columns), per_axis, strict=True))
    return replace(field, rows=rows, columns=columns)


def _convolution(field: Field, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Reach:
    kernel = tuple(argument(args, kwargs, 1, "weight").shape[2:])
    stride = argument(args, kwargs, 3, "stride", 1)
    padding = argument(args, kwargs, 4, "padding", 0)
    dilation = _pair(argument(args, kwargs, 5, "dilation", 1))
    if isinstance(padding, str):
        total = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        padding = (0, 0) if padding == "valid" else tuple(t // 2 for t in total)
    return _windowed(field, kernel, stride, padding, dilation)


def _pooling(field: Field, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Reach:
    kernel = argument(args, kwargs, 1, "kernel_size")
    stride = argument(args, kwargs, 2, "stride", None) or kernel
    return _windowed(field, kernel, stride, argument(args, kwargs, 3, "padding", 0))


def _max_pooling(field: Field, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Reach:
    kernel = argument(args, kwargs, 1, "kernel_size")
    stride = argument(args, kwargs, 2, "stride", None) or kernel
    padding, dilation = argument(args, kwargs, 3, "padding", 0), argument(args, kwargs, 4, "dilation", 1)
    return _windowed(field, kernel, stride, padding, dilation)


def _adaptive_pooling(field: Field, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Reach:
    wanted = _pair(argument(args, kwargs, 1, "output_size"))
    sides = [(given, side or given) for given, side in zip(shape[-2:], wanted, strict=True)]
    if any(given % side or side == 1 for given, side in sides):
        return WHOLE
    steps = tuple(given // side for given, side in sides)
    return _windowed(field, steps, steps, 0)


def _padding(field: Field, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Reach:
    if argument(args, kwargs, 2, "mode", "constant") == "circular":
        raise CossError(
            "a field of circular padding goes round the edge, so it has no size; take the effective field (--data)"
        )
    widths = argument(args, kwargs, 1, "pad")  # from the last dimension backwards: left, right, top, bottom, ...
    before = {len(shape) - 1 - i: widths[2 * i] for i in range(len(widths) // 2)}
    row, column = (before.get(dim, 0) for dim in field.dims)
    return replace(field, rows=field.rows.shifted(-row, 1), columns=field.columns.shifted(-column, 1))


_WINDOWS: dict[str, Callable[[Field, tuple[Any, ...], Mapping[str, Any], torch.Size], Reach]] = {
    "conv2d": _convolution,
    "max_pool2d": _max_pooling,
    "avg_pool2d": _pooling,
    "adaptive_avg_pool2d": _adaptive_pooling,
    "adaptive_max_pool2d": _adaptive_pooling,
    "pad": _padding,
}


def _reduced(field: Field, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size, ndim: int) -> Reach:
    dims = argument(args, kwargs, 1, "dim", None)
    if dims is None:
        return WHOLE
    if isinstance(dims, Tensor):
        return field  # the larger of two maps
    gone = {dim % len(shape) for dim in ((dims,) if isinstance(dims, int) else dims)}
    if gone & set(field.dims):
        return WHOLE
    if ndim == len(shape):
        return field
    first, second = (dim - sum(g < dim for g in gone) for dim in field.dims)
    return replace(field, dims=(first, second))


def _reshaped(
    field: Field, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size
) -> list[Reach]:
    """Where rows and columns went, told by sending every unit's row and column through the same function."""
    sequence = field.dims[0] == field.dims[1]
    moved = []
    for dim in dict.fromkeys(field.dims):
        index = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
        moved.append(list(_tensors(func(index.contiguous(), *args[1:], **kwargs))))
    if sequence:
        return [field if _line(index) == (field.dims[0], 0, 1) else _moved_sequence(field, index) for index in moved[0]]
    return [_moved_map(field, row, column) for row, column in zip(*moved, strict=True)]


def _moved_sequence(field: Field, index: Tensor) -> Reach:
    line = _line(index)
    return WHOLE if line is None or line[1:] != (0, 1) else replace(field, dims=(line[0], line[0]))


def _moved_map(field: Field, row: Tensor, column: Tensor) -> Reach:
    rows, columns = _line(row), _line(column)
    if rows is not None and columns is not None and rows[0] != columns[0]:
        return Field(field.rows.shifted(*rows[1:]), field.columns.shifted(*columns[1:]), (rows[0], columns[0]))
    width = int(column.max()) + 1
    line = _line(row * width + column)  # rows and columns one after the other along one dimension
    return WHOLE if line is None or line[1:] != (0, 1) else replace(field, dims=(line[0], line[0]))


def _line(index: Tensor) -> tuple[int, int, int] | None:
    """(dimension, start, step) if the index grows evenly along just one dimension, else None."""
    changing = [d for d in range(index.ndim) if index.shape[d] > 1 and (index.diff(dim=d) != 0).any()]
    if len(changing) != 1:
        return None
    along = index.movedim(changing[0], 0).flatten(1)[:, 0]
    start, step = int(along[0]), int(along[1] - along[0])
    even = step > 0 and bool((along.diff() == step).all())
    return (changing[0], start, step) if even else None


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    """An argument of an intercepted call, given by position or by name."""
    return kwargs[name] if name in kwargs else args[position] if len(args) > position else default


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, int) or value is None:
        return value, value
    first, second = value if len(value) == 2 else (value[0], value[0])
    return first, second


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
