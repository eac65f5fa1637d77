"""Whole-graph compilation, checkpointing and export."""

from __future__ import annotations

import copy
import io
import shutil
import sys
from threading import Thread

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from stochastic_pooling import (
    AdaptiveStochasticPool1d,
    AdaptiveStochasticPool2d,
    AdaptiveStochasticPool3d,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
    average_draws,
    sampling,
    stochastic_pool2d,
)

# What the case is for: (pool, convolution before it, shape of the input).
NETWORKS = {
    "1d": (StochasticPool1d(3, 2, 1), nn.Conv1d, (2, 3, 14)),
    "2d": (StochasticPool2d(3, 2, 1), nn.Conv2d, (2, 3, 12, 14)),
    "2d, ceil_mode": (StochasticPool2d(3, 2, ceil_mode=True), nn.Conv2d, (2, 3, 12, 14)),
    "2d, dilated": (StochasticPool2d(3, 2, 1, 2), nn.Conv2d, (2, 3, 12, 14)),
    "3d": (StochasticPool3d(3, 2, 1), nn.Conv3d, (2, 3, 6, 7, 8)),
    "global": (AdaptiveStochasticPool2d(1), nn.Conv2d, (2, 3, 12, 14)),
    "adaptive": (AdaptiveStochasticPool2d((5, 4)), nn.Conv2d, (2, 3, 12, 14)),
}


class TwoPools(nn.Module):
    """A convolution whose output is pooled twice, once with another bias: the draws must differ."""

    def __init__(self, pool: nn.Module, convolution: type[nn.Module]) -> None:
        super().__init__()
        self.convolution = convolution(3, 4, 3, padding=1)
        self.bias = nn.Parameter(torch.zeros(4))
        self.first, self.second = copy.deepcopy(pool), copy.deepcopy(pool)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.convolution(x)
        return self.first(x), self.second(x, bias=self.bias)


@pytest.fixture(params=NETWORKS)
def network_and_shape(request: pytest.FixtureRequest, device) -> tuple[nn.Module, tuple[int, ...]]:
    pool, convolution, shape = NETWORKS[request.param]
    return TwoPools(pool, convolution).to(device), shape


@pytest.fixture(autouse=True)
def _fresh_compiler(plain: None) -> None:
    """The ops are opaque to the compiler, so one backend stands for all."""
    torch._dynamo.reset()


def run(module: nn.Module, parameters: list[nn.Parameter], x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients at a fixed seed."""
    torch.manual_seed(5)
    outputs = module(x)
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, parameters)]


def counting(backend: str) -> torch._dynamo.testing.CompileCounterWithBackend:
    return torch._dynamo.testing.CompileCounterWithBackend(backend)


@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "evaluation"]
)
@pytest.mark.filterwarnings("error:Dynamo detected")
def test_one_graph_for_every_batch_size(training, network_and_shape, device):
    network, shape = network_and_shape
    network.train(training)
    parameters = list(network.parameters())
    counter = counting("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 7):
        x = torch.randn(batch, *shape[1:], device=device)
        results = run(compiled, parameters, x)
        for result, expected in zip(results, run(network, parameters, x), strict=True):
            torch.testing.assert_close(result, expected)
        # The bias of zeros is other code, whose sums a GPU may round in another order.
        assert torch.allclose(results[0], results[1]) != training
    # One for the first batch, one for all the others.
    assert counter.frame_count == 2


@pytest.mark.slow
def test_one_graph_for_every_image_size(device):
    for pool in (
        StochasticPool2d(3, 2, 1),
        StochasticPool2d(2, 3, 1, ceil_mode=True),
        StochasticPool2d(2, 10**7),
        AdaptiveStochasticPool2d((5, 4)),
    ):
        torch._dynamo.reset()
        network = TwoPools(pool, nn.Conv2d).to(device)
        parameters = list(network.parameters())
        counter = counting("aot_eager")
        compiled = torch.compile(network, fullgraph=True, backend=counter, dynamic=True)
        for more in (0, 2, 5, 7):
            x = torch.randn(2, 3, 12 + more, 14 + more, device=device)
            for result, expected in zip(
                run(compiled, parameters, x), run(network, parameters, x), strict=True
            ):
                torch.testing.assert_close(result, expected)
        assert counter.frame_count == 1


needs_inductor = pytest.mark.skipif(
    not torch.cuda.is_available()
    and shutil.which("cl" if sys.platform == "win32" else "g++") is None,
    reason="Inductor compiles C++ for CPUs",
)


@needs_inductor
@torch._inductor.config.patch(force_disable_caches=True)  # where fakes of another version may be
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("pool", "layout"),
    [
        (StochasticPool2d(3, 1, 1), torch.contiguous_format),
        # Whose outputs are of either format, and the gradient of one.
        (AdaptiveStochasticPool2d(1), torch.channels_last),
    ],
    ids=["sliding", "global"],
)
def test_inductor_draws_what_eager_draws(training, pool, layout, device):
    network = TwoPools(pool, nn.Conv2d).to(device, memory_format=layout).train(training)
    parameters = list(network.parameters())
    compiled = torch.compile(network, fullgraph=True)
    x = torch.randn(2, 3, 12, 14, device=device).contiguous(memory_format=layout)
    for result, expected in zip(
        run(compiled, parameters, x), run(network, parameters, x), strict=True
    ):
        # Inductor sums in another order.
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@needs_inductor
@torch._inductor.config.patch(force_disable_caches=True)
@pytest.mark.slow
def test_inductor_copies_nothing_into_another_layout(device):
    """Where it has made convolutions channels_last in a network that is not."""
    convolution = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    network = nn.Sequential(convolution[0], StochasticPool2d(2), convolution[1]).to(device)
    parameters = list(network.parameters())

    def step(module: nn.Module) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(5)
        return torch.autograd.grad(module(x).square().sum(), parameters)

    x = torch.randn(2, 3, 12, 14, device=device)
    gradients, code = run_and_get_code(step, torch.compile(network, fullgraph=True))
    assert "stochastic_pooling.sample.default" in "".join(code)
    assert "fused_sample" not in "".join(code)  # no kernel for what goes in or comes out
    torch.testing.assert_close(gradients, step(network), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_replays_the_draw(compiling, reentrant, device):
    network = TwoPools(StochasticPool2d(3, 1, 1), nn.Conv2d).to(device)
    parameters = list(network.parameters())
    x = torch.randn(2, 3, 8, 8, device=device).requires_grad_()
    plain = run(network, parameters, x)

    def replayed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return checkpoint(network, x, use_reentrant=reentrant)

    if reentrant:  # which knows `backward` alone
        torch.manual_seed(5)
        outputs = replayed(x)
        sum(output.square().sum() for output in outputs).backward()
        results = [*outputs, *(parameter.grad for parameter in parameters)]
    else:
        if compiling:
            replayed = torch.compile(replayed, fullgraph=True, backend="aot_eager_decomp_partition")
        results = run(replayed, parameters, x)
    outputs, gradients = results[:2], results[2:]
    # What is drawn scales with the parameters: the gradients of its square do only if they are
    # those of the same cells.
    scaled = sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True))
    torch.testing.assert_close(scaled, 2 * sum(output.square().sum() for output in outputs))
    # On CUDA the compiler gives draws that it makes again a generator of their own.
    if not (compiling and not reentrant and device.type == "cuda"):
        for result, expected in zip(results, plain, strict=True):
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_transforms_compile(training, device):
    """`torch.compile` of `torch.func`."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return stochastic_pool2d(x, 3, 1, 1, training=training).square().sum()

    x = torch.randn(4, 2, 3, 6, 5, device=device)
    for transformed, argument in (
        (torch.func.grad(loss), x[0]),
        (torch.func.vmap(loss, randomness="different"), x),
        (torch.func.vmap(torch.func.grad(loss), randomness="different"), x),
        (lambda x: torch.func.jvp(loss, (x,), (x,)), x[0]),
    ):
        torch._dynamo.reset()
        torch.manual_seed(2)
        expected = transformed(argument)
        torch.manual_seed(2)
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(argument), expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_backward_of_an_eager_call_compiles(training, backend, device):
    """`torch.compile` of the backward pass alone, in which it sees no numbers."""
    x = torch.rand(1, 2, 6, 6, device=device, requires_grad=True)
    output = stochastic_pool2d(x, 3, 1, 1, training=training)
    (expected,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    compiler = torch.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        output.sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.slow
def test_compiled_model_samples_where_asked_to(device):
    model = nn.Sequential(StochasticPool2d(2), AdaptiveStochasticPool2d(4)).to(device).eval()
    x = torch.rand(2, 3, 16, 16, device=device)
    expectation = model(x)
    counter = counting("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expectation)
        with sampling(model):
            assert not torch.equal(compiled(x), compiled(x))
            thread = Thread(target=lambda: torch.testing.assert_close(compiled(x), expectation))
            thread.start()
            thread.join()
        assert average_draws(compiled, x, draws=2).std.max() > 0
    assert counter.frame_count == 3  # the expectation, draws, and draws without gradients


TRACERS = {
    "make_fx": lambda model, x: make_fx(model)(x).eval(),
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "torch.export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict torch.export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("tracer", TRACERS)
def test_average_of_what_was_traced(tracer, device):
    """A graph keeps what the pools did when it was made."""
    x = torch.rand(2, 3, 8, 8, device=device)
    model = nn.Sequential(StochasticPool2d(2), nn.BatchNorm2d(3)).to(device).eval()
    frozen = TRACERS[tracer](model, x)
    with sampling(model):
        drawing = TRACERS[tracer](model, x)
    assert average_draws(drawing, x).std.max() > 0
    with pytest.raises(ValueError, match=r"exported .* within sampling\(model\)"), sampling(frozen):
        pass
    with pytest.raises(ValueError, match=r"exported .* within sampling\(model\)"):
        average_draws(frozen, x)
    # Its dropout makes the outputs differ, no pool does; on a GPU a CUDA graph might draw.
    beside_dropout = nn.Sequential(frozen, nn.Dropout())
    beside_dropout.training = False
    if x.is_cuda:
        assert average_draws(beside_dropout, x).std.max() > 0
    else:
        with pytest.raises(ValueError, match=r"exported .* within sampling\(model\)"):
            average_draws(beside_dropout, x)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "strict"]
)
def test_export_of_a_model_in_evaluation(strict, network_and_shape, device):
    network, shape = network_and_shape
    network.eval()
    program = torch.export.export(
        network,
        (torch.randn(shape, device=device),),
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}},
        strict=strict,
    )
    exported = saved_and_loaded(program).module()
    x = torch.randn(5, *shape[1:], device=device)
    for output, expected in zip(exported(x), network(x), strict=True):
        torch.testing.assert_close(output, expected)


