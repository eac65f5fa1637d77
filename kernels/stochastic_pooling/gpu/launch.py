"""The four functions of `reference.py` for GPU tensors: which kernel, on which grid.

What a launch needs besides tensors follows from their sizes, strides and device, and is computed
once for each. `TRITON_INTERPRET=1` before the import runs the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl

from .. import reference
from ..window import Window, memory_format
from .general import expectation_kernel, gather_kernel, sample_kernel
from .gradient import gradient_sliding_kernel
from .sliding import (
    expectation_sliding_kernel,
    gather_sliding_kernel,
    sample_sliding_kernel,
)

# Bytes of the accumulation dtype in a tile: two fp32 or one fp64 for each thread of 4 warps. More
# would have the fp64 kernels spill registers.
TILE_BYTES = 1024
# Lanes of a sliding kernel's program, a thread each.
SLIDING_BLOCK = 128
# Threads that fill a large GPU (an H100 holds 135,000 with 64 registers each): planes are cut into
# strips until there are as many.
FILLING_THREADS = 2**17
# Inner rows of a sliding kernel come in unrolled groups of so many, by the window's vertical
# stride, and a strip is a multiple of one. Four rows share a Philox call; with stride 1 the rows in
# registers are back where they began after three.
_ROWS = {"sample": (4, 4), "expectation": (6, 4), "gather": (3, 3), "gradient": (3, 2)}
_SLIDING = {
    "sample": sample_sliding_kernel,
    "expectation": expectation_sliding_kernel,
    "gather": gather_sliding_kernel,
    "gradient": gradient_sliding_kernel,
}
# Cells of a side of the largest window that slides.
LARGEST_SIDE = 5
# Registers of a thread, by the horizontal stride of windows of up to 3 cells a side: so few that
# the assembler tries hard, so many that it spills none on any target of the kernel report.
_REGISTERS = {
    "sample": (80, 72),
    "expectation": (72, 96),
    "gather": (64, 80),
    "gradient": (80, 80),
}

_SIZES = ("depth", "height", "width")

_INTERPRETED = triton.knobs.runtime.interpret
_ALREADY_CURRENT = contextlib.nullcontext()
Ints: TypeAlias = tuple[int, ...]


class Plan(NamedTuple):
    """What a launch needs besides tensors.

    The kernel's first arguments are the tensors named by `pointers`, the others `numbers`.
    `partial_bias` is the shape of what a backward adds up to the bias's gradient, channels in the
    middle; `compiled` holds what Triton made of the kernel, for each kind of tensors.
    """

    kernel: Any
    grid: Ints
    pointers: tuple[str, ...]
    numbers: tuple[Any, ...]
    options: dict[str, Any]
    partial_bias: Ints
    compiled: dict[tuple[Any, ...], Any]


class Call(NamedTuple):
    """All that decides a launch. Shapes and strides are those of the input, or its gradient, and of
    the output, or what has its size; and the gradient's strides."""

    name: str
    window: Window
    layout: torch.memory_format
    in_shape: torch.Size
    in_strides: Ints
    out_shape: torch.Size
    out_strides: Ints
    grad_strides: Ints | None
    dtype: torch.dtype
    target: Any
    block: int
    filling_threads: int
    has_bias: bool = False
    bias_gradient: bool = False

    @property
    def channels_last(self) -> bool:
        return self.layout != torch.contiguous_format


class Constants(str):
    """Numbers that a kernel is compiled for, as one argument: its attributes.

    It is the text of them, so that Triton can compare it, hash it and write it down.
    """

    def __new__(cls, **numbers: Any) -> Constants:
        self = super().__new__(cls, numbers)
        for name, number in numbers.items():
            setattr(self, name, number if _INTERPRETED else tl.constexpr(number))
        return self


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    layout = memory_format(input)
    output = _empty_output(input, window, layout, input.dtype)
    code = torch.empty_like(output, dtype=window.code_dtype)
    plan = _plan("sample", window, layout, input, output, has_bias=bias is not None)
    _launch(
        plan, input.device,
        input_ptr=input, bias_ptr=bias, seed_ptr=seed, output_ptr=output, code_ptr=code,
    )  # fmt: skip
    return output, code


