"""The compiled CPU passes beside the reference: every window, 16-bit floats, threads, the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from _pytest.mark import ParameterSet

from stochastic_pooling import StochasticPool1d, StochasticPool2d, reference
from stochastic_pooling.window import Window

from .windows import LAYOUTS, guarded

cpu = pytest.importorskip("stochastic_pooling.cpu", exc_type=ImportError)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the other fixtures are on the GPU"),
]

SEED = torch.tensor(-6_148_914_691_236_517_206)
DENSE = Window(3, 3, 1, 1, 1, 1, 1, 1, False)
STRIDED = Window(2, 2, 2, 2, 0, 0, 1, 1, False)
TILES = Window(3, 2, 3, 2, 0, 0, 1, 1, False)  # whose pass knows no sizes
SPECIAL = [float("nan"), -float("nan"), float("inf"), 3e38, 2e36, 1e30, 1e-35, 1e-40, 1e-45, -1e38]


@pytest.fixture
def threads():
    """Sets the number of threads, which is restored."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that leave nothing to the reference, which would be compared with itself."""
    monkeypatch.setattr(cpu, "reference", None)


def steps(tensor: torch.Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def same(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Also in their zeros' signs and their strides, where they are stepped; NaN is NaN."""
    numbers = torch.equal(result.nan_to_num(7), expected.nan_to_num(7))
    return numbers and steps(result) == steps(expected) and torch.equal(
        result.signbit() & (result == 0), expected.signbit() & (expected == 0)
    )  # fmt: skip


def windows() -> Iterator[ParameterSet]:
    """Kernels and strides. To compile each takes seconds, so of 2 or 3 cells and strides of 1 or 2
    there is each combination of three of the four, the fourth being what makes the sum even; and a
    plain run has those that are alike in both dimensions."""
    pairs = itertools.product(itertools.product((2, 3), (2, 3)), itertools.product((1, 2), (1, 2)))
    even = ((kernel, stride) for kernel, stride in pairs if sum(kernel + stride) % 2 == 0)
    larger = (((1, 3), (1, 2)), ((3, 3), (3, 3)), ((5, 4), (2, 5)), ((5, 1), (1, 5)))
    for kernel, stride in (*even, *larger):
        slow = kernel[0] - kernel[1] != stride[0] - stride[1] or max(kernel) > 3
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(kernel, stride, (1, 1), id=f"{kernel}-{stride}", marks=marks)
    yield pytest.param((2, 3), (2, 1), (3, 2), id="dilated")


@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [*windows()])
def test_every_window_that_slides(kernel, stride, dilation, special, layout, request):
    """Planes of odd and even sides, among them some that are narrower than a window, and one whose
    rows are long."""
    if not special:
        request.getfixturevalue("alone")
    paddings = itertools.product(range(kernel[0] // 2 + 1), range(kernel[1] // 2 + 1))
    sizes = ((5, 7), (8, 9), (7, 4), (3, 3), (2, 11), (1, 6), (12, 2), (17, 5), (4, 41))
    bias = torch.randn(21)
    served = 0
    for padding, ceil_mode, size in itertools.product(paddings, (False, True), sizes):
        window = Window(*kernel, *stride, *padding, *dilation, ceil_mode)
        if min(window.output_size(*size)) < 1:
            continue
        x = torch.randn(2, 21, *size)
        x[:, :4, :4] = -1  # dead windows
        if special:
            numbers = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), x.shape)]
            x = torch.where(torch.rand(x.shape) < 0.01, numbers, x)
        x = guarded(x.contiguous(memory_format=layout))
        output, code = cpu.sample(x, guarded(bias), SEED, window)
        expected, expected_code = reference.sample(x, bias, SEED, window)
        assert torch.equal(code, expected_code)
        assert same(output, expected)
        grad, code = guarded(torch.randn_like(output)), guarded(code)
        grad_input, grad_bias = cpu.sample_backward(grad, code, size, window, True)
        expected, expected_bias = reference.sample_backward(grad, code, size, window, True)
        assert same(grad_input, expected)
        torch.testing.assert_close(grad_bias, expected_bias, rtol=1e-4, atol=1e-4)
        served += 1
    assert served > 20


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tiles_of_any_size_compile_once(training, layout, alone):
    """Their sizes may be those of texts, sounds and images."""
    # In one dimension alone they are windows that slide.
    for kernel_and_stride in ((2, 5, 2, 3), (5, 2, 3, 2)):
        window = Window(*kernel_and_stride, 0, 0, 1, 1, False)
        assert cpu._plan((1, 1, 9, 9), torch.float32, layout, window).constants
    for size, window in (
        ((1, 20), Window(1, 20, 1, 20, 0, 0, 1, 1, False)),
        ((1, 33), Window(1, 33, 1, 33, 0, 0, 1, 1, False)),
        ((5, 6), Window(5, 6, 5, 6, 0, 0, 1, 1, False)),
        ((19, 24), Window(4, 5, 4, 5, 2, 1, 1, 1, False)),
        ((23, 31), Window(9, 12, 9, 12, 4, 6, 1, 1, True)),
        ((20, 20), Window(2, 127, 2, 127, 0, 60, 1, 1, False)),
        ((19, 23), Window(19, 23, 19, 23, 0, 0, 1, 1, False)),  # codes of two bytes
    ):
        x = torch.randn(2, 35, *size)
        x[:, :4, :4] = -1
        x, bias = guarded(x.contiguous(memory_format=layout)), guarded(torch.randn(35))
        assert not cpu._plan(x.shape, x.dtype, layout, window).constants
        results = []
        for backend in (cpu, reference):
            if training:
                output, code = backend.sample(x, bias, SEED, window)
                gradients = backend.sample_backward(output.cos(), code, size, window, True)
                assert same(code, reference.sample(x, bias, SEED, window)[1])
            else:
                output = backend.expectation(x, bias, window)
                gradients = backend.expectation_backward(output.cos(), x, bias, window, True)
            results.append((output, *gradients))
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
            assert steps(result) == steps(expected)


