"""The Triton backend: the four functions of `reference.py` for GPU tensors.

It chooses between the kernels of `triton_general.py` and those of `triton_sliding.py` and launches
them. `TRITON_INTERPRET=1` before the import runs them on CPU tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import reference
from .triton_general import expectation_kernel, gather_kernel, sample_kernel
from .triton_sliding import (
    EXPECTATION_GROUP,
    GATHER_GROUP,
    SAMPLE_GROUP,
    expectation_sliding_kernel,
    gather_sliding_kernel,
    sample_sliding_kernel,
)
from .window import Window, memory_format

# Bytes of the accumulation dtype in a tile: two fp32 or one fp64 for each thread of 4 warps. More
# would have the fp64 kernels spill registers.
TILE_BYTES = 1024

# Lanes of a sliding kernel's program, a thread each.
SLIDING_BLOCK = 128
# Threads that fill a large GPU (an H100 holds 135,000 with 64 registers each): planes are cut into
# strips until there are as many.
FILLING_THREADS = 2**17
# Registers of a thread, by the channels of its lane and the window's horizontal stride: so few that
# the assembler tries hard, so many that it spills none on any target of the kernel report.
_SLIDING_REGISTERS = {
    sample_sliding_kernel: {(1, 1): 64, (1, 2): 72, (2, 1): 96, (2, 2): 120},
    expectation_sliding_kernel: {(1, 1): 64, (1, 2): 80, (2, 1): 96, (2, 2): 112},
    gather_sliding_kernel: {(1, 1): 64, (1, 2): 80, (2, 1): 96, (2, 2): 112},
}


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    output = _empty_output(input, window, input.dtype)
    code = torch.empty_like(output, dtype=window.code_dtype)
    if _slides(window, input, output, code):
        _launch_sliding_forward(
            sample_sliding_kernel, SAMPLE_GROUP, input, output, window,
            input_ptr=input, bias_ptr=bias, seed_ptr=seed, output_ptr=output, code_ptr=code,
            one=0x3F800000, HAS_BIAS=bias is not None, DEAD=window.dead_code,
        )  # fmt: skip
        return output, code
    _launch(
        sample_kernel,
        output,
        dict(
            input_ptr=input, bias_ptr=bias, seed_ptr=seed, output_ptr=output, code_ptr=code,
            channels=input.shape[1], **_sizes("", input), **_sizes("out_", output, "dw"),
            **_strides("in", input), **_dense_strides("out", output),
            HAS_BIAS=bias is not None, DEAD=window.dead_code,
        ),
        window,
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
    grad_input = _empty(
        (*code.shape[:2], *size), grad_output.dtype, code.device, memory_format(code)
    )
    if _slides(window, grad_output, code, grad_input):
        return grad_input, _gather_sliding(grad_output, code, grad_input, window, with_bias)
    grad_bias = _gather(
        grad_input, code, window, with_bias, grad_output_ptr=grad_output, code_ptr=code,
        **_strides("grad", grad_output),
    )  # fmt: skip
    return grad_input, grad_bias


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    output = _empty_output(input, window, input.dtype)
    if _slides(window, input, output):
        _launch_sliding_forward(
            expectation_sliding_kernel, EXPECTATION_GROUP, input, output, window,
            input_ptr=input, bias_ptr=bias, output_ptr=output, HAS_BIAS=bias is not None,
        )  # fmt: skip
        return output
    _launch_expectation(input, bias, window, output, output_ptr=output)
    return output


def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.expectation_backward`."""
    slope = _empty_output(input, window, reference.accumulation_dtype(input.dtype))
    offset = torch.empty_like(slope)
    _launch_expectation(
        input, bias, window, slope,
        grad_output_ptr=grad_output, slope_ptr=slope, offset_ptr=offset,
        **_strides("grad", grad_output),
    )  # fmt: skip
    grad_input = _empty(input.shape, grad_output.dtype, input.device, memory_format(input))
    grad_bias = _gather(
        grad_input, slope, window, with_bias,
        slope_ptr=slope, offset_ptr=offset, input_ptr=input, bias_ptr=bias,
        **_strides("in", input),
    )  # fmt: skip
    return grad_input, grad_bias


def _launch_expectation(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    dense: torch.Tensor,
    **arguments: Any,
) -> None:
    pointers = dict.fromkeys(("output_ptr", "grad_output_ptr", "slope_ptr", "offset_ptr"))
    _launch(
        expectation_kernel,
        dense,
        dict(
            **{**pointers, **_no_strides("grad"), **arguments},
            input_ptr=input, bias_ptr=bias,
            channels=input.shape[1], **_sizes("", input), **_sizes("out_", dense, "dw"),
            **_strides("in", input), **_dense_strides("out", dense),
            HAS_BIAS=bias is not None, COEFFICIENTS="slope_ptr" in arguments,
        ),
        window,
    )  # fmt: skip


def _gather(
    grad_input: torch.Tensor,
    per_output: torch.Tensor,
    window: Window,
    with_bias: bool,
    **arguments: Any,
) -> torch.Tensor:
    """Fill `grad_input` and return the bias's gradient."""
    block_p, _ = _tile_shape(grad_input)
    batch, channels, *depth, height, width = grad_input.shape
    programs = batch * math.prod(depth) * triton.cdiv(height * width, block_p)
    partial_bias = torch.empty(
        programs if with_bias else 0,
        channels if with_bias else 0,
        dtype=reference.accumulation_dtype(grad_input.dtype),
        device=grad_input.device,
    )
    pointers = dict.fromkeys(
        ("grad_output_ptr", "code_ptr", "slope_ptr", "offset_ptr", "input_ptr", "bias_ptr")
    )
    _launch(
        gather_kernel,
        grad_input,
        dict(
            **{**pointers, **_no_strides("in"), **_no_strides("grad"), **arguments},
            grad_input_ptr=grad_input, partial_bias_ptr=partial_bias,
            channels=channels, **_sizes("", grad_input, "dw"), **_sizes("out_", per_output),
            **_dense_strides("out", per_output), **_dense_strides("grad_in", grad_input),
            SAMPLED="code_ptr" in arguments, HAS_BIAS=arguments.get("bias_ptr") is not None,
            BIAS_GRADIENT=with_bias,
        ),
        window,
    )  # fmt: skip
    return partial_bias.sum(0)


