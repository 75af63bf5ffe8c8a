"""Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414), debiased, of any number of images.

The plain estimate grows with the number of units relative to that of images: for independent noise of D = 2048 and
N = 1,000 it is .67. HSIC_1 (Song et al. 2012, JMLR 13, equation 5) is unbiased, and so is its mean over minibatches
(Nguyen, Raghu and Kornblith 2021, arXiv 2010.15327, equation 3), which needs no more memory than one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coss_eval.errors import CossError, UsageError
from coss_eval.similarity.arrays import Array, Compared, jackknifed, pair
from coss_eval.statistics import Jackknifed

FEWEST = 4  # HSIC_1 divides by n - 3


def cka(x: Array, y: Array, *, debiased: bool = True) -> float:
    """Linear CKA of representations ``x`` (N, D) and ``y`` (N, D') of the same N images, in one order.

    1 where one is the other up to rotation and scale. Debiased it is about 0 for unrelated representations whatever
    N, D and D' are, and may lie slightly outside [0, 1]; plain (``debiased=False``) it is
    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of the centred arrays. Raises UsageError for arrays that do not fit, and
    CossError for one that is the same for all images.

    >>> x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    >>> round(cka(x, 3 * x.flip(1)), 6)
    1.0
    """
    a, b = pair(x, y, FEWEST)
    measure = _hsic if debiased else _plain
    grams = torch.stack([a @ a.T, b @ b.T])  # (2, N, N)
    return float(_normalised(measure(grams))[0, 1])


class StreamedCKA:
    """Debiased linear CKA between any number of representations, a minibatch of images at a time.

    Give every ``add`` the same representations of another few images (256, say; the smallest batches weigh as their
    pairs of images do). Memory is one number a minibatch for each pair of representations. The value depends on which
    images share a minibatch, so form them by sample id, not by the order of arrival.

        streamed = StreamedCKA()
        for batch in batches:
            streamed.add({"layer1": first(batch), "layer4": last(batch)})
        streamed.matrix()  # (2, 2)
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._parts: list[Tensor] = []  # float64 (R, R) a minibatch, on the CPU: sums over its pairs of images
        self._weights: list[int] = []  # pairs of images in it
        self.images = 0

    def add(self, representations: Mapping[str, Tensor]) -> None:
        """One minibatch: each representation (B, D) of the same B images, by name. Raises UsageError for B < 4."""
        self.add_grams({name: gram(values) for name, values in representations.items()})

    def add_grams(self, grams: Mapping[str, Tensor]) -> None:
        """One minibatch by its ``gram`` (B, B) under each representation, where not all of them are at hand at once."""
        names, counts = tuple(grams), {len(values) for values in grams.values()}
        if self.names not in ((), names):
            raise UsageError(f"every minibatch needs the same representations, {', '.join(self.names)}, got {names}")
        if len(counts) != 1 or min(counts) < FEWEST:
            raise UsageError(f"a minibatch needs the same {FEWEST} images or more of each, got {sorted(counts)}")
        (count,) = counts
        stacked = torch.stack(list(grams.values()))  # (R, B, B)
        if bad := [name for name, one in zip(names, stacked, strict=True) if not bool(one.isfinite().all())]:
            raise CossError(f"{bad[0]} holds NaN or infinity")
        self.names, self.images = names, self.images + count
        self._parts.append(_hsic(stacked).cpu())
        self._weights.append(count * (count - 3))

    def matrix(self) -> Tensor:
        """CKA between all representations, float64 (R, R), 1 on its diagonal."""
        return _normalised(self._sum(), self.names)

    def estimate(self, first: str, second: str) -> Jackknifed:
        """CKA of two of them with its interval; NaN bounds where there is one minibatch."""
        pick = [self.names.index(name) for name in (first, second)]
        return Jackknifed(*(float(found[-1, 0]) for found in self._compared(pick)))

    def estimates(self) -> Compared:
        """CKA between all representations with intervals, as ``estimate`` of each pair.

        Minibatches share no image, so leaving out one after the other never pairs an image with itself.
        """
        return self._compared(list(range(len(self.names))))

    def _compared(self, pick: list[int]) -> Compared:
        total = self._sum()[pick][:, pick]
        left_out = (
            _normalised(total - weight * part[pick][:, pick])
            for part, weight in zip(self._parts, self._weights, strict=True)
            if len(self._parts) > 1
        )
        return jackknifed(_normalised(total, [self.names[place] for place in pick]), left_out)

    def _sum(self) -> Tensor:
        if not self._parts:
            raise UsageError("no minibatch was added: there is nothing to compare")
        return sum((w * part for part, w in zip(self._parts, self._weights, strict=True)), torch.zeros(()).double())


def gram(values: Tensor) -> Tensor:
    """Inner products (B, B) of the rows; their mean is taken off first, which changes HSIC_1's rounding alone."""
    flat = values.flatten(1).float()
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double()


def _hsic(grams: Tensor) -> Tensor:
    """HSIC_1 between all kernels (R, N, N): the inner products of their U-centred forms (Szekely and Rizzo 2014)."""
    n = grams.shape[-1]
    off = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
    rows = off.sum(-1, keepdim=True) / (n - 2)
    centred = off - rows - rows.mT + off.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    flat = (centred - torch.diag_embed(centred.diagonal(dim1=-2, dim2=-1))).flatten(1)
    return flat @ flat.T / (n * (n - 3))


def _plain(grams: Tensor) -> Tensor:
    """Biased HSIC between kernels (R, N, N) of centred rows, up to its factor."""
    flat = grams.flatten(1)
    return flat @ flat.T


def _normalised(hsic: Tensor, names: Sequence[str] = ()) -> Tensor:
    """HSIC (R, R) divided by the roots of its diagonal. CossError where a representation does not tell images apart."""
    own = hsic.diagonal()
    if bad := (own <= 0).nonzero().flatten().tolist():
        which = names[bad[0]] if names else "a representation"
        raise CossError(f"{which} does not tell images apart (its own HSIC is not above 0)")
    return hsic / (own[:, None] * own[None]).sqrt()
