"""The compiled kernels against the reference: Triton's, interpreted without a GPU, on the grid of
windows and dtypes; numba's, of which test_numba.py has more, on what both may meet."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from stochastic_pooling import philox, reference
from stochastic_pooling.window import Window, memory_format

from .conftest import MODULES
from .windows import CASES, COMBINATIONS, LAYOUTS, guarded, plane

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # numpy, under the interpreter, tells of the overflows and NaNs that the inputs are made for.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]

# Two roundings in the input's precision: one in each of the two results that are compared.
TOLERANCE = {
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-30},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}
SEED = -6_148_914_691_236_517_206  # all four 16-bit parts in use, and negative


def case_ids(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def draw_alike(
    kernels: ModuleType, x: torch.Tensor, bias: torch.Tensor | None, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels draw: the reference's cells and their values, to the last bit."""
    seed = torch.tensor(SEED, device=x.device)
    output, code = kernels.sample(x, bias, seed, window)
    expected, expected_code = reference.sample(x, bias, seed, window)
    assert torch.equal(code, expected_code)
    # Triton's interpreter cuts bf16 off where a GPU rounds.
    exact = x.device.type != "cpu" or x.dtype != torch.bfloat16
    close = {"rtol": 0, "atol": 0} if exact else TOLERANCE[x.dtype]
    torch.testing.assert_close(output, expected, equal_nan=True, **close)
    return output, code


@pytest.fixture(params=["triton", "numba"])
def kernels(request: pytest.FixtureRequest, device: torch.device) -> ModuleType:
    if request.param == "numba" and device.type != "cpu":
        pytest.skip("numba serves CPU tensors")
    module = MODULES[request.param]
    return pytest.importorskip(f"stochastic_pooling.{module}", exc_type=ImportError)


def grid(test: Callable[..., None]) -> Callable[..., None]:
    """Every case, dtype and layout in Triton: numba's passes leave planes with such numbers to the
    reference. The interpreter is slow, and in a plain run it is test_every_window.py that tests the
    sliding kernels in channels_last."""
    backends = [
        pytest.param("triton", LAYOUTS[0], id="triton-contiguous"),
        pytest.param("triton", LAYOUTS[1], id="triton-channels_last", marks=pytest.mark.slow),
    ]
    test = pytest.mark.parametrize(("kernels", "layout"), backends, indirect=True)(test)
    return pytest.mark.parametrize(("case", "dtype"), COMBINATIONS, ids=case_ids)(test)


@grid
def test_sample_draws_the_reference_cells(kernels, case, dtype, layout, device):
    shape, window = CASES[case]
    x = plane(shape, dtype, layout).to(device)
    bias = torch.randn(shape[1], device=device) if shape[1] > 2 else None
    output, _ = draw_alike(kernels, x, bias, window)
    assert output.is_contiguous(memory_format=layout)


@grid
def test_sample_backward(kernels, case, dtype, layout, device):
    shape, window = CASES[case]
    x = plane(shape, dtype, layout).to(device)
    seed = torch.tensor(SEED, device=device)
    output, code = reference.sample(x, None, seed, window)
    grad = torch.randn_like(output)
    result = kernels.sample_backward(grad, code, shape[2:], window, True)
    expected = reference.sample_backward(grad, code, shape[2:], window, True)
    assert_gradients_close(result, expected, dtype)


@grid
def test_expectation(kernels, case, dtype, layout, device):
    shape, window = CASES[case]
    x = plane(shape, dtype, layout).to(device)
    bias = torch.randn(shape[1], device=device) if shape[1] > 2 else None
    result = kernels.expectation(x, bias, window)
    expected = reference.expectation(x, bias, window)
    assert result.is_contiguous(memory_format=layout)
    torch.testing.assert_close(result, expected, equal_nan=True, **TOLERANCE[dtype])
    grad = torch.randn_like(expected)
    assert_gradients_close(
        kernels.expectation_backward(grad, x, bias, window, True),
        reference.expectation_backward(grad, x, bias, window, True),
        dtype,
    )


