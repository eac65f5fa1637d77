"""The random numbers and the draws as statistics, at fixed seeds.

Every p-value is of a test that holds by chance with that probability if the draws are right; as
seeds are fixed, a test passes or fails for good. A test of many statistics at once divides its
threshold by their number (Bonferroni).
"""

from __future__ import annotations

import itertools

import pytest
import torch

from stochastic_pooling import philox, stochastic_pool2d

from .naive import Arguments

# The draws are the same on every backend (test_kernels.py), so the fastest that there is serves.

SMALLEST_P = 1e-3


def chi_square_p_values(counts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """p-values of the goodness of fit of rows of counts to rows of weights; a weight of 0 must not
    be counted and is no degree of freedom."""
    counts, weights = torch.broadcast_tensors(counts.double(), weights.double())
    expected = weights / weights.sum(-1, keepdim=True) * counts.sum(-1, keepdim=True)
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    assert (expected[possible] >= 5).all(), "too few draws for a chi-square test"
    terms = torch.where(possible, (counts - expected) ** 2 / expected.where(possible, 1), 0)
    freedom = possible.sum(-1) - 1
    return torch.special.gammaincc(freedom / 2, terms.sum(-1) / 2)


def assert_fits(counts: torch.Tensor, weights: torch.Tensor) -> None:
    p_values = chi_square_p_values(counts, weights)
    assert p_values.min() > SMALLEST_P / p_values.numel(), (counts, weights, p_values)


def drawn_cells(x: torch.Tensor, kernel: tuple[int, int], seed: int) -> torch.Tensor:
    """The number of the drawn cell in each of the windows that lie side by side on `x`."""
    generator = torch.Generator().manual_seed(seed)
    _, indices = stochastic_pool2d(x, kernel, return_indices=True, generator=generator)
    row, col = indices // x.shape[3], indices % x.shape[3]
    return row % kernel[0] * kernel[1] + col % kernel[1]


def count(numbers: torch.Tensor, buckets: int) -> torch.Tensor:
    return torch.bincount(numbers.flatten(), minlength=buckets)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("seed", [0, -1, 6_148_914_691_236_517_205])
def test_uniforms_are_uniform(seed):
    """10**7 numbers: their values, high bits and low bits, their extremes and their mean."""
    counts = torch.zeros(2**16, dtype=torch.int64)
    images, shape = 40, (40, 25, 100, 100)
    for first in range(0, shape[0], 4):
        numbers = philox.uniforms(torch.tensor(seed), (4, *shape[1:]), first)
        counts += count((numbers * 2**16).long(), 2**16)
    total = images * 25 * 100 * 100
    assert counts.sum() == total == 10**7
    by_bits = counts.view(2**10, 2**6)
    for bits in (counts, by_bits.sum(1), counts.view(2**6, 2**10).sum(0)):
        assert_fits(bits, torch.ones(len(bits)))
    # Each value is expected 153 times, so that both extremes are there.
    assert counts[0] > 0
    assert counts[-1] > 0
    values = torch.arange(2**16, dtype=torch.float64) / 2**16
    mean = (counts * values).sum() / total
    # Of multiples of 2**-16 from 0 to 1 - 2**-16; four standard errors.
    assert abs(mean - (0.5 - 2**-17)) < 4 * (12 * total) ** -0.5


NEIGHBOURS = {
    "next column: other half of the word": (0, 0, 0, 1),
    "two columns on: next counter": (0, 0, 0, 2),
    "next row: next word": (0, 0, 1, 0),
    "two rows on": (0, 0, 2, 0),
    "three rows on": (0, 0, 3, 0),
    "four rows on: next counter": (0, 0, 4, 0),
    "next column and row": (0, 0, 1, 1),
    "next channel": (0, 1, 0, 0),
    "next image": (1, 0, 0, 0),
    "next image, next column": (1, 0, 0, 1),
    "sixteen planes on": (1, 8, 0, 0),
}


def assert_independent(
    first: torch.Tensor, second: torch.Tensor, tests: int, name: str = ""
) -> None:
    """Of two tensors of uniform numbers: no bucket of 32 by 32 and no correlation stands out.

    Args:
        tests: how many pairs of tensors the caller tests at one go.
    """
    buckets = count((first * 32).long() * 32 + (second * 32).long(), 32**2)
    p_value = chi_square_p_values(buckets, torch.ones(32**2))
    # Low bits: those that a simple congruential generator gets wrong.
    low = count(((first * 2**16).long() % 32 * 32 + (second * 2**16).long() % 32), 32**2)
    low_p_value = chi_square_p_values(low, torch.ones(32**2))
    correlation = ((first.double() - 0.5) * (second.double() - 0.5)).mean() * 12
    # Of independent numbers it is normal with this standard deviation.
    correlation_p_value = torch.special.erfc(correlation.abs() * (first.numel() / 2) ** 0.5)
    smallest = min(float(p_value), float(low_p_value), float(correlation_p_value))
    assert smallest > SMALLEST_P / (3 * tests), (name, p_value, low_p_value, correlation)


def neighbours(numbers: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    by = NEIGHBOURS[name]
    first = numbers[tuple(slice(0, n - step) for n, step in zip(numbers.shape, by, strict=True))]
    return first, numbers[tuple(slice(step, None) for step in by)]


def test_neighbouring_numbers_are_independent():
    numbers = philox.uniforms(torch.tensor(100), (9, 16, 64, 64))
    for name in NEIGHBOURS:
        assert_independent(*neighbours(numbers, name), tests=len(NEIGHBOURS), name=name)


# Seeds that differ in the low half of the key, in the high half, in a carry between them, in sign.
SEEDS = [(0, 1), (1, 2), (41, 42), (0, 2**32), (2**32 - 1, 2**32), (-1, 0), (2**63 - 1, -(2**63))]


@pytest.mark.parametrize(("seed", "other"), SEEDS)
def test_numbers_of_neighbouring_seeds_are_independent(seed, other):
    first, second = (philox.uniforms(torch.tensor(s), (4, 16, 64, 64)) for s in (seed, other))
    assert_independent(first, second, tests=2 * len(SEEDS))
    # Nor does one seed's plane hold what the other's next plane does, as where they are added up.
    assert_independent(first[:, 1:], second[:, :-1], tests=2 * len(SEEDS))


def test_numbers_along_a_row_of_seeds_are_independent():
    """The same eight outputs under 100,000 seeds, one after the other: serial correlation."""
    seeds = torch.arange(-50_000, 50_000)
    zero = torch.tensor(0)
    key = (seeds & 0xFFFFFFFF, seeds >> 32 & 0xFFFFFFFF)
    words = torch.stack(philox.philox4x32(key, (zero, zero, zero, zero)), dim=1)
    series = torch.cat([words & 0xFFFF, words >> 16], dim=1) / 2**16
    # Correlations at lags of 1 to 8, in standard errors.
    centred = (series.double() - 0.5) * 12**0.5
    correlations = torch.stack(
        [
            (centred[lag:] * centred[:-lag]).mean(0) * (len(series) - lag) ** 0.5
            for lag in range(1, 9)
        ]
    )
    p_values = torch.special.erfc(correlations.abs() / 2**0.5)
    assert p_values.min() > SMALLEST_P / p_values.numel()
    # And as a whole: the squares of 64 normal numbers, which must not be too small either.
    total = (correlations**2).sum() / 2
    half = torch.tensor(correlations.numel() / 2, dtype=torch.float64)
    assert SMALLEST_P < torch.special.gammainc(half, total) < 1 - SMALLEST_P


# ---------------------------------------------------------------- the draws


@pytest.mark.parametrize("kernel", [(1, 2), (1, 3), (2, 2), (3, 3), (4, 5)], ids=str)
def test_each_window_draws_by_its_weights(kernel):
    """Chi-square of each of 64 windows, all of other weights, over 10,000 images; a third of the
    cells is dead."""
    cells = kernel[0] * kernel[1]
    weights = torch.rand(8, kernel[0], 8, kernel[1]) + 0.05
    weights = torch.where(torch.rand(weights.shape) < 0.33, -weights, weights)
    weights[:, 0, :, 0].clamp_(min=0.05)  # one is alive
    x = weights.view(1, 1, 8 * kernel[0], 8 * kernel[1])
    cell = drawn_cells(x.expand(10_000, -1, -1, -1), kernel, seed=1).flatten(1)
    counts = torch.stack([count(window, cells) for window in cell.T])
    weights = weights.permute(0, 2, 1, 3).reshape(64, cells).relu()
    several = (weights > 0).sum(1) > 1
    assert several.sum() > 32
    assert (counts[weights == 0] == 0).all()
    p_values = chi_square_p_values(counts[several], weights[several])
    assert p_values.min() > SMALLEST_P / len(p_values)
    # They are uniform if the draws are right: neither too small nor too good on the whole.
    # -2 sum log p is chi-square with twice as many degrees of freedom (Fisher).
    half = torch.tensor(float(len(p_values)), dtype=torch.float64)
    together = torch.special.gammaincc(half, -p_values.log().sum())
    assert SMALLEST_P < together < 1 - SMALLEST_P


def test_weights_whose_sum_overflows():
    """3e38, 3e38 and 1e38 sum to infinity in fp32, and are drawn by their weights all the same;
    infinite cells share the draw."""
    inf = torch.inf
    rows = torch.tensor([[3e38, 3e38, 1e38], [inf, inf, 1.0], [inf, 3e38, inf], [inf, inf, inf]])
    shares = torch.tensor([[3.0, 3, 1], [1, 1, 0], [1, 0, 1], [1, 1, 1]])
    cell = drawn_cells(rows[None, None].expand(10_000, -1, -1, -1), (1, 3), seed=3)
    counts = torch.stack([count(cell[:, :, row], 3) for row in range(4)])
    assert_fits(counts, shares)


def test_neighbouring_windows_draw_independently():
    """Pairs of windows of three unequal cells: nine outcomes, as likely as the products say."""
    weights = torch.tensor([3.0, 1, 2])
    cell = drawn_cells(weights.repeat(64).expand(9, 16, 32, -1), (1, 3), seed=5)
    pairs = (neighbours(cell, name) for name in NEIGHBOURS)
    counts = torch.stack([count(3 * first + second, 9) for first, second in pairs])
    assert_fits(counts, weights.outer(weights).flatten())


def test_overlapping_windows_draw_independently():
    """3 x 3 windows of equal cells with stride 1: given the weights, neighbours that share six
    cells draw without regard for each other."""
    generator = torch.Generator().manual_seed(6)
    _, indices = stochastic_pool2d(
        torch.ones(16, 4, 34, 34), 3, 1, return_indices=True, generator=generator
    )
    row, col = indices // 34, indices % 34
    start = torch.arange(32)
    cell = (row - start[:, None]) * 3 + col - start
    assert_fits(count(cell, 9), torch.ones(9))
    for first, second in ((cell[..., :-1], cell[..., 1:]), (cell[:, :, :-1], cell[:, :, 1:])):
        assert_fits(count(9 * first + second, 81), torch.ones(81))


def test_calls_one_after_the_other_draw_independently():
    generator = torch.Generator().manual_seed(7)
    x = torch.ones(4, 4, 32, 64)
    calls = []
    for _ in range(8):
        _, indices = stochastic_pool2d(x, (1, 2), return_indices=True, generator=generator)
        calls.append(indices % 2)
    pairs = list(itertools.combinations(calls, 2))
    counts = torch.stack([count(2 * first + second, 4) for first, second in pairs])
    assert_fits(counts, torch.ones(4))


WINDOWS = {
    "3 x 3, stride 1": Arguments((3, 3), (1, 1), (1, 1)),
    "2 x 2, stride 2": Arguments((2, 2), (2, 2)),
    "3 x 2, strided and dilated": Arguments((3, 2), (2, 1), (1, 0), (1, 2)),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_mean_of_the_draws_is_the_expectation(window):
    """Over 10,000 draws of each window, within four standard errors."""
    *arguments, ceil_mode = WINDOWS[window]
    x = torch.randn(1, 5, 12, 12)
    repeats = 10_000
    generator = torch.Generator().manual_seed(9)
    output = stochastic_pool2d(
        x.expand(repeats, -1, -1, -1), *arguments, ceil_mode=ceil_mode, generator=generator
    )
    expected = stochastic_pool2d(x.double(), *arguments, ceil_mode=ceil_mode, training=False)[0]
    deviation, mean = torch.std_mean(output.double(), 0)
    certain = deviation < 1e-6
    assert certain.sum() < 0.4 * certain.numel()
    torch.testing.assert_close(mean[certain], expected[certain], rtol=1e-6, atol=0)
    error = ((mean - expected) / deviation * repeats**0.5)[~certain]
    assert error.abs().max() < 4
    # Sixteen bits may shift a mean by 2**-13 of the largest weight: no bias shows over all windows.
    assert error.mean().abs() < 4 / error.numel() ** 0.5