def test_sums_of_large_tiles_that_overflow(layout):
    window = Window(1, 1000, 1, 1000, 0, 0, 1, 1, False)
    x = torch.full((2, 33, 1, 1000), 2.0**119).contiguous(memory_format=layout)
    for result, expected in zip(
        (*cpu.sample(x, None, SEED, window), cpu.expectation(x, None, window)),
        (*reference.sample(x, None, SEED, window), x[..., :1]),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)
    large = Window(1, 2**15, 1, 2**15, 0, 0, 1, 1, False)
    assert cpu._plan((1, 1, 1, 2**15), torch.float32, LAYOUTS[0], large) is None


@pytest.mark.slow
def test_the_largest_window(layout):
    """Its last code is 253; where the stride is even, 254 stands for a cell that it lacks."""
    window = Window(2, 127, 1, 2, 0, 60, 1, 1, False)
    x = torch.randn(2, 3, 4, 40).contiguous(memory_format=layout)
    assert cpu._plan(x.shape, x.dtype, layout, window) is not None
    assert cpu._plan(x.shape, x.dtype, layout, dataclasses.replace(window, kernel_w=128)) is None
    results = []
    for backend in (cpu, reference):
        output, code = backend.sample(x, None, SEED, window)
        grad = (code % 9 - 4.0).contiguous(memory_format=layout)
        gradients = backend.sample_backward(grad, code, x.shape[2:], window, True)
        results.append((output, code, *gradients))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
@pytest.mark.parametrize(
    "window",
    [
        DENSE,
        STRIDED,
        Window(3, 3, 2, 2, 1, 1, 1, 1, True),
        Window(2, 3, 1, 2, 1, 0, 2, 1, False),
        Window(3, 2, 2, 1, 0, 1, 1, 1, False),
    ],
    ids=str,
)
def test_expectations(window, special, layout, request):
    if not special:
        request.getfixturevalue("alone")
    for size in ((9, 13), (10, 12), (5, 4), (6, 43)):
        x = torch.randn(2, 35, *size)
        x[:, :4, :4] = -1
        if special:
            numbers = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), x.shape)]
            x = torch.where(torch.rand(x.shape) < 0.01, numbers, x)
        x = x.contiguous(memory_format=layout)
        bias = torch.randn(35) if size[0] > 5 else None
        mean, expected = cpu.expectation(x, bias, window), reference.expectation(x, bias, window)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=0, equal_nan=True)
        if special:  # where a gradient is a difference of large numbers
            continue
        grad = torch.randn_like(mean)
        for result, right in zip(
            cpu.expectation_backward(grad, x, bias, window, bias is not None),
            reference.expectation_backward(grad, x, bias, window, bias is not None),
            strict=True,
        ):
            torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-4)
            assert steps(result) == steps(right)


