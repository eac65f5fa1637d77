"""Extreme numbers, memory and circumstances, through the public functions on every backend."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from stochastic_pooling import stochastic_pool2d

from .conftest import generator
from .windows import DTYPES, LAYOUTS

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # numpy, under the interpreter, tells of the overflows and NaNs that the inputs are made for.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]

NAN, INF = float("nan"), float("inf")

# Three cells; then the training output and the drawn cell (None: no gradient; a tuple: one of
# them), the evaluation output and its gradient. A string is a number of the dtype.
SPECIAL_WINDOWS = {
    "dead": ([-1, -2, -3], 0, None, 0, [0, 0, 0]),
    "zeros": ([-0.0, 0.0, -0.0], 0, None, 0, [0, 0, 0]),
    "all -inf": ([-INF, -INF, -INF], 0, None, 0, [0, 0, 0]),
    "one live cell": ([-1, 4, 0], 4, 1, 4, [0, 1, 0]),
    "one beside -inf": ([-INF, -INF, 2], 2, 2, 2, [0, 0, 1]),
    "inf": ([1, INF, 2], INF, 1, INF, [-1, 1, -1]),
    "inf beside the largest": (["largest", -1, INF], INF, 2, INF, [-1, 0, 1]),
    "two infs": ([INF, 1, INF], INF, (0, 2), INF, [0.5, -0.5, 0.5]),
    "the last of two nans": ([NAN, 1, NAN], NAN, 2, NAN, [NAN, NAN, NAN]),
    "negative nan": ([1, -NAN, 2], NAN, 1, NAN, [NAN, NAN, NAN]),
    "nan and inf": ([NAN, INF, 1], NAN, 0, NAN, [NAN, NAN, NAN]),
    "nan beside dead": ([0, -1, NAN], NAN, 2, NAN, [0, 0, NAN]),
    "largest": ([-1, "largest", 0], "largest", 1, "largest", [0, 1, 0]),
    "two of the largest": (
        ["largest", "largest", -INF],
        *("largest", (0, 1), "largest", [0.5, 0.5, 0]),
    ),
    "largest beside small": (["large", 1, 0], "large", 0, "large", [1, -1, 0]),
    "smallest normal": ([0, -1, "normal"], "normal", 2, "normal", "tiny at 2"),
    "subnormal": (["subnormal", 0, -1], "subnormal", 0, "subnormal", "tiny at 0"),
    "smallest sum": ([-1, "least", 0], "least", 1, "least", [0, 1, 0]),
    "sum just below it": ([0, "less", -1], "less", 1, "less", "tiny at 1"),
}


def number(value: float | str, dtype: torch.dtype) -> float:
    finite = torch.finfo(dtype)
    # In bf16 Triton's interpreter, not a GPU, takes subnormals for zeros. A sixteenth of the
    # smallest normal number is large enough for fp32's draw: above 2**-134.
    below = 1 if dtype == torch.bfloat16 else 16
    # Smaller sums have no gradient; those of fp16, and its subnormal ones, are all larger.
    least = max(2.0**-100, finite.smallest_normal)
    # Beside a large number, 1 is drawn with a probability of less than 2**-15.
    named = {
        "largest": finite.max,
        "large": 65504 if dtype == torch.float16 else 1e38,
        "normal": finite.smallest_normal,
        "subnormal": finite.smallest_normal / below,
        "least": least,
        "less": least * (1 - finite.eps / 2),
    }
    return named[value] if isinstance(value, str) else value


def slopes(gradient: list[float] | str, dtype: torch.dtype) -> list[float]:
    """Sums below 2**-100 have no gradient, for 1 / S would overflow in fp32."""
    if isinstance(gradient, str):
        return [float(dtype == torch.float16 and gradient == f"tiny at {i}") for i in range(3)]
    return gradient


def special_windows(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The table, a channel per row: cells, outputs, allowed cells, means and gradients."""
    rows = SPECIAL_WINDOWS.values()
    # From fp64, so that the numbers reach fp64 unharmed.
    cells = torch.tensor(
        [[number(value, dtype) for value in row[0]] for row in rows], dtype=torch.float64
    ).to(dtype)
    outputs = torch.tensor([number(row[1], dtype) for row in rows], dtype=torch.float64).to(dtype)
    allowed = torch.zeros(len(rows), 3, dtype=torch.bool)
    for mask, row in zip(allowed, rows, strict=True):
        if row[2] is not None:
            mask[list(row[2]) if isinstance(row[2], tuple) else row[2]] = True
    means = torch.tensor([number(row[3], dtype) for row in rows], dtype=torch.float64).to(dtype)
    gradients = torch.tensor([slopes(row[4], dtype) for row in rows], dtype=dtype)
    return cells, outputs, allowed, means, gradients


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 3), (3, 3)], ids=["1x3", "3x3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_windows(dtype, kernel, layout, backend, device):
    """In a 3 x 3 window, which has code of its own, they are a diagonal among dead cells."""
    interpreted = backend == "triton" and device.type == "cpu"
    few = backend == "numba" and (dtype == torch.bfloat16 or kernel == (1, 3))
    if few or (
        interpreted and (dtype, kernel) not in ((torch.float16, (3, 3)), (torch.float32, (1, 3)))
    ):
        pytest.skip("takes the interpreter, or numba, several seconds; the others are enough there")
    cells, outputs, allowed, means, gradients = special_windows(dtype)
    channels = len(cells)
    images = 1 if interpreted else 2
    x = torch.full((images, channels, *kernel), -1.0, dtype=dtype)
    diagonal = [0, 1, 2] if kernel == (3, 3) else [0, 0, 0]
    x[:, :, diagonal, [0, 1, 2]] = cells
    x = x.to(device).contiguous(memory_format=layout).requires_grad_()
    bias = torch.zeros(channels, dtype=dtype, device=device).requires_grad_()

    def close(actual, expected):
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
        expected = expected.to(device).expand(actual.shape)
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)

    output, indices = stochastic_pool2d(
        x, kernel, 1, bias=bias, return_indices=True, generator=generator(device, 1)
    )
    # To the last bit: these numbers need no rounding. Images are alike but for what they draw.
    outputs = outputs.expand(images, -1)
    torch.testing.assert_close(output.cpu().flatten(1), outputs, rtol=0, atol=0, equal_nan=True)
    grad_input, grad_bias = torch.autograd.grad(output.sum(), (x, bias))
    on_diagonal = grad_input[:, :, diagonal, [0, 1, 2]].cpu()
    assert (on_diagonal.sum(-1) == allowed.any(-1)).all()
    assert ((on_diagonal == 0) | (on_diagonal == 1) & allowed).all()
    assert (grad_input.sum((2, 3)).cpu() == allowed.any(-1)).all()
    assert torch.equal(grad_bias.cpu(), images * allowed.any(-1).to(dtype))
    # The index is that of the cell with the gradient; the first where there is none.
    width = kernel[1]
    drawn = torch.where(allowed.any(-1), on_diagonal.argmax(-1), 0)
    flat = torch.tensor([row * width + col for col, row in enumerate(diagonal)])
    assert torch.equal(indices.cpu().flatten(1), flat[drawn])

    mean = stochastic_pool2d(x, kernel, 1, bias=bias, training=False)
    close(mean.flatten(1), means)
    grad_input, grad_bias = torch.autograd.grad(mean.sum(), (x, bias))
    close(grad_input[:, :, diagonal, [0, 1, 2]], gradients)
    close(grad_bias, images * gradients.sum(-1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_dead_window_of_negative_zeros_gives_zero(training, with_bias, backend, device):
    """`-0.0`, and `-0.0 + -0.0`, has the rectified activation 0 and so has the window: +0 as in
    evaluation and in every other dead window. (F.max_pool2d after F.relu would keep -0.)"""
    x = torch.full((1, 2, 6, 8), -0.0, device=device)
    bias = torch.full((2,), -0.0, device=device) if with_bias else None
    output = stochastic_pool2d(x, 3, 1, 1, bias=bias, training=training)
    assert not output.signbit().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_of_the_largest_numbers_is_finite(dtype, backend, device):
    for size in (3, 20):
        x = torch.full((1, 1, size, size), torch.finfo(dtype).max, dtype=dtype, device=device)
        mean = stochastic_pool2d(x, size, training=False)
        torch.testing.assert_close(mean, x[..., :1, :1])


@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)  # numba leaves it to torch
def test_nan_in_no_window_has_no_gradient(backend, device):
    """As with F.max_pool2d, and as in training: no output depends on it."""
    x = torch.ones(1, 1, 2, 8, device=device)
    x[..., 3:5] = NAN  # the windows hold columns 0 to 2 and 5 to 7
    bias = torch.zeros(1, device=device, requires_grad=True)
    output = stochastic_pool2d(x.requires_grad_(), (2, 3), (3, 5), bias=bias, training=False)
    assert output.isfinite().all()
    grad_input, grad_bias = torch.autograd.grad(output.sum(), (x, bias))
    assert grad_input.isfinite().all()
    assert grad_bias.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_views_that_are_negative(training, backend, device):
    """Dense ones, too, whose memory holds the numbers with the other sign."""
    x = torch.randn(1, 2, 6, 6, device=device).requires_grad_()
    bias = torch.randn(2, device=device, requires_grad=True)
    grad = torch.randn(1, 2, 3, 3, device=device)
    results = []
    for negate in (torch.neg, torch._neg_view):
        for pooled in (negate(x), x):
            options = {"bias": negate(bias), "training": training, "generator": generator(device)}
            output = stochastic_pool2d(pooled, 2, **options)
            results.append((output, *torch.autograd.grad(output, (x, bias), negate(grad))))
    for result, of_views in zip(results[:2], results[2:], strict=True):
        assert all(map(torch.equal, result, of_views))


def test_an_empty_stride_is_the_kernel_size():
    x = torch.rand(1, 1, 6, 6)
    expected = F.max_pool2d(x, 2, [])
    assert stochastic_pool2d(x, 2, []).shape == expected.shape


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 2, 2, 2), (2**31, 4, 2, 1)),
        ((1, 2, 2, 3), (1, 2**31, 3, 1)),
        ((1, 2, 2, 3), (1, 3, 2**31, 1)),
        ((1, 2, 3, 2), (1, 3, 1, 2**31)),
    ],
    ids=["images", "channels", "rows", "columns"],
)
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_2_to_the_31(shape, strides, training, backend, device):
    """In memory that is reserved and hardly touched, for the input and the gradient."""
    storage = torch.zeros(1, dtype=torch.float16, device=device).new_empty(2**31 + 16)
    far = storage.as_strided(shape, strides).copy_(torch.randn(shape))
    results = []
    for x in (far, far.contiguous()):
        leaf = x.detach().requires_grad_()
        options = {"training": training, "generator": generator(device)}
        output = stochastic_pool2d(leaf, 3, 1, 1, **options)
        results.append((output, *torch.autograd.grad(output, leaf, x)))
    for result, expected in zip(*results, strict=True):
        assert torch.equal(result, expected)
    assert results[0][1].any()


