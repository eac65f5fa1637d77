"""Stochastic pooling as functions, beside `torch.nn.functional.max_pool2d`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import wrap_torch_function

from . import autograd
from .window import Ints, Window, known, larger

Pooled: TypeAlias = Any  # a tensor, or with `return_indices` a pair, as of `F.max_pool2d`

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

P = ParamSpec("P")
R = TypeVar("R")


def _overridable(pool: Callable[P, R]) -> Callable[P, R]:
    """Let `__torch_function__` take over: a subclass's, a mode's, or that of `torch.fx`, for which
    a call is one node."""

    # With a default, so that the pool itself complains of a missing input.
    def tensors(input: Any = None, *_: Any, bias: Any = None, **__: Any) -> tuple[Any, Any]:
        return input, bias

    decorate: Any = wrap_torch_function(tensors)
    return decorate(pool)


@_overridable
def stochastic_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Pooled:
    """Stochastic pooling over `(H, W)` planes, ReLU and an optional bias included.

    With w = max(input + bias, 0) in a window of sum S, training draws one cell with probability
    w / S and returns its w; evaluation returns the expectation of that draw, sum w² / S (Zeiler &
    Fergus 2013, equations 3.1 and 3.2). A window without a positive cell gives 0 and no gradient;
    the expectation has none where S is below 2**-100. A NaN gives NaN; +Inf beats every finite
    cell. The draw depends on the seed and on the output's coordinates alone, so it is the same on
    every device and in every memory format and dtype.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`, in fp16, bf16, fp32 or fp64. Arithmetic is in fp32 for
            the first three and in fp64 for the last.
        kernel_size: one int, or (height, width); the same for the three that follow.
        stride: `kernel_size` if None.
        padding: at most half of the kernel. Padding is never drawn.
        dilation: distance between the cells of a window.
        ceil_mode: round the output size up instead of down.
        return_indices: also return where each output came from, as int64 `h * W + w` indices that
            `F.max_unpool2d` takes; only in training. A dead window's is its first in-bounds cell.
        bias: `(C,)`, added to the input first; any floating dtype. Its gradient has its dtype.
        training: draw (True) or take the expectation (False).
        generator: on the input's device; its default generator if None, which alone
            `torch.utils.checkpoint` sets back: with another it would draw other cells in backward.

    Returns:
        `(N, C, OH, OW)` or `(C, OH, OW)` in the input's dtype and memory format, shapes as
        `F.max_pool2d`; with `return_indices`, a pair of the output and the indices.

    Raises:
        RuntimeError, TypeError, NotImplementedError: where `F.max_pool2d` would, in its words.
    """
    window = _window(2, kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(2, input, window, return_indices, bias, training, generator)


@_overridable
def stochastic_pool1d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Pooled:
    """Stochastic pooling over `(N, C, L)` or `(C, L)` signals; all else as `stochastic_pool2d`.

    It draws the cells that the 2-d pool draws for `(N, C, 1, L)`.
    """
    window = _window(1, kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(1, input, window, return_indices, bias, training, generator)


@_overridable
def stochastic_pool3d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Pooled:
    """Stochastic pooling over `(N, C, D, H, W)` or `(C, D, H, W)` volumes, as `F.max_pool3d`.

    All else as `stochastic_pool2d`; indices are `(d * H + h) * W + w`. On a CPU the PyTorch
    reference serves volumes, unless they are contiguous and a window is within a slice.
    """
    window = _window(3, kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(3, input, window, return_indices, bias, training, generator)


@_overridable
def adaptive_stochastic_pool2d(
    input: torch.Tensor,
    output_size: int | Sequence[int | None] | None,
    *,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Pooled:
    """Stochastic pooling to a given output size, with the windows of `F.adaptive_max_pool2d`.

    Output row i pools the input rows from floor(i H / OH) to ceil((i + 1) H / OH), columns alike;
    an output size of 1 pools whole planes. All else as `stochastic_pool2d`. The input is laid out
    window by window first, unless H and W are multiples of the output size, or windows are of up to
    3 x 3 cells and all start at one distance, as of 13 rows for 6; while `torch.compile` or an
    export works with symbolic sizes, only what is known of those counts. To lay it out takes memory
    of up to (1 + 2 OH / H) (1 + 2 OW / W) inputs and several times as long, and a bias of infinity
    gives NaN then.

    Args:
        output_size: one int, or (OH, OW); None keeps the input's size.
    """
    return _adaptive(2, input, output_size, return_indices, bias, training, generator)


@_overridable
def adaptive_stochastic_pool1d(
    input: torch.Tensor,
    output_size: int | Sequence[int | None] | None,
    *,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Pooled:
    """`adaptive_stochastic_pool2d` over `(N, C, L)` or `(C, L)`, as `F.adaptive_max_pool1d`."""
    return _adaptive(1, input, output_size, return_indices, bias, training, generator)


@_overridable
def adaptive_stochastic_pool3d(
    input: torch.Tensor,
    output_size: int | Sequence[int | None] | None,
    *,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Pooled:
    """`adaptive_stochastic_pool2d` over `(N, C, D, H, W)` or `(C, D, H, W)`, as
    `F.adaptive_max_pool3d`."""
    return _adaptive(3, input, output_size, return_indices, bias, training, generator)


def _adaptive(
    dims: int,
    input: torch.Tensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool,
    bias: torch.Tensor | None,
    training: bool,
    generator: torch.Generator | None,
) -> Pooled:
    """The adaptive pool over the last `dims` dimensions."""
    name = f"adaptive_stochastic_pool{dims}d"
    _check(dims, input, bias, return_indices=return_indices, training=training)
    sizes = input.shape[-dims:]
    wanted = output_size if isinstance(output_size, Sequence) else [output_size] * dims
    if len(wanted) != dims:
        many = ("one", "two", "three")[dims - 1]
        raise RuntimeError(f"{name}: output_size must be one int or {many}, got {output_size!r}")
    outputs = [
        size if out is None else _numbers(out, 1, "output_size")[0]
        for size, out in zip(sizes, wanted, strict=True)
    ]
    if min(outputs) < 1:
        raise RuntimeError(f"{name}: output_size must be positive, got {output_size!r}")
    if torch.onnx.is_in_onnx_export() and not training and not return_indices:
        batched = input if input.dim() == dims + 2 else input.unsqueeze(0)
        output = autograd.composed_adaptive_expectation(batched, bias, outputs)
        return output if batched is input else output.squeeze(0)
    if torch.jit.is_tracing():
        input = _of_this_size(input, dims)
    sides = [_even_windows(size, out) for size, out in zip(sizes, outputs, strict=True)]
    if None not in sides:
        kernel_size, stride, padding = zip(*sides, strict=True)
        # Of tiles a CPU's backend compiles all sizes at once, of windows that overlap each alone.
        few = input.device.type != "cpu" or all(known(size <= 3) for size in kernel_size)
        if kernel_size == stride or few:
            window = _window(dims, kernel_size, stride, padding)
            return _pool(dims, input, window, return_indices, bias, training, generator)
    kernel: list[int] = []
    places: list[torch.Tensor] = []
    # What windows lack is never drawn: max(-inf + bias, 0) is 0 for any finite bias.
    input = F.pad(input, [0, 1] * dims, value=-torch.inf)
    # `index_select` gives contiguous tensors: with channels at the back, those are channels_last.
    last = known(input.stride(-dims - 1) == 1)
    input = input.movedim(-dims - 1, -1) if last else input
    for dim, (size, out) in enumerate(zip(sizes, outputs, strict=True), -dims):
        cells, place, absent = _adaptive_windows(size, out, input.device)
        kernel.append(cells)
        places.append(place)
        input = input.index_select(dim - last, torch.where(absent, size, place))
    input = input.movedim(-1, -dims - 1) if last else input
    pooled = _pool(dims, input, _window(dims, kernel), return_indices, bias, training, generator)
    if not isinstance(pooled, tuple):
        return pooled
    output, rest = pooled
    flat, pitch = torch.zeros_like(rest), 1
    for size, place in zip(reversed(sizes), reversed(places), strict=True):
        cells = place.shape[0]  # of which `len` would make a plain number of a symbol
        flat = flat + place[rest % cells] * pitch
        rest, pitch = rest // cells, pitch * size
    return output, flat


def _pool(
    dims: int,
    input: torch.Tensor,
    window: Window,
    return_indices: bool,
    bias: torch.Tensor | None,
    training: bool,
    generator: torch.Generator | None,
) -> Pooled:
    """The pool over the last `dims` dimensions."""
    _check(dims, input, bias, return_indices=return_indices, training=training)
    if dims == 1:  # a plane of one row
        input = input.unsqueeze(-2)
    batched = input if input.dim() == max(dims, 2) + 2 else input.unsqueeze(0)
    shape = batched.shape[1:]
    if torch.jit.is_tracing():  # sizes are tensors, which no op takes for a window's numbers
        fitted = _fitted(window, *map(int, shape))
        batched = batched if fitted == window else _of_this_size(batched, batched.dim() - 2)
        window = fitted
    else:
        window = _fitted(window, *shape)
    if return_indices and not training:
        raise RuntimeError(
            "return_indices: in evaluation no cell is drawn, so there are no indices; pass "
            "training=True (a module: sample_in_eval=True) or return_indices=False"
        )
    if dims == 3 and window.sides(3)[0][:2] == (1, 1) and batched.is_contiguous():
        # Each slice by itself: as planes they draw the same, by kernels that slide.
        channels, depth, height, width = shape
        each = None if bias is None else bias.repeat_interleave(depth)
        slices = batched.flatten(1, 2)
        pooled = _pool(2, slices, window, return_indices, each, training, generator)
        pooled = pooled if return_indices else (pooled,)
        results = [result.unflatten(1, (channels, depth)) for result in pooled]
        if return_indices:
            number = torch.arange(depth, device=input.device)[:, None, None]
            results[1] = results[1] + number * (height * width)
    elif training:
        seed = _draw_seed(input.device, generator)
        output, code = autograd.sample(batched, bias, seed, window)
        results = [output]
        if return_indices:
            results.append(window.flat_indices(code, *batched.shape[2:]))
    else:
        results = [autograd.expectation(batched, bias, window)]
    if batched.dim() > input.dim():
        results = [result.squeeze(0) for result in results]
    if dims == 1:
        results = [result.squeeze(-2) for result in results]
    return (results[0], results[1]) if return_indices else results[0]


def _of_this_size(input: torch.Tensor, dims: int) -> torch.Tensor:
    """The same; in a program of `torch.jit.trace` it refuses other sizes, for which the windows
    that stand there would be wrong."""
    return input.expand(*[-1] * (input.dim() - dims), *map(int, input.shape[-dims:]))


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """A fresh 64-bit seed on the device: an aten op, so `torch.manual_seed` reproduces it, nothing
    waits for the device, and a captured CUDA graph draws anew at each replay."""
    if generator is not None and not isinstance(generator, torch.Generator):
        kind = torch.typename(generator)
        raise TypeError(f"argument 'generator' must be a torch.Generator, not {kind}")
    return torch.randint(
        -(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator
    )


def _even_windows(length: int, outputs: int) -> tuple[int, int, int] | None:
    """Kernel size, stride and padding with which a pool has the adaptive windows along one
    dimension, if it is known that there are such."""
    cells, rest = length // outputs, length % outputs
    if known(rest == 0):
        return cells, cells, 0
    if known(rest == 1) and known(cells > 0):
        return cells + 1, cells, 0
    return (cells + 2, cells + 1, 1) if known(rest == outputs - 1) else None


def _adaptive_windows(
    length: int, outputs: int, device: torch.device
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Cells of the longest window along one dimension; then, window by window, the positions of
    as many cells, and whether the window does not have that cell."""
    # At most two more than the quotient; which of them, is not known of a symbolic length.
    rest = length % outputs
    more = 1 if known(outputs % larger(rest, 1) == 0) else 2
    cells = length // outputs + (0 if known(rest == 0) else more)
    # On the device and from a range: a list would be copied there, which waits for the device and
    # which no CUDA graph can capture, and `torch.export` would fix a symbolic length.
    number = torch.arange(outputs, device=device)[:, None]
    positions = number * length // outputs + torch.arange(cells, device=device)
    ends = ((number + 1) * length + outputs - 1) // outputs
    # Not `clamp`, which knows no length that a trace keeps on the CPU.
    place = torch.minimum(positions, ends - 1)
    return cells, place.flatten(), (positions >= ends).flatten()


def _remembered(function: Callable[..., R]) -> Callable[..., R]:
    """Keep what was made of plain numbers, for the next call; symbols are of one trace alone."""
    kept = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def remember(*arguments: Any) -> R:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return kept(*arguments)
        except TypeError:  # a symbol has no hash
            return function(*arguments)

    return remember


@_remembered
def _fitted(window: Window, channels: int, *size: int) -> Window:
    """The window for planes or volumes of this size, which has room for one."""
    output_size = window.output_size(*size)
    if min(output_size) < 1:
        given, calculated = ("x".join(map(str, (channels, *s))) for s in (size, output_size))
        raise RuntimeError(
            f"Given input size: ({given}). Calculated output size: ({calculated}). "
            "Output size is too small"
        )
    return window.bounded(*size)


def _check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"argument '{name}' must be bool, not {torch.typename(flag)}")


def _check(dims: int, input: Any, bias: Any, **flags: Any) -> None:
    """Raise where a pool over the last `dims` dimensions takes no such input, bias or flag."""
    _check_flags(**flags)
    for name, value in (("input", input), ("bias", bias)):
        if not isinstance(value, torch.Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"argument '{name}' must be a tensor, not {type(value).__name__}")
        if value is not None and (value.layout != torch.strided or value.is_nested):
            layout = "nested" if value.is_nested else value.layout
            raise NotImplementedError(
                f"argument '{name}' must be a dense tensor, but its layout is {layout}"
            )
    if input.dim() not in (dims + 1, dims + 2) or 0 in input.shape[-dims - 1 :]:
        raise RuntimeError(
            f"Expected {dims + 1}D or {dims + 2}D (batch mode) tensor with optional 0 dim batch "
            f"size for input, but got:{list(input.shape)}"
        )
    if input.dtype not in _DTYPES:
        raise NotImplementedError(
            f"stochastic pooling is not implemented for {input.dtype}: "
            "it takes float16, bfloat16, float32 and float64"
        )
    if bias is None:
        return
    channels = input.shape[-dims - 1]
    if bias.shape != (channels,):
        raise RuntimeError(
            f"bias: expected one value per channel, shape ({channels},), "
            f"but got {tuple(bias.shape)}"
        )
    if bias.dtype not in _DTYPES:
        raise RuntimeError(f"bias: expected a floating dtype, but got {bias.dtype}")
    if bias.device != input.device:
        raise RuntimeError(
            f"bias: expected on the input's device {input.device}, but it is on {bias.device}"
        )


def _window(
    dims: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Window:
    """The window of arguments with `dims` numbers or one, for pools over `dims` dimensions."""
    _check_flags(ceil_mode=ceil_mode)
    empty = isinstance(stride, Sequence) and len(stride) == 0
    return _checked(
        _numbers(kernel_size, dims, "kernel_size"),
        _numbers(kernel_size if stride is None or empty else stride, dims, "stride"),
        _numbers(padding, dims, "padding"),
        _numbers(dilation, dims, "dilation"),
        ceil_mode,
    )


@_remembered
def _checked(
    kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> Window:
    """`Window.of` what is right; raises what `F.max_pool2d` and `F.max_pool3d` would."""
    every = (*kernel_size, *stride, *padding, *dilation)
    if len(kernel_size) > 1 and any(known(number >= 2**31) for number in every):
        raise RuntimeError("value cannot be converted to type int without overflow")
    positive = {"kernel size": kernel_size, "stride": stride, "dilation": dilation}
    for name, numbers in positive.items():
        if min(numbers) <= 0:
            raise RuntimeError(f"{name} should be greater than zero, but got {numbers}")
    if min(padding) < 0:
        raise RuntimeError(f"pad must be non-negative, but got {padding}")
    if any(pad > size // 2 for pad, size in zip(padding, kernel_size, strict=True)):
        raise RuntimeError(
            "pad should be smaller than or equal to half of kernel size, but got "
            f"pad = {padding}, kernel size = {kernel_size}"
        )
    return Window.of(kernel_size, stride, padding, dilation, ceil_mode)


def _numbers(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    if type(value) is int:
        return (value,) * dims
    try:
        numbers = tuple(
            # What counts as an int: numpy's, and tensors of one. `index` would fix a symbol.
            item if isinstance(item, (int, torch.SymInt)) else operator.index(item)
            for item in (value if isinstance(value, Sequence) else (value,))
        )
        if bool in [type(number) for number in numbers]:
            raise TypeError("a bool is no number")
    except TypeError as error:
        raise TypeError(
            f"argument '{name}' must be an int or a tuple of ints, not {value!r}"
        ) from error
    if len(numbers) == 1:
        return numbers * dims
    if len(numbers) != dims:
        many = ("one int", "two ints", "three ints")[dims - 1]
        raise RuntimeError(
            f"stochastic_pool{dims}d: {name} must either be a single int, or a tuple of {many}"
        )
    return numbers