def _slides(window: Window, read: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether a sliding kernel serves this window and these tensors."""
    layout = memory_format(read)
    tensors = (read, *others)
    return (
        read.dim() == 4
        and {window.kernel_h, window.kernel_w} <= {2, 3}
        and {window.stride_h, window.stride_w} <= {1, 2}
        and (window.dilation_h, window.dilation_w) == (1, 1)
        and read.dtype != torch.float64
        and all(tensor.is_contiguous(memory_format=layout) for tensor in tensors)
        # What an inner row reads beyond its end lies in the next one.
        and min(tensor.shape[3] for tensor in tensors) >= 4
        # Every index fits 32 bits.
        and min(tensor.numel() for tensor in tensors) > 0
        and max(tensor.numel() for tensor in tensors) < 2**31
    )


def _launch_sliding_forward(
    kernel: Any,
    group: int,
    input: torch.Tensor,
    output: torch.Tensor,
    window: Window,
    **arguments: Any,
) -> None:
    # The windows of inner rows end above the last row of the input.
    inner_rows = (input.shape[2] - 1 + window.padding_h - window.kernel_h) // window.stride_h + 1
    layout = _SlidingLayout(output, input, 2 * window.stride_w)
    strip_rows, strips = layout.strips(output.shape[2], group)
    _launch_sliding(
        kernel, layout, strips, input, output, window,
        in_pitch=layout.read_pitch, IN_UNIT=layout.read_unit,
        out_pitch=layout.owned_pitch, OUT_UNIT=layout.owned_unit,
        strip_rows=strip_rows, inner_rows=inner_rows,
        **arguments,
    )  # fmt: skip


def _gather_sliding(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    grad_input: torch.Tensor,
    window: Window,
    with_bias: bool,
) -> torch.Tensor:
    """Fill `grad_input` and return the bias's gradient."""
    batch, channels, height, _ = grad_input.shape
    # The first row of outputs that completes a row of the input, and the one after the last.
    start_row = max(0, triton.cdiv(window.padding_h - window.stride_h + 1, window.stride_h))
    stop_row = triton.cdiv(height + window.padding_h, window.stride_h)
    layout = _SlidingLayout(grad_input, grad_output, 2 // window.stride_w)
    strip_rows, strips = layout.strips(stop_row - start_row, GATHER_GROUP)
    partial_bias = torch.empty(
        (strips * layout.lanes * layout.vector) if with_bias else 0,
        dtype=torch.float32,
        device=code.device,
    )
    _launch_sliding(
        gather_sliding_kernel, layout, strips, grad_input, grad_output, window,
        grad_output_ptr=grad_output, code_ptr=code, grad_input_ptr=grad_input,
        partial_bias_ptr=partial_bias,
        in_pitch=layout.owned_pitch, IN_UNIT=layout.owned_unit,
        out_pitch=layout.read_pitch, OUT_UNIT=layout.read_unit,
        strip_rows=strip_rows, inner_rows=grad_output.shape[2] - 1,
        start_row=start_row, stop_row=stop_row,
        DEAD=window.dead_code, BIAS_GRADIENT=with_bias,
    )  # fmt: skip
    if not with_bias:
        return partial_bias
    if layout.step:
        return partial_bias.view(-1, channels).sum(0)
    return partial_bias.view(strips, batch, channels, layout.pairs).sum((0, 1, 3))


class _SlidingLayout:
    """How the lanes of a sliding kernel lie over the tensor that they own and the one they read.

    Attributes:
        pairs, lanes: pairs of owned columns in a row, and lanes in all.
        step, vector: channels_last: the distance of two columns, and the channels of a lane.
        owned_unit, read_unit, owned_pitch, read_pitch: elements in a unit, units in a row.
        inside: how many of the columns it reads every lane has, the last one of a row included; in
            a backward without padding that lane may begin beyond the last output.
    """

    def __init__(self, owned: torch.Tensor, read: torch.Tensor, own: int):
        batch, channels, _, width = owned.shape
        read_width = read.shape[3]
        self.pairs = triton.cdiv(width, 2)
        if memory_format(owned) == torch.channels_last:
            self.step, self.vector = channels, 2 if channels % 2 == 0 else 1
            self.owned_unit = self.read_unit = self.vector
        else:
            self.step, self.vector = 0, 1
            self.owned_unit = 2 if width % 2 == 0 else 1
            self.read_unit = 2 if read_width % 2 == 0 and own % 2 == 0 else 1
        self.lanes = batch * channels // self.vector * self.pairs
        self.owned_pitch = width * max(self.step, 1) // self.owned_unit
        self.read_pitch = read_width * max(self.step, 1) // self.read_unit
        self.inside = min(own, read_width - (self.pairs - 1) * own)

    def strips(self, rows: int, group: int) -> tuple[int, int]:
        """Rows in a strip, a multiple of `group`, and strips, few but enough to fill a GPU."""
        wanted = min(triton.cdiv(FILLING_THREADS, self.lanes), 2**15)  # a grid's limit is 2**16 - 1
        strip_rows = group * max(1, triton.cdiv(rows, group * wanted))
        return strip_rows, triton.cdiv(rows, strip_rows)


def _launch_sliding(
    kernel: Any,
    layout: _SlidingLayout,
    strips: int,
    input: torch.Tensor,
    output: torch.Tensor,
    window: Window,
    **arguments: Any,
) -> None:
    """Run a sliding kernel for the window over `input` and `output`, or their gradients."""
    registers = _SLIDING_REGISTERS[kernel][layout.vector, window.stride_w]
    height, width = input.shape[2:]
    out_height, out_width = output.shape[2:]
    with _current(input.device):
        kernel[(triton.cdiv(layout.lanes, SLIDING_BLOCK), strips)](
            **arguments,
            channels=input.shape[1], height=height, width=width,
            out_height=out_height, out_width=out_width,
            pairs=layout.pairs, lanes=layout.lanes,
            kernel_h=window.kernel_h, kernel_w=window.kernel_w,
            stride_h=window.stride_h, stride_w=window.stride_w,
            padding_h=window.padding_h, padding_w=window.padding_w,
            STEP=layout.step, VECTOR=layout.vector, INSIDE=layout.inside,
            SAME=(height, width, window.stride_w) == (out_height, out_width, 1),
            BLOCK=SLIDING_BLOCK,
            **_compiler_options(kernel, registers, SLIDING_BLOCK),
        )  # fmt: skip


def _launch(kernel: Any, dense: torch.Tensor, arguments: dict[str, Any], window: Window) -> None:
    """Run `kernel` on tiles that cover `dense`, the tensor that its programs own."""
    if dense.numel() == 0:
        return
    batch, channels, *depth, height, width = dense.shape
    positions = height * width
    block_p, block_c = _tile_shape(dense)
    programs = (
        batch * math.prod(depth) * triton.cdiv(positions, block_p) * triton.cdiv(channels, block_c)
    )
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    wide = any(_image_extent(tensor) >= 2**30 for tensor in tensors)
    with _current(dense.device):
        kernel[(programs,)](
            **arguments,
            positions=positions,
            kernel_d=window.kernel_d, kernel_h=window.kernel_h, kernel_w=window.kernel_w,
            stride_d=window.stride_d, stride_h=window.stride_h, stride_w=window.stride_w,
            padding_d=window.padding_d, padding_h=window.padding_h, padding_w=window.padding_w,
            dilation_d=window.dilation_d, dilation_h=window.dilation_h,
            dilation_w=window.dilation_w,
            ACC=tl.float64 if dense.dtype == torch.float64 else tl.float32,
            INDEX=tl.int64 if wide else tl.int32,
            BLOCK_P=block_p, BLOCK_C=block_c,
            **_compiler_options(kernel),
        )  # fmt: skip


def _compiler_options(kernel: Any, registers: int = 128, lanes: int = 128) -> dict[str, Any]:
    """A limit to the registers of a thread on CUDA, as many warps as `lanes` fill, and whether
    products and sums may become multiply-adds: where they may not, the draw is the reference's to
    the last bit.

    Left alone, NVIDIA's assembler spills a register or two where that lets one more block run; with
    a limit of ours, which no kernel needs to spill for, it does not.
    """
    if triton.knobs.runtime.interpret:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    options = {
        "num_warps": lanes // target.warp_size,
        "enable_fp_fusion": kernel not in (sample_kernel, sample_sliding_kernel),
    }
    if target.backend == "cuda":
        options["maxnreg"] = registers
    return options


def _tile_shape(dense: torch.Tensor) -> tuple[int, int]:
    """BLOCK_P and BLOCK_C: the tile is long where memory is contiguous."""
    _, channels, *_, height, width = dense.shape
    tile = TILE_BYTES // reference.accumulation_dtype(dense.dtype).itemsize
    block_c = 1
    if memory_format(dense) != torch.contiguous_format:
        block_c = min(triton.next_power_of_2(channels), 64)
    return min(triton.next_power_of_2(height * width), tile // block_c), block_c


def _image_extent(tensor: torch.Tensor) -> int:
    """One more than the largest offset inside an image, in elements."""
    if tensor.dim() < 4:
        return tensor.numel()
    return 1 + sum(
        (size - 1) * stride
        for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )


def _sizes(prefix: str, tensor: torch.Tensor, dimensions: str = "dhw") -> dict[str, int]:
    """Those of the sizes depth (1 for planes), height and width that are asked for."""
    names = {"d": "depth", "h": "height", "w": "width"}
    sizes = dict(zip("dhw", (1, *tensor.shape[2:])[-3:], strict=True))
    return {prefix + names[d]: sizes[d] for d in dimensions}


def _strides(prefix: str, tensor: torch.Tensor) -> dict[str, int]:
    n, c, *d, h, w = tensor.stride()
    strides = zip("ncdhw", (n, c, *(d or [0]), h, w), strict=True)
    return {f"{prefix}_stride_{dimension}": stride for dimension, stride in strides}


def _no_strides(prefix: str) -> dict[str, int]:
    return {f"{prefix}_stride_{d}": 0 for d in "ncdhw"}


def _dense_strides(prefix: str, tensor: torch.Tensor) -> dict[str, int]:
    """Strides of a dense tensor: of its images, its channels and its positions."""
    _, channels, *sizes = tensor.shape
    positions = math.prod(sizes)
    last = memory_format(tensor) != torch.contiguous_format
    strides = (channels * positions, 1, channels) if last else (channels * positions, positions, 1)
    return {f"{prefix}_stride_{d}": s for d, s in zip("ncp", strides, strict=True)}


def _empty_output(input: torch.Tensor, window: Window, dtype: torch.dtype) -> torch.Tensor:
    shape = (*input.shape[:2], *window.output_size(*input.shape[2:]))
    return _empty(shape, dtype, input.device, memory_format(input))


def _empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton launches there."""
    if device.type == "cpu":  # in the interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
