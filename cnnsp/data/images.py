"""The images of a split, decoded in memory or left in their files: two classes alike in use.

A photograph takes 192 KiB, 256 × 256 pixels of three bytes. A split above 4 GiB (21,845
photographs) stays on disk, and threads decode its photographs for each batch, each as often as the
epoch has items of it. So a million photographs, which would take 183 GiB, take the memory of their
paths and of the batches under way.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .. import IMAGE_SIZE
from ..errors import UserError, raise_all
from .decoding import decode
from .folder import Split, list_folder

# Bytes of a split that are decoded into memory, and of those that are kept on a GPU: 10,922
# photographs.
HOST_BUDGET, GPU_BUDGET = 4 * 1024**3, 2 * 1024**3

_T = TypeVar("_T")


def ahead(work: Iterable[_T], count: int = 1) -> Iterator[_T]:
    """Each item of ``work``, where taking one starts it, when the ``count`` next are taken."""
    started: deque[_T] = deque()
    for item in work:
        started.append(item)
        if len(started) > count:
            yield started.popleft()
    yield from started


@dataclass(frozen=True)
class ImageSet:
    """Decoded images of one split."""

    images: Tensor  # uint8 [N, 3, H, W], RGB; channels_last in memory, or copied so
    labels: Tensor  # int64 [N], positions in `classes`
    classes: tuple[str, ...]  # names, in alphabetical order
    names: tuple[str, ...] = ()  # of the images, for people to read; empty where they have none

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def device_bytes(self) -> int:
        """Those in the memory of a device that has one of its own."""
        return 0 if self.images.device.type == "cpu" else self.images.nbytes

    @property
    def placement(self) -> str:
        """Where the images are, and how large, for people to read."""
        where = "in memory" if self.images.device.type == "cpu" else f"on {self.images.device}"
        return f"{self.images.nbytes / 2**20:.0f} MiB of images {where}"

    def to(self, device: torch.device, budget_bytes: int) -> ImageSet:
        """Those images on ``device``, if it has memory of its own and they fit the budget."""
        images = self.images.contiguous(memory_format=torch.channels_last)
        return replace(self, images=images.to(device) if images.nbytes <= budget_bytes else images)

    def batches(
        self, numbers: Iterable[Tensor], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of ``numbers``, int64 ``[B]``: bytes ``[M, H*W, 3]``, and rows of them.

        The rows, int64 ``[B]`` on the bytes' device, are the images of these numbers. Images that
        are not on ``device`` are gathered in pinned memory while the batch before is in use.
        """
        pixels = self.images.permute(0, 2, 3, 1).flatten(1, 2)
        if pixels.device.type == device.type:
            for image in numbers:
                yield pixels, send(image, device)
            return

        def gather(image: Tensor) -> Tensor:
            gathered = pixels.index_select(0, image)
            return gathered.pin_memory() if device.type == "cuda" else gathered

        with ThreadPoolExecutor(1) as thread:
            for future in ahead(thread.submit(gather, image) for image in numbers):
                yield _whole(future.result(), device)


@dataclass(frozen=True)
class ImageFiles:
    """Images of one split that are left in their files; used as an :class:`ImageSet` is."""

    paths: tuple[Path, ...]
    labels: Tensor  # int64 [N], positions in `classes`
    classes: tuple[str, ...]  # names, in alphabetical order
    side: int = IMAGE_SIZE  # height and width that they are decoded to
    device_bytes = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def decoded_bytes(self) -> int:
        """Memory that all images would take."""
        return 3 * self.side**2 * len(self)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(path.name for path in self.paths)

    @property
    def placement(self) -> str:
        return f"{self.decoded_bytes / 2**20:.0f} MiB of images in files, decoded batch by batch"

    def to(self, device: torch.device, budget_bytes: int) -> ImageFiles:
        return self

    def batches(
        self, numbers: Iterable[Tensor], device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`ImageSet.batches`: ``workers`` threads decode two batches ahead.

        Raises:
            UserError: naming all files of a batch that cannot be decoded.
        """
        # Threads, for Pillow decodes and resizes without the interpreter's lock: no process has
        # to be started, signalled, or sent images through shared memory, which containers ration.
        pool = ThreadPoolExecutor(max(workers, 1))
        try:
            for pixels, futures in ahead((self._start(pool, n.tolist()) for n in numbers), 2):
                _wait(futures)
                yield _whole(pixels, device)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def load(self, workers: int) -> ImageSet:
        """All of them in memory; raises UserError, naming all files that cannot be decoded."""
        pool = ThreadPoolExecutor(max(workers, 1))
        try:
            pixels, futures = self._start(pool, range(len(self)))
            _wait(tqdm(futures, "decoding", unit="image", leave=False, disable=None))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        images = pixels.unflatten(1, self.size).permute(0, 3, 1, 2)
        return ImageSet(images, self.labels, self.classes, self.names)

    def _start(
        self, pool: ThreadPoolExecutor, numbers: Sequence[int]
    ) -> tuple[Tensor, list[Future[None]]]:
        """The memory that images are decoded to, uint8 ``[B, H*W, 3]``, and who decodes them."""
        pixels = torch.empty(len(numbers), self.side**2, 3, dtype=torch.uint8)

        def work(row: int, number: int) -> None:
            decoded = decode(self.paths[number], self.side)
            pixels[row] = torch.from_numpy(decoded.reshape(-1, 3).copy())

        return pixels, [pool.submit(work, row, number) for row, number in enumerate(numbers)]


Images = ImageSet | ImageFiles


def digest(images: Images) -> str:
    """Of which images these are, and in which order: by their classes and the files' names."""
    named = ascii((images.classes, images.labels.tolist(), images.names))
    return hashlib.sha256(named.encode()).hexdigest()


def _wait(futures: Iterable[Future[None]]) -> None:
    """Until all are done; one UserError names the files of all that failed."""
    reasons = []
    for future in futures:
        try:
            future.result()
        except UserError as error:
            reasons.append(str(error))
    raise_all(reasons)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; CUDA does not wait for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _whole(pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch's own bytes on the device, and all rows of them."""
    return send(pixels, device), torch.arange(len(pixels), device=device)


def load_splits(splits: Mapping[str, Split], workers: int, size: int = IMAGE_SIZE) -> list[Images]:
    """The images of each split in memory, or in their files where they would exceed the budget.

    Raises:
        UserError: naming all files that cannot be decoded; of those left in their files, this
            shows only when they are used.
    """
    loaded: list[Images] = []
    problems = []
    for split in splits.values():
        paths = tuple(path for group in split.values() for path in group)
        labels = [label for label, group in enumerate(split.values()) for _ in group]
        files = ImageFiles(paths, torch.tensor(labels), tuple(split), size)
        try:
            loaded.append(files if files.decoded_bytes > HOST_BUDGET else files.load(workers))
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    return loaded


def in_both(train: Images, test: Images) -> list[str]:
    """The names of the test images that are training images, too; of images in memory alone."""
    if not (isinstance(train, ImageSet) and isinstance(test, ImageSet)):
        return []
    # Every 16th row, for no two photographs share those.
    trained, tested = (
        [hash(rows.tobytes()) for rows in split.images[:, :, ::16].numpy()]
        for split in (train, test)
    )
    known = set(trained)
    return [name for name, rows in zip(test.names, tested, strict=True) if rows in known]


def load_folder(
    data_dir: str | Path, *, validate: int | None = None, workers: int = 2, size: int = IMAGE_SIZE
) -> list[Images]:
    """Training and test images; see :func:`list_folder` and :func:`load_splits`."""
    return load_splits(list_folder(data_dir, validate=validate), workers, size)
