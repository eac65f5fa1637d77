"""What is done to an image before the network sees it, in plain PyTorch, on any device.

Two recipes. A list of :class:`Variant` makes each image once an epoch in each variant: rotations
and gamma corrections, by table, equal to torchvision's of PIL images to 2e-6.
:class:`RandomAugment` draws crop, rotation, flip, colour and gamma anew for every item of every
epoch; each of its operators equals torchvision's of float tensors to 1e-3 after the normalisation.

:func:`look_up` and :func:`draw` make the images of a batch; ``augment_numba.py`` has the same two
for the CPU, compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stochastic_pooling.philox import philox4x32

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of torchvision's rgb_to_grayscale.
GRAY = (0.2989, 0.587, 0.114)

# Images handled at once: on a CPU few, so that the temporaries (some MiB each) stay in its cache;
# on a GPU enough to fill it.
_CPU_CHUNK, _GPU_CHUNK = 4, 64


class Variant(NamedTuple):
    """A rotation by ``angle`` degrees, counter-clockwise, then a gamma correction."""

    angle: int = 0
    gamma: float = 1.0


AS_IS = (Variant(),)
PAPER_VARIANTS = (
    Variant(),
    *(Variant(angle=angle) for angle in range(-15, 16) if angle != 0),
    *(Variant(gamma=percent / 100) for percent in range(70, 131, 2) if percent != 100),
)


class Draw(NamedTuple):
    """What :class:`RandomAugment` drew for some items: float64 ``[B]`` each."""

    top: Tensor  # of the crop, whole pixels of the original
    left: Tensor
    height: Tensor
    width: Tensor
    angle: Tensor  # of the rotation, in degrees, counter-clockwise
    flip: Tensor  # 1 where the image is mirrored, else 0
    brightness: Tensor  # this and the others: torchvision's factors
    contrast: Tensor
    saturation: Tensor
    gamma: Tensor

    def numbers(self, height: int, width: int) -> Tensor:
        """What is computed with, for images of that size, float32 ``[B, 16]``.

        A pixel that lies ``(x, y)`` right of and below the centre of the output comes from
        ``u = a x + b y``, ``v = c x + d y`` relative to the centre of the resized crop, and that is
        ``(scale_x u + middle_x, scale_y v + middle_y)`` in the original, but not outside of the
        centres of the crop's outer pixels. The columns: a, b, c, d, scale_x, scale_y, middle_x,
        middle_y; left, top, right, bottom of the crop; brightness, contrast, saturation, gamma.
        """
        cos, sin = self.angle.deg2rad().cos(), self.angle.deg2rad().sin()
        sign = 1 - 2 * self.flip
        right, bottom = self.left + self.width - 1, self.top + self.height - 1
        columns = (
            sign * cos, -sin, sign * sin, cos,
            self.width / width, self.height / height,
            (self.left + right) / 2, (self.top + bottom) / 2,
            self.left, self.top, right, bottom,
            self.brightness, self.contrast, self.saturation, self.gamma,
        )  # fmt: skip
        return torch.stack(columns, 1).float()


@dataclass(frozen=True)
class RandomAugment:
    """Random augmentation, drawn anew for each item in each epoch.

    The order is that of torchvision's transforms composed so: ``RandomResizedCrop`` to the image's
    own size, ``RandomRotation`` about the centre (black outside), ``RandomHorizontalFlip``, then
    brightness, contrast and saturation as in ``ColorJitter``, each clamped to [0, 1], gamma and
    normalisation. Crop, rotation and flip are one affine map, so the image is interpolated once.
    A crop that would be higher or wider than the image is cut to it, where torchvision draws again.

    What item ``i`` gets in epoch ``e`` depends on ``(seed, e, i)`` alone: Philox4x32 with the key
    ``seed`` and the counter ``(i mod 2**32, i div 2**32, e, 0…2)``.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    repeats: int = 61  # items that each image makes in an epoch
    degrees: float = 15  # largest angle of rotation, either way, at most 180
    scale: tuple[float, float] = (0.6, 1.0)  # area of the crop, as a share of the image's
    ratio: tuple[float, float] = (0.8, 1.25)  # of the crop's width to its height
    flip: float = 0.5  # probability of a mirror image
    gamma: tuple[float, float] = (0.7, 1.3)  # exponent, above 0
    brightness: float = 0.2  # factors are between max(0, 1 - this) and 1 + this
    contrast: float = 0.2
    saturation: float = 0.2
    seed: int = 0  # of everything drawn, from 0 to 2**64 - 1

    def __post_init__(self) -> None:
        for name, right, rule in (
            ("repeats", self.repeats >= 1, "at least 1"),
            ("degrees", 0 <= self.degrees <= 180, "between 0 and 180"),
            ("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "two ascending shares, above 0"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1] < math.inf, "two ascending, above 0"),
            ("flip", 0 <= self.flip <= 1, "a probability, between 0 and 1"),
            ("gamma", 0 < self.gamma[0] <= self.gamma[1] < math.inf, "two ascending, above 0"),
            ("brightness", 0 <= self.brightness < math.inf, "at least 0"),
            ("contrast", 0 <= self.contrast < math.inf, "at least 0"),
            ("saturation", 0 <= self.saturation < math.inf, "at least 0"),
            ("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1"),
        ):
            if not right:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def draw(self, items: Tensor, epoch: int, height: int, width: int) -> Draw:
        """What ``items``, int64 ``[B]``, get in ``epoch``, for images of that size."""
        word = 2**32
        words = philox4x32(
            (torch.tensor(self.seed % word), torch.tensor(self.seed // word)),
            (items % word, items // word, torch.tensor(epoch), torch.arange(3)[:, None]),
        )
        u = torch.stack(words).flatten(0, 1).double() / word  # [12, B]

        def between(number: int, low: float, high: float) -> Tensor:
            return low + (high - low) * u[number]

        def factor(number: int, by: float) -> Tensor:
            return between(number, max(0, 1 - by), 1 + by)

        area = between(0, *self.scale) * (height * width)
        ratio = between(1, math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        crop_height = (area / ratio).sqrt().round().clamp(1, height)
        crop_width = (area * ratio).sqrt().round().clamp(1, width)
        return Draw(
            top=(u[2] * (height - crop_height + 1)).floor(),
            left=(u[3] * (width - crop_width + 1)).floor(),
            height=crop_height,
            width=crop_width,
            angle=between(4, -self.degrees, self.degrees),
            flip=(u[5] < self.flip).double(),
            brightness=factor(6, self.brightness),
            contrast=factor(7, self.contrast),
            saturation=factor(8, self.saturation),
            gamma=between(9, *self.gamma),
        )


def _augment(images: Tensor, numbers: Tensor) -> Tensor:
    """Augment levels, float32 ``[B, 3, H, W]``, to numbers in [0, 1] of that shape."""
    height, width = images.shape[2:]
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    a, b, c, d, scale_x, scale_y, middle_x, middle_y, left, top, right, bottom, *colour = numbers.T[
        :, :, None, None
    ]
    u, v = a * x + b * y, c * x + d * y  # [B, H, W]
    # How much of a pixel lies inside of the crop.
    covered = ((width + 1) / 2 - u.abs()).clamp(0, 1) * ((height + 1) / 2 - v.abs()).clamp(0, 1)
    source_x = (u * scale_x + middle_x).clamp(left, right)
    source_y = (v * scale_y + middle_y).clamp(top, bottom)
    grid = torch.stack(((source_x * 2 + 1) / width - 1, (source_y * 2 + 1) / height - 1), 3)
    # Clamped to the crop, no pixel comes from beyond the image but for rounding. (Apple's GPUs know
    # no other padding than black.)
    images = F.grid_sample(images, grid, "bilinear", padding_mode="zeros", align_corners=False)

    brightness, contrast, saturation, gamma = (c[:, None] for c in colour)

    def gray() -> Tensor:
        red, green, blue = images.unbind(1)
        return (GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue)[:, None]

    images = (images * (covered[:, None] / 255 * brightness)).clamp(0, 1)
    images = torch.lerp(gray().mean((2, 3), keepdim=True), images, contrast).clamp(0, 1)
    images = torch.lerp(gray(), images, saturation).clamp(0, 1)
    return images.pow(gamma)


def rotation_map(angle: float, height: int, width: int) -> Tensor:
    """For each pixel of a rotated image, where it comes from: int32 ``[height * width]``.

    The value is one more than the flat position in the original, or 0 for the black corners.
    Pillow itself rotates an image of positions, so the map equals
    ``torchvision.transforms.functional.rotate`` of a PIL image with its default arguments.
    """
    positions = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)
    rotated = Image.fromarray(positions).rotate(angle, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(rotated)).flatten()


def level_table(gamma: float) -> Tensor:
    """Gamma correction and ImageNet normalisation of the 256 levels: float32 ``[3, 256]``.

    The corrected level is rounded to uint8 as ``torchvision.transforms.functional.adjust_gamma``
    rounds it.
    """
    levels = torch.arange(256, dtype=torch.float64)
    corrected = ((256 - 1e-3) * (levels / 255) ** gamma).floor().clamp(max=255) / 255
    mean, std = normalisation(levels.device, levels.dtype).flatten(2)
    table = ((corrected - mean) / std).float()
    if gamma == 1:
        # A straight line, which is drawn in fp32: runs go on from older checkpoints to the last
        # bit.
        first, last = table[:, :1], table[:, 255:]
        table = first + (last - first) / 255 * levels.float()
    return table


@cache
def normalisation(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """ImageNet's mean and standard deviation of each channel: ``[2, 3, 1, 1]``."""
    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=dtype, device=device)[..., None, None]


def _parts(output: Tensor) -> Iterator[slice]:
    chunk = _CPU_CHUNK if output.device.type == "cpu" else _GPU_CHUNK
    for start in range(0, len(output), chunk):
        yield slice(start, start + chunk)


def look_up(
    pixels: Tensor,
    rows: Tensor,
    sources: Tensor,
    source_of: Tensor,
    levels: Tensor,
    level_of: Tensor,
    output: Tensor,
) -> None:
    """Write images in fixed variants to ``output``, ``[B, 3, H, W]`` in either memory format.

    Args:
        pixels: uint8 ``[M, H*W, 3]``.
        rows: int64 ``[B]``, the image of each output.
        sources: int32 ``[maps, H*W]``, see :func:`rotation_map`.
        source_of: int64 ``[B]``, the map of each output.
        levels: ``[tables, 4, 256]`` of the output's dtype; the fourth channel is unused.
        level_of: int64 ``[B]``, the table of each output.
    """
    by_pixel = output.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, 3], a view in either format
    # Where the table of each byte's channel starts: [H*W*4].
    channel = torch.arange(0, 1024, 256, dtype=torch.int32, device=output.device)
    channel = channel.repeat(pixels.shape[1])
    table = level_of.int() * 1024
    for part in _parts(output):
        # [b, 1 + H*W, 4]: pixel 0 is black, the source of what a rotation brings in from outside,
        # and the four bytes of a pixel (the last is unused) move as one int32.
        padded = F.pad(pixels[rows[part]], (0, 1, 1, 0)).view(torch.int32).squeeze(2)
        moved = torch.gather(padded, 1, sources[source_of[part]].long())
        level = moved.view(torch.uint8).int()  # [b, H*W*4]
        level += channel
        level += table[part, None]
        values = levels.flatten().index_select(0, level.flatten())
        by_pixel[part] = values.view(len(level), -1, 4)[..., :3]


def draw(pixels: Tensor, rows: Tensor, numbers: Tensor, output: Tensor) -> None:
    """Write randomly augmented images to ``output``, ``[B, 3, H, W]`` in either memory format.

    Args:
        pixels: uint8 ``[M, H*W, 3]``.
        rows: int64 ``[B]``, the image of each output.
        numbers: float32 ``[B, 16]``, see :meth:`Draw.numbers`.
    """
    _, _, height, width = output.shape
    mean, std = normalisation(output.device)
    for part in _parts(output):
        images = pixels[rows[part]].unflatten(1, (height, width)).permute(0, 3, 1, 2).float()
        output[part] = (_augment(images, numbers[part]) - mean) / std
