"""The 61 variants of each training image, computed in batches on the training device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data import ImageSet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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


def rotation_map(angle: float, height: int, width: int) -> Tensor:
    """For each pixel of a rotated image, where it comes from: int64 ``[height * width]``.

    The value is one more than the flat position in the original, or 0 for the black corners.
    Pillow itself rotates an image of positions, so the map equals
    ``torchvision.transforms.functional.rotate`` of a PIL image with its default arguments.
    """
    positions = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)
    rotated = Image.fromarray(positions).rotate(angle, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(rotated).astype(np.int64)).flatten()


def level_table(gamma: float) -> Tensor:
    """Gamma correction and ImageNet normalisation of the 256 levels: float32 ``[3, 256]``.

    The corrected level is rounded to uint8 as ``torchvision.transforms.functional.adjust_gamma``
    rounds it.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    corrected = ((256 - 1e-3) * levels**gamma).floor().clamp(max=255) / 255
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)[:, None]
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64)[:, None]
    return ((corrected - mean) / std).float()


class ImageBank:
    """Images of one split on the training device, each in every variant.

    Item ``p`` is image ``p // len(variants)`` in variant ``p % len(variants)``.

    A rotation is a gather with a table of positions, and the gamma correction with the
    normalisation a gather from a table of 256 levels, so uint8 becomes normalised float without
    arithmetic. The four bytes of a pixel (the last is unused) move as one int32.

    Args:
        images: the split; kept on ``device`` at 256 KiB an image of 256 × 256.
        variants: what to make of each image.
        device: where batches are made.
        channels_last: whether batches come in that memory format.
    """

    def __init__(
        self,
        images: ImageSet,
        variants: Sequence[Variant] = AS_IS,
        *,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        count, _, height, width = images.images.shape
        self.height, self.width = height, width
        self.variants = tuple(variants)
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.labels = images.labels.to(self.device)

        # [N, 1 + H*W]: pixel 0 is black, the source of what a rotation brings in from outside.
        pixels = torch.zeros(count, 1 + height * width, 4, dtype=torch.uint8)
        pixels[:, 1:, :3] = images.images.flatten(2).transpose(1, 2)
        self._pixels = pixels.view(torch.int32).squeeze(2).to(self.device)

        angles = sorted({variant.angle for variant in self.variants})
        gammas = sorted({variant.gamma for variant in self.variants})
        maps = torch.stack([rotation_map(angle, height, width) for angle in angles])
        tables = torch.zeros(len(gammas), 4, 256)
        tables[:, :3] = torch.stack([level_table(gamma) for gamma in gammas])
        self._maps = maps.to(self.device)  # [angles, H*W]
        self._levels = tables.flatten().to(self.device)  # [gammas * 4 * 256]
        self._angle_of = torch.tensor([angles.index(v.angle) for v in self.variants])
        self._gamma_of = torch.tensor([gammas.index(v.gamma) for v in self.variants])
        # Where the table of each byte's channel starts: [H*W*4].
        self._channel_start = (torch.arange(4, dtype=torch.int32) * 256).repeat(height * width)
        self._channel_start = self._channel_start.to(self.device)

    def __len__(self) -> int:
        return len(self.labels) * len(self.variants)

    def batch(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 ``[B, 3, H, W]`` and labels int64 ``[B]`` of ``items``, int64 ``[B]``.

        ``items`` lies on the CPU; the result on the bank's device.
        """
        image = items // len(self.variants)
        variant = items % len(self.variants)
        angle = self._angle_of[variant].to(self.device, non_blocking=True)
        table = (self._gamma_of[variant] * 1024).int().to(self.device, non_blocking=True)
        image = image.to(self.device, non_blocking=True)

        shape = (len(items), 3, self.height, self.width)
        batch = torch.empty(shape, device=self.device, memory_format=self.memory_format)
        by_pixel = batch.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, 3], a view in either format
        chunk = _CPU_CHUNK if self.device.type == "cpu" else _GPU_CHUNK
        for start in range(0, len(items), chunk):
            part = slice(start, start + chunk)
            pixels = torch.gather(self._pixels[image[part]], 1, self._maps[angle[part]])
            level = pixels.view(torch.uint8).int()  # [b, H*W*4]
            level += self._channel_start
            level += table[part, None]
            values = self._levels.index_select(0, level.flatten())
            by_pixel[part] = values.view(len(level), -1, 4)[..., :3]
        return batch, self.labels[image]


def epoch_batches(
    length: int, batch_size: int, *, seed: int, epoch: int, first: int = 0
) -> Iterator[Tensor]:
    """Every item of ``range(length)`` once, shuffled by ``(seed, epoch)``, in batches.

    Batches before number ``first`` are left out, so an interrupted epoch can go on.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(length, generator=generator)
    yield from order.split(batch_size)[first:]
