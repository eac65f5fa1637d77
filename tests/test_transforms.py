"""Derivatives beyond `backward`: forward mode, second order, `torch.func`, per example."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import func

from stochastic_pooling import autograd, stochastic_pool1d, stochastic_pool2d, stochastic_pool3d
from stochastic_pooling.functional import _window

# The derivatives are the same code on every backend.
pytestmark = pytest.mark.usefixtures("plain")

POOLS = {1: stochastic_pool1d, 2: stochastic_pool2d, 3: stochastic_pool3d}
SHAPES = {1: (2, 3, 7), 2: (2, 3, 4, 5), 3: (1, 2, 2, 3, 4)}

Pool = Callable[..., torch.Tensor]


def drawing_alike(dims: int, training: bool, device: torch.device) -> Pool:
    """A pool that draws the same cells at each call."""

    def pool(input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return POOLS[dims](input, 3, 1, 1, bias=bias, training=training, generator=generator)

    return pool


def inputs(dims: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp64, and away from zero, where ReLU has no derivative."""
    x = torch.randn(SHAPES[dims], dtype=torch.float64, device=device)
    bias = torch.rand(SHAPES[dims][1], dtype=torch.float64, device=device) * 0.05
    return x + x.sign() * 0.1, bias


@pytest.fixture(params=[1, 2, 3], ids=["1d", "2d", "3d"])
def dims(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def training(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_first_derivatives_in_both_modes(dims, training, device):
    pool = drawing_alike(dims, training, device)
    arguments = [tensor.requires_grad_() for tensor in inputs(dims, device)]
    assert torch.autograd.gradcheck(pool, arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(pool, arguments[:1], check_forward_ad=True)


def test_second_derivatives_in_both_orders(dims, training, device):
    pool = drawing_alike(dims, training, device)
    arguments = [tensor.requires_grad_() for tensor in inputs(dims, device)]
    assert torch.autograd.gradgradcheck(
        pool, arguments, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        pool, arguments[:1], check_fwd_over_rev=True, fast_mode=True
    )


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float16)])
def test_second_derivatives_of_mixed_dtypes(dtypes, training, device):
    """Each has the dtype of its input; they are those of one input alone, and in both orders."""
    pool = drawing_alike(2, training, device)
    arguments = [tensor.to(dtype) for tensor, dtype in zip(inputs(2, device), dtypes, strict=True)]
    directions = [torch.randn_like(tensor) for tensor in arguments]

    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return pool(x, bias).square().sum()

    gradients, tangents = func.jvp(func.grad(loss, (0, 1)), tuple(arguments), tuple(directions))
    _, pull_back = func.vjp(func.grad(loss, (0, 1)), *arguments)
    for results in (gradients, tangents, pull_back(tuple(directions))):
        assert tuple(result.dtype for result in results) == dtypes
    for tangent, product in zip(tangents, pull_back(tuple(directions)), strict=True):
        torch.testing.assert_close(tangent, product, rtol=1e-2, atol=1e-2)
    for number, tangent in enumerate(tangents):
        _, alone = func.jvp(func.grad(loss, number), tuple(arguments), tuple(directions))
        torch.testing.assert_close(alone, tangent)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_second_derivatives_where_sums_overflow_or_vanish(device):
    """The weights 1e38, 3e38 and 2e38 sum to infinity in fp32; scaled down they are ordinary."""
    ratios = torch.tensor([[[1.0, 3.0, 2.0, -1.0]]], device=device)

    def derivatives(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        x = (ratios * scale).requires_grad_()
        output = stochastic_pool1d(x, 4, training=False)
        (grad,) = torch.autograd.grad(output, x, create_graph=True)
        (second,) = torch.autograd.grad((grad * ratios**2).sum(), x)
        return grad.detach(), second

    grad, second = derivatives(1.0)
    for scale in (1e38, 1e-20):
        large_grad, large_second = derivatives(scale)
        torch.testing.assert_close(large_grad, grad)
        torch.testing.assert_close(large_second * scale, second, rtol=1e-4, atol=1e-6)
    with torch.autograd.detect_anomaly():  # which no NaN escapes
        derivatives(0.0)
    # Below 2**-100 the gradient is zero by definition, and so are its derivatives.
    for derivative in derivatives(1e-35):
        assert torch.equal(derivative, torch.zeros_like(derivative))


def test_forward_mode_where_sums_overflow_and_the_default_dtype_is_fp16(device):
    x = torch.full((1, 1, 2, 2), 3e38, device=device)
    tangent = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device)
    torch.set_default_dtype(torch.float16)
    try:
        _, mean = func.jvp(lambda x: stochastic_pool2d(x, 2, training=False), (x,), (tangent,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert mean.item() == 2.5
    ones = torch.ones(1, 1, 2, 2, device=device, dtype=torch.float16)
    _, mean = func.jvp(lambda x: stochastic_pool2d(x, 2, training=False), (ones,), (4e4 * ones,))
    assert mean.item() == 4e4  # of tangents whose sum overflows, too


def test_forward_mode_agrees_with_reverse_mode(training, device):
    """<v, J t> from one and <J' v, t> from the other, and the tangent is never silently zero."""
    pool = drawing_alike(2, training, device)
    x, bias = inputs(2, device)
    tangents = (torch.randn_like(x), torch.randn_like(bias))
    output, tangent = func.jvp(pool, (x, bias), tangents)
    cotangent = torch.randn_like(output)
    _, pull_back = func.vjp(pool, x, bias)
    expected = sum((g * t).sum() for g, t in zip(pull_back(cotangent), tangents, strict=True))
    torch.testing.assert_close((tangent * cotangent).sum(), expected)
    with fwAD.dual_level():
        dual = pool(fwAD.make_dual(x, tangents[0]), fwAD.make_dual(bias, tangents[1]))
        torch.testing.assert_close(fwAD.unpack_dual(dual).tangent, tangent)
        dual = pool(fwAD.make_dual(x.half(), tangents[0].half()), bias.float())
        assert fwAD.unpack_dual(dual).tangent.dtype == torch.float16


def test_functional_gradients_are_those_of_backward(training, device):
    pool = drawing_alike(2, training, device)
    arguments = [tensor.requires_grad_() for tensor in inputs(2, device)]
    expected = torch.autograd.grad(pool(*arguments).square().sum(), arguments)
    plain = [tensor.detach() for tensor in arguments]
    gradients = func.grad(lambda *xs: pool(*xs).square().sum(), argnums=(0, 1))(*plain)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_jacobians_and_hessian(device):
    x, _ = inputs(2, device)
    x = x[:1, :1, :3, :4]
    pool = drawing_alike(2, False, device)
    jacobian = torch.autograd.functional.jacobian(pool, x)
    torch.testing.assert_close(func.jacrev(pool)(x), jacobian)
    torch.testing.assert_close(func.jacfwd(pool)(x), jacobian)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return pool(x).pow(3).sum()

    torch.testing.assert_close(func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


def test_forward_mode_inside_forward_mode(training, device):
    """Second derivatives without a reverse pass, against those by reverse mode."""
    pool = drawing_alike(2, training, device)
    x, bias = inputs(2, device)
    first, second = torch.randn_like(x), torch.randn_like(x)

    def along(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return func.jvp(lambda x: pool(x.pow(2), bias), (x,), (first.to(x.dtype),))

    (output, _), (_, tangent) = func.jvp(along, (x,), (second,))
    torch.testing.assert_close(output, pool(x.pow(2), bias))
    halves = func.jvp(along, (x.half(),), (second.half(),))
    assert {half.dtype for pair in halves for half in pair} == {torch.float16}
    cotangent = torch.randn_like(tangent)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (pool(x.pow(2), bias) * cotangent).sum()

    _, product = torch.autograd.functional.hvp(loss, x, second)
    torch.testing.assert_close((tangent * cotangent).sum(), (product * first).sum())
    assert tangent.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"dilation": 2}, {"ceil_mode": True}], ids=str
)
@pytest.mark.parametrize("size", [(5, 7), (6, 5, 7)], ids=str)
def test_the_composed_expectation_is_the_fused_one(size, options, dtype, device):
    """What ONNX and forward mode within forward mode get, dead windows and NaNs included."""
    x = torch.randn(1, 2, *size, device=device, dtype=dtype)
    x[..., :4, :4] = -2
    bias = torch.rand(2, device=device)
    window = _window(len(size), 2, **options)
    results = []
    for expectation in (autograd._composed_expectation, autograd.expectation):
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        output = expectation(*leaves, window)
        spoiled = expectation(
            x.index_fill(-1, torch.tensor(2, device=device), torch.nan), bias, window
        )
        results.append((output, spoiled, *torch.autograd.grad(output.square().sum(), leaves)))
    for composed, fused in zip(*results, strict=True):
        torch.testing.assert_close(composed, fused, equal_nan=True)


def test_tangents_of_an_empty_batch_of_a_nan_and_of_the_bias_alone(training, device):
    pool = drawing_alike(2, training, device)
    x, bias = inputs(2, device)
    assert func.jvp(pool, (x[:0],), (x[:0],))[1].shape == x[:0].shape
    x[0, 0] = torch.nan
    assert (
        func.jvp(lambda x: pool(x, bias), (x,), (torch.ones_like(x),))[1][0, 0].isnan().all()
        or training
    )
    half = x.half()
    output, tangent = func.jvp(lambda b: pool(half, b), (bias.float(),), (bias.float(),))
    assert tangent.dtype == output.dtype == torch.float16


def batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, *SHAPES[2], dtype=torch.float64, device=device)
    return x, torch.rand(4, SHAPES[2][1], dtype=torch.float64, device=device)


