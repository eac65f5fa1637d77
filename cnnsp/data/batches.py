"""Batches of augmented images, made on the training device from images kept as bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import augment
from .augment import (
    AS_IS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RandomAugment,
    Variant,
    level_table,
    rotation_map,
)
from .images import GPU_BUDGET, Images, send


def _loops(compiled: bool) -> ModuleType:
    """The module whose ``look_up`` and ``draw`` make the images: compiled, where numba is."""
    if compiled:
        try:
            from . import augment_numba
        except ImportError:
            pass
        else:
            return augment_numba
    return augment


class ImageBank:
    """Images of one split, made into augmented batches on the training device.

    Item ``p`` is image ``p // len(variants)`` in variant ``p % len(variants)``; with ``augment``,
    image ``p // augment.repeats``.

    Of a variant, the rotation is a gather with a table of positions, and the gamma correction with
    the normalisation a gather from a table of 256 levels, so uint8 becomes normalised float without
    arithmetic.

    The images stay uint8. On a GPU they lie in its memory if they take no more than
    ``budget_bytes``; otherwise in the host's, or in their files (``images.py``).

    Args:
        images: the split.
        variants: what to make of each image.
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
        device_bytes: bytes of images in the memory of a device that has one of its own.

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
        if not variants:
            raise ValueError("variants must not be empty")
        self.variants, self.augment = tuple(variants), augment
        self.device, self.dtype, self.workers = torch.device(device), dtype, workers
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.images = images.to(self.device, budget_bytes)
        self.labels = images.labels.to(self.device)
        self.repeats = augment.repeats if augment else len(self.variants)
        self._loops = _loops(compiled and self.device.type == "cpu")
        self.device_bytes = self.images.device_bytes

        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device)
        self._std = torch.tensor(IMAGENET_STD, device=self.device)
        # The compiled loops take it that the first map moves nothing.
        angles = [0, *sorted({variant.angle for variant in self.variants} - {0})]
        gammas = sorted({variant.gamma for variant in self.variants})
        maps = torch.stack([rotation_map(angle, *self.images.size) for angle in angles])
        tables = torch.zeros(len(gammas), 4, 256)
        tables[:, :3] = torch.stack([level_table(gamma) for gamma in gammas])
        self._maps = maps.to(self.device)  # [angles, H*W]
        self._levels = tables.to(self.device, dtype)  # [gammas, 4, 256]
        self._angle_of = torch.tensor([angles.index(v.angle) for v in self.variants])
        self._gamma_of = torch.tensor([gammas.index(v.gamma) for v in self.variants])

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
        begun: deque[Tensor] = deque()

        def numbers() -> Iterator[Tensor]:
            for items in batches:
                if len(items) > 0 and not 0 <= int(items.min()) <= int(items.max()) < len(self):
                    raise IndexError(f"items must be in range({len(self)})")
                begun.append(items)
                yield items // self.repeats

        memory = self._empty(0)
        for pixels, rows in self.images.batches(numbers(), self.device, self.workers):
            items = begun.popleft()
            if not reuse or len(memory) < len(items):
                memory = self._empty(len(items))
            output = memory[: len(items)]
            self._make(items, epoch, pixels, rows, output)
            yield items, output, self.labels[send(items // self.repeats, self.device)]

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
            nearest = self.augment.interpolation == "nearest"
            self._loops.draw(pixels, rows, numbers, nearest, self._mean, self._std, output)


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

    Raises:
        ValueError: when ``rank`` is not in ``range(world_size)``.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and {world_size - 1}, got {rank}")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(length, generator=generator)
    for start in range(first * batch_size, length, batch_size):
        yield order[start : start + batch_size][rank::world_size]
