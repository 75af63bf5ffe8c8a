"""A state dict put into a network: what matched, what is missing, what has no place, and when that is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from coss_eval.checkpoints.flat_keys import plain_key, stored_bytes
from coss_eval.errors import CossError
from coss_eval.models.architecture import Architecture, has_more_numbers
from coss_eval.models.model import named

COUNTER = "num_batches_tracked"
LARGEST = 1e15  # of weights and statistics that a network computes with; flipped bits give any power of ten
ROOM = 2**25  # numbers beyond MORE a byte of the file: heads for other classes, and what is built at full width first
MORE = 2

# First segments of keys, beside a network's own, that tell of another network than the one built: an exponent of its
# pooling, a norm before its blocks, register tokens ...
STRUCTURE = re.compile(
    r"\w*pool\w*|gem\w*|(\w+_)?norm(_\w+|\d*)|ls\d*|layer_?scale\w*|gamma\w*|(cls|class|dist|reg|register)_tokens?"
    r"|rel_pos\w*|\w*embed\w*|attn\w*|attention\w*|[bg]n\d*|conv\d+|layer\d+|stages?|blocks?|se|eca|aa|blur\w*"
)
PRETEXT = re.compile(r"decoder|mask|proj|pred|proto|queue|aux|text|head|classifier", re.IGNORECASE)  # may be left out


@dataclass(frozen=True)
class Fit:
    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the backbone, not in the file
    misshapen: tuple[str, ...]  # in both, with different shapes: "conv1.weight is 64x3x3x3 in the file, ..."
    misplaced: tuple[str, ...]  # in the file, a part of the backbone, but without a place in this one
    unexpected: tuple[str, ...]  # in the file, outside the backbone's modules: projection heads and the like

    @property
    def complete(self) -> bool:
        return not (self.missing or self.misshapen or self.misplaced)


def slots_of(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name: the tensors themselves, to be filled in place."""
    return {plain_key(key): tensor for key, tensor in network.state_dict(keep_vars=True).items()}


