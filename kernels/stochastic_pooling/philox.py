"""The counter-based random numbers of the operator, in plain PyTorch.

Philox4x32 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
turns a 64-bit key and a 128-bit counter into four 32-bit words. Seven rounds are the fewest that
pass BigCrush in that paper (its table 2); the operator uses seven.

Which bits an output takes (the whole contract between the reference and the kernels):

    key      the seed's low and high halves
    counter  (ow // 2, oh // 4, plane mod 2**32, plane div 2**32), plane = n * C + c, in a pool of
             volumes (n * C + c) * OD + od
    word     oh mod 4 of the four
    half     its low 16 bits if ow is even, its high 16 bits if ow is odd
    number   u = half / 2**16, in [0, 1)

So two neighbouring columns of four rows share a call: a kernel that slides down two columns at once
keeps four words, one for each row to come. Sixteen bits move the probability of a cell by less than
2**-16, and the expectation of an output by at most 2**-16 times the sum of the steps from each
weight of the window to the next. For 3 x 3 cells that is at most 2**-13 of the largest weight, less
than half a unit in its last place in fp16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 7

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(key: tuple[Tensor, Tensor], counter: Words, rounds: int = ROUNDS) -> Words:
    """Four random words for each counter.

    Args:
        key: two int64 tensors that hold unsigned 32-bit words.
        counter: four of them; all six broadcast together.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: Tensor, shape: Sequence[int], first: int = 0) -> Tensor:
    """The number in [0, 1) that each output of a pool draws.

    Args:
        seed: int64 scalar tensor; its device is that of the result.
        shape: the output's logical shape, `(N, C, OH, OW)` or `(N, C, OD, OH, OW)`; of some of its
            planes `(planes, OD, OH, OW)`.
        first: number of the first image, or of those planes, where it is not the pool's first.

    Returns:
        fp32 of that shape, multiples of 2**-16.
    """
    *planes, height, width = shape
    device = seed.device
    first_plane = first * math.prod(planes[1:])
    plane = first_plane + torch.arange(math.prod(planes), device=device)[:, None, None]
    group = torch.arange((height + 3) // 4, device=device)[:, None]
    pair = torch.arange((width + 1) // 2, device=device)
    key = seed & _MASK, (seed >> 32) & _MASK
    words = philox4x32(key, (pair, group, plane & _MASK, plane >> 32))
    # (planes, groups, 4, pairs) -> (planes, rows, pairs) -> (planes, rows, pairs, 2)
    rows = torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1, 2)[:, :height]
    halves = torch.stack((rows & 0xFFFF, rows >> 16), dim=-1).flatten(2)[..., :width]
    return (halves.to(torch.float32) * 2.0**-16).reshape(tuple(shape))


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; int64 wraps, which leaves the bits right."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK
