"""Stochastic pooling for models that exist: swap their pools, fold biases and ReLUs into them."""

from __future__ import annotations

import copy
import inspect
import logging
import operator
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import (
    AdaptiveStochasticPool2d,
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
    nn.AdaptiveMaxPool2d: AdaptiveStochasticPool2d,
    nn.AdaptiveAvgPool2d: AdaptiveStochasticPool2d,
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

    A twin keeps its pool's name, training mode and hooks (their handles too), and an instance that
    stands in several places is one instance afterwards. State dicts do not change: pools have no
    state. A twin rectifies: after a layer without a ReLU, negative values become 0.

    Only modules are seen, not `F.max_pool2d` in a `forward`; and only the very types named, not
    their subclasses, which may pad or pool in another way.

    Args:
        model: changed in place, unless it is a pool itself.
        select: which pools, by qualified name: a pattern as `fnmatch` takes it (`"features.*"`),
            several of them, or a predicate `(name, module) -> bool`; all of the types if None.
        types: which types, by default `nn.MaxPool1d` to `nn.AvgPool3d`. `nn.AdaptiveMaxPool2d` and
            `nn.AdaptiveAvgPool2d` have twins too, but must be named: the global average before a
            classifier is rarely meant.
        sample_in_eval: the twins draw in evaluation too. Pools that return indices need it there.

    Returns:
        `model`, or its twin if it is a pool itself.

    Raises:
        ValueError: if a type has no twin, a pattern fits no pool, or no pool is chosen.

    Warns:
        UserWarning: where an average counts its padding or has its own divisor, which a draw does
            not.
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
        if type(module) in types
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
                raise ValueError(f"select: no pool fits {pattern!r}. {_survey(model, types)}")
            chosen += fitting
    if not chosen:
        raise ValueError(f"no pool to replace. {_survey(model, types)}")

    twins: dict[nn.Module, nn.Module] = {}
    for name, pool in chosen:
        if pool not in twins:
            twins[pool] = _twin(name, pool, sample_in_eval)
            _log.info("%s: %s for %s", name or "the model", twins[pool], pool)
    # Not `named_children`: it shows an instance once, though it may have two names.
    for parent in model.modules():
        for key, child in list(parent._modules.items()):
            if child in twins:
                setattr(parent, key, twins[child])
    return twins.get(model, model)


def _twin(name: str, pool: Any, sample_in_eval: bool) -> nn.Module:
    arguments = {key: getattr(pool, key) for key in _ARGUMENTS if hasattr(pool, key)}
    twin = _TWINS[type(pool)](**arguments, sample_in_eval=sample_in_eval)
    padding = arguments.get("padding", 0)
    padded = any((padding,) if isinstance(padding, int) else padding)
    if padded and getattr(pool, "count_include_pad", False):
        message = "count_include_pad=True has no twin, because padding is never drawn"
        warnings.warn(f"{name}: {message}", stacklevel=3)
    if getattr(pool, "divisor_override", None) is not None:
        message = f"divisor_override={pool.divisor_override} has no twin and is dropped"
        warnings.warn(f"{name}: {message}", stacklevel=3)
    # The mode and every kind of hook. The dicts themselves: handles remove hooks from those.
    vars(twin).update({key: vars(pool)[key] for key in vars(nn.Module())})
    return twin


def _survey(model: nn.Module, types: tuple[type[nn.Module], ...]) -> str:
    lines = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if "Pool" not in kind.__name__ and not isinstance(module, tuple(_TWINS)):
            continue
        if kind in types:
            note = ""
        elif kind in _TWINS:
            note = f" (not in types: add nn.{kind.__name__})"
        elif isinstance(module, tuple(_TWINS)):
            note = " (a subclass, which may pool in its own way: replace it by hand)"
        else:
            note = " (no twin)"
        lines.append(f"{name or 'the model'}: {kind.__name__}{note}")
    return (
        f"Its pools: {'; '.join(lines) or 'none'}. Pooling by F.max_pool2d and the like inside a "
        "forward cannot be seen: write StochasticPool2d or stochastic_pool2d there."
    )


# ---------------------------------------------------------------- fuse

# For each pool, the convolution whose bias it can add. Of as many dimensions: a 1-d pool takes what
# a 2-d convolution makes of an unbatched input, but not its channels for channels.
_CONVOLUTIONS: dict[type[nn.Module], tuple[type[nn.Module], Callable[..., torch.Tensor]]] = {
    StochasticPool1d: (nn.Conv1d, F.conv1d),
    StochasticPool2d: (nn.Conv2d, F.conv2d),
    StochasticPool3d: (nn.Conv3d, F.conv3d),
    AdaptiveStochasticPool2d: (nn.Conv2d, F.conv2d),
}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_RELUS = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
# What returns memory of its own, never its input or a view of it, as nn.Identity does.
_FRESH = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, F.batch_norm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, F.group_norm),
    *(torch.add, operator.add, *_CATS),
}


