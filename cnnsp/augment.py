"""Augmented batches, made on the training device from images kept as bytes.

Two recipes. A list of :class:`Variant` makes each image once an epoch in each variant: rotations
and gamma corrections, by table, equal to torchvision's of PIL images to 2e-6.
:class:`RandomAugment` draws crop, rotation, flip, colour and gamma anew for every item of every
epoch; each of its operators equals torchvision's of float tensors to 1e-3 after the normalisation.

A CPU runs compiled loops (``augment_numba.py``) where numba is installed; everything else plain
PyTorch.
"""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from stochastic_pooling.philox import ROUNDS, philox4x32

from .data import ImageFiles, ImageSet
from .errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of torchvision's rgb_to_grayscale.
GRAY = (0.2989, 0.587, 0.114)

# Bytes of images that are kept on a GPU: 10,922 photographs.
GPU_BUDGET = 2 * 1024**3
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
    """What :class:`RandomAugment` drew for some items: float64 ``[B]`` each.

    Attributes:
        top, left, height, width: the crop, whole pixels of the original.
        angle: of the rotation, in degrees, counter-clockwise.
        flip: 1 where the image is mirrored, else 0.
        brightness, contrast, saturation, gamma: torchvision's factors.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    angle: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class RandomAugment:
    """Random augmentation, drawn anew for each item in each epoch.

    The order is that of torchvision's transforms composed so: ``RandomResizedCrop`` to the image's
    own size, ``RandomRotation`` about the centre (black outside), ``RandomHorizontalFlip``, then
    brightness, contrast and saturation as in ``ColorJitter``, each clamped to [0, 1], gamma and
    normalisation. Crop, rotation and flip are one affine map, so the image is interpolated once.
    ``"nearest"`` takes the pixels of ``InterpolationMode.NEAREST_EXACT``. A crop that would be
    higher or wider than the image is cut to it, where torchvision draws again.

    What item ``i`` gets in epoch ``e`` depends on ``(seed, e, i)`` alone: Philox4x32 with the key
    ``seed`` and the counter ``(i mod 2**32, i div 2**32, e, 0…2)``.

    Attributes:
        repeats: items that each image makes in an epoch.
        degrees: largest angle of rotation, either way.
        scale: smallest and largest area of the crop, as a share of the image's.
        ratio: smallest and largest ratio of the crop's width to its height.
        flip: probability of a mirror image.
        gamma: smallest and largest exponent.
        brightness, contrast, saturation: the factor is between ``max(0, 1 - value)`` and
            ``1 + value``.
        interpolation: ``"bilinear"`` or ``"nearest"``.
        seed: of everything drawn, at least 0.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    repeats: int = 61
    degrees: float = 15
    scale: tuple[float, float] = (0.6, 1.0)
    ratio: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.5
    gamma: tuple[float, float] = (0.7, 1.3)
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    interpolation: str = "bilinear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees must be between 0 and 180, got {self.degrees}")
        for name in ("scale", "ratio", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be two ascending positive numbers, got {low, high}")
        if self.scale[1] > 1:
            raise ValueError(f"scale must not exceed 1, the whole image, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability between 0 and 1, got {self.flip}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.interpolation not in ("bilinear", "nearest"):
            raise ValueError(
                f'interpolation must be "bilinear" or "nearest", got {self.interpolation!r}'
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {self.seed}")

    def draw(self, items: Tensor, epoch: int, height: int, width: int) -> Draw:
        """What ``items``, int64 ``[B]``, get in ``epoch``, for images of that size."""
        word = 2**32
        words = philox4x32(
            (torch.tensor(self.seed % word), torch.tensor(self.seed // word)),
            (items % word, items // word, torch.tensor(epoch), torch.arange(3)[:, None]),
            ROUNDS,
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


def _numbers(draw: Draw, height: int, width: int) -> Tensor:
    """What is computed with, float32 ``[B, 16]``.

    A pixel that lies ``(x, y)`` right of and below the centre of the output comes from
    ``u = a x + b y``, ``v = c x + d y`` relative to the centre of the resized crop, and that is
    ``(scale_x u + middle_x, scale_y v + middle_y)`` in the original, but not outside of the centres
    of the crop's outer pixels. The columns: a, b, c, d, scale_x, scale_y, middle_x, middle_y; left,
    top, right, bottom of the crop; brightness, contrast, saturation, gamma.
    """
    cos, sin = draw.angle.deg2rad().cos(), draw.angle.deg2rad().sin()
    sign = 1 - 2 * draw.flip
    right, bottom = draw.left + draw.width - 1, draw.top + draw.height - 1
    columns = (
        sign * cos, -sin, sign * sin, cos,
        draw.width / width, draw.height / height,
        (draw.left + right) / 2, (draw.top + bottom) / 2,
        draw.left, draw.top, right, bottom,
        draw.brightness, draw.contrast, draw.saturation, draw.gamma,
    )  # fmt: skip
    return torch.stack(columns, 1).float()


def _augment(images: Tensor, numbers: Tensor, nearest: bool) -> Tensor:
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
    if nearest:
        covered = (covered >= 0.5).float()
        source_x, source_y = (source_x + 0.5).floor(), (source_y + 0.5).floor()
    grid = torch.stack(((source_x * 2 + 1) / width - 1, (source_y * 2 + 1) / height - 1), 3)
    mode = "nearest" if nearest else "bilinear"
    # Clamped to the crop, no pixel comes from beyond the image but for rounding. (Apple's GPUs know
    # no other padding than black.)
    images = F.grid_sample(images, grid, mode, padding_mode="zeros", align_corners=False)

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
    levels = torch.arange(256, dtype=torch.float64) / 255
    corrected = ((256 - 1e-3) * levels**gamma).floor().clamp(max=255) / 255
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)[:, None]
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64)[:, None]
    return ((corrected - mean) / std).float()


def _parts(output: Tensor) -> Iterator[slice]:
    chunk = _CPU_CHUNK if output.device.type == "cpu" else _GPU_CHUNK
    for start in range(0, len(output), chunk):
        yield slice(start, start + chunk)


def _look_up(
    pixels: Tensor,
    rows: Tensor,
    sources: Tensor,
    source_of: Tensor,
    levels: Tensor,
    level_of: Tensor,
    output: Tensor,
) -> None:
    """See ``augment_numba.look_up``."""
    by_pixel = output.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, 3], a view in either format
    # Where the table of each byte's channel starts: [H*W*4].
    channel = (torch.arange(4, dtype=torch.int32, device=output.device) * 256).repeat(
        pixels.shape[1]
    )
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


def _draw(
    pixels: Tensor,
    rows: Tensor,
    numbers: Tensor,
    nearest: bool,
    mean: Tensor,
    std: Tensor,
    output: Tensor,
) -> None:
    """See ``augment_numba.draw``."""
    _, _, height, width = output.shape
    for part in _parts(output):
        images = pixels[rows[part]].unflatten(1, (height, width)).permute(0, 3, 1, 2).float()
        images = _augment(images, numbers[part], nearest)
        output[part] = (images - mean[:, None, None]) / std[:, None, None]


def _compiled_loops() -> ModuleType | None:
    """The module of compiled loops, where numba can be used."""
    try:
        from . import augment_numba
    except ImportError:
        return None
    return augment_numba


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
        self._loops = _compiled_loops() if self.device.type == "cpu" else None

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
        waiting: deque[Tensor] = deque()

        def images() -> Iterator[list[int]]:
            for items in batches:
                waiting.append(items)
                yield (items // self.repeats).tolist()

        if self._files is not None:
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
                futures: deque[Future[Tensor | None]] = deque()
                for items in batches:
                    waiting.append(items)
                    futures.append(thread.submit(self._fetch, items))
                    if len(futures) > 1:
                        yield waiting.popleft(), futures.popleft().result()
                if futures:
                    yield waiting.popleft(), futures.popleft().result()

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
            make = self._loops.look_up if self._loops else _look_up
            make(pixels, rows, self._maps, angle, self._levels, gamma, output)
        else:
            draw = self.augment.draw(items, epoch, self.height, self.width)
            numbers = self._send(_numbers(draw, self.height, self.width))
            nearest = self.augment.interpolation == "nearest"
            make = self._loops.draw if self._loops else _draw
            make(pixels, rows, numbers, nearest, self._mean, self._std, output)
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
