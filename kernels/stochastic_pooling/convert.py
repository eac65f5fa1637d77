"""Swap the pools of models that exist for stochastic pools."""

from __future__ import annotations

import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import pairwise, product
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from . import modules
from .fusion import (
    FRESH,
    chain,
    holders,
    is_patched,
    is_torch,
    names_in,
    reach,
    runs_in_a_row,
)

_log = logging.getLogger(__name__)

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, f"{start}{kind}Pool{dims}d"): getattr(modules, f"{start}StochasticPool{dims}d")
    for start, kind, dims in product(("", "Adaptive"), ("Max", "Avg"), (1, 2, 3))
}
_ARGUMENTS = (
    *("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    *("output_size", "return_indices"),
)
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
        TypeError: for a model that is no module.
        ValueError: if a type has no twin, a pattern fits no pool, or no pool is chosen.

    Warns:
        UserWarning: where an average counts its padding or has its own divisor, which a draw does
            not; where a pool returns indices, without `sample_in_eval`; where negative values,
            which become 0, may reach a twin: each average, unless an `nn.Sequential` shows a ReLU
            or the like before it, and a max pool if one shows a convolution, norm or activation
            with a sign before it and no ReLU behind; where pools are left that the arguments do not
            leave out: subclasses, patched ones, types without a twin, pools that are no children,
            and functions and types of pools in the code of a forward; where a function (a hook,
            too) or an attribute holds on to a pool that was replaced. Pools that the arguments
            leave out are logged at INFO.
    """
    modules.check_model(model)
    types = (types,) if isinstance(types, (type, str)) else tuple(types)
    for pool_type in types:
        if pool_type not in _TWINS:
            name = getattr(pool_type, "__name__", repr(pool_type))
            raise ValueError(
                f"types: {name} has no stochastic twin; choose from "
                + ", ".join(f"nn.{known.__name__}" for known in _TWINS)
            )
    pools = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in types and not is_patched(module)
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
    twins: dict[nn.Module, nn.Module] = {}
    for name, pool in chosen:
        if pool not in twins:
            shown = name or "the model"
            twins[pool] = _twin(shown, pool, sample_in_eval)
            _log.info("%s: %s for %s", shown, twins[pool], pool)
    for name, module in model.named_modules():
        if type(module) in _TWINS and module not in twins:
            _log.info("left as it is: %s: %s", name, type(module).__name__)
    parent: Any
    for parent in model.modules():
        compiled = getattr(parent, "_orig_mod", None) in twins
        _swap(vars(parent), twins, set())
        if compiled:  # its forward is made of what it held
            parent._initialize()
        for holder in holders(parent, twins.__contains__):
            warnings.warn(
                f"replace_pooling: {holder} of a {type(parent).__name__} holds on "
                "to a pool that was replaced, and will use that: let it take the model's",
                stacklevel=2,
            )
    return twins.get(model, model)


def _swap(held: Any, twins: dict[nn.Module, nn.Module], seen: set[int]) -> Any:
    """`held` with twins for pools, and with their methods: a module may stand in `_modules`, maybe
    twice, and in dicts, lists and tuples that a forward may run through instead."""
    if issubclass(type(held), nn.Module):  # a weak proxy says that it is one, and has no hash
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
    changes = []
    if padded and getattr(pool, "count_include_pad", False):
        changes.append("count_include_pad=True has no twin, because padding is never drawn")
    if getattr(pool, "divisor_override", None) is not None:
        changes.append(f"divisor_override={pool.divisor_override} has no twin and is dropped")
    if arguments.get("return_indices") and not sample_in_eval:
        changes.append("return_indices=True works in training alone, without sample_in_eval=True")
    for change in changes:
        warnings.warn(f"{name}: {change}", stacklevel=3)
    # The mode, every kind of hook and what others wrote there. The dicts themselves: handles remove
    # hooks from those.
    vars(twin).update({k: value for k, value in vars(pool).items() if k not in pool.__constants__})
    return twin


def _all_pools(model: nn.Module, types: tuple[type[nn.Module], ...]) -> str:
    known, beyond = _survey(model, types)
    return (
        f"Its pools: {'; '.join(known + beyond) or 'none'}. Pooling by F.max_pool2d and the like "
        "inside a forward cannot be replaced: call a StochasticPool2d of the model there."
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
        if kind in _TWINS and is_patched(module):
            beyond.append(f"{line} (patched, which may pool in its own way: replace it by hand)")
        elif kind in types:
            known.append(line)
        elif kind in _TWINS:
            known.append(f"{line} (not in types: add nn.{kind.__name__})")
        elif isinstance(module, tuple(_TWINS)):
            beyond.append(f"{line} (a subclass, which may pool in its own way: replace it by hand)")
        elif "Pool" in kind_name and not module._modules:
            ours = isinstance(module, modules.StochasticPool)
            skipped = ours or ("AdaptiveAvgPool" in kind_name and not adaptive)
            (known if skipped else beyond).append(f"{line} (no twin)")
        else:
            # A forward that names a type makes pools, or runs those that it knows in its own way.
            code = getattr(getattr(kind, "forward", None), "__code__", None)
            made = {pool.__name__ for pool in types}.intersection(code.co_names if code else ())
            functions = ", ".join(sorted(made | _pooling_functions(module, adaptive)))
            line = f"{functions} in the code of {kind.__name__} (call a StochasticPool2d there)"
            if functions and line not in beyond:
                beyond.append(line)
            if stray := ", ".join(holders(module, is_stray)):
                beyond.append(f"{stray} of a {kind.__name__} (holds pools that are no children)")
    return known, beyond


def _pooling_functions(module: nn.Module, adaptive: bool) -> set[str]:
    """max_pool2d, avg_pool1d_same, …: those that it holds, and that its functions name."""
    pattern = re.compile(f"({'adaptive_|' * adaptive}fractional_)?(max|avg|lp)_pool[123]d")
    names: set[str] = set()
    for _, held in reach(module):
        if callable(held):  # by the name it was made with, whatever a forward calls it
            names.add(str(getattr(held, "__name__", "")))
        if isinstance(held, FunctionType) and not is_torch(held):
            names |= names_in(held.__code__)[0]
    return {name for name in names.difference(module._modules.keys()) if pattern.match(name)}


# After these nothing is negative; after those it may be, as after `FRESH`; the last keep the sign.
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
    rows = [row for row in model.modules() if runs_in_a_row(row)]
    inside = {child for row in rows for child in row.children()}
    negative: dict[nn.Module, set[bool | None]] = {pool: set() for pool in pools}
    for row in rows:
        if row in inside:  # which is seen from outside
            continue
        state = None  # nobody knows
        for module, behind in pairwise([*chain(row), None]):
            kind = type(module)
            if module in pools:
                negative[module].add(state and type(behind) is not nn.ReLU)
            if module in pools or kind in _RECTIFIED:
                state = False
            elif kind not in _SIGN_KEPT:
                state = True if kind in FRESH | _SIGNED else None
    return [
        name or "the model"
        for name, pool in chosen
        if True in negative[pool] or ("Avg" in type(pool).__name__ and negative[pool] != {False})
    ]
