"""Pools over volumes, and pools of windows that differ in size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from stochastic_pooling import (
    adaptive_stochastic_pool1d,
    adaptive_stochastic_pool2d,
    adaptive_stochastic_pool3d,
    functional,
    philox,
    reference,
    stochastic_pool2d,
    stochastic_pool3d,
)
from stochastic_pooling.window import Window

from .conftest import generator
from .naive import drawn_seed
from .test_kernels import draw_alike

pytestmark = [
    pytest.mark.usefixtures("poisoned", "plain"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]

# What the case is for: (shape of the input, window); the last four numbers are the depth's.
VOLUMES = {
    "overlapping, padded": ((1, 2, 3, 3, 4), Window(3, 3, 1, 1, 1, 1, 1, 1, False, 3, 1, 1, 1)),
    "tiles side by side": ((1, 2, 4, 4, 6), Window(2, 2, 2, 2, 0, 0, 1, 1, False, 2, 2, 0, 1)),
    "mixed": ((1, 2, 7, 6, 5), Window(3, 2, 2, 1, 1, 1, 1, 2, True, 2, 3, 1, 2)),
    "slice by slice": ((2, 2, 2, 5, 6), Window(3, 3, 2, 2, 1, 1, 1, 1, False)),
    "every other slice": ((1, 2, 5, 4, 4), Window(3, 3, 1, 1, 1, 1, 1, 1, False, 1, 2, 0, 1)),
    "along the depth": ((1, 2, 7, 2, 3), Window(1, 1, 1, 1, 0, 0, 1, 1, True, 3, 2, 1, 1)),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("case", VOLUMES)
def test_triton_draws_the_reference_cells(case, layout, device):
    kernels = pytest.importorskip("stochastic_pooling.gpu.launch", exc_type=ImportError)
    shape, window = VOLUMES[case]
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    x[0, 0, 0, 0, 0], x[0, 1, -1, -1, -1] = torch.nan, torch.inf
    bias = torch.randn(shape[1], device=device)
    output, code = draw_alike(kernels, x, bias, window)
    mean = kernels.expectation(x, bias, window)
    torch.testing.assert_close(mean, reference.expectation(x, bias, window), equal_nan=True)
    for result in (output, code, mean):
        assert result.is_contiguous(memory_format=layout)
    grad = torch.randn_like(output)
    for result, other in (
        (
            kernels.sample_backward(grad, code, shape[2:], window, True),
            reference.sample_backward(grad, code, shape[2:], window, True),
        ),
        (
            kernels.expectation_backward(grad, x, bias, window, True),
            reference.expectation_backward(grad, x, bias, window, True),
        ),
    ):
        torch.testing.assert_close(result, other, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", VOLUMES)
def test_definition_window_by_window(case, device):
    """The definition read aloud, in plain Python, against the function in fp64."""
    shape, window = VOLUMES[case]
    x = torch.randn(shape, dtype=torch.float64, device=device)
    x[0, 0, :3, :4, :4] = -1  # dead windows
    *arguments, ceil_mode = window.arguments(3)
    output, indices = stochastic_pool3d(
        x, *arguments, ceil_mode=ceil_mode, return_indices=True, generator=generator(device)
    )
    mean = stochastic_pool3d(x, *arguments, ceil_mode=ceil_mode, training=False)
    u = philox.uniforms(torch.tensor(drawn_seed(generator(device)), device=device), output.shape)
    assert output.shape == F.max_pool3d(x, *arguments, ceil_mode=ceil_mode).shape
    sides = window.sides(3)
    for place in itertools.product(*map(range, output.shape)):
        cells = []
        for cell in itertools.product(*(range(kernel) for kernel, *_ in sides)):
            d, h, w = (
                out * stride - padding + number * dilation
                for out, number, (_, stride, padding, dilation) in zip(
                    place[2:], cell, sides, strict=True
                )
            )
            if 0 <= d < shape[2] and 0 <= h < shape[3] and 0 <= w < shape[4]:
                value = max(float(x[(*place[:2], d, h, w)]), 0.0)
                cells.append((value, (d * shape[3] + h) * shape[4] + w))
        total = sum(value for value, _ in cells)
        if total == 0:
            assert (output[place], indices[place], mean[place]) == (0, cells[0][1], 0)
            continue
        running = itertools.accumulate(value for value, _ in cells)
        drawn = sum(before <= float(u[place]) * total for before in running)
        assert (output[place], indices[place]) == cells[drawn]
        expected = sum(value * value for value, _ in cells) / total
        assert float(mean[place]) == pytest.approx(expected, rel=1e-12)


def test_a_volume_of_one_slice_is_a_plane(device):
    x = torch.randn(2, 3, 5, 6, device=device)
    for training in (True, False):
        plane = stochastic_pool2d(x, 3, 1, 1, training=training, generator=generator(device))
        volume = stochastic_pool3d(
            x.unsqueeze(2), (1, 3, 3), 1, (0, 1, 1), training=training, generator=generator(device)
        )
        torch.testing.assert_close(volume.squeeze(2), plane)


@pytest.mark.parametrize("training", [True, False])
def test_windows_within_a_slice_are_those_of_planes(training, device):
    """In channels_last_3d they are a volume's."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(2, 3, 4, 5, 6, generator=generator, device=device)
        x = x.contiguous(memory_format=layout).requires_grad_()
        bias = torch.randn(3, generator=generator, device=device, requires_grad=True)
        options = {"bias": bias, "training": training, "generator": generator}
        pooled = stochastic_pool3d(
            x, (1, 3, 3), (1, 2, 2), (0, 1, 1), return_indices=training, **options
        )
        output, *indices = pooled if training else (pooled,)
        gradients = torch.autograd.grad(output.sin().sum(), (x, bias))
        assert output.is_contiguous(memory_format=layout)
        assert gradients[0].is_contiguous(memory_format=layout)
        results.append((output, *indices, *gradients))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_large_volumes_draw_what_their_corners_draw(device):
    """Of the first a CPU pools one at a time, of the second two, of the last all."""
    x = torch.rand(3, 2, 2, 300, 1000, device=device)
    outputs = [
        stochastic_pool3d(x[..., :height, :width], 2, generator=generator(device))
        for height, width in ((300, 1000), (200, 500), (8, 8))
    ]
    for output in outputs:
        assert torch.equal(output[..., :4, :4], outputs[-1])