IN_DIMS = ((0, 0), (0, None), (None, 0), (1, 0), (2, 1))


def mapped(in_dims: tuple, device: torch.device) -> tuple[list, list]:
    """A batch as `vmap` takes it with these `in_dims`, and its examples one by one."""
    whole = batch(device)
    arguments = [
        tensor[0] if dim is None else tensor.movedim(0, dim)
        for tensor, dim in zip(whole, in_dims, strict=True)
    ]
    examples = [
        [tensor[0 if dim is None else n] for tensor, dim in zip(whole, in_dims, strict=True)]
        for n in range(4)
    ]
    return arguments, examples


def test_vmap_of_the_expectation_is_the_loop(device):
    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return stochastic_pool2d(x, 3, 1, 1, bias=bias, training=False).square().sum()

    for in_dims in IN_DIMS:
        arguments, examples = mapped(in_dims, device)
        values = func.vmap(loss, in_dims)(*arguments)
        gradients = func.vmap(func.grad(loss, argnums=(0, 1)), in_dims)(*arguments)
        for n, example in enumerate(examples):
            torch.testing.assert_close(values[n], loss(*example))
            expected = func.grad(loss, argnums=(0, 1))(*example)
            for gradient, other in zip(gradients, expected, strict=True):
                torch.testing.assert_close(gradient[n], other)


