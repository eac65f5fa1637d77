"""`replace_pooling` and `fuse`, on networks that people use and on a zoo of awkward ones."""

from __future__ import annotations

import copy
import functools
import io
import logging
import pickle
import random
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision import models

from stochastic_pooling.convert import fuse, replace_pooling
from stochastic_pooling.modules import (
    AdaptiveStochasticPool1d,
    AdaptiveStochasticPool2d,
    AdaptiveStochasticPool3d,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
)


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels are not what is tested here, and they would compile for each window."""
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small work waits for busy cores otherwise
    yield
    torch.set_num_threads(threads)


ADAPTIVE = (AdaptiveStochasticPool1d, AdaptiveStochasticPool2d, AdaptiveStochasticPool3d)
POOLS = (StochasticPool1d, StochasticPool2d, StochasticPool3d, *ADAPTIVE)


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, of draws that the seed fixes, and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(1)
    output = model(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weight).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compare outputs and gradients in fp64, where rounding moves no draw; return the output."""
    assert x.dtype == torch.float64
    output, gradients = run(copy.deepcopy(model), x)  # a norm's statistics move
    other_output, other_gradients = run(copy.deepcopy(other), x)
    torch.testing.assert_close(other_output, output, rtol=1e-9, atol=1e-12)
    assert other_gradients.keys() == gradients.keys()
    used = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    # A bias before a norm has no gradient but rounding: what is zero is seen beside the others.
    scale = max(gradient.abs().max().item() for gradient in used.values())
    assert scale > 0
    for name, gradient in gradients.items():
        if name not in used:
            assert other_gradients[name] is None, name
            continue
        torch.testing.assert_close(
            other_gradients[name],
            gradient,
            rtol=1e-9,
            atol=1e-10 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    return output


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """The memory that backward keeps alive, the model's own tensors aside."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # held, and so is all that it saved: no storage is counted twice
    assert output.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


# ---------------------------------------------------------------- networks


def timm_model(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=4)


# The network; its pools; the lines of `folded`.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "alexnet": (
        lambda: models.alexnet(num_classes=4).features,
        3,
        [
            "2: ReLU 1, bias of 0",
            "5: ReLU 4, bias of 3",
            "12: ReLU 11, bias of 10",
        ],
    ),
    "vgg11_bn": (
        lambda: models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True),
        5,
        ["3: ReLU 2", "7: ReLU 6", "14: ReLU 13", "21: ReLU 20", "28: ReLU 27"],
    ),
    # The ReLUs before its other two pools are called by a `forward`, as all those below are.
    "squeezenet1_1": (
        lambda: models.squeezenet1_1(num_classes=4),
        3,
        ["features.2: ReLU features.1, bias of features.0"],
    ),
    "densenet": (
        lambda: models.DenseNet(4, (1, 1, 1, 1), 8, num_classes=4),
        4,
        ["features.pool0: ReLU features.relu0"],
    ),
    "resnet18": (lambda: models.resnet18(num_classes=4), 1, []),
    "resnet10t": (lambda: timm_model("resnet10t"), 4, []),
    "ese_vovnet19b_slim": (lambda: timm_model("ese_vovnet19b_slim"), 3, []),
}


@pytest.mark.filterwarnings("ignore:replace_pooling", "ignore:fuse. nothing to fold")
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    make, pools, folded = NETWORKS[name]
    original = make().double()
    stochastic = replace_pooling(copy.deepcopy(original))
    assert sum(isinstance(module, POOLS) for module in stochastic.modules()) == pools
    fused = fuse(copy.deepcopy(stochastic))
    assert fused.meta["folded"] == folded

    keys = list(original.state_dict())
    assert list(stochastic.state_dict()) == keys
    assert list(fused.state_dict()) == keys
    assert [name for name, _ in fused.named_modules()] == [
        name for name, _ in original.named_modules()
    ]

    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    original.eval()
    with torch.no_grad():
        shape = original(x).shape
    for training in (True, False):
        stochastic.train(training)
        fused.train(training)
        output = assert_same(stochastic, fused, x)
        assert output.shape == shape
        torch.manual_seed(2)
        with torch.no_grad():
            other = copy.deepcopy(stochastic)(x)
        assert torch.equal(other, output) != training  # a draw, or the expectation


@pytest.mark.filterwarnings("ignore:replace_pooling", "ignore:fuse. nothing to fold")
@pytest.mark.parametrize("name", NETWORKS)
def test_network_keeps_less_for_backward(name):
    make, _, folded = NETWORKS[name]
    original = make()
    stochastic = replace_pooling(copy.deepcopy(original))
    fused = fuse(copy.deepcopy(stochastic))
    x = torch.randn(2, 3, 64, 64)
    relus = [
        part[5:] for line in folded for part in line.split(": ")[1].split(", ") if "ReLU" in part
    ]
    rectified = []
    for relu in relus:
        stochastic.get_submodule(relu).register_forward_hook(
            lambda module, inputs, output: rectified.append(output.nbytes)
        )
    bytes_of = {
        "max or average": saved_bytes(original, x),
        "stochastic": saved_bytes(stochastic, x),
        "fused": saved_bytes(fused, x),
    }
    print(name, {kind: f"{count / 2**20:.2f} MiB" for kind, count in bytes_of.items()})
    assert len(rectified) == len(relus)
    # A pool's code of one byte takes the place of an int64 index.
    assert bytes_of["stochastic"] < bytes_of["max or average"]
    # What falls is the output of each folded ReLU, and nothing else.
    assert bytes_of["stochastic"] - bytes_of["fused"] == sum(rectified)
    assert (sum(rectified) > 0) == bool(folded)


# ---------------------------------------------------------------- fuse: what it folds


def chain(*between: nn.Module, pool: nn.Module | None = None) -> nn.Sequential:
    """A convolution, `between` and a pool."""
    pool = StochasticPool2d(2) if pool is None else pool
    return nn.Sequential(nn.Conv2d(3, 4, 3), *between, pool).double()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 8, 8), dtype=torch.float64)


class Features(nn.Sequential):
    """As users write it: the modules are chosen here, and `forward` is inherited."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.note = "kept"

    def describe(self) -> str:
        return f"{self.note}: {len(self)}"


FOLDED: dict[str, tuple[nn.Module, list[str]]] = {
    "nothing between": (chain(), ["1: bias of 0"]),
    "ReLU": (chain(nn.ReLU()), ["2: ReLU 1, bias of 0"]),
    "ReLU in place": (chain(nn.ReLU(True)), ["2: ReLU 1, bias of 0"]),
    "norm": (chain(nn.BatchNorm2d(4), nn.ReLU(True)), ["3: ReLU 2"]),
    "norm, no ReLU": (chain(nn.BatchNorm2d(4)), []),
    "no bias": (
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), StochasticPool2d(2)).double(),
        ["2: ReLU 1"],
    ),
    "ReLU6": (chain(nn.ReLU6()), []),
    "two ReLUs": (chain(nn.ReLU(), nn.ReLU()), []),
    "another module between": (chain(nn.AvgPool2d(3, 1)), []),
    "a transposed convolution": (
        nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)).double(),
        ["2: ReLU 1"],
    ),
    "a max pool": (chain(nn.ReLU(), pool=nn.MaxPool2d(2)), []),
    "ReLU inside": (
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), StochasticPool2d(2)).double(),
        ["1: ReLU 0.1, bias of 0.0"],
    ),
    "a class of its own": (
        Features(nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)).double(),
        ["2: ReLU 1, bias of 0"],
    ),
    "in a row": (
        nn.Sequential(
            chain(nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), StochasticPool2d(2))
        ).double(),
        ["0.2: ReLU 0.1, bias of 0.0", "1.1: bias of 1.0"],
    ),
}


@pytest.mark.filterwarnings("ignore:fuse. nothing to fold")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FOLDED)
def test_fold(case, training):
    model, folded = FOLDED[case]
    model.train(training)
    with torch.no_grad():  # so that it matters
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias += 0.5
    fused = fuse(model)
    assert fused.meta["folded"] == folded
    output = assert_same(model, fused, image())
    # What is folded is not called.
    relus = [part for line in folded for part in line.replace(",", "").split() if part == "ReLU"]
    assert aten_calls(model, image(), "relu") - aten_calls(fused, image(), "relu") == len(relus)
    if folded:
        assert output.abs().sum() > 0


def aten_calls(model: nn.Module, x: torch.Tensor, name: str) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    events = (event.name for event in profile.events())
    return sum(event in (f"aten::{name}", f"aten::{name}_") for event in events)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_fold_every_convolution(dimensions, padding_mode, padding):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    pool = (StochasticPool1d, StochasticPool2d, StochasticPool3d)[dimensions - 1]
    stride = 2 if padding == 1 else 1
    model = nn.Sequential(
        conv(4, 6, 3, stride, padding, dilation=2, groups=2, padding_mode=padding_mode),
        nn.ReLU(),
        pool(2, 1),
    ).double()
    fused = fuse(model)
    assert fused.meta["folded"] == ["2: ReLU 1, bias of 0"]
    assert_same(model, fused, image(2, 4, *(9, 8, 7)[:dimensions]))
    assert_same(model, fused, image(4, *(9, 8, 7)[:dimensions]))  # unbatched


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_fold_a_relu_into_an_adaptive_pool(dimensions):
    """Not the bias: of a bias of infinity, an adaptive pool makes NaN."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = nn.Sequential(conv(4, 6, 3), nn.ReLU(), ADAPTIVE[dimensions - 1](2)).double()
    fused = fuse(model)
    assert fused.meta["folded"] == ["2: ReLU 1"]
    assert_same(model, fused, image(2, 4, *(9, 8, 7)[:dimensions]))


def test_leave_a_bias_of_other_dimensions():
    """A 1-d pool reads (C, H, W) as (N, C, L): H of 4 would take the bias of 4 channels."""
    model = chain(nn.ReLU(), pool=StochasticPool1d(2))
    fused = fuse(model)
    assert fused.meta["folded"] == ["2: ReLU 1"]
    assert_same(model, fused, image(3, 6, 8))


def test_fold_keeps_indices_and_nan():
    model = chain(nn.ReLU(), pool=StochasticPool2d(2, return_indices=True))
    with torch.no_grad():
        model[0].bias[:2] = -100
    fused = fuse(model)
    assert fused.meta["folded"] == ["2: ReLU 1, bias of 0"]
    dead, special = image(), image()
    special[0, 0, 0, 0] = float("nan")
    special[1, 0, 3, 3] = float("inf")
    for x in (dead, special):
        torch.manual_seed(1)
        output, indices = model(x)
        torch.manual_seed(1)
        fused_output, fused_indices = fused(x)
        torch.testing.assert_close(fused_output, output, equal_nan=True)
        assert torch.equal(fused_indices, indices)
    assert output.isnan().any()
    assert output.isinf().any()
    assert (model(dead)[0][:, :2] == 0).all()


# ---------------------------------------------------------------- fuse: the zoo


class Net(nn.Module):
    """Features that fold, and a forward that an animal gives."""

    def __init__(self, function: Callable | None = None, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.features = nn.Sequential(
            *(modules or (nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)))
        )
        self.tail = nn.Conv2d(4, 2, 1)
        self.calls = 0
        self.last: torch.Tensor | None = None
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.function is not None:
            return self.function(self, x)
        return self.tail(self.features(x))

    def remember(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.last = output


def frozen_part(m: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = m.features(x)
    return m.tail(x)


def frozen_tail(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.features(x)
    with torch.no_grad():
        scale = m.tail(x).mean()
    return x * scale


def autocast_inside(m: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.tail(m.features(x.float())).double()


def no_autocast_inside(m: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        return m.tail(m.features(x))


def branch_on_type(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.tail(m.features(x)) if type(x) is torch.Tensor and x.is_leaf else x


def branch_on_dtype(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.features(x)
    return m.tail(x) if x.dtype == torch.float64 else x


def branch_on_random(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.features(x)
    return m.tail(x) if random.random() < 0.5 else x * np.random.rand()


def counter(m: Net, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return m.tail(m.features(x)) if m.calls % 2 else m.features[0](x)


def noise(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.tail(m.features(x + torch.randn(x.shape, dtype=x.dtype)))


def data_decides(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.features(x) if x[0, 0, 0, 0] > 0 else m.features[0](x).tanh()


def stores(m: Net, x: torch.Tensor) -> torch.Tensor:
    previous, m.last = m.last, m.features[0](x)
    x = m.features(x)
    return x if previous is None else x + previous.mean()


def taps(m: Net, x: torch.Tensor) -> torch.Tensor:
    total = x.new_zeros(())
    for layer in m.features:
        x = layer(x)
        total = total + x.mean()
    return total * x


def slices(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.features[:1](x)
    return m.features[-1](m.features[1:-1](x)) * m.features[:3][0].bias.sum()


def reads_the_bias(m: Net, x: torch.Tensor) -> torch.Tensor:
    conv = m.features[0]
    return m.features(x) + conv.bias.sum() + F.conv2d(x, conv.weight, conv.bias).mean()


def reads_the_mode(m: Net, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(m.tail(m.features(x)), training=m.training)


def reuses_the_convolution(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.features(x).mean() + m.features[0](x)


def relu_in_place_is_seen(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.features[0](x)
    z = m.features[2](m.features[1](y))
    return z + y.mean()


def checkpoints(reentrant: bool) -> Callable:
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return m.tail(checkpoint(m.features, x, use_reentrant=reentrant))

    return forward


def penalty(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    y = m.tail(m.features(x) ** 2)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y + slope.square().mean()


def other_parameters(m: Net, x: torch.Tensor) -> torch.Tensor:
    halves = {name: p / 2 for name, p in m.features.named_parameters()}
    return torch.func.functional_call(m.features, halves, (x,))


def per_sample(m: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(m.features, randomness="different")(x)


def forward_mode(m: Net, x: torch.Tensor) -> torch.Tensor:
    output, slope = torch.func.jvp(m.features, (x,), (x.cos(),))
    return output + slope


class DoublesReLU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function in (F.relu, torch.relu, torch.relu_) else result


def function_mode(m: Net, x: torch.Tensor) -> torch.Tensor:
    with DoublesReLU():
        return m.tail(m.features(x))


class OneMore(torch.Tensor):
    """A tensor with another ReLU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result + 1 if function in (F.relu, torch.relu, torch.relu_) else result


def tensor_subclass(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.features(x.as_subclass(OneMore)).as_subclass(torch.Tensor)


class Doubled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Leaky(nn.ReLU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(input, 0.5) + 1


class Wide(StochasticPool2d):
    def forward(self, input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(input + 1, bias)


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self[1], self[0], self[2]])


class CalledTwice(nn.Sequential):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) + 1


class Keeps(nn.Conv2d):
    """Its output is seen again, so that a ReLU in place matters."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.seen = super().forward(input)
        return self.seen


def sees_what_was_kept(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.features(x) + m.features[0].seen.mean()


def same_input_again(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    return m.features(x).mean() + x


def doubled_forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return self._conv_forward(2 * x, self.weight, self.bias)


def doubled_convolution(self: nn.Conv2d, x, weight, bias) -> torch.Tensor:
    return 2 * nn.Conv2d._conv_forward(self, x, weight, bias)


def hook(module: nn.Module, *arguments: object) -> torch.Tensor | None:
    """It counts on its module, and doubles what `module` gives."""
    module.count = getattr(module, "count", 0) + 1
    output = arguments[-1]
    return 2 * output if isinstance(output, torch.Tensor) else None


def hooked(place: int, register: str) -> Callable[[Net], None]:
    def prepare(m: Net) -> None:
        getattr(m.features[place], register)(hook)

    return prepare


def replaced_by(place: int, module: Callable[[], nn.Module]) -> Callable[[Net], None]:
    return lambda m: m.features.__setitem__(place, module().double())


def patched(name: str, function: Callable) -> Callable[[Net], None]:
    def prepare(m: Net) -> None:
        setattr(m.features[0], name, MethodType(function, m.features[0]))

    return prepare


def patched_with_a_closure(m: Net) -> None:
    conv = m.features[0]
    conv.forward = lambda x: conv._conv_forward(2 * x, conv.weight, conv.bias)


def remembers(m: Net) -> None:
    m.features[0].register_forward_hook(m.remember)
    m.function = lambda m, x: m.features(x) + m.last.mean()


def counts_in_a_closure(m: Net) -> None:
    m.features.register_forward_hook(lambda *_: setattr(m, "calls", m.calls + 1))


def freeze(*names: str) -> Callable[[Net], None]:
    def prepare(m: Net) -> None:
        for name in names:
            m.get_parameter(name).requires_grad_(False)

    return prepare


def with_forward(function: Callable, *modules: nn.Module) -> Callable[[], Net]:
    return lambda: Net(function, *copy.deepcopy(modules))


def prepared(prepare: Callable[[Net], object]) -> Callable[[], Net]:
    def make() -> Net:
        m = Net()
        prepare(m)
        return m

    return make


class Resnet(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, relu, pool = self.features
        return pool(relu(conv(x)))


def shared_modules() -> Net:
    conv, relu, pool = nn.Conv2d(4, 4, 1), nn.ReLU(), StochasticPool2d(2, 1)
    return Net(None, nn.Conv2d(3, 4, 3), relu, pool, conv, relu, pool, conv, pool, relu)


def shared_sequential() -> Net:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    m = Net(None, nn.Conv2d(3, 4, 3), inner, StochasticPool2d(2), inner)
    m.other = inner
    return m


def hooks_inside() -> Net:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    inner.register_forward_hook(hook)
    return Net(None, inner, StochasticPool2d(2))


def of_class(kind: type[nn.Sequential]) -> Callable[[], Net]:
    def make() -> Net:
        m = Net()
        m.features = kind(nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)).double()
        return m

    return make


def with_a_class_inside(kind: type[nn.Sequential]) -> Callable[[], Net]:
    def make() -> Net:
        inner = kind(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Identity())
        return Net(None, inner, StochasticPool2d(2))

    return make


def tied() -> Net:
    m = Net(None, nn.Conv2d(3, 3, 3), nn.ReLU(), StochasticPool2d(2))
    m.tail = nn.Conv2d(3, 3, 3, padding=1).double()
    m.tail.weight, m.tail.bias = m.features[0].weight, m.features[0].bias
    return m


def compiled_convolution(m: Net) -> None:
    m.features[0].compile(backend="eager")


def keeps_a_result(m: Net) -> None:
    m.last = m.tail.weight * 2


def uncopyable(m: Net) -> None:
    m.lock = threading.Lock()


def cached_result(m: Net) -> None:
    m.cache = [m.tail.weight * 2]


# How an animal is made; whether it is equal, warned of or refused; how many folds there are; what
# is done to the original and to the result before they run.
Animal = tuple[Callable[[], nn.Module], str, int, Callable[[Any], object] | None]


def animal(
    make: Callable[[], nn.Module],
    outcome: str = "equal",
    folds: int = 1,
    later: Callable[[Any], object] | None = None,
) -> Animal:
    return make, outcome, folds, later


CONV, RELU, POOL = 0, 1, 2
NOTHING = {"outcome": "warned", "folds": 0}
HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
ZOO: dict[str, Animal] = {
    "plain": animal(Net),
    "Sequential": animal(lambda: chain(nn.ReLU())),
    "Sequential of one's own": animal(
        lambda: Features(nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)).double()
    ),
    # What a forward does
    **{
        function.__name__: animal(with_forward(function))
        for function in (
            *(frozen_part, frozen_tail, no_autocast_inside),
            *(branch_on_type, branch_on_dtype, branch_on_random, counter, noise, data_decides),
            *(stores, taps, slices, reads_the_bias, reads_the_mode, reuses_the_convolution),
            *(penalty, other_parameters, per_sample, forward_mode),
            *(function_mode, tensor_subclass),
        )
    },
    **{
        f"{function.__name__}, ReLU in place": animal(
            with_forward(function, nn.Conv2d(3, 4, 3), nn.ReLU(True), StochasticPool2d(2))
        )
        for function in (
            *(relu_in_place_is_seen, taps, stores, slices, reuses_the_convolution),
            *(function_mode, tensor_subclass),
        )
    },
    "autocast_inside": animal(lambda: Net(autocast_inside).float()),
    "checkpoint": animal(with_forward(checkpoints(False))),
    "reentrant checkpoint": animal(with_forward(checkpoints(True))),
    "a forward calls all": animal(Resnet),
    # What its modules are
    "subclass of the convolution": animal(
        prepared(replaced_by(CONV, lambda: Doubled(3, 4, 3))), **NOTHING
    ),
    "subclass of the ReLU": animal(prepared(replaced_by(RELU, Leaky)), **NOTHING),
    "subclass of the pool": animal(prepared(replaced_by(POOL, lambda: Wide(2))), **NOTHING),
    "a convolution that keeps its output": animal(
        with_forward(sees_what_was_kept, Keeps(3, 4, 3), nn.ReLU(True), StochasticPool2d(2)),
        **NOTHING,
    ),
    "ReLU in place on the input": animal(
        with_forward(same_input_again, nn.ReLU(True), StochasticPool2d(2)), **NOTHING
    ),
    "ReLU in place on an alias": animal(
        with_forward(
            same_input_again, nn.Identity(), nn.ReLU(True), StochasticPool2d(2), nn.Conv2d(3, 4, 1)
        ),
        **NOTHING,
    ),
    "a Sequential that runs otherwise": animal(of_class(Backwards)),
    "a Sequential that is called otherwise": animal(of_class(CalledTwice)),
    "one inside that is called otherwise": animal(with_a_class_inside(CalledTwice), **NOTHING),
    "lazy": animal(prepared(replaced_by(CONV, lambda: nn.LazyConv2d(4, 3))), **NOTHING),
    "shared modules": animal(shared_modules, folds=3),
    "shared Sequential": animal(shared_sequential),
    "a hook of a Sequential inside": animal(hooks_inside, **NOTHING),
    "tied parameters": animal(tied),
    "frozen bias": animal(prepared(freeze("features.0.bias"))),
    "frozen weight": animal(prepared(freeze("features.0.weight"))),
    "frozen": animal(prepared(freeze("features.0.weight", "features.0.bias"))),
    "weight_norm": animal(
        prepared(lambda m: parametrizations.weight_norm(m.features[CONV])), **NOTHING
    ),
    "parametrized bias": animal(
        prepared(
            lambda m: parametrize.register_parametrization(m.features[CONV], "bias", nn.Tanh())
        ),
        **NOTHING,
    ),
    "pruned": animal(
        prepared(lambda m: prune.l1_unstructured(m.features[CONV], "weight", 5)), **NOTHING
    ),
    "compiled convolution, later": animal(Net, later=compiled_convolution),
    "keeps a result": animal(prepared(keeps_a_result)),
    "cannot be copied": animal(prepared(uncopyable), "refused", 0),
    "keeps results in a list": animal(prepared(cached_result), "refused", 0),
    # Hooks and patches, before and after
    **{
        f"{register} of {('convolution', 'ReLU', 'pool')[place]}": animal(
            prepared(hooked(place, register)), **NOTHING
        )
        for place in (CONV, RELU, POOL)
        for register in HOOKS
    },
    **{
        f"{register} of {('convolution', 'ReLU', 'pool')[place]}, later": animal(
            Net, later=hooked(place, register)
        )
        for place in (CONV, RELU, POOL)
        for register in HOOKS
    },
    "a hook that is a method": animal(prepared(remembers), **NOTHING),
    "a hook with a closure": animal(prepared(counts_in_a_closure), "warned"),
    "patched forward": animal(prepared(patched("forward", doubled_forward)), **NOTHING),
    "patched _conv_forward": animal(
        prepared(patched("_conv_forward", doubled_convolution)), **NOTHING
    ),
    "patched with a closure": animal(prepared(patched_with_a_closure), **NOTHING),
    "patched forward, later": animal(Net, later=patched("forward", doubled_forward)),
    "patched _conv_forward, later": animal(
        Net, later=patched("_conv_forward", doubled_convolution)
    ),
    "bias gone, later": animal(Net, later=lambda m: setattr(m.features[CONV], "bias", None)),
    "another bias, later": animal(
        Net,
        later=lambda m: setattr(m.features[CONV], "bias", nn.Parameter(torch.ones(4).double())),
    ),
    "another weight, later": animal(
        Net,
        later=lambda m: setattr(
            m.features[CONV], "weight", nn.Parameter(torch.ones(4, 3, 1, 1).double())
        ),
    ),
    "another activation, later": animal(Net, later=replaced_by(RELU, nn.Sigmoid)),
    "another pool, later": animal(Net, later=replaced_by(POOL, lambda: nn.MaxPool2d(2))),
    "one more module, later": animal(Net, later=lambda m: m.features.insert(1, nn.Tanh())),
    "weight_norm, later": animal(
        Net, later=lambda m: parametrizations.weight_norm(m.features[CONV])
    ),
    "pruned, later": animal(
        Net, later=lambda m: prune.l1_unstructured(m.features[CONV], "weight", 5)
    ),
    "patched Sequential, later": animal(
        Net, later=lambda m: setattr(m.features, "forward", m.features[CONV].forward)
    ),
    "bfloat16, later": animal(
        Net, later=lambda m: (m.bfloat16(), setattr(m, "function", in_dtype(torch.bfloat16)))
    ),
}


def in_dtype(dtype: torch.dtype) -> Callable:
    return lambda m, x: m.tail(m.features(x.to(dtype))).double()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name][0]()


def random_states() -> tuple:
    states = torch.get_rng_state().numpy(), np.random.get_state()[1]
    return random.getstate(), *(state.tobytes() for state in states)


def observe(model: nn.Module) -> list[dict[str, Any]]:
    """What calls in both modes give: outputs, gradients, buffers, counters and random states."""
    seen: list[dict[str, Any]] = []
    for training in (True, True, False, False):
        model.train(training).zero_grad()
        torch.manual_seed(len(seen))
        random.seed(len(seen))
        np.random.seed(len(seen))
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        x.requires_grad_()
        output = model(x)
        output.square().sum().backward()
        seen.append(
            {
                "output": output.detach(),
                "states": random_states(),
                "input": x.grad,
                **{f"gradient of {name}": p.grad for name, p in model.named_parameters()},
                **{f"buffer {name}": b.clone() for name, b in model.named_buffers()},
                "counts": [getattr(m, "count", None) for m in model.modules()],
                "calls": getattr(model, "calls", None),
            }
        )
        seen[-1] = copy.deepcopy(seen[-1])
    return seen


def interface(model: nn.Module) -> list[Any]:
    return [
        list(model.state_dict()),
        [(name, module.training, repr(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [sorted(vars(module).keys() - {"meta"}) for module in model.modules()],
    ]


@pytest.mark.filterwarnings("ignore:.*(requires_grad=True|Full backward hook|Lazy modules)")
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    _, outcome, folds, later = ZOO[name]
    original, model = made(name), made(name)
    before = random_states(), [{**vars(module)} for module in model.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fused = fuse(model)
        except (TypeError, RuntimeError):
            assert outcome == "refused"
            return
    assert [w.filename for w in caught] == [__file__] * len(caught)
    assert outcome == ("warned" if caught else "equal")
    # Nothing happened to the model, and the result is used as it is.
    assert (random_states(), [{**vars(module)} for module in model.modules()]) == before
    assert len(fused.meta["folded"]) == folds
    assert interface(fused) == interface(model)
    for one, another in zip(fused.modules(), model.modules(), strict=True):
        assert isinstance(one, type(another))
    if later is not None:
        later(original)
        later(fused)
    if name == "a hook with a closure":  # which was warned of: it counts on the original
        fused(image())
        assert (model.calls, fused.calls) == (1, 0)
        return
    for one, another in zip(observe(original), observe(fused), strict=True):
        assert one.pop("states") == another.pop("states")
        torch.testing.assert_close(another, one, rtol=1e-9, atol=1e-12)


def test_zoo_is_as_documented():
    """`docs/compatibility.md` says how many animals there are, and what becomes of them."""
    counts = Counter(outcome for _, outcome, _, _ in ZOO.values())
    text = (Path(__file__).resolve().parents[1] / "docs" / "compatibility.md").read_text("utf-8")
    assert (
        f"{len(ZOO)} awkward models: {counts['equal']} equal, {counts['warned']} warned of, "
        f"{counts['refused']} refused, none different" in " ".join(text.split())
    )


# ---------------------------------------------------------------- fuse: one by one


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weight", "bias", "input", "expected"),
    [
        (torch.float16, 3, -60_000, 30_000, 30_000),  # 90,000 is infinite
        (torch.bfloat16, 1 + 2**-7, -1024, 1040, 24.125),  # 1048.125 would be 1048
        (torch.float32, 3, -60_000, 30_000, 30_000),
    ],
)
def test_sums_are_rounded_with_the_bias_in_them(dtype, weight, bias, input, expected, training):
    """A convolution in 16 bits sums in 32."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), StochasticPool2d(1)).to(dtype)
    nn.init.constant_(model[0].weight, weight)
    nn.init.constant_(model[0].bias, bias)
    x = torch.full((1, 1, 2, 2), input, dtype=dtype)
    fused = fuse(model.train(training))
    assert (model(x) == expected).all()
    assert (fused(x) == expected).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_outside(dtype, training):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), StochasticPool2d(2)).train(training)
    fused = fuse(model)
    outputs, gradients = [], []
    for one in (model, fused):
        torch.manual_seed(1)
        one.zero_grad()
        with torch.autocast("cpu", dtype):
            outputs.append(one(torch.ones(2, 3, 16, 16)))
        outputs[-1].float().sum().backward()
        gradients.append(model[0].bias.grad)
    assert outputs[0].dtype == dtype
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients)
    assert gradients[0].dtype == torch.float32
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_mixture_of_dtypes_is_an_error_still(name):
    model = chain(nn.ReLU())
    fused = fuse(model)
    for one in (model, fused):
        setattr(one[0], name, nn.Parameter(getattr(one[0], name).float()))
        with pytest.raises(RuntimeError, match=r"type"):
            one(image())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU, StochasticPool2d, nn.Sequential, Features])
def test_a_class_that_is_patched_later(kind, monkeypatch):
    model = Features(*chain(nn.ReLU()))
    fused = fuse(model)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *bias: forward(self, x + 1, *bias))
    assert_same(model, fused, image())


def test_a_hook_of_all_modules_sees_them():
    fused = fuse(chain(nn.ReLU()))
    calls = []
    handle = register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        fused(image())
    finally:
        handle.remove()
    assert calls == [nn.Conv2d, nn.ReLU, StochasticPool2d, type(fused)]


def test_hooks_of_containers_and_of_the_model_keep_firing():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), StochasticPool2d(2)),
    ).double()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model[0].register_forward_hook(lambda *_: calls.append("block"))
    fused = fuse(model)
    assert len(fused.meta["folded"]) == 2
    assert calls == []
    fused(image())
    assert calls == ["block", "model"]


def block() -> nn.Module:
    return Net(
        None,
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)),
        *(nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), StochasticPool2d(2)),
    )


def test_fused_shares_parameters_and_checkpoints():
    model, other = block(), block()
    before = copy.deepcopy(model)
    fused = fuse(model)
    for one, another in zip(fused.parameters(), model.parameters(), strict=True):
        assert one is another
    for one, another in zip(fused.buffers(), model.buffers(), strict=True):
        assert one is another
    assert not set(fused.modules()) & set(model.modules())
    assert_same(before, model, image())  # the model is as it was

    fused.load_state_dict(other.state_dict())
    assert_same(other, fused, image())
    before.load_state_dict(fused.state_dict())
    assert_same(other, before, image())


def test_fused_is_a_sequential_of_its_class():
    model = Features(nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)).double()
    fused = fuse(model)
    assert isinstance(fused, Features)
    assert fused.describe() == "kept: 3"
    assert [type(module) for module in fused] == [nn.Conv2d, nn.ReLU, StochasticPool2d]
    x = image()
    assert torch.equal(fused[1](fused[0](x)), fused[:2](x))
    assert torch.equal(fused[:2](x), model[:2](x))
    fused.append(nn.Tanh())
    assert_same(nn.Sequential(*model, nn.Tanh()), fused, x)


@pytest.mark.parametrize("make", [block, lambda: Features(*chain(nn.ReLU()))])
def test_fused_can_be_copied_and_pickled(make):
    fused = fuse(make())
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(fused), loaded, pickle.loads(pickle.dumps(fused))):
        assert [type(module) for module in other.modules()] == [
            type(module) for module in fused.modules()
        ]
        assert_same(fused, other, image())
        assert next(other.parameters()) is not next(fused.parameters())
        assert other.meta["folded"] == fused.meta["folded"] != []


def test_fused_keeps_modes_and_follows_them():
    model = block()
    model.features[4].eval()
    fused = fuse(model)
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    x = image()
    for training in (False, True):
        fused.train(training)
        assert_same(copy.deepcopy(model).train(training), fused, x)
        assert torch.equal(fused(x), fused(x)) != training
    assert model.training  # a mode of its own
    assert not model.features[4].training


