"""`replace_pooling` and `fuse`, on networks that people use and on a zoo of awkward ones."""

from __future__ import annotations

import contextlib
import copy
import functools
import linecache
import logging
import pickle
import random
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.func import functional_call, jvp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision import models

from stochastic_pooling import average_draws, fuse, replace_pooling, sampling
from stochastic_pooling.modules import (
    AdaptiveStochasticPool1d,
    AdaptiveStochasticPool2d,
    AdaptiveStochasticPool3d,
    StochasticPool,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
)

pytestmark = pytest.mark.usefixtures("plain")


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 8, 8), dtype=torch.float64)


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
    # A bias before a norm has no gradient but rounding: what is zero is seen beside the others.
    scale = max(g.abs().max().item() for g in gradients.values() if g is not None)
    assert scale > 0
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-9, atol=1e-10 * scale)
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


def warned(model: nn.Module, **arguments: Any) -> str:
    """What `replace_pooling` says of it, from the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace_pooling(model, **arguments)
    lines = {linecache.getline(warning.filename, warning.lineno).strip() for warning in caught}
    assert lines <= {"replace_pooling(model, **arguments)"}
    return "\n".join(str(warning.message) for warning in caught)


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, StochasticPool)]


# ---------------------------------------------------------------- networks


# The network; its pools; the lines of `folded`.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "alexnet": (
        lambda: models.alexnet(num_classes=4).features,
        3,
        ["2: ReLU 1, bias of 0", "5: ReLU 4, bias of 3", "12: ReLU 11, bias of 10"],
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
# The pools of which `replace_pooling` says that they may read negative values.
NEGATIVE = {
    "densenet": ", ".join(f"features.transition{number}.pool" for number in (1, 2, 3)),
    "resnet10t": ", ".join(f"layer{number}.0.downsample.0" for number in (2, 3, 4)),
}


def timm_model(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=4)


@pytest.mark.filterwarnings("ignore:fuse. nothing to fold")
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    make, pools, folded = NETWORKS[name]
    original = make()
    stochastic = copy.deepcopy(original)
    said = f"replace_pooling: {NEGATIVE[name]} may read negative values" if name in NEGATIVE else ""
    assert warned(stochastic).split(", which")[0] == said
    assert len(replaced(stochastic)) == pools
    fused = fuse(stochastic)
    assert fused.meta["folded"] == folded
    for one in (stochastic, fused):
        assert list(one.state_dict()) == list(original.state_dict())
        assert list(dict(one.named_modules())) == list(dict(original.named_modules()))

    # A pool's code of one byte takes the place of an int64 index; what falls then is the output of
    # each folded ReLU, and nothing else.
    rectified: list[int] = []
    hooks = [
        stochastic.get_submodule(relu).register_forward_hook(
            lambda module, inputs, output: rectified.append(output.nbytes)
        )
        for relu in re.findall(r"ReLU ([\w.]+)", " ".join(folded))
    ]
    x = torch.randn(2, 3, 64, 64)
    kept = [saved_bytes(model, x) for model in (original, stochastic, fused)]
    print(name, *(f"{size / 2**20:.2f}" for size in kept), "MiB")  # for docs/compatibility.md
    assert len(rectified) == len(folded)
    assert kept[2] + sum(rectified) == kept[1] < kept[0]
    for handle in hooks:
        handle.remove()

    x = image(1, 3, 64, 64)
    with torch.no_grad():
        shape = original.double().eval()(x).shape
    for training in (True, False):
        stochastic.double().train(training)
        fused.double().train(training)
        output = assert_same(stochastic, fused, x)
        assert output.shape == shape
        torch.manual_seed(2)
        with torch.no_grad():
            other = copy.deepcopy(stochastic)(x)
        assert torch.equal(other, output) != training  # a draw, or the expectation


# ---------------------------------------------------------------- fuse: what it folds

# What models below are made of: copies of these.
CONV, RELU, POOL = nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)
NORM, RELU_IN_PLACE = nn.BatchNorm2d(4), nn.ReLU(True)
INSIDE = (nn.Sequential(CONV, RELU), POOL)


def in_a_row(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*map(copy.deepcopy, modules or (CONV, RELU, POOL))).double()


class Features(nn.Sequential):
    """As users write it: the modules are chosen here, and `forward` is inherited."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.note = "kept"