def sample_backward(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    size: Sequence[int],
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample_backward`."""
    layout = memory_format(code)
    code = code.contiguous(memory_format=layout)
    grad_input = torch.empty(
        (*code.shape[:2], *size), dtype=grad_output.dtype, device=code.device, memory_format=layout
    )
    plan = _plan("gather", window, layout, grad_input, code, grad_output, bias_gradient=with_bias)
    return _gather(plan, grad_input, with_bias, grad_output_ptr=grad_output, code_ptr=code)


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    layout = memory_format(input)
    output = _empty_output(input, window, layout, input.dtype)
    plan = _plan("expectation", window, layout, input, output, has_bias=bias is not None)
    _launch(plan, input.device, input_ptr=input, bias_ptr=bias, output_ptr=output)
    return output


def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.expectation_backward`."""
    layout = memory_format(input)
    grad_input = torch.empty(
        input.shape, dtype=grad_output.dtype, device=input.device, memory_format=layout
    )
    flags: Any = {"has_bias": bias is not None, "bias_gradient": with_bias}
    tensors = {"input_ptr": input, "bias_ptr": bias}
    plan = _plan("gradient", window, layout, input, grad_output, grad_output, **flags)
    if plan is not None:
        return _gather(plan, grad_input, with_bias, grad_output_ptr=grad_output, **tensors)
    slope = _empty_output(input, window, layout, reference.accumulation_dtype(input.dtype))
    tensors |= {"slope_ptr": slope, "offset_ptr": torch.empty_like(slope)}
    plan = _plan("coefficients", window, layout, input, slope, grad_output, **flags)
    _launch(plan, input.device, grad_output_ptr=grad_output, **tensors)
    plan = _plan("distribute", window, layout, input, slope, **flags)
    return _gather(plan, grad_input, with_bias, **tensors)


def _gather(
    plan: Plan, grad_input: torch.Tensor, with_bias: bool, **tensors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `grad_input`; it and the bias's gradient."""
    partial_bias = torch.empty(
        plan.partial_bias if with_bias else 0,
        dtype=reference.accumulation_dtype(grad_input.dtype),
        device=grad_input.device,
    )
    _launch(
        plan, grad_input.device,
        grad_input_ptr=grad_input, partial_bias_ptr=partial_bias, **tensors,
    )  # fmt: skip
    return grad_input, partial_bias.sum((0, 2)) if with_bias else partial_bias


def _launch(plan: Plan, device: torch.device, **tensors: torch.Tensor | None) -> None:
    if plan.grid[0] == 0:
        return
    if (bias := tensors.get("bias_ptr")) is not None:
        tensors["bias_ptr"] = bias.contiguous()
    pointers = [tensors.get(name) for name in plan.pointers]
    # What else a kernel is compiled for. To have Triton find that out takes longer than most small
    # kernels run.
    kind = (device, *[t is not None and (t.dtype, t.data_ptr() % 64) for t in pointers])
    compiled = plan.compiled.get(kind)
    with _current(device):
        if compiled is not None:
            compiled[plan.grid](*pointers, *plan.numbers)
            return
        compiled = plan.kernel[plan.grid](*pointers, *plan.numbers, **plan.options)
    # On AMD's GPUs it is compiled for the size of the storages, too. What was only compiled, not
    # launched, has no module; in the interpreter nothing is.
    if "maxnreg" in plan.options and getattr(compiled, "module", None) is not None:
        plan.compiled[kind] = compiled


def _empty_output(
    input: torch.Tensor, window: Window, layout: torch.memory_format, dtype: torch.dtype
) -> torch.Tensor:
    shape = (*input.shape[:2], *_output_size(window, input.shape[2:]))
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=layout)


@functools.lru_cache(4096)
def _output_size(window: Window, size: torch.Size) -> Ints:
    return window.output_size(*size)


# ---------------------------------------------------------------- plans