def test_windows_of_networks_need_no_reference(monkeypatch):
    """Of networks for signals, too, and of stride 3."""
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "numba")
    for name in ("sample", "sample_backward", "expectation", "expectation_backward"):
        monkeypatch.delattr(reference, name)
    signal, image = torch.randn(2, 3, 12), torch.randn(2, 3, 12, 13)
    for training in (True, False):
        for pool, x in ((StochasticPool1d(3, 2, 1), signal), (StochasticPool2d(3), image)):
            x = x.clone().requires_grad_()
            pool.train(training)(x).sum().backward()
            assert x.grad.any()


@pytest.mark.parametrize("window", [DENSE, TILES], ids=["3x3", "tiles"])
def test_no_pass_is_lost_on_tiny_weights(window, layout, monkeypatch):
    """Beside larger ones, and alone where a window has no gradient: the reference would take tens
    of times as long."""
    x = torch.rand(2, 5, 12, 12).contiguous(memory_format=layout)
    x[:, :, 4] = torch.tensor([1e-45, 1e-39, 1e-32, 0.0])[torch.randint(4, (2, 5, 12))]
    x[:, :, 6:] = 1e-33
    mean = reference.expectation(x, None, window)
    grad = torch.randn_like(mean)
    expected = reference.expectation_backward(grad, x, None, window, False)[0]
    assert 0 < mean.min() < 1e-32
    assert not expected[:, :, 9].any()
    tiny = torch.full_like(x, 1e-40)  # where the inverse of a sum overflows
    result, right = (pools.expectation(tiny, None, window) for pools in (cpu, reference))
    torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-44)
    for name in ("expectation", "expectation_backward"):
        monkeypatch.delattr(reference, name)
    torch.testing.assert_close(cpu.expectation(x, None, window), mean, rtol=1e-5, atol=1e-44)
    result, _ = cpu.expectation_backward(grad, x, None, window, False)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["float16", "bfloat16"],
)
def test_every_16_bit_float(dtype):
    """Each is a weight, alone and rounded with a bias; each passes as a gradient, and the sum of
    two is rounded as torch rounds."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    weights = patterns[patterns.abs() < 2.0**119].reshape(1, 1, 4, -1)
    for bias in (None, torch.tensor([0.3])):
        output, code = cpu.sample(weights, bias, SEED, STRIDED)
        expected, expected_code = reference.sample(weights, bias, SEED, STRIDED)
        assert torch.equal(code, expected_code)
        assert same(output, expected)
    code = torch.zeros(1, 1, 1, 2**16, dtype=torch.uint8)
    alone, _ = cpu.sample_backward(patterns.view(code.shape), code, (2, 2**17), STRIDED, False)
    expected = patterns.view(1, 1, -1)
    torch.testing.assert_close(alone[..., 0, ::2], expected, rtol=0, atol=0, equal_nan=True)
    assert not alone[..., 1, :].any()
    assert not alone[..., 1::2].any()
    # Two rows of windows over three rows of inputs; both drew from the row that they share.
    window = Window(2, 2, 1, 2, 0, 0, 1, 1, False)
    grad = torch.stack([patterns, patterns[torch.randperm(2**16)]]).reshape(1, 1, 2, -1)
    code = torch.tensor([2, 1], dtype=torch.uint8).view(1, 1, 2, 1).expand(grad.shape)
    added, _ = cpu.sample_backward(grad, code, (3, 2**17), window, False)
    torch.testing.assert_close(added[:, :, 1, ::2], grad[:, :, 0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(added[:, :, 1, 1::2], grad[:, :, 1], rtol=0, atol=0, equal_nan=True)
    code = torch.tensor([2, 0], dtype=torch.uint8).view(1, 1, 2, 1).expand(grad.shape)
    added, _ = cpu.sample_backward(grad, code, (3, 2**17), window, False)
    expected = (grad[:, :, 0].float() + grad[:, :, 1].float()).to(dtype)
    torch.testing.assert_close(added[:, :, 1, ::2], expected, rtol=0, atol=0, equal_nan=True)
    assert not added[:, :, ::2].any()


def run_all(x: torch.Tensor, window: Window) -> list[torch.Tensor]:
    bias = torch.linspace(-1, 1, x.shape[1])
    output, code = cpu.sample(x, bias, SEED, window)
    grad = output.cos()
    return [
        output, code, cpu.expectation(x, bias, window),
        *cpu.sample_backward(grad, code, x.shape[2:], window, True),
        *cpu.expectation_backward(grad, x, bias, window, True),
    ]  # fmt: skip


def assert_same(results, expected) -> None:
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills fresh memory where asked to")
def test_what_was_in_memory_does_not_count():
    """Lanes beyond the last plane had what was there before, which sent calls to the reference."""
    code = """if True:
        from tests.test_numba import *
        for name in ("sample", "sample_backward", "expectation", "expectation_backward"):
            delattr(reference, name)
        torch.set_num_threads(2)
        run_all(torch.rand(1, 33, 24, 24), DENSE)"""
    huge = os.environ | {"MALLOC_PERTURB_": "128"}  # bytes of 127, which are floats of 3e38
    result = subprocess.run([sys.executable, "-c", code], env=huge, stderr=subprocess.PIPE)
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.filterwarnings("error")
def test_infinite_gradients_of_a_bias_pass_in_silence():
    """They are what `GradScaler` looks for."""
    grad = torch.tensor([torch.inf, 1, -torch.inf, 2]).expand(1, 2, 3, 4).clone()
    grad[:, 1, :, 2] = 1
    code = torch.zeros(grad.shape, dtype=torch.uint8)
    _, grad_bias = cpu.sample_backward(grad, code, (6, 8), STRIDED, True)
    assert grad_bias[0].isnan()
    assert grad_bias[1] == torch.inf


@pytest.mark.parametrize("team", [True, False], ids=["team", "no team"])
@pytest.mark.parametrize("window", [DENSE, STRIDED], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    window, team, layout, threads, alone, monkeypatch
):
    if not team:
        monkeypatch.setattr(cpu.compiling, "_parallel", None)
    elif cpu.compiling._parallel is None:
        pytest.skip("PyTorch has no OpenMP team here")
    x = torch.randn(3, 12, 70, 40).to(memory_format=layout)
    threads(1)
    expected = run_all(x, window)
    for number in (2, 3, 8):
        threads(number)
        assert_same(run_all(x, window), expected)


def test_many_python_threads_at_once(threads, alone):
    threads(2)
    inputs = [torch.randn(2, 6, 60, 60) for _ in range(8)]
    expected = [run_all(x, DENSE) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for results, others in zip(
                pool.map(run_all, inputs, [DENSE] * 8), expected, strict=True
            ):
                assert_same(results, others)


def _pool_in_child(x: torch.Tensor, expected: torch.Tensor) -> None:
    torch.set_num_threads(2)
    output, _ = cpu.sample(x, None, SEED, DENSE)
    assert torch.equal(output, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork(threads):
    """Where PyTorch's team has lost its threads."""
    threads(2)
    # Large enough for two threads of ours, too small for torch's own, which a fork breaks.
    x = torch.randn(1, 20, 30, 36)
    expected, _ = cpu.sample(x, None, SEED, DENSE)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_pool_in_child, args=(x, expected), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_what_is_not_plain_memory(layout):
    """A gradient in the other format, and tensors whose numbers are not as they lie in memory."""
    x = torch.randn(2, 5, 8, 9).contiguous(memory_format=layout)
    negative = torch.complex(x, x).conj().imag  # -x, and the memory of x
    assert negative.is_neg()
    expected = reference.sample(-x, None, SEED, DENSE)
    assert_same(cpu.sample(negative, None, SEED, DENSE), expected)
    _, code = expected
    (other,) = (form for form in LAYOUTS if form != layout)
    grad = torch.randn_like(x).contiguous(memory_format=other)
    result, _ = cpu.sample_backward(grad, code, (8, 9), DENSE, False)
    assert same(result, reference.sample_backward(grad, code, (8, 9), DENSE, False)[0])