def assert_gradients_close(result, expected, dtype):
    (grad_input, grad_bias), (expected_input, expected_bias) = result, expected
    torch.testing.assert_close(grad_input, expected_input, equal_nan=True, **TOLERANCE[dtype])
    # The bias's gradient sums the cells before they are rounded to the input's dtype.
    loose = {"rtol": 1e-4, "atol": 1e-4} if dtype != torch.float64 else TOLERANCE[dtype]
    torch.testing.assert_close(grad_bias, expected_bias, equal_nan=True, **loose)


@pytest.fixture
def sliding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Triton kernels with small programs, and planes in one strip."""
    kernels = pytest.importorskip("stochastic_pooling.gpu.launch", exc_type=ImportError)
    monkeypatch.setattr(kernels, "SLIDING_BLOCK", 32)
    monkeypatch.setattr(kernels, "FILLING_THREADS", 1)
    return kernels


@pytest.mark.parametrize(
    ("value", "row", "col", "filling"),
    [
        ("nan", 3, 3, 1),
        pytest.param("-nan", 8, 9, 1, marks=pytest.mark.slow),
        ("inf", 3, 0, 2**20),
        ("3e38", 4, 1, 1),
        pytest.param("2e19", 5, 4, 1, marks=pytest.mark.slow),
        ("1e-21", 6, 5, 1),
        ("1e-28", 6, 5, 1),
        pytest.param("1e-45", 6, 5, 1, marks=pytest.mark.slow),
    ],
)
def test_sliding_kernels_notice_a_special_window(
    sliding, value, row, col, filling, layout, device, monkeypatch
):
    """Also in a row that few windows hold that are looked at: a group's last, above a strip."""
    monkeypatch.setattr(sliding, "FILLING_THREADS", filling)
    shape, window = (1, 2, 13, 10), CASES["overlapping, padded"][1]
    x = torch.full(shape, -1.0) if "e-" in value else torch.rand(shape)
    x[0, 1, row, col : col + 2] = float(value)
    x = x.to(device).contiguous(memory_format=layout)
    draw_alike(sliding, x, None, window)
    torch.testing.assert_close(
        sliding.expectation(x, None, window),
        reference.expectation(x, None, window),
        equal_nan=True,
        rtol=1e-5,
        atol=0,
    )
    window = Window(2, 2, 1, 1, 1, 1, 1, 1, False)
    grad = torch.ones(1, 2, 14, 11, device=device)
    torch.testing.assert_close(
        sliding.expectation_backward(grad, x, None, window, False)[0],
        reference.expectation_backward(grad, x, None, window, False)[0],
        equal_nan=True,
    )


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((12, 13), Window(3, 3, 1, 1, 0, 0, 1, 1, False)),
        ((8, 6), Window(2, 2, 2, 2, 1, 1, 1, 1, False)),
    ],
    ids=["last lane beyond the outputs", "first row above the plane"],
)
def test_windows_that_were_wrong(kernels, size, window, layout, device):
    x = guarded(torch.rand(1, 2, *size).contiguous(memory_format=layout).to(device))
    output, code = draw_alike(kernels, x, None, window)
    grad = guarded(torch.randint(-8, 9, output.shape, device=device).to(output))
    grad_input, _ = kernels.sample_backward(grad, guarded(code), size, window, False)
    assert torch.equal(grad_input, reference.sample_backward(grad, code, size, window, False)[0])
    torch.testing.assert_close(
        kernels.expectation(x, None, window), reference.expectation(x, None, window)
    )


