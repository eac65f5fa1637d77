"""Photographs in ``train_data/<class>`` and ``test_data/<class>``, decoded once into memory.

A photograph takes 192 KiB, 256 × 256 pixels of three bytes. A split above 4 GiB (21,845
photographs) stays on disk, and its photographs are decoded for each batch by DataLoader workers,
each as often as the epoch has items of it. So a million photographs, which would take 183 GiB, take
the memory of their paths and of the batches under way, and as many workers as decode a batch in the
time of a step.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..network import IMAGE_SIZE

# Bytes of a split that are decoded into memory.
HOST_BUDGET = 4 * 1024**3
# What operating systems leave in folders. Hidden files are ignored too.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx"}
# What Pillow raises for a damaged file, beside OSError (truncated, or no image at all).
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images of one split.

    Attributes:
        images: uint8 ``[N, 3, H, W]``, RGB; those of a folder are channels_last in memory.
        labels: int64 ``[N]``, positions in ``classes``.
        classes: the class names, in alphabetical order.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageFiles:
    """Images of one split that are left in their files.

    Attributes:
        paths: of the images.
        labels: int64 ``[N]``, positions in ``classes``.
        classes: the class names, in alphabetical order.
        size: height and width that they are decoded to.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    size: int = IMAGE_SIZE

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def decoded_bytes(self) -> int:
        """Memory that all images would take."""
        return 3 * self.size**2 * len(self.paths)

    def decode(self, numbers: Sequence[int], workers: int = 1, progress: bool = False) -> Tensor:
        """Images ``numbers``, uint8 ``[B, H*W, 3]``, decoded by ``workers`` threads.

        Raises:
            UserError: when a file is no image, or damaged.
        """
        images = torch.empty(len(numbers), self.size**2, 3, dtype=torch.uint8)
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            decoded = pool.map(lambda number: decode(self.paths[number], self.size), numbers)
            if progress:
                decoded = tqdm(
                    decoded, "decoding", len(numbers), unit="image", leave=False, disable=None
                )
            for image, pixels in zip(images, decoded, strict=True):
                image.numpy()[:] = pixels.reshape(-1, 3)
        return images


Images = ImageSet | ImageFiles


def is_junk(path: Path) -> bool:
    """Whether ``path`` is a hidden file or one that an operating system drops in folders."""
    return path.name.startswith(".") or path.name.lower() in _JUNK


def decode(path: Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """Read one image as torchvision's ``ImageFolder`` and ``Resize((size, size))`` do.

    The EXIF orientation is ignored, as there. Returns uint8 ``[size, size, 3]``, RGB.

    Raises:
        UserError: when the file is no image, or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is not an image") from None
    except DECODE_ERRORS as error:
        raise UserError(f"cannot decode {path}: {error}") from None


def list_split(folder: Path) -> dict[str, list[Path]]:
    """The files of each class folder in ``folder``, both in alphabetical order.

    Raises:
        UserError: when the folder is missing, or holds no class, an empty class or a folder
            inside a class.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: expected {folder.parent}/train_data/<class>/ and "
            f"{folder.parent}/test_data/<class>/ (scripts/prepare_flowers.py makes them)"
        )
    files: dict[str, list[Path]] = {}
    for class_folder in sorted(p for p in folder.iterdir() if p.is_dir() and not is_junk(p)):
        paths = sorted(p for p in class_folder.iterdir() if not is_junk(p))
        if not paths:
            raise UserError(f"{class_folder} holds no images")
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path} is not a file: images lie directly in their class folder")
        files[class_folder.name] = paths
    if not files:
        raise UserError(f"{folder} holds no class folders")
    return files


def load_folder(
    data_dir: str | Path,
    *,
    workers: int = 2,
    size: int = IMAGE_SIZE,
    budget_bytes: int = HOST_BUDGET,
    validate: int | None = None,
) -> tuple[Images, Images]:
    """Decode ``data_dir/train_data`` and ``data_dir/test_data`` with ``workers`` threads.

    A split that would take more than ``budget_bytes`` of memory is left in its files, where a
    damaged one shows only when it is used.

    With ``validate``, a number from 0 to 3, the second split is not that of ``test_data`` but this
    quarter of ``train_data``, which the first then lacks: every fourth image of each class.

    Raises:
        UserError: naming the folder or file at fault; see :func:`list_split` and :func:`decode`.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist")
    train, test = list_split(data_dir / "train_data"), list_split(data_dir / "test_data")
    if train.keys() != test.keys():
        only = [f"{c!r} is only in train_data" for c in sorted(train.keys() - test.keys())]
        only += [f"{c!r} is only in test_data" for c in sorted(test.keys() - train.keys())]
        raise UserError(f"classes of {data_dir} differ between the splits: {', '.join(only)}")
    if len(train) < 2:
        raise UserError(f"{data_dir} holds one class, {next(iter(train))!r}; it takes two or more")

    if validate is not None:
        train, test = _hold_out(train, validate)

    def load(split: dict[str, list[Path]]) -> Images:
        paths = tuple(path for group in split.values() for path in group)
        labels = torch.tensor([n for n, group in enumerate(split.values()) for _ in group])
        files = ImageFiles(paths, labels, tuple(split), size)
        if files.decoded_bytes > budget_bytes:
            return files
        pixels = files.decode(range(len(files)), workers, progress=True)
        images = pixels.unflatten(1, (size, size)).permute(0, 3, 1, 2)
        return ImageSet(images, labels, files.classes)

    return load(train), load(test)


def _hold_out(
    split: dict[str, list[Path]], quarter: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    for name, paths in split.items():
        if len(paths) < 4:
            raise UserError(f"class {name!r} has {len(paths)} images: too few for quarters")
    held = {name: paths[quarter::4] for name, paths in split.items()}
    kept = {
        name: [path for number, path in enumerate(paths) if number % 4 != quarter]
        for name, paths in split.items()
    }
    return kept, held