def test_vmap_of_the_draw_follows_its_randomness(device):
    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return stochastic_pool2d(x, 3, 1, 1, bias=bias).square().sum()

    per_example = func.grad(loss, argnums=(0, 1))
    for in_dims in IN_DIMS:
        arguments, examples = mapped(in_dims, device)
        torch.manual_seed(1)
        gradients = func.vmap(per_example, in_dims, randomness="same")(*arguments)
        for n, example in enumerate(examples):
            torch.manual_seed(1)
            for gradient, other in zip(gradients, per_example(*example), strict=True):
                torch.testing.assert_close(gradient[n], other)

    x, bias = batch(device)
    alike = [tensor[:1].expand_as(tensor) for tensor in (x, bias)]
    torch.manual_seed(1)
    values = func.vmap(loss, randomness="different")(*alike)
    assert values.unique().numel() == 4
    torch.manual_seed(1)
    assert torch.equal(func.vmap(loss, randomness="different")(*alike), values)
    assert not torch.isin(func.vmap(loss, randomness="different")(*alike), values).any()

    # The draws of each example are draws: 0 where a window is dead, else one of its cells, to which
    # its gradient goes.
    def sums(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = stochastic_pool2d(x, 3, 1, 1, bias=bias)
        return output.sum(), output

    for in_dims in IN_DIMS:
        arguments, examples = mapped(in_dims, device)
        gradients, (_, outputs) = func.vmap(
            func.grad_and_value(sums, (0, 1), has_aux=True), in_dims, randomness="different"
        )(*arguments)
        for n, (x, bias) in enumerate(examples):
            cells = (x + bias[:, None, None]).relu()
            for channel in range(3):
                assert torch.isin(outputs[n][:, channel], cells[:, channel]).all()
            torch.testing.assert_close((gradients[0][n] * cells).sum(), outputs[n].sum())
            torch.testing.assert_close(gradients[1][n], gradients[0][n].sum((0, 2, 3)))
    x, bias = batch(device)
    with pytest.raises(RuntimeError, match="randomness"):
        func.vmap(loss)(x, bias)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)], ids=str)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_no_example(randomness, in_dims, training, device):
    """As a sampler gives it that leaves each example to chance: shapes, and no error."""

    def sums(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return stochastic_pool2d(x, 3, 1, 1, bias=bias, training=training).sum((0, 2, 3))

    x, bias = (
        tensor[0] if dim is None else tensor[:0]
        for tensor, dim in zip(batch(device), in_dims, strict=True)
    )
    for derivative in (func.jacrev, functools.partial(func.jacfwd, randomness="same")):
        jacobians = func.vmap(derivative(sums, (0, 1)), in_dims, randomness=randomness)(x, bias)
        assert [jacobian.shape for jacobian in jacobians] == [(0, 3, *SHAPES[2]), (0, 3, 3)]