def test_unbatched_volumes_and_bad_ones(device):
    x = torch.randn(3, 4, 5, 6, device=device)
    single = stochastic_pool3d(x, 2, return_indices=True, generator=generator(device))
    batched = stochastic_pool3d(x[None], 2, return_indices=True, generator=generator(device))
    for one, other in zip(single, batched, strict=True):
        assert torch.equal(one, other[0])
    restored = F.max_unpool3d(*batched, 2, output_size=x[None].shape)[0]
    assert torch.equal(restored[restored > 0], x[restored > 0])
    assert stochastic_pool3d(x.new_zeros(0, 3, 4, 5, 6), 2).shape == (0, 3, 2, 2, 3)
    with pytest.raises(RuntimeError, match="Expected 4D or 5D"):
        stochastic_pool3d(x[0], 2)
    with pytest.raises(RuntimeError, match="a tuple of three ints"):
        stochastic_pool3d(x, (2, 2))
    with pytest.raises(RuntimeError, match="Output size is too small"):
        stochastic_pool3d(x, 6)


ADAPTIVE = {
    1: (adaptive_stochastic_pool1d, F.adaptive_max_pool1d, (11,), [1, 4, (11,), 17]),
    2: (
        *(adaptive_stochastic_pool2d, F.adaptive_max_pool2d, (7, 9)),
        [1, (2, 3), (5, 4), (7, None), 9],
    ),
    3: (
        *(adaptive_stochastic_pool3d, F.adaptive_max_pool3d, (3, 4, 5)),
        [1, 2, (3, 2, 5), (2, None, 4), 6],
    ),
}


