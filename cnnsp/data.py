"""Photographs in ``train_data/<class>`` and ``test_data/<class>``, decoded once into memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .errors import UserError
from .network import IMAGE_SIZE

# What operating systems leave in folders. Hidden files are ignored too.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx"}
# What Pillow raises for a damaged file, beside OSError (truncated, or no image at all).
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images of one split.

    Attributes:
        images: uint8 ``[N, 3, H, W]``, RGB.
        labels: int64 ``[N]``, positions in ``classes``.
        classes: the class names, in alphabetical order.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


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
    data_dir: str | Path, *, workers: int = 2, size: int = IMAGE_SIZE
) -> tuple[ImageSet, ImageSet]:
    """Decode ``data_dir/train_data`` and ``data_dir/test_data`` with ``workers`` threads.

    Memory: 192 KiB an image at 256 × 256.

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
    return _decode_split(train, workers, size), _decode_split(test, workers, size)


def _decode_split(files: dict[str, list[Path]], workers: int, size: int) -> ImageSet:
    paths: Sequence[Path] = [path for group in files.values() for path in group]
    labels = [label for label, group in enumerate(files.values()) for _ in group]
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(workers) as pool:
        decoded = pool.map(lambda path: decode(path, size), paths)
        try:
            bar = tqdm(decoded, "decoding", len(paths), unit="image", leave=False, disable=None)
            for position, pixels in enumerate(bar):
                images[position] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return ImageSet(images, torch.tensor(labels), tuple(files))