@pytest.mark.filterwarnings("error")
def test_fuse_twice():
    fused = fuse(block())
    again = fuse(fused)
    assert again.meta == fused.meta
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
    assert_same(fused, again, image())


def test_nothing_to_fold_is_said():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    with pytest.warns(UserWarning, match="nothing to fold in Sequential"):
        fused = fuse(plain)
    assert fused.meta["folded"] == []
    assert_same(plain, fused, image())


def test_a_meta_of_ones_own_is_kept():
    model = chain(nn.ReLU())
    model.meta = "mine"
    assert fuse(model).meta == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fused_compiles_into_one_graph():
    fused = fuse(block())
    targets = []

    def backend(graph: fx.GraphModule, inputs: list) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend=backend)
    x = image()
    for training in (True, False):
        fused.train(training)
        compiled.train(training)
        output, gradients = run(fused, x)
        compiled_output, compiled_gradients = run(compiled, x)
        torch.testing.assert_close(compiled_output, output)
        for one, another in zip(compiled_gradients.values(), gradients.values(), strict=True):
            torch.testing.assert_close(one, another)
    assert any("conv2d" in target for target in targets)
    assert not any("relu" in target for target in targets)  # it folds there, too


def test_a_trace_is_that_of_the_model():
    """What others do with `torch.fx` (features, quantization) sees every module."""
    model = chain(nn.ReLU())
    graphs = [fx.symbolic_trace(one).graph for one in (model, fuse(model))]
    calls, fused_calls = ([(node.op, node.target) for node in graph.nodes] for graph in graphs)
    assert fused_calls == calls


def test_fused_on_the_meta_device():
    fused = fuse(chain(nn.ReLU())).to("meta")
    assert fused(image().to("meta")).shape == (2, 4, 3, 3)


def test_folds_are_logged(caplog):
    with caplog.at_level(logging.INFO, "stochastic_pooling"):
        fused = fuse(block())
    lines = [record.getMessage().removeprefix("folded into ") for record in caplog.records]
    assert lines == fused.meta["folded"] != []


# ---------------------------------------------------------------- replace_pooling


class Padded(nn.MaxPool2d):
    """As timm's MaxPool2dSame: it pads on its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def pools() -> nn.Sequential:
    return nn.Sequential(
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
        nn.Sequential(nn.MaxPool2d(2), Padded(2)),
        nn.AdaptiveAvgPool2d(1),
    )


def named(value: object) -> str:
    """As text, but of a function not where it lies: other processes know the test by it."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, POOLS)]


