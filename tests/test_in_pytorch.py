"""What PyTorch's users do with a built-in pool: precision, modules, averages, processes, GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import io
import pickle
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stochastic_pooling import (
    AdaptiveStochasticPool1d,
    AdaptiveStochasticPool2d,
    AdaptiveStochasticPool3d,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
    adaptive_stochastic_pool2d,
    average_draws,
    ops,
    reference,
    sampling,
    stochastic_pool2d,
)

from .conftest import generator

pytestmark = pytest.mark.usefixtures("plain")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODULES = [
    StochasticPool1d(2),
    StochasticPool2d((3, 2), stride=2, padding=1, dilation=1, ceil_mode=True),
    StochasticPool3d(2, sample_in_eval=True),
    AdaptiveStochasticPool1d(3),
    AdaptiveStochasticPool2d((2, None), return_indices=True),
    AdaptiveStochasticPool3d(1, sample_in_eval=True),
]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_that_autograd_batches(backend, training, device):
    """Its batches are tensors of plain type, which kernels cannot read."""
    x = torch.rand(1, 2, 6, 6, device=device, requires_grad=True)
    y = stochastic_pool2d(x, 2, training=training, generator=generator(device, 1))
    grads = torch.eye(y.numel(), device=device).view(-1, *y.shape)
    (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_a_graph_for_second_derivatives_is_freed(backend, device):
    """Without a bias, too, whose gradient is a tensor of no numbers."""
    x = torch.rand(1, 2, 6, 6, device=device, requires_grad=True)
    y = stochastic_pool2d(x, 2)
    torch.autograd.grad(y.square().sum(), x, create_graph=True)
    alive = weakref.ref(x)
    del x, y
    gc.collect()
    assert alive() is None


class Block(nn.Module):
    """A convolution, with its bias in the pool, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.pool = StochasticPool2d(3, 2)
        self.linear = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.conv2d(x, self.convolution.weight), bias=self.convolution.bias)
        return self.linear(x.flatten(1))


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype(training, dtype, device):
    """The pool takes what the convolution gives and keeps it; the bias stays in fp32."""
    network = Block().to(device).train(training)
    x = torch.randn(2, 3, 8, 8, device=device)
    seen = []
    network.pool.register_forward_hook(lambda *call: seen.extend((call[1][0], call[2])))
    with torch.autocast(device.type, dtype):
        loss = network(x).float().square().sum()
        assert stochastic_pool2d(x, 3, training=training).dtype == torch.float32
    assert [tensor.dtype for tensor in seen] == [dtype, dtype]
    loss.backward()
    gradient = network.convolution.bias.grad
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0


def test_sums_are_in_fp32(device):
    """4096 ones and a four make 4100, which fp16 steps over, and their bias gradient too."""
    x = torch.ones(1, 1, 17, 241, device=device, dtype=torch.float16)
    x[..., 0, 0] = 4
    mean = stochastic_pool2d(x, (17, 241), training=False)
    assert mean == torch.tensor((4096 + 16) / 4100).half()
    tiles = torch.ones(1, 1, 64, 128, device=device, dtype=torch.float16)
    bias = torch.zeros(1, device=device, requires_grad=True)
    stochastic_pool2d(tiles, 1, bias=bias).sum().backward()
    assert bias.grad == 64 * 128