# The modules of a Sequential; what folds.
FOLDED: dict[str, tuple[tuple[nn.Module, ...], list[str]]] = {
    "nothing between": ((CONV, POOL), ["1: bias of 0"]),
    "ReLU": ((CONV, RELU, POOL), ["2: ReLU 1, bias of 0"]),
    "norm": ((CONV, NORM, RELU_IN_PLACE, POOL), ["3: ReLU 2"]),
    "norm, no ReLU": ((CONV, NORM, POOL), []),
    "no pool": ((CONV, RELU), []),
    "no bias": ((nn.Conv2d(3, 4, 3, bias=False), RELU, POOL), ["2: ReLU 1"]),
    "ReLU6": ((CONV, nn.ReLU6(), POOL), []),
    "two ReLUs": ((CONV, RELU, RELU, POOL), []),
    "a transposed convolution": ((nn.ConvTranspose2d(3, 4, 3), RELU, POOL), ["2: ReLU 1"]),
    "a max pool": ((CONV, RELU, nn.MaxPool2d(2)), []),
    "ReLU inside": (INSIDE, ["1: ReLU 0.1, bias of 0.0"]),
    "in a row": (
        (nn.Sequential(CONV, RELU, POOL), nn.Sequential(nn.Conv2d(4, 4, 1), POOL)),
        ["0.2: ReLU 0.1, bias of 0.0", "1.1: bias of 1.0"],
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FOLDED)
def test_fold(case, training, caplog):
    modules, folded = FOLDED[case]
    model = in_a_row(*modules).train(training)
    with torch.no_grad():  # so that it matters
        for name, parameter in model.named_parameters():
            parameter += 0.5 * name.endswith("bias")
    nothing = pytest.warns(UserWarning, match="nothing to fold in Sequential")
    caplog.set_level(logging.INFO, "stochastic_pooling")
    with contextlib.nullcontext() if folded else nothing:
        fused = fuse(model)
    assert fused.meta["folded"] == folded
    assert [r.getMessage() for r in caplog.records] == [f"folded into {line}" for line in folded]
    assert assert_same(model, fused, image()).abs().sum() > 0
    # What is folded is not called.
    text = " ".join(folded)
    folds = Counter(ReLU=text.count("ReLU"), bias=text.count("bias"))
    assert Calls(model).counts - Calls(fused).counts == folds


class Calls(TorchDispatchMode):
    """Counts the ReLUs and the biases that are added."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        with self:
            model(image())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts["ReLU"] += str(function) in ("aten.relu.default", "aten.relu_.default")
        self.counts["bias"] += str(function) == "aten.convolution.default" and args[2] is not None
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "pool", "size"),
    [
        (nn.Conv1d, StochasticPool1d(2, 1), (9,)),
        (nn.Conv2d, StochasticPool2d(2, 1), (9, 8)),
        (nn.Conv3d, StochasticPool3d(2, 1), (9, 8, 7)),
        (nn.Conv1d, AdaptiveStochasticPool1d(2), (9,)),
        (nn.Conv2d, AdaptiveStochasticPool2d(2), (9, 8)),
        (nn.Conv3d, AdaptiveStochasticPool3d(2), (9, 8, 7)),
    ],
)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("stride", "padding"), [(2, 1), (1, "same")])
def test_fold_every_convolution(kind, pool, size, padding_mode, stride, padding):
    model = in_a_row(kind(4, 6, 3, stride, padding, 2, 2, padding_mode=padding_mode), RELU, pool)
    fused = fuse(model)
    # Of a bias of infinity, an adaptive pool would make NaN.
    bias = "" if "Adaptive" in type(pool).__name__ else ", bias of 0"
    assert fused.meta["folded"] == [f"2: ReLU 1{bias}"]
    assert_same(model, fused, image(2, 4, *size))
    assert_same(model, fused, image(4, *size))  # unbatched


def test_leave_a_bias_of_other_dimensions():
    """A 1-d pool reads (C, H, W) as (N, C, L): H of 4 would take the bias of 4 channels."""
    model = in_a_row(CONV, RELU, StochasticPool1d(2))
    fused = fuse(model)
    assert fused.meta["folded"] == ["2: ReLU 1"]
    assert_same(model, fused, image(3, 6, 8))


def test_fold_keeps_indices_and_nan():
    model = in_a_row(CONV, RELU, StochasticPool2d(2, return_indices=True))
    nn.init.constant_(model[0].bias[:2], -100)  # they give 0
    x = image()
    x[0, 0, 0, 0] = float("nan")
    x[1, 0, 3, 3] = float("inf")
    results = []
    for one in (model, fuse(model)):
        torch.manual_seed(1)
        results.append(one(x))
    torch.testing.assert_close(results[1], results[0], equal_nan=True)
    output, _ = results[0]
    assert output.isnan().any()
    assert output.isinf().any()
    assert (output[:, :2] == 0).any()


# ---------------------------------------------------------------- fuse: the zoo


class Net(nn.Module):
    """Features that fold, and a forward that an animal gives."""

    def __init__(self, function: Callable | None = None, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.features = in_a_row(*modules)
        self.tail = nn.Conv2d(4, 2, 1).double()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.function is not None:
            return self.function(self, x)
        return self.tail(self.features(x))

    def count(self, *_: object) -> None:
        self.calls += 1


def autocast_inside(m: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.tail(m.features(x.float())).double()


def branches(m: Net, x: torch.Tensor) -> torch.Tensor:
    """On types, a counter, data and random numbers."""
    m.calls += 1
    noise = torch.randn(x.shape, dtype=x.dtype) * np.random.rand()
    y = m.features(x + noise if type(x) is torch.Tensor and x.is_leaf else x)
    if m.calls % 2 or x[0, 0, 0, 0] > 0:
        y = m.tail(y) if y.dtype == torch.float64 else y.tanh()
    return -y if random.random() < 0.5 else y


def by_parts(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Run one by one, in slices, all at once, and what they gave is read again."""
    kept = [x]
    for layer in m.features:
        kept.append(layer(kept[-1]))
    first, others = m.features[:1], m.features[1:]
    sliced = others(first(x)) * m.features[0].bias.sum()
    return sliced + m.features(x) + sum(y.mean() for y in kept)


def other_parameters(m: Net, x: torch.Tensor) -> torch.Tensor:
    halves = {name: p / 2 for name, p in m.features.named_parameters()}
    return functional_call(m.features, halves, (x,))


class OneMore(torch.Tensor):
    """A tensor with another ReLU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result + 1 if function in (F.relu, torch.relu, torch.relu_) else result


class DoublesReLU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function in (F.relu, torch.relu, torch.relu_) else result


def function_mode(m: Net, x: torch.Tensor) -> torch.Tensor:
    with DoublesReLU():
        return m.tail(m.features(x))


def plain_features(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.features(x).as_subclass(torch.Tensor)


def same_input_again(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    return m.features(x).mean() + x


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self[1], self[0], self[2]])


def doubling(kind: type[nn.Module], method: str = "forward") -> type:
    """A subclass with a method that gives twice as much."""

    def double(self: nn.Module, *inputs: object, **named: object) -> torch.Tensor:
        return 2 * getattr(kind, method)(self, *inputs, **named)

    return type(f"Doubling{kind.__name__}", (kind,), {method: double})


def hook(module: nn.Module, *arguments: object) -> torch.Tensor | None:
    """It counts on its module, and doubles what `module` gives."""
    module.hooked = getattr(module, "hooked", 0) + 1
    return 2 * arguments[-1] if isinstance(arguments[-1], torch.Tensor) else None


Change = Callable[[Any], object]


def replaced_by(place: int, module: nn.Module) -> Change:
    return lambda m: m.features.__setitem__(place, copy.deepcopy(module).double())


def patched(method: str, function: Callable) -> Change:
    return lambda m: setattr(m.features[0], method, MethodType(function, m.features[0]))


def of_one_more(name: str) -> Change:
    def change(m: Net) -> None:
        tensor = m.features[0]._parameters.pop(name).detach()
        setattr(m.features[0], name, tensor.as_subclass(OneMore))

    return change


def changed(change: Change, *modules: nn.Module) -> Callable[[], Net]:
    def make() -> Net:
        m = Net(None, *modules)
        change(m)
        return m

    return make


def of_class(kind: Callable[..., nn.Module]) -> Callable[[], Net]:
    return changed(lambda m: setattr(m, "features", kind(*m.features)))


def shares_modules(m: Net) -> None:
    relu, pool = nn.ReLU(), StochasticPool2d(2, 1)
    inner = nn.Sequential(nn.Conv2d(4, 4, 1).double(), relu)
    m.features = nn.Sequential(m.features[0], relu, pool, inner, pool, inner, pool, relu)


def block() -> Net:
    return Net(None, CONV, RELU, POOL, nn.Conv2d(4, 4, 2), NORM, RELU, POOL)


class Animal(NamedTuple):
    make: Callable[[], nn.Module]
    outcome: str = "equal"  # or warned, refused
    folds: int = 1
    later: Change | None = None  # done to the original and to the result before they run


NOTHING = {"outcome": "warned", "folds": 0}
ZOO: dict[str, Animal] = {
    "two blocks": Animal(block, folds=2),
    # What a forward does
    **{
        name: Animal(functools.partial(Net, function))
        for name, function in {
            "branches": branches,
            "run by parts": by_parts,
            "checkpoint": lambda m, x: m.tail(checkpoint(m.features, x, use_reentrant=True)),
            "other parameters": other_parameters,
            "a call per sample": lambda m, x: vmap(m.features, randomness="different")(x),
            "forward mode": lambda m, x: sum(jvp(m.features, (x,), (x.cos(),))),
            "function mode": function_mode,
            "tensor subclass": lambda m, x: plain_features(m, x.as_subclass(OneMore)),
        }.items()
    },
    "run by parts, ReLU in place": Animal(lambda: Net(by_parts, CONV, RELU_IN_PLACE, POOL)),
    "autocast inside": Animal(lambda: Net(autocast_inside).float()),
    **{
        f"tensor subclass as {name}": Animal(lambda: Net(plain_features), later=of_one_more(name))
        for name in ("weight", "bias")
    },
    # What its modules are
    "ReLU in place on an alias": Animal(
        lambda: Net(same_input_again, nn.Identity(), RELU_IN_PLACE, POOL, nn.Conv2d(3, 4, 1)),
        **NOTHING,
    ),
    "a Sequential of one's own": Animal(of_class(Features)),
    "a Sequential that runs otherwise": Animal(of_class(Backwards)),
    "a Sequential with a forward of its own": Animal(of_class(doubling(nn.Sequential)), **NOTHING),
    "a Sequential that is called otherwise": Animal(of_class(doubling(nn.Sequential, "__call__"))),
    "a patched Sequential": Animal(
        changed(lambda m: setattr(m.features, "forward", m.features[0].forward)), **NOTHING
    ),
    "one inside that is called otherwise": Animal(
        lambda: Net(None, doubling(nn.Sequential, "__call__")(CONV, RELU), POOL), **NOTHING
    ),
    "shared modules": Animal(changed(shares_modules), folds=2),
    "a pool in evaluation": Animal(changed(lambda m: m.features[2].eval())),
    "frozen bias": Animal(changed(lambda m: m.features[0].bias.requires_grad_(False))),
    "keeps a result": Animal(changed(lambda m: setattr(m, "last", m.tail.weight * 2))),
    "keeps results in a list": Animal(
        changed(lambda m: setattr(m, "cache", [m.tail.weight * 2])), "refused", 0
    ),
    # Hooks
    "a hook of the Sequential": Animal(changed(lambda m: m.features.register_forward_hook(hook))),
    "a hook of a Sequential inside": Animal(
        changed(lambda m: m.features[0].register_forward_hook(hook), *INSIDE), **NOTHING
    ),
    "a hook that is a method": Animal(changed(lambda m: m.features.register_forward_hook(m.count))),
    "a hook with a closure": Animal(
        changed(lambda m: m.features.register_forward_hook(lambda _, x, y: y * m.tail.bias.sum())),
        "warned",
    ),
    # What others do to it later
    **{
        f"{name}, later": Animal(Net, later=change)
        for name, change in {
            "no bias": lambda m: setattr(m.features[0], "bias", None),
            "another convolution": replaced_by(0, nn.Conv2d(3, 4, 1)),
            "one more module": lambda m: m.features.insert(1, nn.Tanh()),
            "compiled convolution": lambda m: m.features[0].compile(backend="eager"),
            "patched Sequential": lambda m: setattr(m.features, "forward", m.features[0].forward),
        }.items()
    },
}
# After one of these nothing folds, whether it is done before `fuse` or later.
CHANGES: dict[str, Change] = {
    "forward hook": lambda m: m.features[0].register_forward_hook(hook),
    "forward pre-hook": lambda m: m.features[1].register_forward_pre_hook(hook),
    "backward hook": lambda m: m.features[2].register_full_backward_hook(hook),
    "backward pre-hook": lambda m: m.features[0].register_full_backward_pre_hook(hook),
    "patched forward": patched("forward", lambda conv, x: F.conv2d(2 * x, conv.weight, conv.bias)),
    "patched _call_impl": patched("_call_impl", lambda conv, x: 2 * conv.forward(x)),
    "patched _conv_forward": patched("_conv_forward", lambda conv, *args: 2 * F.conv2d(*args)),
    "weight_norm": lambda m: parametrizations.weight_norm(m.features[0]),
    "pruned": lambda m: prune.l1_unstructured(m.features[0], "weight", 5),
    "subclass of the convolution": replaced_by(0, doubling(nn.Conv2d)(3, 4, 3)),
    "subclass of the ReLU": replaced_by(1, doubling(nn.ReLU)()),
    "subclass of the pool": replaced_by(2, doubling(StochasticPool2d, "_pooled")(2)),
    "lazy convolution": replaced_by(0, nn.LazyConv2d(4, 3)),
    "another activation": replaced_by(1, nn.Sigmoid()),
}
for name, change in CHANGES.items():
    ZOO[name] = Animal(changed(change), **NOTHING)
    ZOO[f"{name}, later"] = Animal(Net, later=change)


def random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def observe(model: nn.Module) -> list[dict[str, Any]]:
    """What calls in both modes give: outputs, gradients, buffers, counters and random states."""
    seen: list[dict[str, Any]] = []
    for training in (True, True, False, False):
        model.train(training).zero_grad()
        torch.manual_seed(len(seen))
        random.seed(len(seen))
        np.random.seed(len(seen))
        x = image().requires_grad_()
        output = model(x)
        output.square().sum().backward()
        result = {
            "output": output.detach(),
            "states": random_states(),
            "input": x.grad,
            **{f"gradient of {name}": p.grad for name, p in model.named_parameters()},
            **{f"buffer {name}": buffer for name, buffer in model.named_buffers()},
            "hooked": [getattr(module, "hooked", None) for module in model.modules()],
            "calls": getattr(model, "calls", None),
        }
        seen.append(copy.deepcopy(result))
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
    make, outcome, folds, later = ZOO[name]
    original = make()
    torch.manual_seed(0)
    model = make()
    before = random_states(), [{**vars(module)} for module in model.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fused = fuse(model)
        except RuntimeError:
            assert outcome == "refused"
            return
    assert [w.filename for w in caught] == [__file__] * len(caught)
    assert outcome == ("warned" if caught else "equal")
    # Nothing happened to the model, and the result is used as it is.
    assert (random_states(), [{**vars(module)} for module in model.modules()]) == before
    assert len(fused.meta["folded"]) == folds
    assert interface(fused) == interface(model)
    for one, another in zip(fused.modules(), model.modules(), strict=True):
        assert one is not another
        assert isinstance(one, type(another))
    states = [one.state_dict(keep_vars=True) for one in (fused, model)]
    assert all(states[1][key] is tensor for key, tensor in states[0].items())
    if later is not None:
        later(original)
        later(fused)
    for one, another in zip(observe(original), observe(fused), strict=True):
        assert one.pop("states") == another.pop("states")
        torch.testing.assert_close(another, one, rtol=1e-9, atol=1e-12)


def test_zoo_is_as_documented():
    """`docs/compatibility.md` says how many animals there are, and what becomes of them."""
    counts = Counter(animal.outcome for animal in ZOO.values())
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


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_mixture_of_dtypes_is_an_error_still(name):
    model = in_a_row()
    fused = fuse(model)
    for one in (model, fused):
        setattr(one[0], name, nn.Parameter(getattr(one[0], name).float()))
        with pytest.raises(RuntimeError, match=r"type"):
            one(image())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU, StochasticPool2d, nn.Sequential, Features])
def test_a_class_that_is_patched_later(kind, monkeypatch):
    model = Features(*in_a_row())
    fused = fuse(model)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *bias: forward(self, x + 1, *bias))
    assert_same(model, fused, image())


def test_a_hook_of_all_modules_sees_them():
    fused = fuse(in_a_row())
    calls = []
    with register_module_forward_hook(lambda module, *_: calls.append(type(module))):
        fused(image())
    assert calls == [nn.Conv2d, nn.ReLU, StochasticPool2d, type(fused)]


def test_a_default_device_is_no_obstacle():
    model = in_a_row()
    fused = fuse(model)
    with torch.device("cpu"):
        assert Calls(model).counts - Calls(fused).counts == {"ReLU": 1, "bias": 1}


@pytest.mark.parametrize("function", [replace_pooling, fuse, average_draws, sampling])
def test_a_model_that_is_no_module_is_an_error(function):
    wrong = pytest.raises(TypeError, match=r"'model' must be an nn\.Module, not list")
    with wrong, function([POOL]):
        pass


@pytest.mark.filterwarnings("error")
def test_fused_can_be_copied_pickled_and_fused_again():
    fused = fuse(of_class(Features)())
    pickled = [pickle.loads(pickle.dumps(fused, protocol)) for protocol in (2, 5)]  # 2: torch.save
    again = fuse(fused)
    for other in (copy.deepcopy(fused), *pickled, again):
        assert list(map(type, other.modules())) == list(map(type, fused.modules()))
        assert repr(type(other.features)) == repr(Features)
        assert_same(fused, other, image())
        assert (next(other.parameters()) is next(fused.parameters())) == (other is again)
        assert other.meta["folded"] == fused.meta["folded"] != []


def test_a_class_derived_from_one_that_folds_folds():
    """As FSDP derives them."""
    fused, derived = fuse(in_a_row()), fuse(in_a_row())
    mixin = type("Mixin", (), {})
    derived.__class__ = type("Derived", (mixin, type(derived)), {})
    assert saved_bytes(derived, image()) == saved_bytes(fused, image())


def test_a_meta_of_ones_own_is_kept():
    model = in_a_row()
    model.meta = "mine"
    assert fuse(model).meta == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fused_compiles_into_one_graph():
    fused = fuse(block())
    targets = []

    def backend(graph: fx.GraphModule, inputs: list) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    compiled = copy.deepcopy(fused)
    compiled.compile(fullgraph=True, backend=backend)
    x = image()
    for training in (True, False):
        torch.testing.assert_close(run(compiled.train(training), x), run(fused.train(training), x))
    assert any("conv2d" in target for target in targets)
    assert not any("relu" in target for target in targets)  # it folds there, too


def test_a_trace_is_that_of_the_model():
    """What others do with `torch.fx` (features, quantization) sees every module."""
    model = in_a_row()
    graphs = [fx.symbolic_trace(one).graph for one in (model, fuse(model))]
    calls, fused_calls = ([(node.op, node.target) for node in graph.nodes] for graph in graphs)
    assert fused_calls == calls


def test_fused_on_the_meta_device():
    fused = fuse(in_a_row()).to("meta")
    assert fused(image().to("meta")).shape == (2, 4, 3, 3)


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


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool1d(3, 2, 1, 2, True, True),
        nn.MaxPool2d((3, 2), (2, 1), (1, 0), 1, False, True),
        nn.MaxPool3d(3, 2, 1, (1, 2, 1), False, True),
        nn.AvgPool1d(3, 2, 1, True, False),
        nn.AvgPool2d((3, 2), None, (1, 0), True, False),
        nn.AvgPool3d(3, 2, 1, True, False),
        nn.AdaptiveMaxPool1d(4, True),
        nn.AdaptiveMaxPool2d((2, 3), True),
        nn.AdaptiveMaxPool3d((2, None, 3), True),
        nn.AdaptiveAvgPool1d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveAvgPool3d(2),
    ],
    ids=lambda pool: type(pool).__name__,
)
@pytest.mark.filterwarnings("error")
def test_arguments_move_to_the_twin(pool):
    model = nn.Sequential(nn.ReLU(), pool)
    assert replace_pooling(model, types=[type(pool)], sample_in_eval=True) is model
    assert type(model[1]).__name__ == re.sub("Max|Avg", "Stochastic", type(pool).__name__)
    assert model[1].sample_in_eval
    moved = set(vars(pool)) & set(vars(model[1])) - set(vars(nn.Module()))
    assert moved >= ({"output_size"} if hasattr(pool, "output_size") else {"kernel_size", "stride"})
    for name in moved:
        assert getattr(model[1], name) == getattr(pool, name), name
    dimensions = int(type(pool).__name__[-2])
    x = torch.randn(2, 3, *(9, 8, 7)[:dimensions])
    results = [y if isinstance(y, tuple) else (y,) for y in (model(x), pool(x))]
    shapes, expected = ([(y.shape, y.dtype) for y in result] for result in results)
    assert shapes == expected


@pytest.mark.filterwarnings("ignore:replace_pooling")
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["0", "1", "2.0"]),
        ({"select": "2.*"}, ["2.0"]),
        ({"select": ["0", "2.?"]}, ["0", "2.0"]),
        ({"select": lambda name, pool: pool.kernel_size == 2}, ["1", "2.0"]),
        ({"types": [nn.AvgPool2d]}, ["1"]),
        ({"types": nn.AdaptiveAvgPool2d}, ["3"]),
        ({"types": [nn.MaxPool2d, nn.AdaptiveAvgPool2d], "select": ["3", "0"]}, ["0", "3"]),
    ],
)
def test_selection(arguments, names):
    model = pools()
    assert replace_pooling(model, **arguments) is model
    assert replaced(model) == names
    assert type(model[2][1]) is Padded


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (pools(), {"select": ["0", "typo.*"]}, r"no pool fits 'typo\.\*'.* 0: MaxPool2d;"),
        (pools(), {"select": "3"}, r"3: AdaptiveAvgPool2d \(not in types: add nn.AdaptiveAvgPo"),
        (pools(), {"select": "2.1"}, r"2\.1: Padded \(a subclass"),
        (pools(), {"select": lambda name, pool: False}, "no pool to replace"),
        (pools(), {"types": [nn.MaxPool1d]}, r"no pool .*F\.max_pool2d .*cannot be replaced"),
        (pools(), {"types": "MaxPool2d"}, "types: 'MaxPool2d' has no"),
        (pools(), {"types": [nn.LPPool2d]}, r"LPPool2d has no .*; choose from nn\.MaxPool1d"),
        (nn.Sequential(StochasticPool2d(2)), {}, r"0: StochasticPool2d \(no twin\)"),
        (nn.Sequential(nn.ReLU()), {}, "Its pools: none"),
    ],
)
def test_nothing_chosen_is_an_error(model, arguments, message):
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        replace_pooling(model, **arguments)
    assert repr(model) == before


def test_a_pool_itself_is_returned_as_its_twin():
    twin = replace_pooling(nn.MaxPool2d(2).eval())
    assert type(twin) is StochasticPool2d
    assert not twin.training
    assert "\nthe model: count_include_pad" in warned(nn.AvgPool2d(3, 1, 1))


def test_shared_instances_modes_hooks_and_attributes():
    pool = nn.MaxPool2d(2).eval()
    pool.index = -1  # as detectors note where a layer reads from
    calls = []
    handle = pool.register_forward_hook(lambda module, *_: calls.append(module))
    inner = nn.Sequential(pool)
    model = nn.ModuleDict({"a": pool, "b": inner, "c": inner, "d": pool, "e": nn.MaxPool2d(2)})
    replace_pooling(model, "c.0")  # one of its names is enough
    twin = model["a"]
    assert replaced(model) == ["a"]
    assert model["d"] is model["b"][0] is twin
    assert (twin.index, twin.training, model.training) == (-1, False, True)
    twin(torch.rand(1, 1, 4, 4))
    handle.remove()
    twin(torch.rand(1, 1, 4, 4))
    assert calls == [twin]


class Lists(nn.Module):
    """Its forward reads none of PyTorch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [nn.ReLU(), nn.MaxPool2d(2)]
        self.named: dict[str, Any] = {"pool": self.parts[1]}
        self.named["all"] = self.named
        self.call = self.parts[1].forward
        self.pairs = [("pool", (self.parts[1],))]
        self.net = nn.Sequential(*self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.named["pool"](self.parts[1](self.parts[0](x)))


@pytest.mark.filterwarnings("error")
def test_pools_in_lists_are_replaced():
    model = replace_pooling(Lists())
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


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_graphs_of_fx_and_scripts():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    assert replaced(replace_pooling(model)) == ["1"]
    script = torch.jit.trace(nn.ReLU(), torch.rand(1))
    model = replace_pooling(nn.Sequential(script, nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2)))
    assert fuse(model).meta["folded"] == ["3: ReLU 2, bias of 1"]


@pytest.mark.parametrize(
    "patch",
    [
        lambda pool: setattr(pool, "forward", lambda x: F.max_pool2d(x, 2, padding=1)),
        lambda pool: pool.compile(),
    ],
)
def test_a_patched_pool_is_left_and_named(patch):
    model = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2))
    patch(model[1])
    assert "1: MaxPool2d (patched, which may" in warned(model)
    assert replaced(model) == ["0"]