@pytest.mark.parametrize(
    ("pool", "twin"),
    [
        (nn.MaxPool1d(3, 2, 1, 2, True, True), StochasticPool1d),
        (nn.MaxPool2d((3, 2), (2, 1), (1, 0), 1, False, True), StochasticPool2d),
        (nn.MaxPool3d(3, 2, 1, (1, 2, 1), False, True), StochasticPool3d),
        (nn.AvgPool1d(3, 2, 1, True, False), StochasticPool1d),
        (nn.AvgPool2d((3, 2), None, (1, 0), True, False), StochasticPool2d),
        (nn.AvgPool3d(3, 2, 1, True, False), StochasticPool3d),
        (nn.AdaptiveMaxPool1d(4, True), AdaptiveStochasticPool1d),
        (nn.AdaptiveMaxPool2d((2, 3), True), AdaptiveStochasticPool2d),
        (nn.AdaptiveMaxPool3d((2, None, 3), True), AdaptiveStochasticPool3d),
        (nn.AdaptiveAvgPool1d(2), AdaptiveStochasticPool1d),
        (nn.AdaptiveAvgPool2d(2), AdaptiveStochasticPool2d),
        (nn.AdaptiveAvgPool3d(2), AdaptiveStochasticPool3d),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("error")
def test_arguments_move_to_the_twin(pool, twin):
    model = nn.Sequential(nn.ReLU(), pool)
    assert replace_pooling(model, types=[type(pool)], sample_in_eval=True) is model
    assert type(model[1]) is twin
    assert model[1].sample_in_eval
    moved = set(vars(pool)) & set(vars(model[1])) - set(vars(nn.Module()))
    assert moved >= ({"output_size"} if hasattr(pool, "output_size") else {"kernel_size", "stride"})
    for name in moved:
        assert getattr(model[1], name) == getattr(pool, name), name
    dimensions = {"1d": 1, "2d": 2, "3d": 3}[type(pool).__name__[-2:]]
    x = torch.randn(2, 3, *(9, 8, 7)[:dimensions])
    outputs, expected = model(x), pool(x)
    for output, other in zip(
        outputs if isinstance(outputs, tuple) else [outputs],
        expected if isinstance(expected, tuple) else [expected],
        strict=True,
    ):
        assert output.shape == other.shape
        assert output.dtype == other.dtype


@pytest.mark.filterwarnings("ignore:replace_pooling")
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["0", "1", "2.0"]),
        ({"select": "2.*"}, ["2.0"]),
        ({"select": ["0", "2.?"]}, ["0", "2.0"]),
        ({"select": lambda name, pool: pool.kernel_size == 2}, ["1", "2.0"]),
        ({"types": [nn.AvgPool2d]}, ["1"]),
        ({"types": [nn.AdaptiveAvgPool2d]}, ["3"]),
        ({"types": [nn.MaxPool2d, nn.AdaptiveAvgPool2d], "select": ["3", "0"]}, ["0", "3"]),
    ],
    ids=named,
)
def test_selection(arguments, names):
    model = pools()
    assert replace_pooling(model, **arguments) is model
    assert replaced(model) == names
    assert type(model[2][1]) is Padded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select": ["0", "typo.*"]}, r"no pool fits 'typo\.\*'.* 0: MaxPool2d;"),
        ({"select": "3"}, r"3: AdaptiveAvgPool2d \(not in types: add nn.AdaptiveAvgPool2d\)"),
        ({"select": "2.1"}, r"2\.1: Padded \(a subclass"),
        ({"select": lambda name, pool: False}, "no pool to replace"),
        ({"types": [nn.MaxPool1d]}, r"no pool to replace.*F\.max_pool2d .*cannot be replaced"),
        ({"types": [nn.LPPool2d]}, r"LPPool2d has no stochastic twin; choose from nn\.MaxPool1d"),
    ],
    ids=named,
)
def test_nothing_chosen_is_an_error(arguments, message):
    model = pools()
    with pytest.raises(ValueError, match=message):
        replace_pooling(model, **arguments)
    assert replaced(model) == []


def test_a_second_call_names_the_stochastic_pools():
    model = replace_pooling(nn.Sequential(nn.MaxPool2d(2)))
    with pytest.raises(ValueError, match=r"0: StochasticPool2d \(no twin\)"):
        replace_pooling(model)
    with pytest.raises(ValueError, match="Its pools: none"):
        replace_pooling(nn.Sequential(nn.ReLU()))


def test_a_pool_itself_is_returned_as_its_twin():
    pool = nn.MaxPool2d(2).eval()
    twin = replace_pooling(pool)
    assert type(twin) is StochasticPool2d
    assert not twin.training


def test_shared_instances_modes_and_hooks():
    pool = nn.MaxPool2d(2).eval()
    calls = []
    handle = pool.register_forward_hook(lambda module, *_: calls.append(module))
    inner = nn.Sequential(pool)
    model = nn.ModuleDict({"a": pool, "b": inner, "c": inner, "d": pool, "e": nn.MaxPool2d(2)})
    replace_pooling(model, "c.0")  # one of its names is enough
    twin = model["a"]
    assert type(twin) is StochasticPool2d
    assert model["d"] is model["b"][0] is twin
    assert type(model["e"]) is nn.MaxPool2d
    assert not twin.training
    assert model.training
    x = torch.rand(1, 1, 4, 4)
    twin(x)
    assert calls == [twin]
    handle.remove()
    twin(x)
    assert calls == [twin]


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (nn.AvgPool2d(3, 1, 1), "1: count_include_pad"),
        (nn.AvgPool1d(3, 1, 1), "1: count_include_pad"),
        (nn.AvgPool2d(3, divisor_override=2), "1: divisor_override=2"),
    ],
)
def test_a_changed_meaning_is_warned_of(pool, message):
    with pytest.warns(UserWarning, match=message) as record:
        replace_pooling(nn.Sequential(nn.ReLU(), pool))
    assert [warning.filename for warning in record] == [__file__]


