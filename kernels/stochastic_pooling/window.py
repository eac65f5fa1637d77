"""The geometry of a pooling window: sizes, output shape and the number of each of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Ints: TypeAlias = tuple[int, ...]

# Up to this number arguments are left as they are, so that no symbolic size meets a guard.
ORDINARY = 16


@dataclass(frozen=True)
class Window:
    """A sliding window over `(H, W)` planes or `(D, H, W)` volumes, with the arguments of
    `F.max_pool2d` and `F.max_pool3d`.

    The cells of a window are numbered in row-major order, padding included: cell
    `(k * kernel_h + i) * kernel_w + j` of the output `(od, oh, ow)` lies on the input slice
    `od * stride_d - padding_d + k * dilation_d`, on the row
    `oh * stride_h - padding_h + i * dilation_h` and on the column
    `ow * stride_w - padding_w + j * dilation_w`. A plane is a volume of one slice.
    """

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    ceil_mode: bool
    kernel_d: int = 1
    stride_d: int = 1
    padding_d: int = 0
    dilation_d: int = 1

    @classmethod
    def of(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> Window:
        """The window of four (depth, height, width) triples, (height, width) pairs, or widths."""
        kernel_d, kernel_h, kernel_w = _triple(kernel_size, 1)
        stride_d, stride_h, stride_w = _triple(stride, 1)
        padding_d, padding_h, padding_w = _triple(padding, 0)
        dilation_d, dilation_h, dilation_w = _triple(dilation, 1)
        return cls(
            kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
            ceil_mode, kernel_d, stride_d, padding_d, dilation_d,
        )  # fmt: skip

    def arguments(self, dims: int) -> tuple[Ints, Ints, Ints, Ints, bool]:
        """What `of` takes, with `dims` (2 or 3) numbers for each argument."""
        kernel_size, stride, padding, dilation = zip(*self.sides(dims), strict=True)
        return kernel_size, stride, padding, dilation, self.ceil_mode

    @property
    def cells(self) -> int:
        """Number of cells of a window."""
        return self.kernel_d * self.kernel_h * self.kernel_w

    def sides(self, dims: int) -> tuple[tuple[int, int, int, int], ...]:
        """Kernel size, stride, padding and dilation of each of the last `dims` dimensions."""
        return (
            (self.kernel_d, self.stride_d, self.padding_d, self.dilation_d),
            (self.kernel_h, self.stride_h, self.padding_h, self.dilation_h),
            (self.kernel_w, self.stride_w, self.padding_w, self.dilation_w),
        )[-dims:]

    def output_size(self, *size: int) -> tuple[int, ...]:
        """Output size for planes of `(height, width)` or volumes of `(depth, height, width)`."""
        return tuple(
            _outputs(length, *side, self.ceil_mode)
            for length, side in zip(size, self.sides(len(size)), strict=True)
        )

    def bounded(self, *size: int) -> Window:
        """A window with the same cells of planes or volumes of this size, whose numbers are at most
        some times the size, whatever these are. Its padding may be more than half of its kernel."""
        # ONNX takes numbers, no symbols, and its kernels do not mind large ones.
        exceeds = known if torch.onnx.is_in_onnx_export() else bool
        sides = [
            _bounded(length, *side, self.ceil_mode)
            if any(known(number > ORDINARY) and exceeds(number > length) for number in side)
            else side
            for length, side in zip(size, self.sides(len(size)), strict=True)
        ]
        kernel_size, stride, padding, dilation = zip(*sides, strict=True)
        return Window.of(kernel_size, stride, padding, dilation, self.ceil_mode)

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest integer type with a value for each cell and one more, `dead_code`."""
        if self.cells <= 255:
            return torch.uint8
        if self.cells <= 32767:
            return torch.int16
        return torch.int32

    @property
    def dead_code(self) -> int:
        """The code of a window without a live cell: -1, as `code_dtype` holds it."""
        return 255 if self.code_dtype == torch.uint8 else -1

    def flat_indices(self, code: torch.Tensor, *size: int) -> torch.Tensor:
        """The flat indices of the drawn cells, as `F.max_unpool2d` and `F.max_unpool3d` take them.

        Args:
            code: cell numbers, `(..., OH, OW)` or `(..., OD, OH, OW)`, of `code_dtype`.
            size: of the input, (height, width) or (depth, height, width).

        Returns:
            int64 `h * width + w` or `(d * height + h) * width + w` of the shape of `code`; where
            the window is dead, that of its first in-bounds cell.
        """
        sides = self.sides(len(size))
        dead = code == self.dead_code
        rest = code.to(torch.int64)
        flat = torch.zeros_like(rest)
        pitch = 1
        # The last dimension's cells are numbered fastest.
        for dim in range(-1, -len(size) - 1, -1):
            kernel, stride, padding, dilation = sides[dim]
            starts = torch.arange(code.shape[dim], device=code.device) * stride - padding
            starts = starts.view(-1, *[1] * (-dim - 1))
            drawn = starts + rest % kernel * dilation
            rest = rest // kernel
            # A dilated window can step over a very short input: the clamp keeps its index inside.
            first = torch.where(starts < 0, starts % dilation, starts).clamp(max=size[dim] - 1)
            flat = flat + torch.where(dead, first, drawn) * pitch
            pitch = pitch * size[dim]
        return flat


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """The format that a result of `tensor`'s shape and layout should have, dense or not.

    By the strides alone, for planes of 1 x 1 are dense in both: codes of theirs tell the gradient
    how the input lay.
    """
    channels = tensor.size(1)
    if channels == 1 or tensor.stride(1) != 1 or tensor.stride(-1) < channels:
        return torch.contiguous_format
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d