def test_gradients_of_another_dtype_and_of_a_bias_that_is_zero():
    """None counts as zeros, and its gradient is wanted."""
    x, grad = torch.randn(2, 2, 5, 8, 9)
    for other in (grad, grad.half()):
        result = cpu.expectation_backward(other, x, None, DENSE, True)
        assert_same(result, reference.expectation_backward(other, x, None, DENSE, True))


def test_a_bias_may_change_its_size_afterwards():
    """As FSDP wants it, which frees what it gathered."""
    bias = torch.zeros(3)
    cpu.sample(torch.rand(1, 3, 4, 4), bias, SEED, DENSE)
    bias.untyped_storage().resize_(0)


def test_whatever_the_defaults_are():
    x = torch.randn(2, 5, 8, 9)
    expected = run_all(x, DENSE)
    cpu._plan.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            bias = torch.linspace(-1, 1, 5, dtype=torch.float32, device="cpu")
            output, code = cpu.sample(x, bias, SEED, DENSE)
            gradients = cpu.sample_backward(output.cos(), code, (8, 9), DENSE, True)
    finally:
        torch.set_default_dtype(torch.float32)
        cpu._plan.cache_clear()
    assert_same([output, code, *gradients], [*expected[:2], *expected[3:5]])


def test_compiling_is_announced_once_and_needs_no_folder(monkeypatch, caplog):
    """As where the package is installed read-only, for a user without a home."""
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    part = cpu.compiling.inlined(lambda: None)

    def nothing(pointers):
        part()
        part()

    with caplog.at_level(logging.WARNING, "stochastic_pooling"):
        cpu.compiling.compiled_for_c(nothing, "nothing")(0)
    (record,) = caplog.records
    assert "compiling nothing" in record.getMessage()

    @cpu.compiling.compiled
    def double(x):
        return 2 * x

    assert double(21) == 42