def fuse(model: nn.Module, *, concrete_args: dict[str, Any] | None = None) -> fx.GraphModule:
    """Fold ReLUs and convolutions' biases into the stochastic pools that follow them.

    The pool rectifies and adds a bias anyway, so conv → ReLU → pool becomes a convolution without
    bias and `pool(x, bias=conv.bias)`: the same values, up to the rounding of the sum, with two
    passes over memory fewer and no activation kept for backward. It folds

    - a ReLU (`nn.ReLU`, `F.relu`, `torch.relu`, `Tensor.relu`, in place or not) after a
      convolution, a norm, a sum or a `torch.cat`;
    - the ReLUs before a `torch.cat` that a pool reads;
    - the bias of a convolution with as many dimensions as the pool.

    It leaves alone whatever it cannot prove equal: a value with another user, modules that carry
    hooks, a parametrization or a `forward` of their own, subclasses, pools that get a bias already.

    Args:
        model: traceable by `torch.fx`. It is not changed, but shares its modules and parameters
            with the result: `copy.deepcopy` one of them to use both.
        concrete_args: arguments of `forward` to fix, as `torch.fx.symbolic_trace` takes them
            (`{"mask": None}`).

    Returns:
        A graph module with the same module names, state-dict keys, modes and hooks, so that
        checkpoints load both ways. `meta["folded"]` lists what was folded, a line per call of a
        pool (`"features.2: ReLU features.1, bias of features.0"`); the lines are also logged at
        INFO; a pickle loses them. A folded convolution's settings are fixed, its parameters are
        not; hooks put on it later (pruning, `weight_norm`, FSDP) do not run.

    Raises:
        RuntimeError: if `torch.fx` cannot trace `model`.

    Warns:
        UserWarning: if the graph depends on the training mode, as with
            `F.dropout(x, training=self.training)`: it keeps that of the call. Submodules whose
            `forward` reads `self.training`, or with hooks, stay whole, and so do right in both
            modes; fuse one by itself to fold what is inside.
    """
    try:
        root, graph = _trace(model, concrete_args)
    except Exception as error:  # Python code meets symbolic values: it may raise anything.
        raise RuntimeError(
            f"fuse: torch.fx cannot trace {type(model).__name__} ({error}). Control flow that "
            "depends on data or shapes is out of its reach: fuse the submodules that hold the "
            "pools instead (model.features = fuse(model.features)), or fix optional arguments "
            "of forward with concrete_args"
        ) from error
    if _depends_on_mode(model, graph, concrete_args):
        mode = "training" if model.training else "evaluation"
        warnings.warn(
            f"{type(model).__name__}: forward reads self.training, and the fused model keeps what "
            f"it does in {mode} mode. Use nn.Dropout for F.dropout, or fuse once for each mode",
            stacklevel=2,
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    folded = []
    for node in list(graph.nodes):
        # One argument: a second would be a bias.
        if _operation(node, modules) in _CONVOLUTIONS and len(node.args) == 1 and not node.kwargs:
            parts = _fold_into(node, modules)
            if parts:
                folded.append(f"{node.target}: {', '.join(parts)}")
                _log.info("folded into %s", folded[-1])

    fused = fx.GraphModule(root, graph, type(model).__name__)
    constants = {name: fused._buffers[name] for name in fused._buffers.keys() - model._buffers}
    # It holds the modules that the graph calls, in that order; we want all, in the model's order,
    # and the hooks of the model itself.
    vars(fused).update({key: copy.copy(vars(model)[key]) for key in vars(nn.Module())})
    for name, constant in constants.items():
        fused.register_buffer(name, constant, persistent=False)
    fused.meta["folded"] = folded
    return fused


def _fold_into(pool: fx.Node, modules: dict[str, nn.Module]) -> list[str]:
    """Fold into one call of a pool what it reads; return what that was."""
    folded: list[str] = []
    value = _drop_relus(pool.all_input_nodes[0], modules, folded)
    conv_type, convolution = _CONVOLUTIONS[_operation(pool, modules)]
    if _operation(value, modules) is not conv_type or len(value.users) > 1:
        return folded
    graph, name = pool.graph, str(value.target)
    conv: Any = modules[name]
    if conv.bias is None:
        return folded
    (input,), padding = value.all_input_nodes, conv.padding
    with graph.inserting_before(value):
        if conv.padding_mode != "zeros":
            pad = conv._reversed_padding_repeated_twice
            input, padding = graph.call_function(F.pad, (input, pad, conv.padding_mode)), 0
        weight = graph.get_attr(f"{name}.weight")
        without_bias = graph.call_function(
            convolution,
            (input, weight, None, conv.stride, padding, conv.dilation, conv.groups),
        )
    value.replace_all_uses_with(without_bias)
    graph.erase_node(value)
    with graph.inserting_before(pool):
        pool.kwargs = {"bias": graph.get_attr(f"{name}.bias")}
    return [*folded, f"bias of {name}"]


def _drop_relus(value: fx.Node, modules: dict[str, nn.Module], folded: list[str]) -> fx.Node:
    """Take out the ReLUs before a pool, through a cat too; return what it reads then."""
    if len(value.users) > 1:
        return value
    if _operation(value, modules) in _RELUS:
        (source,) = value.all_input_nodes
        # Else others may see what a ReLU in place writes, or write to what the pool reads then.
        fresh = _operation(source, modules) in _FRESH and "out" not in source.kwargs
        if len(source.users) > 1 or not fresh:
            return value
        value.replace_all_uses_with(source)
        value.graph.erase_node(value)
        folded.append(f"ReLU {value.target if value.op == 'call_module' else value.name}")
        value = source
    if _operation(value, modules) in _CATS:
        for branch in value.all_input_nodes:
            _drop_relus(branch, modules, folded)
    return value


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """The function, the method's name or the type of the module; None if that was altered."""
    if node.op != "call_module":
        return node.target if node.op in ("call_function", "call_method") else None
    module = modules[str(node.target)]
    return None if _has_hooks(module) or "forward" in vars(module) else type(module)


def _has_hooks(module: nn.Module) -> bool:
    return any(
        vars(module)[f"_{kind}_hooks"]
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
    )


class _Tracer(fx.Tracer):
    # Else an in-place update of a buffer would run while tracing.
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        code = getattr(inspect.unwrap(type(m).forward), "__code__", None)
        return (
            isinstance(m, StochasticPool)
            or _has_hooks(m)
            or (code is not None and "training" in code.co_names)
            or super().is_leaf_module(m, module_qualified_name)
        )


def _trace(model: nn.Module, concrete_args: dict[str, Any] | None) -> tuple[nn.Module, fx.Graph]:
    # A shallow copy, because the tracer stores constants on the module.
    root = object.__new__(type(model))
    vars(root).update(vars(model))
    return root, _Tracer().trace(root, concrete_args)


def _depends_on_mode(
    model: nn.Module, graph: fx.Graph, concrete_args: dict[str, Any] | None
) -> bool:
    """Whether tracing with every module in its other mode gives another graph."""
    modules = list(model.modules())
    try:
        for module in modules:
            module.training = not module.training
        return str(_trace(model, concrete_args)[1]) != str(graph)
    except Exception:
        return True
    finally:
        for module in modules:
            module.training = not module.training