def _triple(values: Sequence[int], default: int) -> tuple[int, int, int]:
    depth, height, width = (*[default] * (3 - len(values)), *values)
    return depth, height, width


def _outputs(
    length: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    span = length + 2 * padding - dilation * (kernel - 1) - 1
    outputs = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode:
        # A last window that starts beyond the input and its left padding is dropped. Not by an
        # `if`: an export would keep one answer for every size.
        outputs = -larger(-outputs, -((length + padding + stride - 1) // stride))
    return outputs


def _bounded(
    length: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> tuple[int, int, int, int]:
    outputs = _outputs(length, kernel, stride, padding, dilation, ceil_mode)
    if outputs == 1:
        # One cell in front of the input, then those inside; if there is none, one behind.
        front = -(-padding // dilation)
        inside = max(min(kernel - 1, (length - 1 + padding) // dilation) - front + 1, 1)
        start = min(front * dilation - padding, length)
        dilation = dilation if inside > 1 else start + 1
        padding = dilation - start
        return inside + 1, length + 2 * padding, padding, dilation
    if kernel == 1:
        return 1, stride, 0, 1
    if dilation > 1:  # or there would not be two outputs
        return kernel, stride, padding, dilation
    if stride >= 2 * length:  # of two windows, the first of which holds all
        return length + 1, max(stride - padding, 0) + 1, 1, 1
    # Cells that are outside in each window go, in front as many as behind: so do all sizes stay.
    outside = min(padding - (outputs - 1) * stride, kernel - length - padding)
    outside = max(outside, 0)
    return kernel - 2 * outside, stride, padding - outside, 1


def larger(one: Any, other: Any) -> Any:
    """`max`, without a guard on symbols; Dynamo has that of `max`, and not always the other, which
    refuses the tensors that sizes are in `torch.jit.trace`."""
    plain = torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing()
    return max(one, other) if plain else torch.sym_max(one, other)


def known(condition: bool | torch.SymBool) -> bool:
    """Whether it holds for sure: under a compiler, without a guard on its symbols."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)