def test_gradient_scaler(device):
    """An overflow of the scaled loss skips the step; a later one is taken."""
    network = Block().to(device)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=1000)
    x = torch.randn(2, 3, 8, 8, device=device)
    taken = 0
    for _ in range(30):
        before = network.linear.weight.detach().clone()
        optimiser.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = network(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        moved = not torch.equal(network.linear.weight, before)
        taken += moved
        assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert 0 < taken < 30
    assert scaler.get_scale() < 2.0**40


def test_deterministic_algorithms(device):
    """Two backwards give the same bits, and nothing asks for an algorithm that is not there."""
    x = torch.randn(2, 8, 16, 16, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        outputs = [
            stochastic_pool2d(x, 3, 1, 1, bias=bias, generator=generator(device)),
            stochastic_pool2d(x, 3, 2, bias=bias, training=False),
            adaptive_stochastic_pool2d(x, 5, bias=bias, generator=generator(device)),
        ]
        loss = sum(output.square().sum() for output in outputs)
        return list(torch.autograd.grad(loss, (x, bias)))

    torch.use_deterministic_algorithms(True)
    try:
        for one, other in zip(gradients(), gradients(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- arguments and tensors


def test_integers_of_other_libraries(device):
    x = torch.randn(1, 2, 7, 7, device=device)
    expected = stochastic_pool2d(x, 3, 2, 1, training=False)
    for three, two in ((np.int64(3), np.int32(2)), (torch.tensor(3), torch.tensor(2))):
        for stride in (two, (two, two)):
            assert torch.equal(stochastic_pool2d(x, three, stride, 1, training=False), expected)


@pytest.mark.parametrize("training", [True, False])
def test_tensors_without_data(training, monkeypatch):
    """Meta and fake tensors have the shapes, dtypes and strides of real ones, and no backend sees
    them."""
    real = torch.randn(2, 3, 7, 9).half().contiguous(memory_format=torch.channels_last)
    output = stochastic_pool2d(real, 3, 2, 1, training=training)
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "none")
    meta = real.to("meta").requires_grad_()
    fake_mode = FakeTensorMode()
    fake = fake_mode.from_tensor(real.requires_grad_())
    for x, mode in ((meta, contextlib.nullcontext()), (fake, fake_mode)):
        with mode:
            result = stochastic_pool2d(x, 3, 2, 1, training=training)
            result.sum().backward()
        for tensor, other in ((result, output), (x.grad, real)):
            assert tensor.shape == other.shape
            assert tensor.dtype == other.dtype
            assert tensor.stride() == other.stride()


def test_subclasses_stay_subclasses(device):
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(1, 2, 6, 6, device=device).as_subclass(Tagged)
    for training in (True, False):
        assert type(stochastic_pool2d(x, 2, training=training)) is Tagged


class Bias(nn.Module):
    """A bias that its pool adds, and a pool that gives two results."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3)
        self.pool = StochasticPool2d(2)
        self.drawing = AdaptiveStochasticPool2d(2, return_indices=True, sample_in_eval=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.pool(F.conv2d(x, self.convolution.weight), bias=self.convolution.bias)
        output, indices = self.drawing(y)
        return y, output + indices


def test_modules_are_nodes_for_fx_that_follow_the_mode(device):
    """As quantization wants it: traced and trained, then evaluated."""
    model = Bias().to(device)
    x = torch.rand(2, 2, 8, 8, device=device)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [
        "pool",
        "drawing",
    ]
    for training in (False, True):
        model.train(training)
        graph.train(training)
        results = []
        for network in (graph, model):
            torch.manual_seed(5)
            results.append(network(x))
        assert all(map(torch.equal, *results))
        assert torch.equal(graph(x)[0], graph(x)[0]) != training
    alone = torch.fx.symbolic_trace(model.pool)
    assert alone(x).shape == (2, 2, 4, 4)


def test_functions_are_one_node_for_fx_and_can_be_intercepted(device):
    def pools(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = stochastic_pool2d(x, 3, 1, 1, bias=bias, training=False)
        return adaptive_stochastic_pool2d(x, 2, training=False)

    traced = torch.fx.symbolic_trace(pools)
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert functions == [stochastic_pool2d, adaptive_stochastic_pool2d]
    x, bias = torch.randn(1, 2, 6, 6, device=device), torch.randn(2, device=device)
    assert torch.equal(traced(x, bias), pools(x, bias))
    of_bias = torch.fx.symbolic_trace(lambda b: stochastic_pool2d(x, 3, bias=b, training=False))
    assert torch.equal(of_bias(bias), stochastic_pool2d(x, 3, bias=bias, training=False))

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with Recorder():
        stochastic_pool2d(x, 3)
    assert seen[0] is stochastic_pool2d


def test_backends_see_numbers_in_memory(device, monkeypatch):
    """Tensors of plain type may be zeros without memory, or hold another tensor."""
    seen, expectation = [], reference.expectation

    def note(input: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(input)
        return expectation(input, *others)

    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "torch")
    monkeypatch.setattr(reference, "expectation", note)
    zeros = torch._efficientzerotensor((1, 2, 6, 6), device=device)
    functional = torch._to_functional_tensor(torch.rand(1, 2, 6, 6, device=device))
    torch._enable_functionalization(reapply_views=True)
    try:
        for x in (zeros, functional):
            stochastic_pool2d(x, 2, training=False)
    finally:
        torch._disable_functionalization()
    assert len(seen) == 2
    assert not any(x._is_zerotensor() or torch._is_functional_tensor(x) for x in seen)


@pytest.mark.parametrize("training", [True, False])
def test_eager_code_calls_no_op(training, device, monkeypatch):
    """Whose dispatch takes longer than a small pool."""
    for name in ("sample", "sample_backward", "expectation", "expectation_backward"):
        monkeypatch.setattr(ops, name, None)
    x = torch.rand(1, 2, 6, 6, device=device, requires_grad=True)
    bias = nn.Parameter(torch.rand(2, device=device))
    stochastic_pool2d(x, 3, bias=bias, training=training).sum().backward()
    assert bias.grad.sum() > 0


def test_dispatch_modes_see_the_op(device):
    """As those that count operations, or choose what a checkpoint keeps."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with Recorder():
        stochastic_pool2d(torch.rand(1, 2, 6, 6, device=device), 3)
    assert torch.ops.stochastic_pooling.sample.default in seen


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "pool",
    [
        StochasticPool2d(3, 1, 1),
        StochasticPool2d(3, 2, ceil_mode=True),
        StochasticPool2d(40, 20, 20),
        AdaptiveStochasticPool2d(4),
    ],
    ids=str,
)
def test_traced_graphs_replay(pool, device):
    """`make_fx` and `torch.jit.trace` record the ops, `requires_grad` or not; files hold them."""
    pool = copy.deepcopy(pool).eval()
    x, other = torch.randn(2, 1, 2, 6, 6, device=device).unbind()
    scripted = torch.jit.trace(pool, x)
    saved = io.BytesIO()
    torch.jit.save(scripted, saved)
    saved.seek(0)
    symbolic = make_fx(pool, tracing_mode="symbolic")(x)
    for traced in (make_fx(pool)(x), symbolic, scripted, torch.jit.load(saved)):
        torch.testing.assert_close(traced(other), pool(other))
    batch = torch.cat((other, x, other))
    torch.testing.assert_close(scripted(batch), pool(batch))
    larger = torch.randn(3, 2, 9, 8, device=device)
    if isinstance(pool, AdaptiveStochasticPool2d) or pool.kernel_size > 6:  # windows of that size
        with pytest.raises(RuntimeError, match="expanded size"):
            scripted(larger)
    else:
        torch.testing.assert_close(scripted(larger), pool(larger))


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize("pool", MODULES, ids=lambda pool: type(pool).__name__)
def test_module_manners(pool, tmp_path):
    assert pool.state_dict() == {}
    assert list(pool.parameters()) == []
    assert type(pool).__name__ in repr(nn.Sequential(pool))
    torch.save(pool, tmp_path / "pool.pt")
    copies = [
        copy.deepcopy(pool),
        pickle.loads(pickle.dumps(pool)),
        torch.load(tmp_path / "pool.pt", weights_only=False),
        pool.to(torch.float16).to("cpu"),
    ]
    for other in copies:
        assert vars(other).keys() == vars(pool).keys()
        assert repr(other) == repr(pool)
        assert other.sample_in_eval == pool.sample_in_eval
    # What `repr` shows, but for return_indices as in nn.MaxPool2d, builds the module again.
    built = eval(repr(pool), {type(pool).__name__: type(pool)})
    assert repr(built) == repr(pool)
    assert built.sample_in_eval == pool.sample_in_eval


def test_state_dicts_and_reprs_are_those_of_max_pooling(device):
    stochastic, maximum = (
        nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Conv2d(4, 2, 1))
        for pool in (StochasticPool2d(2), nn.MaxPool2d(2))
    )
    assert repr(stochastic) == repr(maximum).replace("MaxPool2d", "StochasticPool2d")
    maximum.load_state_dict(stochastic.state_dict())
    file = io.BytesIO()
    torch.save(maximum.state_dict(), file)
    file.seek(0)
    stochastic.load_state_dict(torch.load(file))


# ---------------------------------------------------------------- averages over draws


def test_average_of_draws_is_the_expectation(device):
    pool = StochasticPool2d(3, 1, 1).eval()
    x = torch.randn(2, 3, 6, 6, device=device)
    draws = 2000
    average = average_draws(pool, x, draws=draws)
    error = (average.mean - pool(x)).abs()
    assert (error <= 4.5 * average.std / draws**0.5 + 1e-6).all()
    # The spread is that of the draw: E[w²] - E[w]².
    w = x.relu()
    sums = [9 * F.avg_pool2d(w**power, 3, 1, 1) for power in (1, 2, 3)]
    variance = sums[2] / sums[0].clamp(min=1e-9) - (sums[1] / sums[0].clamp(min=1e-9)) ** 2
    torch.testing.assert_close(average.std**2, variance, rtol=0.2, atol=0.02)
    scaled = []
    for scale in (2.0**-80, 1.0, 2.0**70):  # their squares are beyond fp32
        torch.manual_seed(0)
        scaled.append(average_draws(pool, x * scale, draws=3).std / scale)
    assert torch.equal(scaled[0], scaled[1])
    assert torch.equal(scaled[1], scaled[2])


def test_average_of_probabilities(device):
    network = nn.Sequential(Block(), nn.LogSoftmax(1)).to(device).eval()
    x = torch.randn(3, 3, 8, 8, device=device)
    torch.manual_seed(3)
    mean, std = average_draws(network, x, draws=8, transform=torch.exp)
    torch.manual_seed(3)
    with sampling(network), torch.no_grad():
        outputs = torch.stack([network(x).exp() for _ in range(8)])
    torch.testing.assert_close(mean, outputs.mean(0))
    torch.testing.assert_close(std, outputs.std(0))
    torch.testing.assert_close(mean.sum(1), torch.ones(3, device=device))
    assert std.min() > 0
    assert not mean.requires_grad
    half = average_draws(network.half(), x.half(), draws=3)
    assert half.mean.dtype == torch.float16


def test_average_of_outputs_in_the_same_memory(device):
    """As a CUDA graph gives them."""

    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.memory = StochasticPool2d(2), x.new_empty(1, 1, 1, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.memory.copy_(self.pool(x))

    # Of fp64, which is averaged as it is.
    x = torch.tensor([[1.0, 3.0]], device=device).double().repeat(2, 64).view(1, 1, 2, 128)
    average = average_draws(Reusing().eval(), x, draws=2)
    assert set(average.mean.unique().tolist()) == {1.0, 2.0, 3.0}
    assert average.std.max() > 1


def test_draws_are_observed_by_all_who_are_there(device):
    """As those of an average within an average."""
    pool, x = StochasticPool2d(2), torch.rand(1, 2, 6, 6, device=device)
    with ops.observed() as outer:
        with ops.observed() as inner:
            pool(x)
        pool(x)
    pool(x)
    assert (len(outer), len(inner)) == (2, 1)


def test_average_of_infinities(device):
    """As a network gives them that masks some of its classes."""
    mask = torch.tensor([0.0, -torch.inf, torch.inf], device=device)
    network, x = StochasticPool1d(2).eval(), torch.rand(1, 3, 8, device=device)
    mean, std = average_draws(network, x, draws=3, transform=lambda y: y + mask[:, None])
    assert torch.equal(mean[0, 1:], mask[1:, None].expand(2, 4))
    assert torch.equal(std[0, 1:], torch.zeros(2, 4, device=device))
    assert std[0, 0].any()


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [1, 2, 0]])
def test_average_of_infinite_and_finite_draws(order):
    inf = torch.inf
    draws = torch.tensor([[-inf, inf, -inf], [-3.0, 1.0, 2.0], [-1.0, 2.0, inf]])[order]
    outputs = iter(draws)
    model = StochasticPool2d(2).eval()
    average = average_draws(
        model, torch.rand(1, 1, 2, 2), draws=3, transform=lambda _: next(outputs)
    )
    torch.testing.assert_close(average.mean, draws.mean(0), equal_nan=True)
    assert average.std[:2].tolist() == [inf, inf]