@pytest.mark.parametrize(
    ("dims", "output_size"),
    [(dims, output_size) for dims, (*_, sizes) in ADAPTIVE.items() for output_size in sizes],
    ids=str,
)
def test_adaptive_windows_are_those_of_adaptive_max_pool(dims, output_size, device):
    """Weights so far apart that the largest is all but 2**-16 of the sum: it is what is drawn."""
    pool, max_pool, size, _ = ADAPTIVE[dims]
    ranks = torch.rand(2, 3, math.prod(size), device=device).argsort(-1).view(2, 3, *size)
    x = torch.pow(2.0, 16 * ranks.double())
    for input in (x, x[0]):
        drawn = pool(input, output_size, return_indices=True, generator=generator(device))
        maximum = max_pool(input, output_size, return_indices=True)
        for result, expected in zip(drawn, maximum, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("size", "output_size"), [((4, 6, 4), 2), ((4, 6, 4), 3), ((4, 6, 4), 9), ((1, 1, 1), 3)]
)
def test_adaptive_pools_keep_channels_last(dims, size, output_size, device):
    """Where windows are of unequal size, too, and where planes have one cell."""
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    x = torch.randn(2, 3, *size[:dims], device=device)
    laid_out = torch.empty_like(x, memory_format=layout).copy_(x)
    for training in (True, False):
        output, expected = (
            ADAPTIVE[dims][0](x, output_size, training=training, generator=generator(device))
            for x in (laid_out, x)
        )
        assert output.is_contiguous(memory_format=layout)
        assert expected.is_contiguous()
        assert torch.equal(output, expected) or not training
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("size", "output_size", "window"),
    [
        ((6, 8), (3, 2), ((2, 4),)),
        ((7, 5), 3, (3, 2, (0, 1))),
        ((3, 4), (4, 3), (2, 1, (1, 0))),
        ((1, 1), (2, 1), ((2, 1), 1, (1, 0))),
    ],
)
def test_adaptive_pool_of_even_windows_is_the_pool(size, output_size, window, device, monkeypatch):
    """And lays nothing out."""
    monkeypatch.setattr(functional, "_adaptive_windows", None)
    x, bias = torch.randn(2, 3, *size, device=device), torch.randn(3, device=device)
    for training in (True, False):
        adaptive = adaptive_stochastic_pool2d(
            x, output_size, bias=bias, training=training, generator=generator(device)
        )
        pool = stochastic_pool2d(
            x, *window, bias=bias, training=training, generator=generator(device)
        )
        assert torch.equal(adaptive, pool)
    # Not on a CPU, for which each size of larger windows that overlap would be compiled.
    assert adaptive_stochastic_pool2d(x.new_empty(2, 3, 7, 9, device="meta"), 2).shape[2:] == (2, 2)


@pytest.mark.parametrize("output_size", [(3, 4), (2, 5)])
def test_adaptive_expectations_are_of_each_window(output_size, device):
    """Of its cells alone, each once."""
    x = torch.rand(1, 1, 5, 7, device=device)
    mean = adaptive_stochastic_pool2d(x, output_size, training=False)
    for place in itertools.product(*map(range, output_size)):
        rows, columns = (
            slice(i * length // out, math.ceil((i + 1) * length / out))
            for i, length, out in zip(place, (5, 7), output_size, strict=True)
        )
        cells = x[0, 0, rows, columns]
        torch.testing.assert_close(mean[0, 0][place], cells.square().sum() / cells.sum())


def test_adaptive_gradients(device):
    x = torch.randn(1, 2, 5, 7, dtype=torch.float64, device=device)
    x = (x + x.sign() * 0.1).requires_grad_()
    bias = torch.full((2,), 0.05, dtype=torch.float64, device=device, requires_grad=True)
    for training in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, bias, training=training: adaptive_stochastic_pool2d(
                x, (2, 5), bias=bias, training=training, generator=generator(device)
            ),
            (x, bias),
            check_forward_ad=True,
        )


def test_adaptive_dead_windows_and_bad_arguments(device):
    x = -torch.ones(1, 1, 5, 7, device=device)
    output, indices = adaptive_stochastic_pool2d(x, (2, 3), return_indices=True)
    assert torch.equal(output, torch.zeros(1, 1, 2, 3, device=device))
    assert indices.tolist() == [[[[0, 2, 4], [14, 16, 18]]]]
    # A bias does not bring to life the cells that the shorter windows lack.
    for size in (3, 5):
        mean = adaptive_stochastic_pool2d(2 * x, size, bias=x.new_full((1,), 3), training=False)
        assert torch.equal(mean, torch.ones_like(mean))
    # Nor are they drawn where it makes NaN of all.
    nan = x.new_full((1,), torch.nan)
    _, indices = adaptive_stochastic_pool2d(x, 5, bias=nan, return_indices=True)
    assert torch.equal(indices, F.adaptive_max_pool2d(x + nan, 5, return_indices=True)[1])
    with pytest.raises(TypeError, match="'output_size' must be an int"):
        adaptive_stochastic_pool2d(x, 2.5)
    wrongs = ((0, "must be positive"), ((5, 0), "must be positive"), ((1, 2, 3), "one int or two"))
    for wrong, message in wrongs:
        with pytest.raises(RuntimeError, match=message):
            adaptive_stochastic_pool2d(x, wrong)
    with pytest.raises(RuntimeError, match="Expected 3D or 4D"):
        adaptive_stochastic_pool2d(x[0, 0], 1)
    with pytest.raises(RuntimeError, match="pool3d: output_size must be one int or three"):
        adaptive_stochastic_pool3d(x, (1, 2))