# What the case is for: (pool, size it is exported with, other sizes).
DYNAMIC = {
    "ceil_mode, last windows dropped": (
        *(StochasticPool2d(2, 3, 1, ceil_mode=True), (10, 12)),
        [(1, 1), (2, 3), (3, 4), (11, 5), (12, 13)],
    ),
    "dilated": (StochasticPool2d((3, 2), 2, 1, 2, ceil_mode=True), (10, 12), [(5, 6), (11, 8)]),
    "1d, shorter than the window": (
        StochasticPool1d(7, 3, 3, ceil_mode=True),
        (10,),
        [(1,), (2,), (4,), (14,)],
    ),
    "3d": (StochasticPool3d((2, 1, 2), 3, (1, 0, 1), 2), (6, 7, 8), [(4, 5, 4), (7, 5, 9)]),
    "huge stride": (StochasticPool2d(2, 10**7), (10, 12), [(2, 3), (13, 5)]),
    "global": (AdaptiveStochasticPool2d(1), (10, 12), [(1, 1), (7, 5)]),
    "adaptive": (AdaptiveStochasticPool2d(3), (10, 11), [(1, 2), (9, 6), (13, 9), (7, 22)]),
    "adaptive, even": (AdaptiveStochasticPool2d((3, 2)), (9, 8), [(3, 4), (7, 22), (2, 1)]),
    "adaptive, 1d": (AdaptiveStochasticPool1d(4), (10,), [(3,), (8,), (15,)]),
    "adaptive, 3d": (AdaptiveStochasticPool3d((2, None, 1)), (5, 6, 7), [(4, 3, 5), (1, 8, 9)]),
}


@pytest.mark.parametrize("case", DYNAMIC)
def test_export_for_any_image_size(case, device):
    pool, size, others = DYNAMIC[case]
    pool.eval()
    dynamic = dict.fromkeys(range(2, 2 + len(size)), torch.export.Dim.DYNAMIC)
    x = torch.randn(2, 3, *size, device=device)
    exported = torch.export.export(pool, (x,), dynamic_shapes=(dynamic,)).module()
    drawing = copy.copy(pool)
    drawing.sample_in_eval = drawing.return_indices = True
    drawn = torch.export.export(drawing, (x,), dynamic_shapes=(dynamic,)).module()
    for other in (size, *others):
        # Export takes sizes of 1 for constants, the output's too, and refuses what differs.
        if min(other) > 2:
            x = torch.randn(2, 3, *other, device=device)
            torch.testing.assert_close(exported(x), pool(x))
            output, index = drawn(x)
            cells = x.relu().flatten(2).gather(2, index.flatten(2)).view(output.shape)
            torch.testing.assert_close(output, cells)


# Of each kind one, for what they reckon is tested above: (case, dtype).
ONNX = [
    ("adaptive", torch.float32),
    *(
        pytest.param(case, dtype, marks=pytest.mark.slow)
        for case, dtype in [
            ("ceil_mode, last windows dropped", torch.float32),
            ("huge stride", torch.float16),
            ("adaptive", torch.float16),
            ("1d, shorter than the window", torch.float32),
            ("adaptive, 3d", torch.float32),
        ]
    ),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("case", "dtype"), ONNX, ids=str)
def test_onnx_for_any_image_size(case, dtype, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pool, size, others = DYNAMIC[case]
    pool.eval()
    path = tmp_path / "pool.onnx"
    dynamic = dict.fromkeys((0, *range(2, 2 + len(size))), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        pool,
        (torch.randn(2, 3, *size, dtype=dtype),),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=(dynamic,),
    )
    assert {node.domain for node in onnx.load(path).graph.node} == {""}  # standard operators
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    close = {"rtol": 2e-3, "atol": 1e-3} if dtype == torch.float16 else {}
    for other in (size, *others):
        x = torch.randn(4, 3, *other).to(dtype)
        x[0] = -1
        x[1].flatten()[-1] = torch.nan  # in its own windows alone
        x[2] = 600  # the squares are beyond fp16
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        output = torch.from_numpy(output)
        torch.testing.assert_close(output, pool(x), equal_nan=True, **close)


def test_exported_training_graph_draws_and_trains(device):
    network = TwoPools(StochasticPool2d(3, 1, 1), nn.Conv2d).to(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    exported = torch.export.export(network, (x,)).module()
    results = run(exported, list(exported.parameters()), x)
    for result, expected in zip(results, run(network, list(network.parameters()), x), strict=True):
        torch.testing.assert_close(result, expected)