def _plan(
    name: str,
    window: Window,
    layout: torch.memory_format,
    input: torch.Tensor,
    output: torch.Tensor,
    grad: torch.Tensor | None = None,
    **flags: bool,
) -> Any:
    """The launch of a call over tensors of the input's size and of the output's, and a gradient of
    the latter; None for a gradient of the expectation that does not slide."""
    call = Call(
        name, window, layout, input.shape, input.stride(), output.shape, output.stride(),
        None if grad is None else grad.stride(), input.dtype,
        _target(input.device), SLIDING_BLOCK, FILLING_THREADS, **flags,
    )  # fmt: skip
    return _planned(call)


@functools.lru_cache(4096)
def _planned(call: Call) -> Plan | None:
    window = call.window
    # What all kernels of a call are compiled for.
    constants = {name: number for name, number in asdict(window).items() if name != "ceil_mode"}
    constants.update(
        dead=window.dead_code, has_bias=call.has_bias, bias_gradient=call.bias_gradient
    )
    strides = call.in_strides, call.out_strides, call.grad_strides or call.out_strides
    step = max(w for *_, w in strides)
    if (
        call.name in _SLIDING
        and len(call.in_shape) == 4
        and all(
            size <= LARGEST_SIDE and stride <= min(size, 2) and dilation == 1
            for size, stride, _, dilation in window.sides(2)
        )
        and call.dtype != torch.float64
        and math.prod(call.in_shape) * math.prod(call.out_shape) > 0
        # Indices are of 32 bits; those of a lane's columns begin beyond the last one.
        and max(*_extents(call, 0), math.prod(call.in_shape)) + (LARGEST_SIDE + 1) * step < 2**31
    ):
        return _slide(call, constants)
    return None if call.name == "gradient" else _tile(call, constants)


def _extents(call: Call, first: int) -> list[int]:
    """One more than the largest offsets in the tensors, over the dimensions from `first` on."""
    tensors = (
        (call.in_shape, call.in_strides),
        (call.out_shape, call.out_strides),
        (call.out_shape, call.grad_strides or call.out_strides),
    )
    return [
        1 + sum((n - 1) * s for n, s in zip(shape[first:], strides[first:], strict=True))
        for shape, strides in tensors
    ]


