"""Batches of augmented images, made on the training device from images kept as bytes."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from ..errors import UserError
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
from .decoding import ImageFiles, ImageSet

# Bytes of images that are kept on a GPU: 10,922 photographs.
GPU_BUDGET = 2 * 1024**3


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


_T = TypeVar("_T")


def one_ahead(work: Iterable[_T]) -> Iterator[_T]:
    """Each item of ``work``, where taking one starts it, when the next one has been taken, too."""
    started: deque[_T] = deque()
    for item in work:
        started.append(item)
        if len(started) > 1:
            yield started.popleft()
    yield from started


def _leave_signals_alone(_: int) -> None:
    """The process that trains decides when to stop, and Ctrl-C comes to its workers, too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Decoding(Dataset):
    """Batches of decoded files for a DataLoader."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitems__(self, indices: list[int]) -> Tensor | UserError:
        # Raised in a worker, an error would arrive with the worker's traceback for its message.
        try:
            return self.files.decode(indices)
        except UserError as error:
            return error


class ImageBank:
    """Images of one split, made into augmented batches on the training device.

    Item ``p`` is image ``p // len(variants)`` in variant ``p % len(variants)``; with ``augment``,
    image ``p // augment.repeats``.

    Of a variant, the rotation is a gather with a table of positions, and the gamma correction with
    the normalisation a gather from a table of 256 levels, so uint8 becomes normalised float without
    arithmetic.

    The images stay uint8, 192 KiB an image of 256 × 256. On a GPU they lie in its memory if they
    take no more than ``budget_bytes``; otherwise in the host's, and :meth:`batches` gathers the
    next batch in pinned memory while the device works. :class:`ImageFiles` are decoded for each
    batch: :meth:`batches` has each of its ``workers`` processes prepare two batches ahead, so that
    ``2 * workers + 1`` batches of bytes are in memory.

    Args:
        images: the split.
        variants: what to make of each image.
        augment: random augmentation, in place of variants.
        device: where batches are made.
        channels_last: whether batches come in that memory format.
        dtype: floating dtype of batches.
        budget_bytes: bytes of images to keep on a device that has memory of its own.
        workers: processes (in :meth:`batch` threads) that decode :class:`ImageFiles`.
        compiled: whether a CPU runs the compiled loops of ``augment_numba.py``, where numba is
            installed; everything else runs plain PyTorch.

    Attributes:
        labels: int64 ``[N]``, on the device.
        repeats: items that each image makes.
        device_bytes: bytes of images in the memory of a device that has one of its own.
        placement: where the images are, and how large, for people to read.

    Raises:
        ValueError: when both variants and random augmentation are given.
    """

    def __init__(
        self,
        images: ImageSet | ImageFiles,
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
        self.labels = images.labels.to(self.device)
        self.repeats = augment.repeats if augment else len(self.variants)
        self._loops = _loops(compiled and self.device.type == "cpu")

        self.device_bytes = 0
        self._files = images if isinstance(images, ImageFiles) else None
        if isinstance(images, ImageFiles):
            self.height = self.width = images.size
            size = images.decoded_bytes
            where = f"in files, decoded batch by batch by {workers} workers"
        else:
            self.height, self.width = images.images.shape[2:]
            # [N, H*W, 3]. The images of a folder lie so in memory, and are not copied.
            self._pixels = images.images.permute(0, 2, 3, 1).contiguous().flatten(1, 2)
            size = self._pixels.nbytes
            where = "in memory"
            if self.device.type != "cpu":
                where = f"in host memory, sent to {self.device} batch by batch"
                if size <= budget_bytes:
                    self._pixels = self._pixels.to(self.device)
                    self.device_bytes = size
                    where = f"on {self.device}"
        self.placement = f"{size / 2**20:.0f} MiB of images {where}"

        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device)
        self._std = torch.tensor(IMAGENET_STD, device=self.device)
        # The compiled loops take it that the first map moves nothing.
        angles = [0, *sorted({variant.angle for variant in self.variants} - {0})]
        gammas = sorted({variant.gamma for variant in self.variants})
        maps = torch.stack([rotation_map(angle, self.height, self.width) for angle in angles])
        tables = torch.zeros(len(gammas), 4, 256)
        tables[:, :3] = torch.stack([level_table(gamma) for gamma in gammas])
        self._maps = maps.to(self.device)  # [angles, H*W]
        self._levels = tables.to(self.device, dtype)  # [gammas, 4, 256]
        self._angle_of = torch.tensor([angles.index(v.angle) for v in self.variants])
        self._gamma_of = torch.tensor([gammas.index(v.gamma) for v in self.variants])

    def __len__(self) -> int:
        return len(self.labels) * self.repeats

    def batch(self, items: Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` and labels int64 ``[B]`` of ``items``, int64 ``[B]``.

        ``items`` lies on the CPU; the result on the bank's device. :meth:`batches` is faster where
        the images are not on the device.

        Raises:
            UserError: when a file cannot be decoded.
        """
        return self._make(items, epoch, self._fetch(items), self._empty(len(items)))

    def batches(
        self, batches: Iterable[Tensor], epoch: int = 0, reuse: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Items, images and labels of each of ``batches``; see :meth:`batch`.

        Args:
            batches: items, as :func:`epoch_batches` yields them.
            epoch: what random augmentation depends on.
            reuse: whether images may take the memory of those before them, for a caller who is done
                with a batch when asking for the next.

        Raises:
            UserError: when a file cannot be decoded.
        """
        memory = self._empty(0)
        for items, fetched in self._fetch_ahead(batches):
            if not reuse or len(memory) < len(items):
                memory = self._empty(len(items))
            yield items, *self._make(items, epoch, fetched, memory[: len(items)])

    def _empty(self, count: int) -> Tensor:
        shape = (count, 3, self.height, self.width)
        form = self.memory_format
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=form)

    def _send(self, tensor: Tensor) -> Tensor:
        """A tensor on the device; CUDA does not wait for the copy."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _fetch(self, items: Tensor) -> Tensor | None:
        """The bytes of the items' images in host memory, or None if the device has them."""
        image = items // self.repeats
        if self._files is not None:
            return self._files.decode(image.tolist(), self.workers)
        if self._pixels.device.type == self.device.type:
            return None
        pinned = self.device.type == "cuda"
        gathered = torch.empty(
            (len(image), *self._pixels.shape[1:]), dtype=torch.uint8, pin_memory=pinned
        )
        return torch.index_select(self._pixels, 0, image, out=gathered)

    def _fetch_ahead(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each of ``batches`` with what :meth:`_fetch` gives, prepared while others are in use."""
        if self._files is not None:
            waiting: deque[Tensor] = deque()

            def images() -> Iterator[list[int]]:
                for items in batches:
                    waiting.append(items)
                    yield (items // self.repeats).tolist()

            loader: DataLoader[Any] = DataLoader(
                _Decoding(self._files),
                batch_sampler=images(),
                num_workers=self.workers,
                collate_fn=default_convert,
                worker_init_fn=_leave_signals_alone,
                pin_memory=self.device.type == "cuda",
                # One of its own, for the loader would draw from the default one.
                generator=torch.Generator(),
            )
            for decoded in loader:
                if isinstance(decoded, UserError):
                    raise decoded
                yield waiting.popleft(), decoded
        elif self._pixels.device.type == self.device.type:
            for items in batches:
                yield items, None
        else:
            with ThreadPoolExecutor(1) as thread:
                started = ((items, thread.submit(self._fetch, items)) for items in batches)
                for items, future in one_ahead(started):
                    yield items, future.result()

    def _make(
        self, items: Tensor, epoch: int, fetched: Tensor | None, output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the images of ``items`` to ``output``; returns it, and the labels."""
        if len(items) > 0 and not 0 <= int(items.min()) <= int(items.max()) < len(self):
            raise IndexError(f"items must be in range({len(self)})")
        image = self._send(items // self.repeats)
        if fetched is None:
            pixels, rows = self._pixels, image
        else:
            pixels = fetched.to(self.device, non_blocking=self.device.type == "cuda")
            rows = torch.arange(len(items), device=self.device)
        if self.augment is None:
            variant = items % self.repeats
            angle, gamma = self._send(self._angle_of[variant]), self._send(self._gamma_of[variant])
            self._loops.look_up(pixels, rows, self._maps, angle, self._levels, gamma, output)
        else:
            size = self.height, self.width
            numbers = self._send(self.augment.draw(items, epoch, *size).numbers(*size))
            nearest = self.augment.interpolation == "nearest"
            self._loops.draw(pixels, rows, numbers, nearest, self._mean, self._std, output)
        return output, self.labels[image]


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