@pytest.mark.parametrize("view", ["columns", "rows", "channels", "signals' channels"])
def test_what_lies_beside_a_view_is_not_read(sliding, view, layout, device, monkeypatch):
    """A NaN that is read, whatever undoes it, has a strip done again."""
    if device.type != "cpu":
        pytest.skip("the kernels call what is compiled into them")
    storage = torch.full((9, 4, 18, 16), torch.nan).contiguous(memory_format=layout)
    x = {
        "columns": storage[:1, ..., 4:12],
        "rows": storage[:1, :, 1::2],
        "channels": storage[:1, 1:3],
        "signals' channels": storage[:, :, :1].contiguous(memory_format=layout)[:, 1:3],
    }[view].normal_()
    for name, again in (("sliding", "_strip_again"), ("gradient", "_differentiate_strip_again")):
        module = importlib.import_module(f"stochastic_pooling.gpu.{name}")
        monkeypatch.setattr(module, again, None)
    rows = 1 if "signals" in view else 2
    window = Window(rows, 3, 1, 1, rows // 2, 1, 1, 1, False)
    output, _ = draw_alike(sliding, x, None, window)
    assert not sliding.expectation(x, None, window).isnan().any()
    gradient, _ = sliding.expectation_backward(output, x, None, window, False)
    assert not gradient.isnan().any()


@pytest.mark.parametrize("case", ["overlapping, padded", "dilated, not square"])
def test_any_strides(kernels, case, device):
    """Views of an input and of a bias, and expanded gradients."""
    window = CASES[case][1]
    storage = torch.randn(2, 8, 9, 6, device=device)
    for x in (storage[:, ::2, 1:, 1::2], storage.transpose(1, 3), storage[:1].expand(3, 8, 9, 6)):
        bias = torch.randn(2 * x.shape[1], device=device)[::2]
        output, code = draw_alike(kernels, x, bias, window)
        grad = torch.ones((), device=device).expand(output.shape)
        assert_gradients_close(
            kernels.sample_backward(grad, code, x.shape[2:], window, True),
            reference.sample_backward(grad, code, x.shape[2:], window, True),
            torch.float32,
        )


def laid_out(like: torch.Tensor, how: str) -> torch.Tensor:
    """Small integers, whose sums are exact, in the shape of `like`."""
    n, c, h, w = like.shape
    numbers = torch.randint(-8, 9, like.shape, device=like.device).to(like.dtype)
    if how == "expanded":
        return numbers[:1, :1, :1, :1].expand(like.shape)
    storage = {
        "contiguous": numbers,
        "channels_last": numbers.contiguous(memory_format=torch.channels_last),
        "slice": like.new_empty(n, 2 * c, h, w + 1)[:, c:, :, :w],
        "images apart": like.new_empty(n, c * h * w + 1)[:, 1:].unflatten(1, (c, h, w)),
        "channels apart": like.new_empty(n, c, h * w + 1)[..., 1:].unflatten(2, (h, w)),
        "channels_last slice": like.new_empty(n, h, w, 2 * c).permute(0, 3, 1, 2)[:, c:],
        "transposed": like.new_empty(n, c, w, h).transpose(2, 3),
        "stepped": like.new_empty(n, c, h + 1, 2 * w)[:, :, 1:, 1::2],
    }[how]
    return storage.copy_(numbers)


@pytest.mark.parametrize(
    "how",
    [
        "contiguous", "channels_last", "expanded", "slice", "images apart", "channels apart",
        "channels_last slice", "transposed", "stepped",
    ],
)  # fmt: skip
def test_sliding_kernels_serve_every_layout(sliding, how, layout, device, monkeypatch):
    """A tensor in another layout is read through its strides, not by the general kernels."""
    monkeypatch.setattr(sliding, "_tile", None)
    shape, window = (2, 4, 10, 8), CASES["overlapping, stride 2"][1]
    x = laid_out(torch.empty(shape, device=device), how)
    if layout == torch.channels_last:
        x[0, 0, 0, 0] = torch.inf  # so does what is done again
    output, code = draw_alike(sliding, x, None, window)
    assert output.is_contiguous(memory_format=memory_format(x))
    torch.testing.assert_close(
        sliding.expectation(x, None, window), reference.expectation(x, None, window)
    )

    code = code.contiguous(memory_format=layout)
    grad = laid_out(output, how)
    grad_input, grad_bias = sliding.sample_backward(grad, code, shape[2:], window, True)
    expected, expected_bias = reference.sample_backward(grad, code, shape[2:], window, True)
    assert torch.equal(grad_input, expected)
    assert torch.equal(grad_bias, expected_bias)
    assert grad_input.is_contiguous(memory_format=layout)
    assert_gradients_close(
        sliding.expectation_backward(grad, x, None, window, True),
        reference.expectation_backward(grad, x, None, window, True),
        torch.float32,
    )


def test_a_launch_is_planned_once(sliding, layout, device, monkeypatch):
    """What depends on shapes alone takes tens of microseconds, so it is remembered."""
    monkeypatch.setattr(sliding, "_launch", lambda *_, **__: None)
    seed = torch.tensor(SEED, device=device)
    planners = (sliding._planned, sliding._output_size)
    for window in (CASES["overlapping, padded"][1], CASES["dilated, not square"][1]):
        x = torch.randn(1, 2, 7, 8, device=device).contiguous(memory_format=layout)
        for repeated in (False, True):
            before = [planner.cache_info().misses for planner in planners]
            output, code = sliding.sample(x, None, seed, window)
            sliding.sample_backward(output, code, x.shape[2:], window, True)
            sliding.expectation(x, None, window)
            sliding.expectation_backward(output, x, None, window, True)
            planned = [planner.cache_info().misses for planner in planners] != before
            assert planned <= (not repeated)


def test_a_compiled_kernel_serves_what_it_was_compiled_for(sliding, layout, device):
    """Launched again with tensors that lie elsewhere, bias and gradient of another dtype."""
    shape, window = CASES["overlapping, padded"]
    strides = torch.empty(shape, memory_format=layout).stride()
    seed = torch.tensor(SEED, device=device)
    for offset, dtype in ((0, None), (1, None), (0, torch.float16), (1, torch.float16), (0, None)):
        memory = torch.randn(offset + math.prod(shape), device=device)
        x = memory[offset:].as_strided(shape, strides)
        bias = None if dtype is None else x[0, :, 0, 0].to(dtype)
        results = []
        for backend in (sliding, reference):
            output, code = backend.sample(x, bias, seed, window)
            grad = (code - 4).to(dtype or x.dtype)
            backward = backend.sample_backward(grad, code, shape[2:], window, True)
            results.append((output, code, *backward))
        assert all(map(torch.equal, *results))


def test_planes_of_one_cell_with_codes_in_channels_last(sliding, device):
    """The planes' own strides do not tell their format."""
    window = Window(2, 2, 1, 1, 1, 1, 1, 1, False)
    x = torch.rand(2, 3, 1, 1, device=device)
    _, code = reference.sample(x, None, torch.tensor(SEED, device=device), window)
    code = code.contiguous(memory_format=torch.channels_last)
    grad = torch.randint(-8, 9, code.shape, device=device).float()
    result = sliding.sample_backward(grad, code, (1, 1), window, True)
    expected = reference.sample_backward(grad, code, (1, 1), window, True)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("dilation", [1, 2])
def test_dead_is_what_no_running_sum_exceeds(kernels, dilation, device):
    """Of the smallest numbers u * S may be rounded to S."""
    x = torch.full((1, 1, 8, 8), 2.0**-149, device=device)
    window = Window(1, 2, 1, 1, 0, 0, 1, dilation, False)
    _, code = draw_alike(kernels, x, None, window)
    assert set(code.unique().tolist()) == {0, 1, window.dead_code}


@pytest.mark.parametrize("stride", [2, 3])  # by 3 no window slides
def test_sums_that_meet_the_number(sliding, stride, device):
    """u * S is the sum of the first row, which the next two cells change together, not alone."""
    window = Window(3, 2, stride, 2, 0, 0, 1, 1, False)
    u = philox.uniforms(torch.tensor(SEED, device=device), (1, 4, 1, 16))
    first, one = u * 2**25, torch.ones_like(u)
    cells = torch.stack([first, 0 * one, one, one, 2**25 - 2 - first, 0 * one], -1)
    x = cells.view(1, 4, 16, 3, 2).transpose(2, 3).flatten(3)
    _, code = draw_alike(sliding, x, None, window)
    assert (code == torch.where(u < 0.5, 2, 3)).all()


@pytest.mark.parametrize("size", [1, 2])
def test_no_channels(kernels, size, device):
    """What `vmap` makes of no example. Planes of one cell have strides as in channels_last."""
    window = Window.of((size, size), (size, size), (0, 0), (1, 1), False)
    x, bias = torch.empty(2, 0, size, size, device=device), torch.empty(0, device=device)
    assert (memory_format(x) == torch.channels_last) == (size == 1)
    output, code = kernels.sample(x, bias, torch.tensor(SEED, device=device), window)
    mean = kernels.expectation(x, bias, window)
    assert output.shape == code.shape == mean.shape == (2, 0, 1, 1)
    for grad_input, grad_bias in (
        kernels.sample_backward(output, code, x.shape[2:], window, True),
        kernels.expectation_backward(mean, x, bias, window, True),
    ):
        assert (grad_input.shape, grad_bias.shape) == (x.shape, bias.shape)


def test_plans_of_what_there_is_no_memory_for(sliding, monkeypatch):
    """The gradient of an expanded input is larger than all that is given; columns may lie far
    apart: what 32 bits do not reach does not slide. Nor do windows that skip rows or columns."""
    monkeypatch.setattr(sliding, "_target", lambda device: None)  # meta tensors have no device
    monkeypatch.setattr(sliding, "FILLING_THREADS", 2**17)
    window = Window(3, 3, 1, 1, 0, 0, 1, 1, False)
    number = torch.zeros((), dtype=torch.float16)

    def plan(call, input, output, grad):
        return sliding._plan(call, window, torch.contiguous_format, input, output, grad)

    large, large_output = number.expand(2, 1024, 1024, 1026), number.expand(2, 1024, 1022, 1024)
    assert plan("gradient", large, large_output, large_output) is None
    assert "int64" in str(plan("distribute", large, large_output, None).numbers[-1].index)
    small, output = number.expand(1, 1, 4, 4), number.expand(1, 1, 2, 2)
    assert plan("gradient", small, output, output).kernel.__name__ == "gradient_sliding_kernel"
    assert plan("gather", small, output, output).kernel.__name__ == "gather_sliding_kernel"
    for strides in ((1, 1, 1, 2**30), (1, 1, 2**31, 1)):
        far = torch.empty_strided((1, 1, 2, 2), strides, device="meta")
        assert plan("gather", small, output, far).kernel.__name__ == "gather_kernel"
    tall, output = number.expand(1, 1, 2**20, 3), number.expand(1, 1, 2**20 - 2, 1)
    assert plan("sample", tall, output, None).grid[1] < 2**16  # CUDA's limit
    for kernel, stride, dilation in (
        ((1, 3), (2, 1), (1, 1)), ((3, 1), (1, 2), (1, 1)), ((2, 3), (1, 1), (2, 1)),
        ((3, 3), (3, 1), (1, 1)), ((2, 6), (1, 1), (1, 1)),
    ):  # fmt: skip
        window = Window.of(kernel, stride, (0, 0), dilation, False)
        assert plan("sample", small, output, None).kernel.__name__ == "sample_kernel", window


def test_programs_of_small_planes_are_full(sliding, layout, monkeypatch):
    """Whole planes as windows, of which each channel has one."""
    monkeypatch.setattr(sliding, "_target", lambda device: None)
    window = Window(7, 7, 7, 7, 0, 0, 1, 1, False)
    planes, cells = (torch.empty(4, 512, n, n, device="meta") for n in (7, 1))
    for name, outputs in (("sample", 4 * 512), ("gather", 4 * 512 * 49)):
        plan = sliding._plan(name, window, layout, planes, cells)
        assert plan.grid[0] * sliding.TILE_BYTES // 4 < 1.5 * outputs, name


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 1, 2, 4), (2**30, 0, 4, 1)),
        ((1, 3, 2, 4), (0, 2**30, 4, 1)),
        ((1, 1, 3, 2, 4), (0, 0, 2**30, 4, 1)),
        ((1, 1, 3, 4), (0, 0, 2**30, 1)),
    ],
    ids=["images", "channels", "slices", "rows"],
)
def test_64_bit_indices(kernels, shape, strides, device):
    """Products of numbers that each have 32 bits, in memory that is reserved and hardly touched."""
    window = Window(2, 2, 1, 1, 0, 1, 1, 2, False)  # dilated: the sliding kernels read a copy
    storage = torch.zeros(1, dtype=torch.float16, device=device).new_empty(2**31 + 32)
    x = storage.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    output, code = draw_alike(kernels, x, None, window)
    grad = storage.as_strided(output.shape, strides, 16)
    grad.copy_(torch.randn(grad.shape))
    results, expected = (
        (
            *backend.sample_backward(grad, code, shape[2:], window, True),
            *backend.expectation_backward(grad, x, None, window, True),
        )
        for backend in (kernels, reference)
    )
    assert_gradients_close(results[:2], expected[:2], torch.float16)
    assert_gradients_close(results[2:], expected[2:], torch.float16)
