"""The functions and modules that users import, on every backend that this machine has."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from stochastic_pooling import (
    StochasticPool1d,
    StochasticPool2d,
    adaptive_stochastic_pool2d,
    ops,
    stochastic_pool1d,
    stochastic_pool2d,
    stochastic_pool3d,
)
from stochastic_pooling.window import Window, _bounded, _outputs

from .conftest import generator
from .windows import CASES, DTYPES, LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


# ---------------------------------------------------------------- beside F.max_pool2d


@pytest.mark.parametrize("training", [True, False])
def test_outputs_can_be_changed_in_place(training, backend, device):
    """As a ReLU behind a pool does; also where the reference takes over from a backend."""
    plane = torch.rand(2, 3, 6, 6, device=device)
    unusual = plane.index_fill(0, torch.tensor(0, device=device), torch.nan)
    cases = [
        (stochastic_pool2d, plane),
        (stochastic_pool2d, unusual.contiguous(memory_format=torch.channels_last)),
        (stochastic_pool2d, plane[0].double()),
        (stochastic_pool1d, plane[0]),
    ]
    if backend != "numba":  # which serves planes
        cases.append((stochastic_pool3d, plane[None]))
    for pool, x in cases:
        x = x.clone().requires_grad_()
        output = pool(x, 2, training=training)
        grad = torch.ones_like(output)
        (once,) = torch.autograd.grad(output, x, 3 * grad, retain_graph=True)
        (gradient,) = torch.autograd.grad(output.mul_(3), x, grad)
        torch.testing.assert_close(gradient, once, equal_nan=True)


@pytest.mark.parametrize(
    "arguments", [(2.5,), (3, 1, 1.0), (3, 2**31), (2**31 + 1, 1, 2**30)], ids=str
)
def test_bad_arguments_raise_what_max_pool2d_raises(arguments):
    """Those that are no small integers; test_properties.py has these."""
    x = torch.randn(1, 2, 5, 5)
    errors = (RuntimeError, TypeError)
    with pytest.raises(errors) as expected:
        F.max_pool2d(x, *arguments)
    with pytest.raises(expected.type):
        stochastic_pool2d(x, *arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: stochastic_pool2d(x, 0), RuntimeError, "kernel size should be greater"),
        (lambda x: stochastic_pool2d(x, 3, 1, 2), RuntimeError, "pad should be smaller"),
        (lambda x: stochastic_pool2d(x, 7), RuntimeError, "Output size is too small"),
        (lambda x: stochastic_pool2d(x[0, 0], 3), RuntimeError, r"Expected 3D or 4D .*\[5, 5\]"),
        (lambda x: stochastic_pool2d(x[:, :0], 3), RuntimeError, "optional 0 dim batch size"),
        (lambda x: stochastic_pool2d(x.long(), 3), NotImplementedError, "int64"),
        (lambda x: adaptive_stochastic_pool2d(x.long(), 7), NotImplementedError, "int64"),
        (lambda x: stochastic_pool2d(x, 3, bias=torch.ones(3)), RuntimeError, r"shape \(2,\)"),
        (lambda x: stochastic_pool2d(x, 3, bias=torch.ones(2).int()), RuntimeError, "int32"),
        (
            lambda x: stochastic_pool2d(x, 3, bias=torch.ones(2, device="meta")),
            RuntimeError,
            "on meta",
        ),
        (
            lambda x: stochastic_pool2d(x, 3, return_indices=True, training=False),
            RuntimeError,
            "sample_in_eval=True",
        ),
        (lambda x: stochastic_pool1d(x, 3), RuntimeError, "Expected 2D or 3D"),
        (lambda x: stochastic_pool2d(x.numpy(), 3), TypeError, "'input' must be a tensor, not nda"),
        (lambda x: stochastic_pool2d(x, 3, bias=1.0), TypeError, "'bias' must be a tensor, not fl"),
        (lambda x: stochastic_pool2d(x.to_sparse(), 3), NotImplementedError, "'input'.* dense"),
        (lambda x: stochastic_pool2d(x.to_mkldnn(), 3), NotImplementedError, "'input'.* dense"),
        (
            lambda x: stochastic_pool2d(torch.nested.nested_tensor(list(x)), 3),
            NotImplementedError,
            "'input'.* dense.* nested",
        ),
        (lambda x: stochastic_pool2d(x, 3, generator=3), TypeError, "'generator'.*, not int"),
        (
            lambda x: stochastic_pool2d(x, 3, bias=torch.ones(2).to_sparse()),
            NotImplementedError,
            "'bias'.* dense",
        ),
        (lambda x: stochastic_pool2d(kernel_size=3), TypeError, "stochastic_pool2d.*'input'"),
        (lambda x: stochastic_pool1d(x[0], (2, 2)), RuntimeError, "a tuple of one int"),
        # Equal to the numbers of a window that is remembered.
        (lambda x: [stochastic_pool2d(x, n) for n in (2, 2.0)], TypeError, "'kernel_size'.*2.0"),
        (lambda x: [stochastic_pool2d(x, (n, 2)) for n in (2, 2.0)], TypeError, "'kernel_size'"),
        (lambda x: stochastic_pool2d(x, (True, 2)), TypeError, "'kernel_size'"),
        (lambda x: stochastic_pool2d(x, 2, ceil_mode="False"), TypeError, "'ceil_mode'.*not str"),
        (lambda x: stochastic_pool2d(x, 2, training="no"), TypeError, "'training' must be bool"),
        (lambda x: stochastic_pool2d(x, 2, training=np.True_), TypeError, "bool, not numpy.bool"),
        (lambda x: [stochastic_pool2d(y, 5) for y in (x, x[..., 1:])], RuntimeError, "2x5x4"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(1, 2, 5, 5))


def test_backend_that_cannot_serve(monkeypatch):
    x = torch.randn(1, 2, 5, 5)
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="choose one of torch, triton, numba"):
        stochastic_pool2d(x, 3)
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        stochastic_pool2d(x, 3)
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "numba")
    with pytest.raises(RuntimeError, match="serves CPU tensors"):
        ops.backend_for(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="serves planes"):
        stochastic_pool3d(x, 2)


def test_backend_of_each_device(monkeypatch):
    """By name, for not every machine can import each."""
    monkeypatch.setattr(ops, "_load", lambda name: name)
    monkeypatch.setattr(ops, "_default_backend", ops._default_backend.__wrapped__)
    monkeypatch.delenv("STOCHASTIC_POOLING_BACKEND", raising=False)
    preferred = {"cpu": "numba", "cuda": "triton", "xpu": "triton", "mps": ops.reference}
    for device, module in preferred.items():
        assert ops.backend_for(torch.device(device)) == module
        of_volumes = ops.reference if device == "cpu" else module
        assert ops.backend_for(torch.device(device), volumes=True) == of_volumes
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.backend_for(torch.device("cuda")) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "True")
    assert ops.backend_for(torch.device("cpu")) == "triton"

    def lack(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(ops, "_load", lack)
    with pytest.raises(RuntimeError, match="triton cannot be imported here"):
        ops.backend_for(torch.device("cpu"))
    monkeypatch.delenv("STOCHASTIC_POOLING_BACKEND")
    assert ops.backend_for(torch.device("cpu")) is ops.reference


@pytest.mark.parametrize("dims", [2, 3])
def test_backends_are_asked_whether_they_serve_volumes(dims, device, monkeypatch):
    pool = {2: stochastic_pool2d, 3: stochastic_pool3d}[dims]
    asked = []
    monkeypatch.setattr(ops, "backend_for", lambda *of: asked.append(of) or ops.reference)
    x = torch.rand(1, 2, *[4] * dims, device=device)
    for training in (True, False):
        pool(x, 2, training=training)
        torch.func.grad(lambda x, training=training: pool(x, 2, training=training).sum())(x)
    assert asked == [(x.device, dims == 3)] * 6


def test_unbatched_empty_and_one_dimensional(backend, device):
    x = torch.randn(3, 4, 6, device=device)
    batched = stochastic_pool2d(x[None], 2, return_indices=True, generator=generator(device))
    single = stochastic_pool2d(x, 2, return_indices=True, generator=generator(device))
    for one, other in zip(single, batched, strict=True):
        assert torch.equal(one, other[0])
    signal = stochastic_pool1d(x, 3, 2, 1, return_indices=True, generator=generator(device))
    plane = stochastic_pool2d(
        x[:, :, None], (1, 3), (1, 2), (0, 1), return_indices=True, generator=generator(device)
    )
    for one, other in zip(signal, plane, strict=True):
        assert torch.equal(one, other[:, :, 0])
    assert torch.equal(signal[0], x.gather(2, signal[1]).relu())

    empty = torch.randn(0, 3, 4, 6, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    for training in (True, False):
        output = stochastic_pool2d(empty, 2, bias=bias, training=training)
        assert output.shape == (0, 3, 2, 3)
        output.sum().backward()
        assert empty.grad.shape == empty.shape
        assert torch.equal(bias.grad, torch.zeros_like(bias))


INT_MAX = 2**31 - 1
# What the case is for: (kernel, stride, padding, dilation, ceil_mode), outputs for four cells.
HUGE = {
    "stride": ((2, 10**7, 0, 1, False), 1),
    "largest stride, padded": ((3, INT_MAX, 1, 1, True), 1),
    "kernel": ((10**6, 2, 5 * 10**5, 1, False), 3),
    "largest kernel": ((INT_MAX, 1, INT_MAX // 2, 1, False), 4),
    "all but dilation": ((INT_MAX, INT_MAX, INT_MAX // 2, 1, True), 1),
    "two windows": ((2 * 10**6, 10**6 + 3, 10**6, 1, True), 2),
    "dilation of one cell": ((1, 2, 0, INT_MAX, False), 2),
    "dilation that steps over": ((2, INT_MAX, 1, 10**6, True), 1),
}


# They are cut to size before any backend sees them.
@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "torch") for case in HUGE), ("stride", "triton")],
    indirect=["backend"],
)
def test_huge_arguments_cost_no_more_than_the_tensors(case, backend, device):
    """Forward, backward and second derivatives; as they are they would need terabytes."""
    (*arguments, ceil_mode), outputs = HUGE[case]
    x = torch.rand(1, 2, 4, 4, device=device, requires_grad=True)
    output, indices = stochastic_pool2d(x, *arguments, ceil_mode=ceil_mode, return_indices=True)
    assert output.shape == (1, 2, outputs, outputs)
    drawn = torch.where(output > 0, x.flatten(2).gather(2, indices.flatten(2)).view_as(output), 0)
    assert torch.equal(output, drawn)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert grad.sum() == (output > 0).sum()
    mean = stochastic_pool2d(x, *arguments, ceil_mode=ceil_mode, training=False)
    (grad,) = torch.autograd.grad(mean.sum(), x, create_graph=True)
    torch.testing.assert_close((grad * x).sum(), mean.sum())  # homogeneous of degree 1
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close((second * x).sum(), x.new_zeros(()), rtol=0, atol=1e-5)


def test_bounded_windows_hold_the_same_cells():
    """All small windows: what stands for huge ones is drawn from in the same order."""
    counted = 0
    for length, kernel, stride, dilation in itertools.product(
        (1, 2, 5), (1, 2, 3, 4, 7, 12), (1, 2, 3, 5, 9, 11, 30), (1, 2, 3, 6)
    ):
        for padding, ceil_mode in itertools.product(range(kernel // 2 + 1), (False, True)):
            side = (kernel, stride, padding, dilation)
            outputs = _outputs(length, *side, ceil_mode)
            if outputs < 1:
                continue
            other = _bounded(length, *side, ceil_mode)
            assert _outputs(length, *other, ceil_mode) == outputs
            assert cells_inside(length, outputs, *other) == cells_inside(length, outputs, *side)
            assert max(other) <= 4 * length + 4
            counted += 1
    assert counted > 1000


def cells_inside(
    length: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> list[list[int]]:
    starts = [stride * output - padding for output in range(outputs)]
    windows = [range(start, start + kernel * dilation, dilation) for start in starts]
    return [[cell for cell in window if 0 <= cell < length] for window in windows]


@pytest.mark.usefixtures("plain")
def test_huge_arguments_in_one_and_three_dimensions(device):
    for pool, maximum, dims in (
        (stochastic_pool1d, F.max_pool1d, 1),
        (stochastic_pool3d, F.max_pool3d, 3),
    ):
        x = torch.rand(1, 2, *[4] * dims, device=device)
        for arguments in ((2, 10**7), (10**6, 3, 5 * 10**5), *[(2, 2**31)] * (dims == 1)):
            output, indices = pool(x, *arguments, return_indices=True)
            assert output.shape == maximum(x, *arguments).shape
            assert torch.equal(x.flatten(2).gather(2, indices.flatten(2)).view_as(output), output)
            assert pool(x, *arguments, training=False).shape == output.shape


# ---------------------------------------------------------------- the draw


def test_same_cells_in_every_dtype_and_format(backend, device):
    """Halves of small integers are exact in every dtype, so one seed must give one answer."""
    x = torch.randint(-8, 16, (1, 16, 6, 5), device=device) / 2
    expected = None
    for dtype in DTYPES:
        for layout in LAYOUTS:
            _, indices = stochastic_pool2d(
                x.to(dtype).contiguous(memory_format=layout),
                *(3, 1, 1),
                return_indices=True,
                generator=generator(device),
            )
            expected = indices if expected is None else expected
            assert torch.equal(indices, expected)


def test_manual_seed_reproduces_and_every_call_draws_anew(backend, device):
    x = torch.rand(2, 3, 6, 6, device=device) + 0.5
    torch.manual_seed(1)
    first, second = stochastic_pool2d(x, 3, 1, 1), stochastic_pool2d(x, 3, 1, 1)
    torch.manual_seed(1)
    assert torch.equal(stochastic_pool2d(x, 3, 1, 1), first)
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["overlapping, padded", "dilated, strided, not square"])
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)  # numba has no fp64
def test_gradcheck(case, training, backend, device):
    shape, window = CASES[case]
    *arguments, ceil_mode = window.arguments(2)
    # One image and weights well away from zero, where ReLU has no derivative.
    x = torch.randn(1, *shape[1:], dtype=torch.float64, device=device)
    x = (x + x.sign() * 0.1).requires_grad_()
    bias = (torch.rand(shape[1], dtype=torch.float64, device=device) * 0.05).requires_grad_()

    def pool(x, bias):
        return stochastic_pool2d(
            x,
            *arguments,
            ceil_mode=ceil_mode,
            bias=bias,
            training=training,
            generator=generator(device),  # the same draw at every evaluation
        )

    # The fast mode compares random projections of the Jacobian: few calls, for the interpreter.
    assert torch.autograd.gradcheck(pool, (x, bias), fast_mode=backend == "triton")


@pytest.mark.parametrize("training", [True, False])
def test_bias_and_relu_are_those_of_a_convolution_block(training, backend, device):
    """Fused and not: the same values and gradients, the bias's in its own dtype."""
    x = torch.randn(2, 3, 5, 6, device=device).half().requires_grad_()
    bias = torch.randn(3, device=device).requires_grad_()
    output = stochastic_pool2d(
        x, 3, 1, 1, bias=bias, training=training, generator=generator(device)
    )
    assert output.dtype == torch.float16
    grad = torch.randn_like(output)
    fused = torch.autograd.grad(output, (x, bias), grad)
    assert [g.dtype for g in fused] == [torch.float16, torch.float32]

    # In fp32, so that the sum of fp16 and fp32 is as exact as inside the kernel.
    wide = (x.float() + bias[:, None, None]).relu()
    separate = stochastic_pool2d(wide, 3, 1, 1, training=training, generator=generator(device))
    torch.testing.assert_close(output.float(), separate, rtol=1e-3, atol=1e-6)
    expected = torch.autograd.grad(separate, (x, bias), grad.float())
    torch.testing.assert_close(fused[0], expected[0], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(fused[1], expected[1], rtol=1e-3, atol=1e-3)


def test_what_is_kept_for_backward(backend, device):
    """Training: a byte per output. Evaluation: the input, if a gradient is wanted."""
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tensor.nbytes))
        return tensor

    x = torch.randn(2, 3, 6, 7, device=device)
    x_grad = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stochastic_pool2d(x_grad, 3, 1, 1)
        assert kept == [(torch.uint8, x.numel())]
        kept.clear()
        stochastic_pool2d(x_grad, 3, 1, 1, training=False)
        assert kept == [(torch.float32, x.nbytes)]
        kept.clear()
        stochastic_pool2d(x, 3, 1, 1)
        stochastic_pool2d(x, 3, 1, 1, training=False)
        assert kept == []