def _slide(call: Call, constants: dict[str, Any]) -> Plan:
    window, channels_last = call.window, call.channels_last
    batch, channels, height, width = call.in_shape
    out_height, out_width = call.out_shape[2:]
    # Where planes have one row, and windows, images are the rows.
    folded = height == window.kernel_h == 1
    if folded:
        batch, height, out_height = 1, batch, batch
    gathers = call.name in ("gather", "gradient")
    # A lane owns two columns of what is written, so `own` of what is read.
    own = 2 // window.stride_w if gathers else 2 * window.stride_w
    owned_width, read_width = (width, out_width) if gathers else (out_width, width)
    pairs = triton.cdiv(owned_width, 2)
    lanes = batch * channels * pairs

    def view(shape: torch.Size, strides: Ints, columns: int) -> tuple[Constants, dict[str, int]]:
        """What the kernels know of a tensor of whose columns a lane has so many, and its strides
        in units of as many elements as are loaded at once."""
        n, c, h, w = (s if size > 1 else 0 for size, s in zip(shape, strides, strict=True))
        if folded:
            n, h = 0, n
        even = not any(number % 2 for number in (columns, n, c, h, shape[3]))
        unit = 2 if even and w == 1 and not channels_last else 1
        # The numbers of channels that networks have get code of their own, with 5 to 14 % fewer
        # instructions; all others share theirs.
        constant = w % 8 == 0 if channels_last else w == 1
        # What an inner row reads beyond its ends lies in the rows beside it, if these begin and end
        # there and have room for it; where images are rows, in the next channel's.
        row = shape[3] * w
        adjacent = h == row or (folded and c == row and h == channels * c)
        masked = h < (window.kernel_w + 1) * w or (w > 0 and not adjacent)
        numbers = {"n": n // unit, "c": c // unit, "pitch": h // unit, "step": w}
        return Constants(unit=unit, step=w * constant, masked=masked), numbers

    input = view(call.in_shape, call.in_strides, 2 if gathers else own)
    output = view(call.out_shape, call.out_strides, own if gathers else 2)
    grad = output
    if call.grad_strides is not None:
        grad = view(call.out_shape, call.grad_strides, own)
    if call.name == "gradient":
        strides = torch.empty(call.in_shape, device="meta", memory_format=call.layout).stride()
        read, owned = input, view(call.in_shape, strides, 2)
    else:
        read, owned = (output, input) if gathers else (input, output)

    # The windows of inner rows end above the last row of the input.
    inner = (height - 1 + window.padding_h - window.kernel_h) // window.stride_h + 1
    start, stop = 0, out_height
    if gathers:
        # The first row of outputs that completes a row of the input, and the one after the last.
        start = max(0, triton.cdiv(window.padding_h - window.stride_h + 1, window.stride_h))
        stop = triton.cdiv(height + window.padding_h, window.stride_h)
        inner = out_height - 1 if call.name == "gather" else min(inner, out_height - 1)
    # Few strips, but enough to fill a GPU; a grid's limit is 2**16 - 1.
    wanted = min(triton.cdiv(call.filling_threads, lanes), 2**15)
    rows = _ROWS[call.name][window.stride_h - 1]
    strip_rows = rows * max(1, triton.cdiv(stop - start, rows * wanted))
    if call.name == "gradient":
        strip_rows += 1  # whose first row belongs to no group
    strips = triton.cdiv(stop - start, strip_rows)

    # Of the outputs whose windows reach the lane's columns of the input, counted from the first
    # that begins in them or later, if nothing were padded; and where in the input they begin.
    first = -((window.kernel_w - 1 - window.padding_w) // window.stride_w)
    constants.update(
        first=first, columns=(1 + window.padding_w) // window.stride_w - first + 1,
        start=first * window.stride_w - window.padding_w,
        channels=channels if channels_last and channels % 8 == 0 else 0,
        channels_last=channels_last, folded=folded, draws=call.name == "sample",
        block=call.block, rows=rows,
        # Two rows of input for each, at once, are more numbers than there are registers.
        batch=1 if call.name == "sample" and window.stride_w == 2 else rows,
        # How many of the columns it reads every lane has, the last one of a row included; in a
        # backward without padding that lane may begin beyond the last output.
        inside=min(own, read_width - (pairs - 1) * own),
        in_inside=2 - width % 2 if call.name == "gradient" else 0,
        # Whether one index serves two tensors.
        same=read == owned and (call.name == "gradient" or (own == 2 and window.stride_h == 1)),
        grad_same=grad == output if call.name == "gather" else grad == owned and own == 2,
        own=owned[0], read=read[0], grad=grad[0],
    )  # fmt: skip
    registers = _REGISTERS[call.name][window.stride_w - 1]
    if max(window.kernel_h, window.kernel_w) > 3:
        registers = 168
    if channels_last and channels % 8:
        registers += 8  # for more addresses
    kernel = _SLIDING[call.name]
    numbers = dict(
        start_row=start, stop_row=stop, inner_rows=inner, strip_rows=strip_rows, one=0x3F800000,
        pairs=pairs, lanes=lanes,
        channels=channels, height=height, width=width, out_height=out_height, out_width=out_width,
        **{f"in_{name}": number for name, number in input[1].items()},
        **{f"out_{name}": number for name, number in output[1].items()},
        **{f"own_{name}": number for name, number in owned[1].items()},
        **{f"grad_{name}": number for name, number in grad[1].items()},
        v=Constants(**constants),
    )  # fmt: skip
    partial = strips * batch * pairs
    return _made(
        kernel,
        (triton.cdiv(lanes, call.block), strips, 1),
        numbers,
        _compiler_options(call, registers, call.block),
        (partial, channels, 1) if channels_last else (1, channels, partial),
    )


def _tile(call: Call, constants: dict[str, Any]) -> Plan:
    in_shape, out_shape, in_strides = call.in_shape, call.out_shape, call.in_strides
    channels_last = call.channels_last
    batch, channels = in_shape[:2]
    numbers: dict[str, Any] = {"channels": channels}
    for prefix, shape in (("", in_shape), ("out_", out_shape)):
        sizes = (1, *shape[2:])[-3:]
        numbers |= {f"{prefix}{name}": n for name, n in zip(_SIZES, sizes, strict=True)}
    for prefix, strides in (("in", in_strides), ("grad", call.grad_strides or in_strides)):
        n, c, *size = strides
        strides = (n, c, *(0, *size)[-3:])
        numbers |= {f"{prefix}_stride_{name}": s for name, s in zip("ncdhw", strides, strict=True)}
    for prefix, shape in (("out", out_shape), ("grad_in", in_shape)):  # of dense tensors
        cells = math.prod(shape[2:])
        strides = (channels * cells, 1, channels) if channels_last else (channels * cells, cells, 1)
        numbers |= {f"{prefix}_stride_{name}": s for name, s in zip("ncp", strides, strict=True)}

    # The tensor that the programs own, in tiles that are long where memory is contiguous and full
    # where planes are small.
    gathers = call.name in ("gather", "distribute")
    depth, height, width = (1, *(in_shape if gathers else out_shape)[2:])[-3:]
    positions = height * width
    double = call.dtype == torch.float64
    tile = TILE_BYTES // (8 if double else 4)
    # There may be no channels: `vmap` makes them of its examples.
    most_c, most_p = (triton.next_power_of_2(max(n, 1)) for n in (channels, positions))
    block_p = min(most_p, tile // min(most_c, 64) if channels_last else tile)
    block_c = min(most_c, tile // block_p)
    blocks_p = batch * depth * triton.cdiv(positions, block_p)
    wide = max(*_extents(call, 1), math.prod(in_shape[1:])) >= 2**30
    constants.update(
        coefficients=call.name == "coefficients", sampled=call.name == "gather",
        acc=tl.float64 if double else tl.float32, index=tl.int64 if wide else tl.int32,
        block_p=block_p, block_c=block_c,
    )  # fmt: skip
    kernel = (
        gather_kernel if gathers else sample_kernel if call.name == "sample" else expectation_kernel
    )
    numbers.update(positions=positions, v=Constants(**constants))
    return _made(
        kernel,
        (blocks_p * triton.cdiv(channels, block_c), 1, 1),
        numbers,
        _compiler_options(call),
        (blocks_p, channels, 1),
    )


def _made(
    kernel: Any, grid: Ints, numbers: dict[str, Any], options: dict[str, Any], partial_bias: Ints
) -> Plan:
    """A plan with those of the numbers that the kernel takes."""
    names = kernel.arg_names
    pointers = tuple(name for name in names if name.endswith("_ptr"))
    taken = tuple(numbers[name] for name in names[len(pointers) :])
    return Plan(kernel, grid, pointers, taken, options, partial_bias, {})


# ---------------------------------------------------------------- devices


def _compiler_options(call: Call, registers: int = 128, lanes: int = 128) -> dict[str, Any]:
    """A limit to the registers of a thread on CUDA, as many warps as `lanes` fill, and whether
    products and sums may become multiply-adds: where they may not, the draw is the reference's to
    the last bit.

    Left alone, NVIDIA's assembler spills a register or two where that lets one more block run; with
    a limit of ours, which no kernel needs to spill for, it does not.
    """
    target = call.target
    if target is None:
        return {}
    options = {"num_warps": lanes // target.warp_size, "enable_fp_fusion": call.name != "sample"}
    if target.backend == "cuda":
        # What the assembler makes for these needs some more.
        more = target.arch == 100 or (target.arch == 120 and call.name == "gradient")
        options["maxnreg"] = registers + 8 * more
    return options


def _target(device: torch.device) -> Any:
    """What Triton compiles for on the device; None in the interpreter."""
    return None if _INTERPRETED else _target_of(triton.runtime.driver.active, device)


@functools.lru_cache
def _target_of(driver: Any, device: torch.device) -> Any:
    with _current(device):
        return driver.get_current_target()


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton launches there."""
    if device.type == "cpu":  # in the interpreter
        return _ALREADY_CURRENT
    module = torch.get_device_module(device)
    return _ALREADY_CURRENT if module.current_device() == device.index else module.device(device)
