"""Fold ReLUs and convolutions' biases into the stochastic pools that follow them."""

from __future__ import annotations

import copy
import dis
import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from logging import Logger
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import ProxyTypes, ref

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from . import modules

_log = logging.getLogger(__name__)

# What returns memory of its own that nobody else knows: else a ReLU in place would be seen.
FRESH = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm),
}
# For each pool, the convolution whose bias it can add: of as many dimensions, because a 1-d pool
# takes what a 2-d convolution makes of an unbatched input, but not its channels for channels. Not
# for adaptive pools, where a bias of infinity gives NaN.
_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(modules, f"StochasticPool{dims}d"): getattr(nn, f"Conv{dims}d") for dims in (1, 2, 3)
}
_POOLS = {
    *_CONVOLUTIONS,
    *(getattr(modules, f"AdaptiveStochasticPool{dims}d") for dims in (1, 2, 3)),
}


def fuse(model: nn.Module) -> nn.Module:
    """Fold ReLUs and convolutions' biases into the stochastic pools that follow them.

    The pool rectifies and adds a bias anyway, so conv → ReLU → pool becomes a convolution without
    bias and `pool(x, bias=conv.bias)`: the same values, up to the rounding of the sum, with two
    passes over memory fewer and no activation kept for backward. It folds

    - an `nn.ReLU` between a convolution or a norm and a pool;
    - the bias of a convolution with as many dimensions as the pool, unless the pool is adaptive. In
      fp32 and fp64 alone: a convolution in fp16 or bf16 sums in fp32, and its sum without the bias
      may overflow, or round the result away. So autocast leaves the biases where they are.

    It does so only where one `nn.Sequential` runs them in a row, itself or through Sequentials
    inside it, because there alone nobody else can get hold of the values between. What a `forward`
    of your own calls stays as it is: write `self.pool(self.conv(x))` without a ReLU there, or make
    the three an `nn.Sequential`.

    The Sequential looks in each call at what it holds. What has a hook, a parametrization, a
    patched method or a class of its own by then runs as it is.

    Args:
        model: not changed; it shares parameters and buffers with the result, so that an optimizer
            made before goes on.

    Returns:
        A copy with the classes, names, state-dict keys, modes and hooks of the model (a Sequential
        that folds is of a subclass of its class). `meta["folded"]` lists what is folded, a line for
        each pool (`"features.2: ReLU features.1, bias of features.0"`), unless the model has a
        `meta` of its own; the lines are also logged at INFO.

    Raises:
        TypeError: for a model that is no module.
        Exception: whatever `copy.deepcopy` raises, if the model cannot be copied.

    Warns:
        UserWarning: if there is nothing to fold; if a function (a hook, too) or an attribute of a
            module holds on to a module of the original, which the copy then calls.
    """
    modules.check_model(model)
    tensors = [
        value
        for module in model.modules()
        for values in (module._parameters, module._buffers, vars(module))
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    fused = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    originals = set(model.modules())
    for module in fused.modules():
        for holder in holders(module, originals.__contains__):
            warnings.warn(
                f"fuse: {holder} of a {type(module).__name__} holds on to a module of the original "
                "and will use that in the copy: make it a method, or let a hook use the module "
                "that it is given",
                stacklevel=2,
            )
    names = {module: name for name, module in fused.named_modules()}
    folded: dict[str, None] = {}  # A set in order: a Sequential folds what those inside it do.
    for module in filter(runs_in_a_row, list(names)):
        kind: Any = type(module)
        for source, relu, pool in _steps(module):
            parts = [] if relu is None else [f"ReLU {names[relu]}"]
            if pool is not None and _bias(source, pool) is not None:
                parts.append(f"bias of {names[source]}")
            if parts:
                folded[f"{names[pool]}: {', '.join(parts)}"] = None
                if not isinstance(module, _Folding):
                    module.__class__ = _folding(kind)
    for line in folded:
        _log.info("folded into %s", line)
    if not folded:
        warnings.warn(
            f"fuse: nothing to fold in {type(model).__name__}, because no nn.Sequential runs a "
            "convolution or a norm (a lazy one is none before its first batch), nn.ReLU and a "
            "stochastic pool in a row; in a forward of your own, leave out a ReLU that the pool "
            "alone reads",
            stacklevel=2,
        )
    if not hasattr(fused, "meta"):
        fused.meta = {"folded": list(folded)}  # type: ignore[assignment]
    return fused


class _Folding(nn.Sequential):
    """A Sequential that passes over the ReLUs and biases which its pools take over."""

    _kind: Any  # the class that it was

    def forward(self, input):
        if self._kind.forward is not _RUN:  # patched meanwhile
            return super().forward(input)
        for source, relu, pool in _steps(self):
            if pool is not None and _delays_bias(source, pool, input):
                input = source._conv_forward(input, source.weight, None)
                input = pool(input, bias=source.bias)
                continue
            input = source(input)
            if relu is not None and not _is_plain_tensor(input):
                input = relu(input)
            if pool is not None:
                input = pool(input)
        return input

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _restore, (self._kind,), super().__reduce_ex__(protocol)[2]


@functools.cache
def _folding(kind: Any) -> Any:
    return type(kind.__name__, (_Folding, kind), {"__module__": kind.__module__, "_kind": kind})


def _restore(kind: Any) -> nn.Module:
    return object.__new__(_folding(kind))


_RUN = nn.Sequential.forward
_RUNS_IN_A_ROW = {_RUN, _Folding.forward}


def runs_in_a_row(module: nn.Module) -> bool:
    forward = getattr(type(module), "forward", None)  # TorchScript's has none
    return forward in _RUNS_IN_A_ROW and not is_patched(module)


_METHODS = ("__call__", "_call_impl", "_compiled_call_impl", "forward", "_conv_forward")
# As they are now: a class can be patched later.
_KNOWN = {
    kind: [getattr(kind, name, None) for name in _METHODS]
    for kind in (nn.Sequential, _Folding, nn.ReLU, *FRESH, *_POOLS)
}


def _steps(sequential: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """What it runs: a module alone, or one with the pool after it and the ReLU between, if any."""
    rest: list[Any] = list(chain(sequential))
    while rest:
        source, relu, pool = (*rest[:3], None, None)[:3]
        if type(relu) in _POOLS:
            relu, pool = None, relu
        if not (
            (type(source) in FRESH and _is_itself(source))
            and (relu is None or (type(relu) is nn.ReLU and _is_itself(relu)))
            and (type(pool) in _POOLS and _is_itself(pool))
        ):
            relu = pool = None
        yield source, relu, pool
        del rest[: 1 + (relu is not None) + (pool is not None)]


def chain(sequential: Any) -> Iterator[nn.Module]:
    """What it runs, with what the Sequentials inside it run."""
    for module in sequential:
        if isinstance(module, nn.Sequential) and _is_itself(module):
            yield from chain(module)
        else:
            yield module


def _is_itself(module: nn.Module) -> bool:
    """Whether a call does what the class says and no more: no hooks, nothing patched."""
    kind = next(kind for kind in type(module).__mro__ if kind in _KNOWN)
    return not (
        [getattr(type(module), name, None) for name in _METHODS] != _KNOWN[kind]
        or is_patched(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def is_patched(module: nn.Module) -> bool:
    return any(name in vars(module) for name in _METHODS)


def _bias(source: Any, pool: nn.Module) -> Any:
    return source.bias if _CONVOLUTIONS.get(type(pool)) is type(source) else None


def _delays_bias(source: Any, pool: nn.Module, input: Any) -> bool:
    bias = _bias(source, pool)
    return (
        all(map(_is_plain_tensor, (input, source.weight, bias)))  # no None, either
        # Else the convolution complains, and the pool would not.
        and input.dtype == bias.dtype
        and input.device == bias.device
        and input.dtype in (torch.float32, torch.float64)
        and not input.is_meta  # a device that `is_autocast_enabled` does not know
        and not torch.is_autocast_enabled(input.device.type)
    )


def _is_plain_tensor(value: object) -> bool:
    """Whether neither its class nor a mode can give torch's functions another meaning."""
    known = type(value) in (torch.Tensor, nn.Parameter)
    # `torch.set_default_device` is a mode, too, but one that minds factories alone.
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return known and all(type(mode) is DeviceContext for mode in modes)


def holders(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """What in it or its class leads to modules that are wanted past its children, where neither a
    swap nor a copy reaches: the names of functions, hooks too, and of attributes."""
    found = {name for name, held in reach(module) if isinstance(held, nn.Module) and wanted(held)}
    return sorted(found)


def reach(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Whatever it and its class lead to, but not through other modules, each with the name of the
    attribute or of the function that holds it."""
    todo: list[tuple[str, Any]] = []
    # `__init__` is done; annotations, which Python 3.14 has in a function, run nothing.
    passed = "__init__", "__annot"
    for owner in (module, *type(module).__mro__):
        todo += (item for item in vars(owner).items() if not item[0].startswith(passed))
    seen = set()
    while todo:
        name, held = todo.pop()
        if id(held) in seen or type(held) in ProxyTypes:  # a dead one raises at any question
            continue
        seen.add(id(held))
        yield name, held
        if isinstance(held, FunctionType):
            if not is_torch(held):
                todo += [(held.__qualname__, thing) for thing in _read(held)]
        elif isinstance(held, ref):
            todo.append((name, held()))
        # Records of a logger lead to all that was ever logged.
        elif not isinstance(held, (nn.Module, type, ModuleType, Logger)) and not is_torch(held):
            # Numbers and texts, which are not tracked, lead nowhere.
            todo += [(name, thing) for thing in filter(gc.is_tracked, gc.get_referents(held))]


def is_torch(thing: object) -> bool:
    """Whether it is a function of PyTorch, or of one of its types."""
    owner = thing if isinstance(thing, FunctionType) else type(thing)
    return str(owner.__module__).split(".")[0] == "torch"  # FX gives its functions None


def _read(function: FunctionType) -> Iterator[Any]:
    """What the function holds and the globals that it reads, `helper` and `tools.helper` alike."""
    yield from (function.__defaults__, function.__kwdefaults__, function.__closure__)
    names, known = names_in(function.__code__)
    for thing in map(function.__globals__.get, known):
        yield thing
        if isinstance(thing, (type, ModuleType)):
            yield from map(vars(thing).get, names & vars(thing).keys())


@functools.cache
def names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """The names in it and in functions that it makes: all of them, and the global ones."""
    codes = [code]
    for one in codes:  # which grows
        codes += (inner for inner in one.co_consts if isinstance(inner, CodeType))
    steps = (step for one in codes for step in dis.get_instructions(one))
    known = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}
    return {name for one in codes for name in one.co_names}, known