def test_average_says_what_is_wrong(device):
    pool, x = StochasticPool2d(2), torch.randn(1, 1, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        average_draws(pool, x)
    with pytest.raises(ValueError, match="at least 2"):
        average_draws(pool.eval(), x, draws=1)
    with pytest.raises(TypeError, match=r"'model' must be an nn\.Module"):
        average_draws(lambda x: x, x)
    with pytest.raises(ValueError, match="no stochastic pool"):
        average_draws(nn.MaxPool2d(2).eval(), x)
    with pytest.raises(TypeError, match="of tuple, which has no mean"):
        average_draws(StochasticPool2d(2, return_indices=True).eval(), x)
    with pytest.raises(TypeError, match=r"of torch\.int64, which has no mean"):
        average_draws(pool, x, transform=lambda output: output.argmax(-1))
    part = nn.Sequential(pool, nn.BatchNorm2d(1)).eval()
    part[1].train()
    with pytest.raises(ValueError, match="1, a part of the model, is in training mode"):
        average_draws(part, x)
    assert part[1].num_batches_tracked == 0
    # What keeps nothing itself may be in training mode.
    part = nn.Sequential(pool, nn.Sequential(nn.BatchNorm2d(1)), nn.Linear(2, 2)).to(device).eval()
    part[1].training = part[2].training = True
    average_draws(part, x, draws=2)
    # The pools are as before, whatever happened inside.
    with pytest.raises(RuntimeError), sampling(pool):
        pool(x[0, 0])
    assert torch.equal(pool(x), pool(x))


def test_average_beside_dropout_and_with_keyword_inputs(device):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.dropout = StochasticPool2d(2), nn.Dropout()

        def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
            return self.dropout(self.pool(x)) * scale

    model, x = Scaled().eval(), torch.ones(1, 1, 64, 64, device=device)
    assert set(average_draws(model, x, scale=3, draws=2).mean.unique().tolist()) == {3.0}
    model.dropout.train()
    # Nothing, or twice a weight of 1.
    assert set(average_draws(model, x, scale=3, draws=2).mean.unique().tolist()) == {0.0, 3.0, 6.0}
    assert model.dropout.training


# ---------------------------------------------------------------- sampling is the caller's own


class Calls:
    """A pool in evaluation, and whether a call of it draws."""

    def __init__(self, device: torch.device) -> None:
        self.pool = StochasticPool2d(2).eval()
        self.x = torch.rand(1, 1, 32, 32, device=device) + 0.5
        self.expectation = self.pool(self.x)

    def draw(self) -> bool:
        return not torch.equal(self.pool(self.x), self.expectation)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_overlapping_samplings_end_with_the_last(first_to_end, device):
    calls = Calls(device)
    contexts = [sampling(calls.pool), sampling(nn.Sequential(calls.pool, StochasticPool2d(2)))]
    for context in contexts:
        context.__enter__()
    contexts.pop(first_to_end).__exit__(None, None, None)
    assert calls.draw()
    contexts.pop().__exit__(None, None, None)
    assert not calls.draw()
    other = Calls(device)
    contexts = [sampling(calls.pool), sampling(other.pool)]
    for context in contexts:
        context.__enter__()
    contexts[first_to_end].__exit__(None, None, None)
    assert [calls.draw(), other.draw()] == [first_to_end == 1, first_to_end == 0]
    contexts[1 - first_to_end].__exit__(None, None, None)
    assert not calls.draw()
    # Where a test's parts run in contexts of their own, as asyncio's may, it ends in another.
    context = sampling(calls.pool)
    copy_context().run(context.__enter__)
    context.__exit__(None, None, None)
    assert not calls.draw()
    calls.pool.sample_in_eval = True
    with sampling(calls.pool):
        pass
    assert calls.draw()


def test_sampling_is_not_that_of_other_threads_or_tasks(device):
    calls = Calls(device)
    with ThreadPoolExecutor(1) as other, sampling(calls.pool):
        assert not other.submit(calls.draw).result()
        assert calls.draw()
    assert not calls.draw()

    async def tasks() -> tuple[bool, bool]:
        inside = asyncio.Event()

        async def one() -> bool:
            with sampling(calls.pool):
                inside.set()
                await asyncio.sleep(0)
                return calls.draw()

        async def another() -> bool:
            await inside.wait()
            return calls.draw()

        return tuple(await asyncio.gather(one(), another()))

    assert asyncio.run(tasks()) == (True, False)
    assert not calls.draw()


def test_threads_that_average_leave_the_pool_as_it_was(device):
    calls = Calls(device)
    with ThreadPoolExecutor(4) as threads:
        averages = [threads.submit(average_draws, calls.pool, calls.x, draws=9) for _ in range(8)]
        while not all(average.done() for average in averages):
            assert not calls.draw()
        assert all(average.result().std.max() > 0 for average in averages)
        assert not any(threads.submit(calls.draw).result() for _ in range(4))
    assert not calls.draw()


def test_replicas_of_data_parallel_draw_in_their_threads(device):
    calls = Calls(device)
    for context, alike in ((sampling(calls.pool), False), (contextlib.nullcontext(), True)):
        with context:
            replica = calls.pool._replicate_for_data_parallel()
        with ThreadPoolExecutor(1) as thread:
            output = thread.submit(replica, calls.x).result()
        assert torch.equal(output, calls.expectation) == alike
    assert not calls.draw()


# ---------------------------------------------------------------- processes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def train_two_steps(rank: int, port: int, folder: str) -> None:
    """One of two processes: two steps of DDP on the same images, from a seed for each rank, then
    from one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = DistributedDataParallel(Block())
    x = torch.randn(2, 3, 8, 8)
    steps = []
    for seed in (rank, 7):
        torch.manual_seed(seed)
        output = network(x)
        network.zero_grad()
        output.square().sum().backward()
        steps.append((output.detach(), network.module.convolution.bias.grad.clone()))
    torch.save(steps, Path(folder) / f"{rank}.pt")
    # On a busy machine a process that ends while the other one or its own DDP is at work aborts.
    dist.barrier()
    del network, output
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_data_parallel_ranks_draw_by_their_seeds(tmp_path):
    multiprocessing.spawn(train_two_steps, (free_port(), str(tmp_path)), nprocs=2)
    ranks = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    steps = zip(*ranks, (False, True), strict=True)
    for (output, gradient), (other, other_gradient), alike in steps:
        assert torch.equal(output, other) == alike
        assert torch.equal(gradient, other_gradient)  # their mean
        assert gradient.abs().sum() > 0


# ---------------------------------------------------------------- GPUs


@needs_gpu
def test_cuda_graph_draws_anew_at_each_replay():
    pool = StochasticPool2d(3, 1, 1)
    x = torch.rand(2, 4, 16, 16, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            pool(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        output = pool(x)
        (grad,) = torch.autograd.grad(output.sum(), x)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(output.clone())
        # Forward and backward of one replay belong together.
        torch.testing.assert_close((grad * x).sum(), output.sum())
    assert not torch.equal(*replays)


@needs_gpu
def test_graphed_callables():
    network = Block().cuda()
    x = torch.randn(2, 3, 8, 8, device="cuda")
    graphed = torch.cuda.make_graphed_callables(network, (x,))
    # Every replay writes to the same memory.
    outputs = [graphed(x).clone() for _ in range(2)]
    outputs[0].sum().backward()
    assert not torch.equal(*outputs)
    assert network.convolution.bias.grad.abs().sum() > 0


@needs_gpu
def test_streams():
    """Launches go to the current stream, behind what is on it already."""
    x = torch.rand(8, 64, 64, 64, device="cuda")
    expected = stochastic_pool2d(x + 1, 3, 1, 1, generator=generator(x.device))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        output = stochastic_pool2d(x + 1, 3, 1, 1, generator=generator(x.device))
    stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    x = torch.rand(2, 4, 16, 16)
    outputs = [
        stochastic_pool2d(x.to(device), 3, 1, 1, generator=generator(torch.device(device)))
        for device in ("cuda:0", "cuda:1")
    ]
    assert torch.equal(*(output.cpu() for output in outputs))
