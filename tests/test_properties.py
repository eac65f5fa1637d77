"""What must hold for any input: hypothesis draws windows, shapes, dtypes, layouts and values.

Each property runs on every backend, with fewer and smaller examples in Triton's interpreter.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from stochastic_pooling import philox, stochastic_pool1d, stochastic_pool2d

from . import naive
from .conftest import generator
from .naive import Arguments
from .windows import CASES, DTYPES

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # numpy, under the interpreter, tells of the overflows and NaNs that the inputs are made for.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]

# In a plain run it is test_numba.py that tests numba: to compile for each of the windows and dtypes
# here takes a minute.
backends = pytest.mark.parametrize(
    "backend", ["torch", "triton", pytest.param("numba", marks=pytest.mark.slow)], indirect=True
)
EXAMPLES = {"torch": 80, "numba": 10, "triton": 5}
# One rounding in the input's precision of a result in the accumulation's, and for 16 bits a cut-off
# in Triton's interpreter where others round.
RTOL = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.float64: 1e-12}
# The windows that networks use, which have code of their own in some backends, in half of examples.
COMMON = [
    Arguments((3, 3), (1, 1), (1, 1)),
    Arguments((3, 3), (2, 2), (1, 1)),
    Arguments((3, 3), (2, 2), ceil_mode=True),
    Arguments((2, 2), (2, 2)),
]
VALUES = ["normal", "quarters", "wide", "special"]
VIEWS = [
    "contiguous",
    "channels_last",
    "strided",
    "transposed",
    "batch innermost",
    "misaligned",
    "misaligned channels_last",
    "expanded",
    "negated",
]


@dataclass(frozen=True)
class Example:
    """One call of the pool; `seed` makes its numbers too."""

    shape: tuple[int, int, int, int]
    arguments: Arguments
    dtype: torch.dtype
    values: str
    view: str
    grad_view: str
    bias_dtype: torch.dtype | None
    seed: int

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        torch.manual_seed(self.seed)
        x = numbers(self.values, self.shape, self.dtype)
        if self.values == "special":
            # Outside all windows a NaN's gradient is NaN in evaluation; see test_extremes.py.
            x = torch.where(self.arguments.covered(*self.shape[2:]), x, 1)
        bias = None
        if self.bias_dtype is not None:
            bias = torch.randn(self.shape[1], dtype=torch.float64) / 2
            bias = bias.to(device, self.bias_dtype).requires_grad_()
        return viewed(x.to(device), self.view).requires_grad_(), bias

    def grad(self, output: torch.Tensor) -> torch.Tensor:
        """Small whole numbers, whose sums are exact in every dtype."""
        grad = torch.randint(-4, 5, output.shape).to(output)
        return viewed(grad, self.grad_view)

    def pool(self, x, bias, training, **options):
        return stochastic_pool2d(
            x,
            *self.arguments[:4],
            ceil_mode=self.arguments.ceil_mode,
            bias=bias,
            training=training,
            generator=generator(x.device, self.seed) if training else None,
            **options,
        )


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def windows(draw: st.DrawFn) -> Arguments:
    if draw(st.booleans()):
        return draw(st.sampled_from(COMMON))
    kernel = draw(pairs(1, 4))
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    return Arguments(kernel, draw(pairs(1, 3)), padding, draw(pairs(1, 3)), draw(st.booleans()))


@st.composite
def examples(draw: st.DrawFn, largest: int = 9, values: list[str] = VALUES) -> Example:
    arguments = draw(windows())
    # Long enough for one window, but for what padding may take.
    sizes = [
        draw(st.integers(min(max((kernel - 1) * dilation + 1 - padding, 1), largest), largest))
        for kernel, _, padding, dilation in zip(*arguments[:4], strict=True)
    ]
    planes = (st.integers(0, 3), st.integers(1, 5)) if largest > 6 else (st.just(1), st.just(2))
    shape = (*map(draw, planes), *sizes)
    try:
        arguments.output_size(*sizes)
    except RuntimeError:
        assume(False)
    return Example(
        shape,
        arguments,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(values)),
        draw(st.sampled_from(VIEWS)),
        draw(st.sampled_from(VIEWS)),
        draw(st.sampled_from([None, None, *DTYPES])),
        draw(st.integers(0, 2**32)),
    )


def for_all(strategy: st.SearchStrategy, examples: int) -> Callable[[Callable], None]:
    """Run the decorated function on `examples` of the strategy, always the same ones."""

    def run(check: Callable) -> None:
        @settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(strategy)
        def each(example):
            check(example)

        each()

    return run


def numbers(values: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    finite = torch.finfo(dtype)
    if values == "quarters":  # many zeros and equal cells; sums and boundaries are exact
        return (torch.randint(-8, 9, shape) / 4).to(dtype)
    if values == "wide":
        exponent = 8 if dtype == torch.float16 else 40
        return (x * 2.0 ** torch.randint(-exponent, exponent + 1, shape)).to(dtype)
    x = x.to(dtype)
    if values == "special":
        # In bf16 the interpreter, not a GPU, takes subnormals for zeros.
        small = finite.smallest_normal / (1 if dtype == torch.bfloat16 else 8)
        nan, inf = float("nan"), float("inf")
        # The mean of equal largest numbers may round up to infinity; see test_extremes.py.
        large = finite.max * (1 - 8 * finite.eps)
        choices = torch.tensor(
            [nan, -nan, inf, -inf, large, large, -large, -0.0, small], dtype=dtype
        )
        chosen = choices[torch.randint(len(choices), shape)]
        x = torch.where(torch.rand(shape) < 0.2, chosen, x)
    return x


def viewed(x: torch.Tensor, view: str) -> torch.Tensor:
    """`x` in another layout; "expanded" repeats its first image's first column."""
    batch, channels, height, width = x.shape
    if view == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if view == "strided":
        storage = x.new_full((batch, 2 * channels, height + 1, 2 * width), 77)
        return storage[:, ::2, 1:, 1::2].copy_(x)
    if view == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if view == "batch innermost":
        return x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    if view == "misaligned":
        return x.new_full((x.numel() + 1,), 77)[1:].view(x.shape).copy_(x)
    if view == "misaligned channels_last":
        storage = x.new_full((x.numel() + 1,), 77)[1:]
        return storage.view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(x)
    if view == "expanded":
        return x[:1, :, :, :1].expand(x.shape)
    if view == "negated":
        return torch._neg_view(-x)
    return x