def helper(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(torch.max_pool1d(x.flatten(2), 2), 1)


renamed, halved = F.max_pool2d, functools.partial(F.avg_pool2d, kernel_size=2)
tools = ModuleType("tools")
tools.down = lambda x: F.max_pool2d(x, 2)  # type: ignore[attr-defined]
by_name = {"max": F.max_pool2d, "avg": F.avg_pool2d}
stored_pool, stored_pools = nn.MaxPool2d(2), {"pool": nn.MaxPool2d(2)}


def runs(**attributes: Any) -> nn.Module:
    """A pool that can be replaced, in a class whose base may run others."""
    base = type("Base", (nn.Sequential,), attributes)
    return type("Runs", (base,), {})(nn.MaxPool2d(2))


def holding(hold: Callable[[nn.Module], object]) -> nn.Module:
    model = runs()
    model.held = hold(model[0])
    return model


def logger_with(pool: nn.Module) -> logging.Logger:
    logger: Any = logging.Logger("it has records of a pool")
    logger.last = pool
    return logger


def functions() -> nn.Module:
    """A pool with the name of a function, and pools that nobody can replace."""
    model = runs(
        forward=lambda self, x: self.max_pool2d(x) + self.inner(x) + helper(x),
        inner=lambda self, x: sum(F.avg_pool2d(part, 2) for part in (x, x)),
    )
    model.max_pool2d = nn.MaxPool2d(2)
    model.down = [F.relu, functools.partial(F.max_pool3d, kernel_size=2)]
    return model


@torch.no_grad()
def decorated(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_max_pool2d(halved(renamed(x, 2)), 1)


def with_defaults(self, x, down=F.max_pool2d, *, again=F.avg_pool2d):
    return self.stored_pools(again(down(x, 2), 2))  # a method with the name of pools elsewhere


MAX, AVG, UNKNOWN = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
FUNCTION = "leaves max_pool2d in the code of Runs"
STRAY = "of a Runs (holds pools that are no children)"
HELD = "of a Runs holds on to a pool that was replaced"


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        # What means something else
        *(
            (nn.Sequential(RELU, pool(3, 1, 1)), "1: count_include_pad")
            for pool in (nn.AvgPool1d, nn.AvgPool2d)
        ),
        (nn.Sequential(RELU, nn.AvgPool2d(3, divisor_override=2)), "1: divisor_override=2"),
        (nn.Sequential(RELU, nn.MaxPool2d(2, return_indices=True)), "1: return_indices=True works"),
        *(
            (nn.Sequential(RELU, nn.AvgPool2d(3, padding=padding)), "")
            for padding in (0, (0, 0), [0, 0], np.int64(0))
        ),
        # What may be negative
        *(
            (nn.Sequential(*modules), f"replace_pooling: {names} may read neg" if names else "")
            for modules, names in (
                ((CONV, nn.ReLU6(), nn.Dropout(), AVG), ""),
                ((nn.Sequential(CONV, RELU), AVG), ""),
                ((nn.Sigmoid(), nn.Sequential(AVG)), ""),
                ((MAX, AVG), ""),  # of a twin nothing is negative
                ((RELU, CONV, AVG), "2"),
                ((RELU, nn.Tanh(), AVG), "2"),
                ((AVG,), "0"),
                ((nn.ModuleList([RELU, AVG, nn.AvgPool2d(3)]),), "0.1, 0.2"),
                ((RELU, AVG, UNKNOWN, AVG), "1, 3"),
                ((NORM, MAX), "1"),
                ((nn.LeakyReLU(), MAX), "1"),
                ((NORM, MAX, RELU), ""),
            )
        ),
        # What is left
        (nn.Sequential(MAX, Padded(2)), "1: Padded (a subclass"),
        (nn.Sequential(MAX, nn.LPPool2d(2, 2)), "1: LPPool2d (no twin)"),
        (nn.Sequential(MAX, torch.jit.script(nn.MaxPool2d(2))), "leaves 1: MaxPool2d (no twin)"),
        (nn.Sequential(MAX, torch.jit.script(nn.AdaptiveAvgPool2d(1))), ""),
        (nn.Sequential(MAX, StochasticPool2d(2), nn.AdaptiveAvgPool2d(1)), ""),
        (nn.Sequential(functions(), functions()), "leaves avg_pool2d, max_pool1d, max_pool3d in"),
        (runs(forward=decorated), "leaves avg_pool2d, max_pool2d in the code of Runs"),
        (runs(forward=with_defaults), "leaves avg_pool2d, max_pool2d in the code of Runs"),
        (runs(forward=lambda self, x: by_name["max"](x)), "leaves avg_pool2d, max_pool2d in the"),
        (runs(forward=lambda self, x: tools.down(x)), FUNCTION),
        (runs(forward=lambda self, x: F.max_pool2d_with_indices(x, 2)[0]), "max_pool2d_with_ind"),
        (runs(down=staticmethod(lambda x: F.max_pool2d(x, 2))), FUNCTION),
        (runs(down=property(lambda self: F.max_pool2d)), FUNCTION),
        (runs(forward=lambda self, x: nn.MaxPool2d(2)(x)), "leaves MaxPool2d in the code of Runs"),
        (runs(hidden=[nn.Sequential(nn.MaxPool2d(2))]), f"leaves hidden {STRAY}"),
        (runs(hidden=SimpleNamespace(pool=nn.MaxPool2d(2))), f"leaves hidden {STRAY}"),
        (
            runs(shared=nn.MaxPool2d(2), forward=lambda self, x: stored_pools["pool"](x)),
            f"leaves <lambda>, shared {STRAY}",
        ),
        (runs(__init__=lambda self, _: nn.Sequential.__init__(self, stored_pool)), ""),
        # What holds on to a pool
        (holding(lambda pool: {"kept": functools.partial(pool)}), f"held {HELD}"),
        (holding(lambda pool: {pool}), f"held {HELD}"),
        (holding(lambda pool: SimpleNamespace(pool=pool)), f"held {HELD}"),
        (holding(weakref.ref), f"held {HELD}"),
        (holding(lambda pool: [weakref.proxy(RELU)]), ""),
        (holding(logger_with), ""),
        (holding(lambda pool: [lambda x: pool(x)]), f"<lambda> {HELD}"),
        (holding(lambda pool: lambda x, kept=pool: kept(x)), f"<lambda> {HELD}"),
        (holding(lambda pool: lambda x, *, kept=[pool]: kept[0](x)), f"<lambda> {HELD}"),
    ],
)
def test_warnings(model, said):
    text = warned(model)
    assert said in text
    assert bool(text) == bool(said)
    assert re.search(r";|\n", text) is None  # nothing else


def test_adaptive_functions_are_named_with_adaptive_types():
    model = runs(forward=decorated).append(nn.AdaptiveMaxPool2d(2))
    text = warned(model, types=nn.AdaptiveMaxPool2d)
    assert "leaves adaptive_max_pool2d, avg_pool2d, max_pool2d in the code of Runs" in text


def test_what_the_arguments_leave_out_is_logged(caplog):
    caplog.set_level(logging.INFO, "stochastic_pooling")
    assert warned(pools()[0::3]) == ""
    pool = nn.MaxPool2d(2)
    warned(nn.Sequential(nn.ReLU(), pool, nn.AvgPool2d(2), pool), select=["1", "3"])
    assert sum("StochasticPool2d" in r.getMessage() for r in caplog.records) == 2
    left = [r.getMessage() for r in caplog.records if r.getMessage().startswith("left")]
    assert left == ["left as it is: 3: AdaptiveAvgPool2d", "left as it is: 2: AvgPool2d"]