class Runs(nn.Module):
    """Its forward reads none of PyTorch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [nn.ReLU(), nn.MaxPool2d(2)]
        self.named = {"pool": self.parts[1]}
        self.call = self.parts[1].forward
        self.pairs = [("pool", (self.parts[1],))]
        self.net = nn.Sequential(*self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.named["pool"](self.parts[1](self.parts[0](x)))


@pytest.mark.filterwarnings("error")
def test_pools_in_lists_are_replaced():
    model = replace_pooling(Runs())
    assert type(model.net[1]) is StochasticPool2d
    assert model.parts[1] is model.named["pool"] is model.pairs[0][1][0] is model.net[1]
    assert model.call.__self__ is model.net[1]
    assert len({model(torch.rand(1, 1, 4, 4)).item() for _ in range(50)}) > 1


def test_a_compiled_pool_is_replaced_behind_its_compilation():
    model = nn.Sequential(nn.ReLU(), torch.compile(nn.MaxPool2d(2), backend="eager"))
    x = torch.rand(1, 1, 4, 4)
    assert torch.equal(model(x), F.max_pool2d(x, 2))
    assert warned(model) == ""
    assert len({model(x).sum().item() for _ in range(20)}) > 1


def test_a_function_that_holds_on_to_a_pool_is_named():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.ReLU(), pool)
    model[0].register_forward_hook(lambda module, _, output: pool(output))
    assert "<lambda> of a ReLU holds on to a pool" in warned(model)


@pytest.mark.parametrize(
    "hold",
    [
        functools.partial,
        lambda pool: {pool},
        lambda pool: [lambda x: pool(x)],
        lambda pool: lambda x, *, kept=[pool]: kept[0](x),
    ],
)
def test_what_else_holds_on_to_a_pool_is_named(hold):
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    model.held = hold(model[1])
    assert " of a Sequential holds on to a pool" in warned(model)


def test_a_dict_that_holds_itself():
    model = nn.Sequential(nn.MaxPool2d(2))
    model.known = {"pool": model[0]}
    model.known["all"] = model.known
    replace_pooling(model)
    assert model.known["pool"] is model[0]


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_graphs_of_fx_and_scripts():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    assert replaced(replace_pooling(model)) == ["1"]
    script = torch.jit.trace(nn.ReLU(), torch.rand(1))
    model = replace_pooling(nn.Sequential(script, nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2)))
    assert fuse(model).meta["folded"] == ["3: ReLU 2, bias of 1"]


def test_what_was_written_on_a_pool_is_on_its_twin():
    pool = nn.MaxPool2d(2)
    pool.index = -1  # as detectors note where a layer reads from
    assert replace_pooling(nn.Sequential(nn.ReLU(), pool))[1].index == -1


def test_a_patched_pool_is_left_and_named():
    model = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2))
    model[1].forward = lambda x: F.max_pool2d(x, 2, padding=1)
    assert "1: MaxPool2d (patched, which may" in warned(model)
    assert replaced(model) == ["0"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("padding", [0, (0, 0), [0, 0], np.int64(0)])
def test_an_unpadded_average_is_no_reason_to_warn(padding):
    model = nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, padding=padding))
    assert replaced(replace_pooling(model)) == ["1"]


def warned(model: nn.Module, **arguments: Any) -> str:
    """What `replace_pooling` says of it, from the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace_pooling(model, **arguments)
    assert [warning.filename for warning in caught] == [__file__] * len(caught)
    return "\n".join(str(warning.message) for warning in caught)


class Calls(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize(
    ("model", "negative"),
    [
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), ""),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Dropout(), nn.AvgPool2d(2)), ""),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.AvgPool2d(2)), ""),
        (nn.Sequential(nn.Sigmoid(), nn.Sequential(nn.AvgPool2d(2))), ""),
        (nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2)), ""),  # of a twin nothing is negative
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)), "2"),
        (nn.Sequential(nn.ReLU(), nn.Tanh(), nn.AvgPool2d(2)), "2"),
        (nn.Sequential(nn.AvgPool2d(2)), "0"),
        (Calls(nn.ReLU(), nn.AvgPool2d(2), nn.AvgPool2d(3)), "parts.1, parts.2"),
        (Calls(nn.ReLU(), nn.MaxPool2d(2)), ""),
        (nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2)), "1"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.ReLU()), ""),
        (models.alexnet(), ""),
        (models.resnet18(), ""),
        (
            models.DenseNet(4, (1, 1, 1), 8),
            "features.transition1.pool, features.transition2.pool",
        ),
    ],
)
def test_what_may_be_negative_is_named(model, negative):
    text = warned(model)
    assert text == "" if not negative else f": {negative} may read negative values" in text


class Functions(nn.Module):
    """A pool as a module, and pools that nobody can replace."""

    def __init__(self) -> None:
        super().__init__()
        self.max_pool2d = nn.MaxPool2d(2)
        self.down = functools.partial(F.max_pool3d, kernel_size=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.max_pool2d(x) + self.inner(x) + helper(x)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return sum(F.avg_pool2d(part, 2) for part in (x, x))


def helper(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(torch.max_pool1d(x.flatten(2), 2), 1)


@pytest.mark.filterwarnings("ignore:The default weight init")
@pytest.mark.parametrize(
    ("model", "left"),
    [
        (nn.Sequential(nn.MaxPool2d(2), Padded(2)), ["1: Padded (a subclass"]),
        (nn.Sequential(nn.MaxPool2d(2), nn.LPPool2d(2, 2)), ["1: LPPool2d (no twin)"]),
        (Functions(), ["avg_pool2d, max_pool1d, max_pool3d in the code of Functions"]),
        (models.squeezenet1_1(), []),
        (nn.Sequential(nn.MaxPool2d(2), StochasticPool2d(2), nn.AdaptiveAvgPool2d(1)), []),
    ],
)
def test_what_is_left_is_named(model, left):
    text = warned(model)
    assert all(line in text for line in left)
    assert text == "" or text.count(";") == len(left) - 1


def test_timm_pools_that_are_left_are_named():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.MaxPool2d(2), layers.create_pool2d("max", 3, padding="same"))
    assert "1: MaxPool2dSame (a subclass" in warned(model)


def test_what_the_arguments_leave_out_is_logged(caplog):
    with caplog.at_level(logging.INFO, "stochastic_pooling"):
        assert warned(pools()[0::3]) == ""
        warned(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)), select="1")
    left = [r.getMessage() for r in caplog.records if r.getMessage().startswith("left")]
    assert left == ["left as it is: 3: AdaptiveAvgPool2d", "left as it is: 2: AvgPool2d"]
