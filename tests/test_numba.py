"""What the compiled CPU kernels have of their own: tiles, threads, 16-bit floats, their cache.

`test_kernels.py` holds them against the reference over the grid of windows and dtypes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stochastic_pooling import reference
from stochastic_pooling.window import Window

from .windows import LAYOUTS

kernels = pytest.importorskip("stochastic_pooling.numba_kernels", exc_type=ImportError)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the other fixtures are on the GPU"),
]

SEED = torch.tensor(-6_148_914_691_236_517_206)
DENSE = Window(3, 3, 1, 1, 1, 1, 1, 1, False)
WINDOWS = {
    "3 x 3, stride 1": DENSE,
    "3 x 3, no padding": Window(3, 3, 1, 1, 0, 0, 1, 1, False),
    "3 x 3, stride 2": Window(3, 3, 2, 2, 1, 1, 1, 1, False),
    "3 x 3, dilated": Window(3, 3, 1, 2, 1, 1, 2, 3, True),
    "2 x 2, stride 2": Window(2, 2, 2, 2, 0, 0, 1, 1, False),
}
SHAPES = {
    "a tile has several sheets, the last fewer": (3, 7, 70, 29),
    "a sheet has several tiles each way": (1, 41, 66, 101),
    "rows shorter than a chunk": (5, 3, 6, 7),
}


@pytest.fixture
def threads():
    """Sets the number of threads, which is restored."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=LAYOUTS, ids=["contiguous", "channels_last"])
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


def sprinkled(shape: tuple[int, ...], layout: torch.memory_format) -> torch.Tensor:
    """A random input; in every other channel one number in a hundred is none of the ordinary."""
    x = torch.randn(shape)
    special = torch.tensor(
        [float("nan"), -float("nan"), float("inf"), 3e38, 1e30, 1e-40, 1e-35, -1e38]
    )
    special = special[torch.randint(8, shape)]
    x[:, ::2] = torch.where(torch.rand(shape) < 0.01, special, x)[:, ::2]
    return x.contiguous(memory_format=layout)


def assert_close(result, expected) -> None:
    """Of gradients of the input and the bias; the latter sums them up, in some order."""
    torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_tiles(window, shape, layout):
    window, shape = WINDOWS[window], SHAPES[shape]
    x = sprinkled(shape, layout)
    bias = torch.randn(shape[1])
    output, code = kernels.sample(x, bias, SEED, window)
    expected, expected_code = reference.sample(x, bias, SEED, window)
    assert torch.equal(code, expected_code)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    mean = kernels.expectation(x, bias, window)
    torch.testing.assert_close(
        mean, reference.expectation(x, bias, window), rtol=1e-5, atol=0, equal_nan=True
    )
    grad = torch.randn_like(output)
    assert_close(
        kernels.sample_backward(grad, code, shape[2:], window, True),
        reference.sample_backward(grad, code, shape[2:], window, True),
    )
    # The gradient of 1e38 is a difference of large numbers, and a NaN in no window anyone's guess.
    ones = torch.ones_like(x)
    used, _ = reference.expectation_backward(torch.ones_like(output), ones, None, window, False)
    x = torch.where(used > 0, x.clamp(max=1e18), 1).contiguous(memory_format=layout)
    assert_close(
        kernels.expectation_backward(grad, x, bias, window, True),
        reference.expectation_backward(grad, x, bias, window, True),
    )