# ---------------------------------------------------------------- with and without gradients


def run_all(x: torch.Tensor, bias: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Both modes, forward and, where gradients are wanted, backward."""
    results = []
    for training in (True, False):
        options = {"training": training, "generator": generator(x.device, seed)}
        output = stochastic_pool2d(x, 3, 1, 1, bias=bias, **options)
        results.append(output.detach())
        wanted = [tensor for tensor in (x, bias) if tensor.requires_grad]
        if wanted and output.requires_grad:
            results += torch.autograd.grad(output, wanted, output.detach().cos())
    return results


def assert_same(results, expected) -> None:
    assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, backend, device):
    x, bias = torch.randn(2, 3, 5, 6, device=device), torch.randn(3, device=device)
    expected = run_all(x, bias, 1)
    assert len(expected) == 2
    with mode():
        assert_same(run_all(x, bias, 1), expected)
        # Where a parameter would have its gradient, none is kept.
        output = stochastic_pool2d(x, 3, bias=bias.clone().requires_grad_(), training=False)
        assert not output.requires_grad
        assert output.is_inference() == (mode is torch.inference_mode)
        inside = torch.randn(2, 3, 5, 6, device=device)
    # A tensor made there can be pooled outside, if nothing wants a gradient of it.
    assert len(run_all(inside, bias, 1)) == 2


@pytest.mark.parametrize("wants", ["input", "bias"])
def test_one_of_input_and_bias_may_want_a_gradient(wants, backend, device):
    """It gets what it gets where both do."""
    x = torch.randn(2, 3, 5, 6, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    output, grad_input, grad_bias, mean, mean_grad_input, mean_grad_bias = run_all(x, bias, 2)
    if wants == "input":
        results = run_all(x, bias.detach(), 2)
        assert_same(results, [output, grad_input, mean, mean_grad_input])
    else:
        results = run_all(x.detach(), bias, 2)
        assert_same(results, [output, grad_bias, mean, mean_grad_bias])


# ---------------------------------------------------------------- threads and processes


def work(number: int, device: torch.device, size: int) -> list[torch.Tensor]:
    """Of tensors of its own: a few pools of several shapes and layouts."""
    own = torch.Generator().manual_seed(number)
    results = []
    for scale, layout in ((1, LAYOUTS[0]), (2, LAYOUTS[1]), (3, LAYOUTS[0])):
        shape = (2, 1 + number % 3, scale * size, size + number)
        x = torch.randn(shape, generator=own).to(device).contiguous(memory_format=layout)
        bias = torch.randn(shape[1], generator=own).to(device)
        results += run_all(x.requires_grad_(), bias.requires_grad_(), number)
    return results


def test_eight_threads_give_what_one_gives(backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter keeps the program's number in a global")
    rounds, size = 4, 40
    expected = [work(number, device, size) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(rounds):
            tasks = [pool.submit(work, number, device, size) for number in range(8)]
            for task, others in zip(tasks, expected, strict=True):
                assert_same(task.result(timeout=100), others)


def _pool_in_child(x: torch.Tensor, bias: torch.Tensor, expected: list[torch.Tensor]) -> None:
    assert_same(run_all(x, bias, 3), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork(backend, device):
    """Used, with gradients, before. PyTorch itself allows no backward in the child then."""
    if device.type != "cpu":
        pytest.skip("CUDA does not survive a fork")
    # Too small for the threads of PyTorch, which a fork breaks.
    x, bias = torch.randn(1, 3, 9, 10), torch.randn(3)
    run_all(x.clone().requires_grad_(), bias, 3)
    expected = run_all(x, bias, 3)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_pool_in_child, args=(x, bias, expected), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