# ---------------------------------------------------------------- modules


def test_module_follows_its_mode(device):
    x = torch.rand(2, 3, 6, 6, device=device) + 0.5
    pool = StochasticPool2d(3, 1, 1)
    assert not torch.equal(pool(x), pool(x))
    pool.eval()
    assert torch.equal(pool(x), stochastic_pool2d(x, 3, 1, 1, training=False))
    drawing = StochasticPool2d(3, 1, 1, sample_in_eval=True).eval()
    assert not torch.equal(drawing(x), drawing(x))
    output, indices = StochasticPool1d(2, return_indices=True)(x[:, :, 0])
    assert torch.equal(x[:, :, 0].gather(2, indices), output)


# ---------------------------------------------------------------- torch.library


@pytest.mark.parametrize(
    "layout",
    [torch.contiguous_format, torch.channels_last, torch.channels_last_3d],
    ids=["contiguous", "channels_last", "channels_last_3d"],
)
def test_opcheck(layout, backend, device):
    """Schema, fake tensors and their strides, autograd and AOT dispatch of each registered op."""
    size = (2, 3, 4) if layout == torch.channels_last_3d else (5, 6)
    if len(size) == 3 and backend == "numba":
        pytest.skip("numba serves planes")
    window = Window(3, 3, 1, 1, 1, 1, 1, 1, False).arguments(len(size))
    x = torch.randn(2, 4, *size, device=device).half().contiguous(memory_format=layout)
    bias, seed = torch.randn(4, device=device), torch.tensor(7, device=device)
    output, code = ops.sample(x, bias, seed, *window)
    differentiable = x.clone().requires_grad_(), bias.clone().requires_grad_()
    for op, arguments in (
        (ops.sample, (x, bias, seed, *window)),
        (ops.sample, (*differentiable, seed, *window)),
        (ops.sample_backward, (output, code, size, *window, True)),
        (ops.expectation, (x, bias, *window)),
        (ops.expectation, (*differentiable, *window)),
        (ops.expectation_backward, (output, x, bias, *window, True)),
    ):
        torch.library.opcheck(op, arguments)


def test_fakes_lie_as_results_do(plain, device):
    """Whole planes, too, whose outputs are of every format: by their strides the gradient knows."""
    seed = torch.tensor(7, device=device)
    for layout, size, dtype in (
        (torch.contiguous_format, (16, 17), torch.float16),  # codes of two bytes
        (torch.channels_last, (5, 6), torch.float32),
        (torch.channels_last_3d, (2, 3, 4), torch.float64),
    ):
        x = torch.randn(2, 4, *size, device=device, dtype=dtype).contiguous(memory_format=layout)
        for kernel in (size, [2] * len(size)):
            window = kernel, kernel, [0] * len(size), [1] * len(size), False
            results = []
            for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
                with mode:
                    y = x.clone()
                    output, code = ops.sample(y, None, seed, *window)
                    g = output.contiguous()
                    mean = ops.expectation(y, None, *window)
                    gradients = (
                        *ops.sample_backward(g, code, size, *window, False),
                        *ops.expectation_backward(g, y, None, *window, False),
                    )
                    tensors = (output, code, mean, *gradients)
                    results.append([(t.shape, t.stride(), t.dtype) for t in tensors])
            assert results[0] == results[1]
            assert gradients[0].stride() == gradients[2].stride() == x.stride()