@pytest.mark.parametrize("window", ["3 x 3, stride 1", "2 x 2, stride 2"])
@pytest.mark.parametrize("special", [-float("nan"), 1e-45])
def test_one_special_window(window, special, layout):
    """A NaN may be negative, as inf - inf is on x86; the sum of a subnormal may be dead."""
    window = WINDOWS[window]
    x = torch.full((2, 3, 8, 9), special if special > 0 else 1.0)
    x[0, 1, 4, 4] = special
    x = x.contiguous(memory_format=layout)
    output, code = kernels.sample(x, None, SEED, window)
    expected, expected_code = reference.sample(x, None, SEED, window)
    assert (expected.isnan() | (code == window.dead_code)).any()
    assert torch.equal(code, expected_code)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_float(dtype):
    """Gradients of all 65,536 patterns pass unchanged; a sum of two is rounded as torch rounds."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    grad = torch.stack([patterns, patterns[torch.randperm(2**16)]]).reshape(1, 1, 2, -1)
    one_cell = Window(1, 1, 1, 1, 0, 0, 1, 1, False)
    code = torch.zeros(grad.shape, dtype=torch.uint8)
    passed, _ = kernels.sample_backward(grad, code, (2, 2**16), one_cell, False)
    torch.testing.assert_close(passed, grad, rtol=0, atol=0, equal_nan=True)
    # Two windows of two rows, over three; both take the row that they share.
    column = Window(2, 1, 1, 1, 0, 0, 1, 1, False)
    code[0, 0, 0] = 1
    added, _ = kernels.sample_backward(grad, code, (3, 2**16), column, False)
    expected = (grad[0, 0, 0].float() + grad[0, 0, 1].float()).to(dtype)
    torch.testing.assert_close(added[0, 0, 1], expected, rtol=0, atol=0, equal_nan=True)
    assert not added[0, 0, ::2].any()


def run_all(x: torch.Tensor, window: Window) -> list[torch.Tensor]:
    bias = torch.linspace(-1, 1, x.shape[1])
    output, code = kernels.sample(x, bias, SEED, window)
    grad = output.cos()
    return [
        output, code, kernels.expectation(x, bias, window),
        *kernels.sample_backward(grad, code, x.shape[2:], window, True),
        *kernels.expectation_backward(grad, x, bias, window, True),
    ]  # fmt: skip


def assert_same(results, expected) -> None:
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("window", ["3 x 3, stride 1", "2 x 2, stride 2"])
def test_results_do_not_depend_on_the_number_of_threads(window, layout, threads):
    x = torch.randn(3, 12, 70, 40).to(memory_format=layout)
    threads(1)
    expected = run_all(x, WINDOWS[window])
    for number in (2, 3, 8):
        threads(number)
        assert_same(run_all(x, WINDOWS[window]), expected)


def test_many_python_threads_at_once(threads):
    threads(2)
    inputs = [torch.randn(2, 6, 60, 60) for _ in range(8)]
    expected = [run_all(x, DENSE) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for results, others in zip(
                pool.map(run_all, inputs, [DENSE] * 8), expected, strict=True
            ):
                assert_same(results, others)


def test_a_busy_pool_is_not_waited_for(threads):
    threads(4)
    x = torch.randn(2, 6, 60, 60)
    expected = run_all(x, DENSE)
    release = threading.Event()
    busy = [kernels._submit(lambda: release.wait(60)) for _ in range(64)]
    try:
        assert_same(run_all(x, DENSE), expected)
    finally:
        release.set()
    assert all(future.result() for future in busy)


def _pool_in_child(x: torch.Tensor, expected: torch.Tensor) -> None:
    assert kernels._pool is None
    output, _ = kernels.sample(x, None, SEED, DENSE)
    assert kernels._pool is not None
    assert torch.equal(output, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork(threads):
    threads(2)
    # Large enough for two threads of ours, too small for torch's own, which a fork breaks.
    x = torch.randn(1, 20, 30, 36)
    expected, _ = kernels.sample(x, None, SEED, DENSE)
    assert kernels._pool is not None
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_pool_in_child, args=(x, expected), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_an_empty_batch(layout):
    x = torch.empty(0, 3, 8, 8).contiguous(memory_format=layout)
    output, code = kernels.sample(x, None, SEED, DENSE)
    assert output.shape == code.shape == kernels.expectation(x, None, DENSE).shape == x.shape
    for grad_input, grad_bias in (
        kernels.sample_backward(output, code, (8, 8), DENSE, True),
        kernels.expectation_backward(output, x, None, DENSE, True),
    ):
        assert grad_input.shape == x.shape
        assert torch.equal(grad_bias, torch.zeros(3))


def test_no_folder_for_the_cache(monkeypatch):
    """As where the package is installed read-only, for a user without a home."""
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])

    @kernels.compiled
    def double(x):
        return 2 * x

    assert double(21) == 42


def test_numba_missing_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "stochastic_pooling.numba_kernels")
    with pytest.raises(ImportError, match="numba"):
        importlib.import_module("stochastic_pooling.numba_kernels")
