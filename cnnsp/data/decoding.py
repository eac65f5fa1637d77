"""One way from a file to pixels, for training, evaluation and prediction alike."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .. import IMAGE_SIZE
from ..errors import UserError

# Formats that Pillow needs a package for, by the bytes that follow "ftyp", and its name.
_PACKAGES = {
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
        ("HEIC", "pillow-heif"),
    ),
    **dict.fromkeys((b"avif", b"avis"), ("AVIF", "--upgrade pillow")),
}


def decode(path: Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """Read one image, resized to uint8 ``[size, size, 3]``; see :func:`read`."""
    with naming(path):
        return np.asarray(read(path).resize((size, size), Image.Resampling.BILINEAR))


def read(path: Path) -> Image.Image:
    """An image in RGB, as one sees it.

    It stands upright (EXIF), lies on white where it is transparent, and is the first frame of an
    animation. Pixels of 16 or 32 bits or floats are scaled: from 0 to 1, if they are floats that
    never exceed it, or else to 255, 4095 or 65535, the least that none exceeds.

    Raises:
        UserError: when the file is no image, damaged, or has pixels beyond those scales.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
        with _open(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # a picture is whole, though its EXIF be damaged
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":
                return _scaled(image, path)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # what a changed byte can lead to in Pillow
        raise UserError(f"cannot decode {path}: {error}") from None


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Image.UnidentifiedImageError:
        with path.open("rb") as file:
            start = file.read(12)
    if start[4:8] != b"ftyp" or start[8:] not in _PACKAGES:
        more = ""
        if path.suffix.lower() in Image.registered_extensions():
            more = ", or of a kind that Pillow does not read"
        elif start[:4] == b"PK\3\4":
            more = "; unpack it, and name the folder"
        raise UserError(f"{path} is not an image{more}")
    name, package = _PACKAGES[start[8:]]
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
        return Image.open(path)
    except (ImportError, Image.UnidentifiedImageError):
        raise UserError(f"{path} is {name}: pip install {package}, or convert it to JPEG") from None


def _scaled(image: Image.Image, path: Path) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    tops = (1, 255, 4095, 65535) if image.mode == "F" else (255, 4095, 65535)
    top = next((top for top in tops if high <= top), None)
    if not low >= 0 or top is None:  # NaN, too, is refused
        raise UserError(
            f"{path} has pixels from {low:g} to {high:g}; convert it to 8 bits a channel"
        )
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8)).convert("RGB")


_decoded, _show_others = threading.local(), warnings.showwarning


def _show(message: Warning | str, *details: Any) -> None:
    if (path := getattr(_decoded, "path", None)) is None:
        _show_others(message, *details)
    else:
        # In one piece, or the lines of two threads may mix.
        sys.stderr.write(f"warning: {path}: {' '.join(str(message).split())}\n")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context, Pillow's warnings go to stderr in one line with the file's name.

    In this thread alone, and for each file, though Pillow's texts name none.
    """
    _decoded.path = path
    try:
        yield
    finally:
        del _decoded.path


# Python's own context for warnings is no use to several threads at once.
warnings.showwarning = _show  # type: ignore[assignment]
for category in (UserWarning, RuntimeWarning):
    warnings.filterwarnings("always", category=category, module=r"(PIL|cnnsp)\.")