def test_threads_that_compile_at_once_leave_each_other_the_thresholds(monkeypatch):
    both, unrolled, thresholds = threading.Barrier(2), [], []

    def compile_beside_another(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        unrolled.append(thresholds[-1])
        return SimpleNamespace(address=0)

    monkeypatch.setattr(cpu.compiling, "_set_thresholds", lambda one, _: thresholds.append(one))
    monkeypatch.setattr(cpu.compiling, "_cached", compile_beside_another)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(cpu.compiling.compiled_for_c, (lambda _: None, lambda _: None), "ab"))
    assert thresholds == [8192, 300] * 2
    assert unrolled == [8192] * 2


def test_damaged_files_in_the_cache_are_left_alone(monkeypatch):
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.IndexDataCacheFile, "_load_index", lambda _: pickle.loads(b""))
    cpu.compiling.compiled_for_c(lambda pointers: None, "nothing")(0)


def test_another_process_finds_what_was_compiled():
    code = "import torch; from tests.test_numba import *; run_all(torch.ones(1, 2, 8, 8), DENSE)"
    run_all(torch.ones(1, 2, 8, 8), DENSE)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "compiling" not in result.stderr


def test_numba_that_compiles_nothing_leaves_it_to_the_reference(tmp_path):
    """As where coverage of other code is measured. In a folder without what was compiled before."""
    code = "import torch, stochastic_pooling as s; s.stochastic_pool2d(torch.ones(2, 4, 4), 2)"
    settings = {"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | settings)
    assert result.returncode == 0


def test_numba_missing_is_an_import_error(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("stochastic_pooling.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match="numba"):
        importlib.import_module("stochastic_pooling.cpu")
