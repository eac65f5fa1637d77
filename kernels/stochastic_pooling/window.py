"""The geometry of a pooling window: sizes, output shape and the number of each of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """A sliding window over `(H, W)` planes, with the arguments of `F.max_pool2d`.

    The cells of a window are numbered in row-major order, padding included: cell `i * kernel_w + j`
    of the output `(oh, ow)` lies on the input row `oh * stride_h - padding_h + i * dilation_h` and
    on the column `ow * stride_w - padding_w + j * dilation_w`.
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

    @classmethod
    def of(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> Window:
        """The window of four (height, width) pairs, checked."""
        (kernel_h, kernel_w), (stride_h, stride_w) = kernel_size, stride
        (padding_h, padding_w), (dilation_h, dilation_w) = padding, dilation
        window = cls(
            kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
            ceil_mode,
        )  # fmt: skip
        window._check()
        return window

    def _check(self) -> None:
        if min(self.kernel_h, self.kernel_w) <= 0:
            raise RuntimeError(
                "kernel size should be greater than zero, but got "
                f"kH: {self.kernel_h} kW: {self.kernel_w}"
            )
        if min(self.stride_h, self.stride_w) <= 0:
            raise RuntimeError(
                "stride should be greater than zero, but got "
                f"dH: {self.stride_h} dW: {self.stride_w}"
            )
        if min(self.dilation_h, self.dilation_w) <= 0:
            raise RuntimeError(
                "dilation should be greater than zero, but got "
                f"dilationH: {self.dilation_h} dilationW: {self.dilation_w}"
            )
        if min(self.padding_h, self.padding_w) < 0:
            raise RuntimeError(
                f"pad must be non-negative, but got padH: {self.padding_h} padW: {self.padding_w}"
            )
        if self.padding_h > self.kernel_h // 2 or self.padding_w > self.kernel_w // 2:
            raise RuntimeError(
                "pad should be smaller than or equal to half of kernel size, but got "
                f"padW = {self.padding_w}, padH = {self.padding_h}, "
                f"kW = {self.kernel_w}, kH = {self.kernel_h}"
            )

    @property
    def cells(self) -> int:
        """Number of cells of a window."""
        return self.kernel_h * self.kernel_w

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Output height and width for an input plane of `height` x `width`."""
        ceil = self.ceil_mode
        return (
            _outputs(height, self.kernel_h, self.stride_h, self.padding_h, self.dilation_h, ceil),
            _outputs(width, self.kernel_w, self.stride_w, self.padding_w, self.dilation_w, ceil),
        )

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest integer type with a value for each cell and one more, `DEAD`."""
        if self.cells <= 255:
            return torch.uint8
        if self.cells <= 32767:
            return torch.int16
        return torch.int32

    @property
    def dead_code(self) -> int:
        """The code of a window without a live cell: -1, as `code_dtype` holds it."""
        return 255 if self.code_dtype == torch.uint8 else -1

    def flat_indices(self, code: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The flat indices `h * width + w` of the drawn cells, as `F.max_unpool2d` takes them.

        Args:
            code: cell numbers, `(..., OH, OW)`, of `code_dtype`.
            height, width: size of the input plane.

        Returns:
            int64 indices of the shape of `code`; where the window is dead, that of its first
            in-bounds cell.
        """
        device = code.device
        rows = torch.arange(code.shape[-2], device=device) * self.stride_h - self.padding_h
        cols = torch.arange(code.shape[-1], device=device) * self.stride_w - self.padding_w
        cell = code.to(torch.int64)
        row = rows[:, None] + cell // self.kernel_w * self.dilation_h
        col = cols + cell % self.kernel_w * self.dilation_w
        first_row = _first_inside(rows, self.dilation_h, height)
        first_col = _first_inside(cols, self.dilation_w, width)
        dead = code == self.dead_code
        return torch.where(dead, first_row[:, None] * width + first_col, row * width + col)


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """The format that a result of `tensor`'s shape and layout should have, dense or not."""
    if tensor.is_contiguous() or tensor.stride(1) != 1 or tensor.stride(3) < tensor.size(1):
        return torch.contiguous_format
    return torch.channels_last


def _outputs(
    length: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    span = length + 2 * padding - dilation * (kernel - 1) - 1
    outputs = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    # With ceil_mode, a last window that starts beyond the input and its left padding is dropped.
    if ceil_mode and (outputs - 1) * stride >= length + padding:
        outputs -= 1
    return outputs


def _first_inside(start: torch.Tensor, dilation: int, length: int) -> torch.Tensor:
    """The first of `start, start + dilation, …` that is not negative.

    A dilated window can step over a very short input; the clamp keeps its index in the plane.
    """
    inside = torch.where(start < 0, start + (-start + dilation - 1) // dilation * dilation, start)
    return inside.clamp(max=length - 1)