def copy_into(slots: Mapping[str, Tensor], backbone: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """Copy every tensor of ``state`` that has a place of its shape in the backbone.

    ``slots`` has the whole network's names, head included; only those in use by ``backbone`` are asked for.
    """
    used = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    wanted = {key: slot for key, slot in slots.items() if id(slot) in used}
    matched, missing, misshapen = [], [], []
    for key, slot in wanted.items():
        tensor = state.get(key)
        if tensor is None:
            missing += [] if key.endswith(COUNTER) else [key]
        elif tensor.is_complex() and not slot.is_complex():
            misshapen.append(f"{key} holds complex numbers in the file, {_shape(slot)} real ones in the network")
        elif tensor.shape != slot.shape:
            misshapen.append(f"{key} is {_shape(tensor)} in the file, {_shape(slot)} in the network")
        else:
            with torch.no_grad():
                slot.copy_(tensor)
            matched.append(key)
    modules = {key.partition(".")[0] for key in wanted}
    heads = tuple(f"{key.rpartition('.')[0]}." for key in slots if key not in wanted)  # projections take their places
    extra = [key for key in state if key not in wanted]
    misplaced = [
        key
        for key in extra
        if not key.startswith(heads) and (key.partition(".")[0] in modules or _of_the_backbone(key, state[key]))
    ]
    return Fit(
        tuple(matched),
        tuple(missing),
        tuple(misshapen),
        tuple(misplaced),
        tuple(key for key in extra if key not in misplaced),
    )


def _of_the_backbone(key: str, tensor: Tensor) -> bool:
    """Whether a tensor outside the modules that were built belongs to the network all the same, and not to a head."""
    name = key.partition(".")[0]
    spatial = tensor.ndim == 4 and max(tensor.shape[2:]) > 1
    return not PRETEXT.search(name) and (spatial or STRUCTURE.fullmatch(name) is not None)


def refuse_larger(
    architecture: Architecture, tensors: Iterable[Tensor], classes: int | None = None, *, asked: bool = False
) -> None:
    """CossError where the network that a file says it holds has far more numbers than the file.

    A name or a shape of a few bytes would have it built, which takes what the largest networks take. ``asked``: a
    person named the network.
    """
    if asked:
        return
    stored = stored_bytes(tensors)
    most = 2 ** (ROOM + MORE * stored).bit_length()
    if has_more_numbers(architecture, most, classes):
        named = architecture.arch + (f" of width {architecture.width}" if architecture.width != 64 else "")
        raise CossError(
            f"it is said to be a {named}, which is far larger than the file ({stored:,} bytes of tensors): "
            "give --arch where it is one all the same"
        )


def refuse_non_finite(backbone: nn.Module, head: nn.Module | None, source: str) -> None:
    """CossError that names the first tensor with a value that is NaN, infinite, or as no weight is (LARGEST).

    Minus infinity, or the smallest number there is, is a value of attention masks: of buffers that hold nothing else
    but zeros.
    """
    for part, module in (("", backbone), ("head ", head)):
        if module is None:
            continue
        buffers = {id(tensor) for tensor in module.buffers()}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            bad = ~(tensor.abs() <= LARGEST) if tensor.is_floating_point() else tensor.new_zeros(0, dtype=torch.bool)
            count = int(bad.sum())
            if count and not (id(tensor) in buffers and bool(((tensor == 0) | (tensor < -LARGEST)).all())):
                finite = bool(tensor.isfinite().all())
                what = f"beyond {LARGEST:g}, as no weight of a network is" if finite else "that are NaN or infinite"
                raise CossError(
                    f"{Path(source).name}: {part}{name.removeprefix('network.')} holds {count} of {tensor.numel():,} "
                    f"values {what}; its weights are damaged (a run that diverged?), give another file"
                )


def refuse_unless_complete(fit: Fit, arch: str, hints: Sequence[str], *, allow_partial: bool) -> None:
    """CossError that names what is missing and the flags that would help.

    With ``allow_partial`` only where less than half of the backbone matched, since that is another network.
    """
    total = len(fit.matched) + len(fit.missing) + len(fit.misshapen)
    if fit.complete or (allow_partial and 2 * len(fit.matched) >= total):
        return
    faults = [
        *([f"{named(fit.missing)} missing"] if fit.missing else []),
        *([f"{len(fit.misshapen)} of another shape ({fit.misshapen[0]})"] if fit.misshapen else []),
        *([f"{named(fit.misplaced)} without a place in the network"] if fit.misplaced else []),
    ]
    advice = [*hints, *([] if allow_partial else ["--allow-partial"])]
    raise CossError(
        f"it does not fill {arch}: {len(fit.matched)} of {total} tensors match, {'; '.join(faults)}; "
        f"try {' or '.join(advice) or 'another --arch'}"
    )


def roots_by_name(keys: Sequence[str], network_keys: Sequence[str]) -> list[str]:
    """The prefixes under which most of a network's own key names stand, most complete first."""
    have = set(keys)
    probes = network_keys[:: max(1, len(network_keys) // 16)]
    votes = Counter(key.removesuffix(end) for end in probes for key in keys if key == end or key.endswith(f".{end}"))
    counts = {root: sum(root + key in have for key in network_keys) for root in votes}
    most = max(counts.values(), default=0)
    return sorted((root for root in counts if 2 * counts[root] > most), key=lambda root: -counts[root])


def linear_at(tensors: Mapping[str, Tensor], prefix: str, inputs: int) -> nn.Linear | None:
    """The linear layer (or 1x1 convolution) at a prefix, where it takes ``inputs`` features; None where none is."""
    weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
    if weight is not None and weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    if weight is None or weight.ndim != 2 or weight.shape[1] != inputs:
        return None
    linear = nn.Linear(inputs, weight.shape[0], bias=bias is not None, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def head_line(place: str, head: nn.Module | None) -> str | None:
    """A head in a key report: "fc: 512 to 10 classes"."""
    if not isinstance(head, nn.Linear):
        return None if head is None else type(head).__name__
    return f"{place}: {head.in_features} to {head.out_features} classes".removeprefix(": ")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
