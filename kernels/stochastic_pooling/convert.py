"""Stochastic pooling for models that exist: swap their pools, fold biases and ReLUs into them."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import operator
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .modules import (
    AdaptiveStochasticPool1d,
    AdaptiveStochasticPool2d,
    AdaptiveStochasticPool3d,
    StochasticPool,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
)

_log = logging.getLogger(__name__)

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool1d: StochasticPool1d,
    nn.MaxPool2d: StochasticPool2d,
    nn.MaxPool3d: StochasticPool3d,
    nn.AvgPool1d: StochasticPool1d,
    nn.AvgPool2d: StochasticPool2d,
    nn.AvgPool3d: StochasticPool3d,
    nn.AdaptiveMaxPool1d: AdaptiveStochasticPool1d,
    nn.AdaptiveMaxPool2d: AdaptiveStochasticPool2d,
    nn.AdaptiveMaxPool3d: AdaptiveStochasticPool3d,
    nn.AdaptiveAvgPool1d: AdaptiveStochasticPool1d,
    nn.AdaptiveAvgPool2d: AdaptiveStochasticPool2d,
    nn.AdaptiveAvgPool3d: AdaptiveStochasticPool3d,
}
_ARGUMENTS = (
    *("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    *("output_size", "return_indices"),
)
_OPENED = (dict, list, tuple, set, frozenset, deque, partial, CellType, MethodType)
_WINDOWED = tuple(pool for pool in _TWINS if not pool.__name__.startswith("Adaptive"))


def replace_pooling(
    model: nn.Module,
    select: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    types: type[nn.Module] | Iterable[type[nn.Module]] = _WINDOWED,
    sample_in_eval: bool = False,
) -> nn.Module:
    """Swap a model's max and average pools for stochastic pools with the same arguments, in place.

    A twin keeps its pool's name, training mode, hooks (their handles too) and what else was written
    on it, and an instance that stands in several places, lists too, is one instance afterwards.
    State dicts do not change: pools have no state. Only modules of the very types named are
    replaced, not their subclasses, which may pad or pool in another way, nor those with a method
    patched, and not `F.max_pool2d` in a `forward`.

    Args:
        model: changed in place, unless it is a pool itself.
        select: which pools, by qualified name: a pattern as `fnmatch` takes it (`"features.*"`),
            several of them, or a predicate `(name, module) -> bool`; all of the types if None.
        types: which types, by default `nn.MaxPool1d` to `nn.AvgPool3d`. The adaptive pools of
            PyTorch have twins too, but must be named: the global average before a classifier is
            rarely meant.
        sample_in_eval: the twins draw in evaluation too. Pools that return indices need it there.

    Returns:
        `model`, or its twin if it is a pool itself.

    Raises:
        ValueError: if a type has no twin, a pattern fits no pool, or no pool is chosen.

    Warns:
        UserWarning: where an average counts its padding or has its own divisor, which a draw does
            not; where negative values, which become 0, may reach a twin: each average, unless an
            `nn.Sequential` shows a ReLU or the like before it, and a max pool if one shows a
            convolution, norm or activation with a sign before it and no ReLU behind; where pools
            are left that the arguments do not leave out: subclasses, patched ones, types without a
            twin, pools that are no children, and functions and types of pools in the code of a
            forward; where a function (a hook, too) or an attribute holds on to a pool that was
            replaced. Pools that the arguments leave out are logged at INFO.
    """
    types = (types,) if isinstance(types, type) else tuple(types)
    for pool_type in types:
        if pool_type not in _TWINS:
            name = getattr(pool_type, "__name__", pool_type)
            raise ValueError(
                f"types: {name} has no stochastic twin; choose from "
                + ", ".join(f"nn.{known.__name__}" for known in _TWINS)
            )
    pools = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in types and not _is_patched(module)
    ]
    if select is None:
        chosen = pools
    elif callable(select):
        chosen = [(name, pool) for name, pool in pools if select(name, pool)]
    else:
        chosen = []
        for pattern in (select,) if isinstance(select, str) else select:
            fitting = [(name, pool) for name, pool in pools if fnmatchcase(name, pattern)]
            if not fitting:
                raise ValueError(f"select: no pool fits {pattern!r}. {_all_pools(model, types)}")
            chosen += fitting
    if not chosen:
        raise ValueError(f"no pool to replace. {_all_pools(model, types)}")

    _, beyond = _survey(model, types)
    if beyond:
        warnings.warn(f"replace_pooling leaves {'; '.join(beyond)}", stacklevel=2)
    signed = _may_read_negatives(model, chosen)
    if signed:
        warnings.warn(
            f"replace_pooling: {', '.join(signed)} may read negative values, which a stochastic "
            "pool takes for 0: put a ReLU before, or leave the pool out with select",
            stacklevel=2,
        )
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in _TWINS and (name, module) not in chosen:
            _log.info("left as it is: %s: %s", name, type(module).__name__)
    twins: dict[nn.Module, nn.Module] = {}
    for name, pool in chosen:
        if pool not in twins:
            twins[pool] = _twin(name, pool, sample_in_eval)
            _log.info("%s: %s for %s", name or "the model", twins[pool], pool)
    parent: Any
    for parent in model.modules():
        compiled = getattr(parent, "_orig_mod", None) in twins
        _swap(vars(parent), twins, set())
        if compiled:  # its forward is made of what it held
            parent._initialize()
        for holder in _holders(parent, twins.__contains__):
            warnings.warn(
                f"replace_pooling: {holder} of a {type(parent).__name__} holds on "
                "to a pool that was replaced, and will use that: let it take the model's",
                stacklevel=2,
            )
    return twins.get(model, model)


def _swap(held: Any, twins: dict[nn.Module, nn.Module], seen: set[int]) -> Any:
    """`held` with twins for pools, and with their methods: a module may stand in `_modules`, maybe
    twice, and in dicts, lists and tuples that a forward may run through instead."""
    if isinstance(held, nn.Module):
        return twins.get(held, held)
    if isinstance(held, MethodType) and isinstance(held.__self__, nn.Module):
        pool = held.__self__
        return getattr(twins[pool], held.__name__, held) if pool in twins else held
    if isinstance(held, (dict, list)) and id(held) not in seen:
        seen.add(id(held))  # it may hold itself
        for key, child in list(held.items() if isinstance(held, dict) else enumerate(held)):
            if (swapped := _swap(child, twins, seen)) is not child:
                held[key] = swapped
    elif type(held) is tuple:
        swapped = [_swap(child, twins, seen) for child in held]
        return held if all(map(operator.is_, held, swapped)) else tuple(swapped)
    return held


def _twin(name: str, pool: Any, sample_in_eval: bool) -> nn.Module:
    arguments = {key: getattr(pool, key) for key in _ARGUMENTS if hasattr(pool, key)}
    twin = _TWINS[type(pool)](**arguments, sample_in_eval=sample_in_eval)
    padding = arguments.get("padding", 0)
    padded = any(padding if isinstance(padding, (tuple, list)) else (padding,))
    if padded and getattr(pool, "count_include_pad", False):
        message = "count_include_pad=True has no twin, because padding is never drawn"
        warnings.warn(f"{name}: {message}", stacklevel=3)
    if getattr(pool, "divisor_override", None) is not None:
        message = f"divisor_override={pool.divisor_override} has no twin and is dropped"
        warnings.warn(f"{name}: {message}", stacklevel=3)
    # The mode, every kind of hook and what others wrote there. The dicts themselves: handles remove
    # hooks from those.
    vars(twin).update({k: value for k, value in vars(pool).items() if k not in pool.__constants__})
    return twin


def _all_pools(model: nn.Module, types: tuple[type[nn.Module], ...]) -> str:
    known, beyond = _survey(model, types)
    return (
        f"Its pools: {'; '.join(known + beyond) or 'none'}. Pooling by F.max_pool2d and the like "
        "inside a forward cannot be replaced: write StochasticPool2d or stochastic_pool2d there."
    )


def _survey(model: nn.Module, types: tuple[type[nn.Module], ...]) -> tuple[list[str], list[str]]:
    """Its pools, a line each: those on which the arguments decide, and those beyond their reach."""
    known, beyond = [], []
    # As the adaptive averages of PyTorch are left if nobody asks for them, so are those of others.
    adaptive = any("Adaptive" in kind.__name__ for kind in types)
    children = set(model.modules())

    def is_stray(held: nn.Module) -> bool:
        return held not in children and any(type(pool) in types for pool in held.modules())

    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        kind_name = getattr(module, "original_name", kind.__name__)  # of a scripted or traced one
        line = f"{name or 'the model'}: {kind_name}"
        if kind in _TWINS and _is_patched(module):
            beyond.append(f"{line} (patched, which may pool in its own way: replace it by hand)")
        elif kind in types:
            known.append(line)
        elif kind in _TWINS:
            known.append(f"{line} (not in types: add nn.{kind.__name__})")
        elif isinstance(module, tuple(_TWINS)):
            beyond.append(f"{line} (a subclass, which may pool in its own way: replace it by hand)")
        elif "Pool" in kind_name and not module._modules:
            ours = isinstance(module, StochasticPool)
            skipped = ours or ("AdaptiveAvgPool" in kind_name and not adaptive)
            (known if skipped else beyond).append(f"{line} (no twin)")
        else:
            # A forward that names a type makes pools, or runs those that it knows in its own way.
            code = getattr(getattr(kind, "forward", None), "__code__", None)
            made = {pool.__name__ for pool in types}.intersection(code.co_names if code else ())
            functions = ", ".join(sorted(made | _pooling_functions(module, adaptive)))
            line = f"{functions} in the code of {kind.__name__} (write stochastic_pool2d there)"
            if functions and line not in beyond:
                beyond.append(line)
            for holder in _holders(module, is_stray):
                beyond.append(f"{holder} of a {kind.__name__} (holds pools that are no children)")
    return known, beyond


def _pooling_functions(module: nn.Module, adaptive: bool) -> set[str]:
    """What its methods, or the functions that they name or wrap, call max_pool2d, avg_pool1d_same,
    … and such functions that it holds."""
    kinds = f"({'adaptive_|' * adaptive}fractional_)?(max|avg|lp)_pool[123]d"
    pattern = re.compile(f"{kinds}(?!_with_indices)")  # of which the plain one is made
    todo = [value for owner in (module, *type(module).__mro__) for value in vars(owner).values()]
    names: set[str] = set()
    seen = set()
    while todo:
        value = todo.pop()
        value = value.func if isinstance(value, partial) else getattr(value, "__func__", value)
        code = getattr(value, "__code__", value)  # a constant may be the code of a function inside
        if callable(value):  # by the name it was made with, whatever a forward calls it
            names.add(str(getattr(value, "__name__", "")))
        if isinstance(value, FunctionType):  # a decorator's closure holds what it decorates
            todo += [held for cell in value.__closure__ or () for held in gc.get_referents(cell)]
        if not isinstance(code, CodeType) or code in seen:
            continue
        seen.add(code)
        if not (getattr(value, "__module__", None) or "").startswith("torch."):  # FX gives it none
            names.update(code.co_names)
            known = getattr(value, "__globals__", {})
            todo += [*code.co_consts, *(known[name] for name in code.co_names if name in known)]
    return {name for name in names.difference(module._modules.keys()) if pattern.match(name)}


# After these nothing is negative; after those it may be, as after `_FRESH`; the last keep the sign.
_RECTIFIED = {nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, *_TWINS.values()}
_SIGNED = {
    *(nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Linear, nn.LayerNorm),
}
_SIGN_KEPT = {
    *(nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *_TWINS),
}


def _may_read_negatives(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> list[str]:
    """The chosen averages, but for those before which a Sequential shows a ReLU or the like, and
    the maxima for which it shows the contrary."""
    pools = [pool for _, pool in chosen]
    rows = [row for row in model.modules() if _runs_in_a_row(row)]
    inside = {child for row in rows for child in row.children()}
    negative: dict[nn.Module, set[bool | None]] = {pool: set() for pool in pools}
    for row in rows:
        if row in inside:  # which is seen from outside
            continue
        state = None  # nobody knows
        chain: list[Any] = [*_chain(row), None]
        for module, behind in pairwise(chain):
            kind = type(module)
            if module in pools:
                negative[module].add(state and type(behind) is not nn.ReLU)
            if module in pools or kind in _RECTIFIED:
                state = False
            elif kind not in _SIGN_KEPT:
                state = True if kind in _FRESH | _SIGNED else None
    return [
        name or "the model"
        for name, pool in chosen
        if True in negative[pool] or ("Avg" in type(pool).__name__ and negative[pool] != {False})
    ]


# ---------------------------------------------------------------- fuse

# What returns memory of its own that nobody else knows: else a ReLU in place would be seen.
_FRESH = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm),
}
_POOLS = {*_TWINS.values()}
# For each pool, the convolution whose bias it can add: of as many dimensions, because a 1-d pool
# takes what a 2-d convolution makes of an unbatched input, but not its channels for channels. Not
# for adaptive pools, where a bias of infinity gives NaN.
_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    StochasticPool1d: nn.Conv1d,
    StochasticPool2d: nn.Conv2d,
    StochasticPool3d: nn.Conv3d,
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
        Exception: whatever `copy.deepcopy` raises, if the model cannot be copied.

    Warns:
        UserWarning: if there is nothing to fold; if a function (a hook, too) or an attribute of a
            module holds on to a module of the original, which the copy then calls.
    """
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
        for holder in _holders(module, originals.__contains__):
            warnings.warn(
                f"fuse: {holder} of a {type(module).__name__} holds on to a module of the original "
                "and will use that in the copy: make it a method, or let a hook use the module "
                "that it is given",
                stacklevel=2,
            )
    names = {module: name for name, module in fused.named_modules()}
    folded: dict[str, None] = {}  # A set in order: a Sequential folds what those inside it do.
    for module in filter(_runs_in_a_row, list(names)):
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
            "convolution or a norm, nn.ReLU and a stochastic pool in a row; in a forward of your "
            "own, leave out the ReLU before the pool",
            stacklevel=2,
        )
    if not hasattr(fused, "meta"):
        fused.meta = {"folded": list(folded)}  # type: ignore[assignment]
    return fused


class _Folding(nn.Sequential):
    """A Sequential that passes over the ReLUs and biases which its pools take over."""

    def forward(self, input):
        kind: Any = type(self).__bases__[1]
        if kind.forward is not _RUN:  # patched meanwhile
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
        return _restore, (type(self).__bases__[1],), super().__reduce_ex__(protocol)[2]


@functools.cache
def _folding(kind: Any) -> Any:
    return type(kind.__name__, (_Folding, kind), {"__module__": kind.__module__})


def _restore(kind: Any) -> nn.Module:
    return object.__new__(_folding(kind))


_RUN = nn.Sequential.forward
_RUNS_IN_A_ROW = {_RUN, _Folding.forward}


def _runs_in_a_row(module: nn.Module) -> bool:
    forward = getattr(type(module), "forward", None)  # TorchScript's has none
    return forward in _RUNS_IN_A_ROW and not _is_patched(module)


_METHODS = ("__call__", "_call_impl", "_compiled_call_impl", "forward", "_conv_forward")
# As they are now: a class can be patched later.
_KNOWN = {
    kind: [getattr(kind, name, None) for name in _METHODS]
    for kind in (nn.Sequential, _Folding, nn.ReLU, *_FRESH, *_POOLS)
}


def _steps(sequential: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """What it runs: a module alone, or one with the pool after it and the ReLU between, if any."""
    chain: list[Any] = list(_chain(sequential))
    while chain:
        source, relu, pool = (*chain[:3], None, None)[:3]
        if type(relu) in _POOLS:
            relu, pool = None, relu
        if not (
            (type(source) in _FRESH and _is_itself(source))
            and (relu is None or (type(relu) is nn.ReLU and _is_itself(relu)))
            and (type(pool) in _POOLS and _is_itself(pool))
        ):
            relu = pool = None
        yield source, relu, pool
        del chain[: 1 + (relu is not None) + (pool is not None)]


def _chain(sequential: Any) -> Iterator[nn.Module]:
    """What it runs, with what the Sequentials inside it run."""
    for module in sequential:
        if isinstance(module, nn.Sequential) and _is_itself(module):
            yield from _chain(module)
        else:
            yield module


def _is_itself(module: nn.Module) -> bool:
    """Whether a call does what the class says and no more: no hooks, nothing patched."""
    kind = next(kind for kind in type(module).__mro__ if kind in _KNOWN)
    return not (
        [getattr(type(module), name, None) for name in _METHODS] != _KNOWN[kind]
        or _is_patched(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _is_patched(module: nn.Module) -> bool:
    return any(name in vars(module) for name in _METHODS)


def _bias(source: Any, pool: nn.Module) -> Any:
    return source.bias if _CONVOLUTIONS.get(type(pool)) is type(source) else None


def _delays_bias(source: Any, pool: nn.Module, input: Any) -> bool:
    bias = _bias(source, pool)
    return (
        bias is not None
        and all(map(_is_plain_tensor, (input, source.weight, bias)))
        # Else the convolution complains, and the pool would not.
        and input.dtype == source.weight.dtype == bias.dtype
        and input.device == bias.device
        and input.dtype in (torch.float32, torch.float64)
        and not input.is_meta  # a device that `is_autocast_enabled` does not know
        and not torch.is_autocast_enabled(input.device.type)
    )


def _is_plain_tensor(value: object) -> bool:
    """Whether neither its class nor a mode can give torch's functions another meaning."""
    known = type(value) in (torch.Tensor, nn.Parameter)
    return known and not torch._C._len_torch_function_stack()


def _holders(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, None]:
    """What in it leads to modules that are wanted past its children, where neither a swap nor a
    copy reaches: the names of functions, hooks too, and of attributes."""
    holders: dict[str, None] = {}
    todo: list[tuple[str, Any]] = list(vars(module).items())
    seen = set()
    while todo:
        name, held = todo.pop()
        if isinstance(held, nn.Module):
            if wanted(held):
                holders[name] = None
        elif not isinstance(held, (FunctionType, *_OPENED)) or id(held) in seen:
            continue
        elif isinstance(held, FunctionType):
            inside = [held.__defaults__, held.__kwdefaults__, held.__closure__]
            named = map(held.__globals__.get, held.__code__.co_names)
            inside += [thing for thing in named if not isinstance(thing, FunctionType)]
            todo += [(held.__qualname__, thing) for thing in inside]
        else:
            todo += [(name, thing) for thing in gc.get_referents(held)]
        seen.add(id(held))
    return holders
