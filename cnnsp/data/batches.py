"""Batches of augmented images, made on the training device from images kept as bytes."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from . import augment as plain
from .augment import AS_IS, RandomAugment, Variant
from .images import GPU_BUDGET, Images, send


class ImageBank:
    """Images of one split, made into augmented batches on the training device.

    Item ``p`` is image ``p // repeats``, in variant ``p % repeats`` if there are variants. The
    images stay uint8: on a GPU in its memory if they take no more than ``budget_bytes``; otherwise
    in the host's, or in their files (``images.py``). Of a variant, the rotation is a gather with a
    table of positions, and the gamma correction with the normalisation a gather from a table of 256
    levels, so uint8 becomes normalised float without arithmetic.

    Args:
        images: the split.
        variants: what to make of each image, at least one.
        augment: random augmentation, in place of variants.
        device: where batches are made.
        channels_last: whether batches come in that memory format.
        dtype: floating dtype of batches.
        budget_bytes: bytes of images to keep on a device that has memory of its own.
        workers: threads that decode :class:`ImageFiles`.
        compiled: whether a CPU runs the compiled loops of ``augment_numba.py``, where numba is
            installed; everything else runs plain PyTorch.

    Attributes:
        images: the split.
        labels: int64 ``[N]``, on the device.
        repeats: items that each image makes.

    Raises:
        ValueError: when both variants and random augmentation are given.
    """

    def __init__(
        self,
        images: Images,
        variants: Sequence[Variant] = AS_IS,
        *,
        augment: RandomAugment | None = None,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        budget_bytes: int = GPU_BUDGET,
        workers: int = 2,
        compiled: bool = True,
    ) -> None:
        if augment is not None and tuple(variants) != AS_IS:
            raise ValueError("give variants or augment, not both")
        self.augment, self.device = augment, torch.device(device)
        self.dtype, self.workers = dtype, workers
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.images = images.to(self.device, budget_bytes)
        self.labels = images.labels.to(self.device)
        self.repeats = augment.repeats if augment else len(variants)
        self._loops = plain
        if compiled and self.device.type == "cpu":
            with suppress(ImportError):  # where there is no numba
                self._loops = importlib.import_module("cnnsp.data.augment_numba")

        angles = sorted({variant.angle for variant in variants})
        gammas = sorted({variant.gamma for variant in variants})
        maps = [plain.rotation_map(angle, *self.images.size) for angle in angles]
        tables = torch.zeros(len(gammas), 4, 256)
        tables[:, :3] = torch.stack([plain.level_table(gamma) for gamma in gammas])
        self._maps = torch.stack(maps).to(self.device)  # [angles, H*W]
        self._levels = tables.to(self.device, dtype)  # [gammas, 4, 256]
        self._angle_of = torch.tensor([angles.index(v.angle) for v in variants])
        self._gamma_of = torch.tensor([gammas.index(v.gamma) for v in variants])

    def __len__(self) -> int:
        return len(self.labels) * self.repeats

    def batch(self, items: Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` and labels int64 ``[B]`` of ``items``, see :meth:`batches`."""
        ((_, images, labels),) = self.batches([items], epoch)
        return images, labels

    def batches(
        self, batches: Iterable[Tensor], epoch: int = 0, reuse: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Items, images and labels of each of ``batches``.

        Args:
            batches: items, int64 ``[B]`` on the CPU, as :func:`epoch_batches` yields them.
            epoch: what random augmentation depends on.
            reuse: whether images may take the memory of those before them, for a caller who is done
                with a batch when asking for the next.

        Raises:
            UserError: when a file cannot be decoded.
        """
        here, there = itertools.tee(batches)
        decoded = self.images.batches(map(self._images_of, there), self.device, self.workers)
        memory = self._empty(0)
        for items, (pixels, rows) in zip(here, decoded, strict=True):
            if not reuse or len(memory) < len(items):
                memory = self._empty(len(items))
            output = memory[: len(items)]
            self._make(items, epoch, pixels, rows, output)
            yield items, output, self.labels[send(items // self.repeats, self.device)]

    def _images_of(self, items: Tensor) -> Tensor:
        if len(items) > 0 and not 0 <= int(items.min()) <= int(items.max()) < len(self):
            raise IndexError(f"items must be in range({len(self)})")
        return items // self.repeats

    def _empty(self, count: int) -> Tensor:
        shape, form = (count, 3, *self.images.size), self.memory_format
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=form)

    def _make(
        self, items: Tensor, epoch: int, pixels: Tensor, rows: Tensor, output: Tensor
    ) -> None:
        """Write the images of ``items``, rows of ``pixels``, to ``output``."""
        if self.augment is None:
            variant = items % self.repeats
            angle = send(self._angle_of[variant], self.device)
            gamma = send(self._gamma_of[variant], self.device)
            self._loops.look_up(pixels, rows, self._maps, angle, self._levels, gamma, output)
        else:
            drawn = self.augment.draw(items, epoch, *self.images.size)
            numbers = send(drawn.numbers(*self.images.size), self.device)
            self._loops.draw(pixels, rows, numbers, output)


def epoch_batches(
    length: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    first: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Tensor]:
    """Every item of ``range(length)`` once, shuffled by ``(seed, epoch)``, in batches.

    Batches before number ``first`` are left out, so an interrupted epoch can go on. The order takes
    8 bytes an item.

    Of ``world_size`` processes that train together, the one of number ``rank`` gets every
    ``world_size``-th item of each batch. All get as many batches; where a batch does not divide
    evenly, the first ranks get one item more, and a batch of fewer items than ranks gives the
    others an empty tensor.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(length, generator=generator)
    for start in range(first * batch_size, length, batch_size):
        yield order[start : start + batch_size][rank::world_size]