def rectified(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    w = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (w if bias is None else w + bias.detach().to(w.dtype)[:, None, None]).relu()


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor, backend: str) -> None:
    """`actual` is `exact` in its dtype, to the last bit but for bf16 in Triton's interpreter."""
    interpreted = backend == "triton" and actual.device.type == "cpu"
    # It cuts bf16 off where a GPU rounds.
    cut_off = interpreted and actual.dtype == torch.bfloat16
    rtol = RTOL[actual.dtype] if cut_off else 0
    exact = exact.to(actual.device, actual.dtype)
    torch.testing.assert_close(actual, exact, rtol=rtol, atol=0, equal_nan=True)


# ---------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("first_plane", [0, 2**32 - 6, 2**40])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 5, -(2**63), 2**63 - 1])
def test_uniforms_are_the_oracles(seed, first_plane):
    """Plane by plane, past 2**32 of them and in every half of a word, in Python's integers."""
    shape = (4, 2, 9, 5)
    result = philox.uniforms(torch.tensor(seed), shape, first_plane // 2)
    for n, c, oh, ow in itertools.product(*map(range, shape)):
        expected = naive.uniform(seed, first_plane + 2 * n + c, oh, ow)
        assert float(result[n, c, oh, ow]) == expected


def check_against_the_oracle(example: Example, backend: str, device: torch.device) -> None:
    x, bias = example.tensors(device)
    wanted = [tensor for tensor in (x, bias) if tensor is not None]
    seed = naive.drawn_seed(generator(device, example.seed))
    oracle = naive.Pool(x, bias, seed, example.arguments)

    output, indices = example.pool(x, bias, True, return_indices=True)
    assert torch.equal(indices.cpu(), oracle.index)
    assert_rounded(output, oracle.value, backend)
    grad = example.grad(output)
    grad_input, grad_bias = oracle.gradient(grad, training=True)
    grads = torch.autograd.grad(output, wanted, grad)
    assert torch.equal(grads[0].cpu().double(), grad_input)
    if bias is not None:
        assert torch.equal(grads[1].cpu(), grad_bias.to(bias.dtype))

    rtol = RTOL[x.dtype]
    output = example.pool(x, bias, False)
    # Up to a few subnormal numbers of rounding.
    atol = {torch.float16: 2**-24, torch.bfloat16: 2**-126}.get(x.dtype, 0)
    atol += 2**-147 if x.dtype != torch.float64 else 2**-1070
    torch.testing.assert_close(
        output.cpu().double(), oracle.expectation.to(x.dtype).double(),
        rtol=rtol, atol=atol, equal_nan=True,
    )  # fmt: skip
    grads = torch.autograd.grad(output, wanted, grad)
    grad_input, grad_bias = oracle.gradient(grad, training=False)
    # A cell's gradient is a difference of terms of up to twice the output's gradient.
    atol = 1e-12 if x.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        grads[0].cpu().double(), grad_input, rtol=rtol, atol=10 * atol, equal_nan=True
    )
    if bias is not None:
        torch.testing.assert_close(
            grads[1].cpu().double(), grad_bias,
            rtol=max(rtol, RTOL[bias.dtype]), atol=100 * atol, equal_nan=True,
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_grid_is_the_oracles(case, device):
    """The named cases of `windows.py`, which hypothesis may miss; there the others follow the
    reference."""
    shape, window = CASES[case]
    arguments = Arguments(*window.arguments(2))
    views = {"view": "contiguous", "grad_view": "contiguous"}
    example = Example(
        shape, arguments, torch.float64, "special", **views, bias_dtype=torch.float64, seed=11
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "STOCHASTIC_POOLING_BACKEND", "torch")
        check_against_the_oracle(example, "torch", device)


@backends
def test_pools_are_the_oracles(backend, device):
    interpreted = backend == "triton" and device.type == "cpu"
    largest = 5 if interpreted else 9

    @for_all(examples(largest), EXAMPLES[backend])
    def _(example):
        check_against_the_oracle(example, backend, device)


# ---------------------------------------------------------------- without it, on larger planes


@backends
def test_outputs_are_members_of_their_windows(backend, device):
    interpreted = backend == "triton" and device.type == "cpu"

    @for_all(examples(6 if interpreted else 40), EXAMPLES[backend])
    def _(example):
        x, bias = example.tensors(device)
        output, indices = example.pool(x, bias, True, return_indices=True)
        width = x.shape[3]
        w = rectified(x, bias)
        picked = w.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
        dead = F.max_pool2d(w, *example.arguments).nan_to_num(1) <= 0
        # Elsewhere than in a special input a sum is never too small for a draw.
        if example.values != "special":
            assert_rounded(output, picked.where(~dead, 0), backend)
        else:
            assert_rounded(output.where(picked > 0, 0), picked.where(picked > 0, 0), backend)
        kernel, stride, padding, dilation, _ = example.arguments
        for dim, place in ((0, indices // width), (1, indices % width)):
            start = torch.arange(indices.shape[2 + dim], device=device) * stride[dim] - padding[dim]
            offset = place - start.view(-1, *[1] * (1 - dim))
            inside = (offset % dilation[dim] == 0) & (offset >= 0)
            inside &= offset < kernel[dim] * dilation[dim]
            assert (inside | dead).all()


@backends
def test_training_gradients_conserve_mass(backend, device):
    interpreted = backend == "triton" and device.type == "cpu"
    values = [name for name in VALUES if name != "special"]

    @for_all(examples(6 if interpreted else 40, values), EXAMPLES[backend])
    def _(example):
        x, bias = example.tensors(device)
        bias = torch.zeros(x.shape[1], device=device).requires_grad_() if bias is None else bias
        output = example.pool(x, bias, True)
        grad = example.grad(output)
        grad_input, grad_bias = torch.autograd.grad(output, (x, bias), grad)
        live = F.max_pool2d(rectified(x, bias), *example.arguments) > 0
        mass = (grad.double() * live).sum((0, 2, 3))
        assert torch.equal(grad_input.double().sum((0, 2, 3)), mass)
        assert torch.equal(grad_bias, mass.to(bias.dtype))


@backends
def test_one_live_cell_makes_it_max_pooling(backend, device):
    """Then both modes, the indices and the gradients are those of `F.max_pool2d` after a ReLU."""
    interpreted = backend == "triton" and device.type == "cpu"

    @for_all(examples(6 if interpreted else 30), EXAMPLES[backend])
    def _(example):
        torch.manual_seed(example.seed)
        x = -torch.rand(example.shape).to(example.dtype)
        # A grid so wide that no window holds two of its cells, of which some are live.
        steps = [
            (kernel - 1) * dilation + 1
            for kernel, dilation in zip(
                example.arguments.kernel, example.arguments.dilation, strict=True
            )
        ]
        top, left = (int(torch.randint(step, ())) for step in steps)
        grid = x[:, :, top :: steps[0], left :: steps[1]]
        grid.copy_(torch.where(torch.rand(grid.shape) < 0.7, torch.rand(grid.shape) + 0.5, grid))
        x = viewed(x.to(device), "contiguous" if example.view == "expanded" else example.view)
        x.requires_grad_()
        expected, places = F.max_pool2d(x.relu(), *example.arguments, return_indices=True)
        # A dilated window may step over the whole input: -inf there, here 0.
        beside = expected.isinf()
        expected = expected.where(~beside, 0)
        output, indices = example.pool(x, None, True, return_indices=True)
        assert torch.equal(indices.where(~beside, 0), places.where(~beside, 0))
        assert torch.equal(output, expected)
        # w * w / S is w, and (2 w - y) / S is 1, up to rounding.
        rtol = RTOL[x.dtype]
        mean = example.pool(x, None, False)
        torch.testing.assert_close(mean, expected, rtol=rtol, atol=0)
        grad = example.grad(output)
        (grad_expected,) = torch.autograd.grad(expected, x, grad)
        (grad_input,) = torch.autograd.grad(example.pool(x, None, True), x, grad)
        assert torch.equal(grad_input, grad_expected)
        (grad_input,) = torch.autograd.grad(mean, x, grad)
        torch.testing.assert_close(grad_input, grad_expected, rtol=rtol, atol=10 * rtol)


# ---------------------------------------------------------------- shapes and errors

NUMBER = st.integers(-1, 5)
ANY = st.one_of(NUMBER, NUMBER, st.tuples(NUMBER, NUMBER), st.lists(NUMBER, max_size=3))
STRIDE = st.one_of(st.none(), ANY.filter(lambda stride: stride != []))  # see test_extremes.py
DILATION = st.one_of(st.integers(0, 3), pairs(0, 3))


@st.composite
def calls(draw: st.DrawFn, dims: int) -> tuple:
    """Shape, kernel, stride, padding, dilation and ceil_mode, which go together half the time."""
    sizes = st.tuples(st.integers(0, 2), st.integers(1, 3), *[st.integers(1, 9)] * dims)
    if draw(st.booleans()):
        window = draw(windows())
        numbers = [number[:dims] for number in window[:4]]
        return draw(sizes), *numbers, window[4]
    shapes = st.one_of(sizes, sizes, st.lists(st.integers(0, 9), min_size=1, max_size=5))
    return draw(st.tuples(shapes, ANY, STRIDE, ANY, DILATION, st.booleans()))


def outcome(call: Callable) -> tuple:
    """What a call returns, as a shape, or raises, as a type."""
    try:
        return tuple(call().shape)
    except Exception as error:
        return (type(error),)


@pytest.mark.parametrize("dims", [1, 2])
def test_shapes_and_errors_are_those_of_max_pooling(dims, plain):
    pool, max_pool = (
        (stochastic_pool1d, F.max_pool1d) if dims == 1 else (stochastic_pool2d, F.max_pool2d)
    )
    seen: collections.Counter = collections.Counter()

    @for_all(calls(dims), 600)
    def _(call):
        shape, kernel, stride, padding, dilation, ceil_mode = call
        x = torch.zeros(shape)
        expected = outcome(
            lambda: max_pool(x, kernel, stride, padding, dilation, ceil_mode=ceil_mode)
        )
        actual = outcome(lambda: pool(x, kernel, stride, padding, dilation, ceil_mode=ceil_mode))
        seen[type(expected[0])] += 1
        assert actual == expected

    assert min(seen[int], seen[type]) > 100
