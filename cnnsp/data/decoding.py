"""One way from a file to pixels, for training, evaluation and prediction alike."""

from __future__ import annotations

import contextlib
import importlib
import re
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

# Phones take photographs of 200 million pixels, which Pillow would take for an attack.
Image.MAX_IMAGE_PIXELS = 2**28
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
    never exceed it, or else to the least largest number of 8, 10, 12, 14 or 16 bits that none does.

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
    if not start:
        raise UserError(f"{path} is empty")
    if start[4:8] != b"ftyp" or start[8:] not in _PACKAGES:
        more = ""
        if path.suffix.lower() in Image.registered_extensions():
            more = ", or of a kind that Pillow does not read"
        elif path.suffix.lower() == ".zip":
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
    tops = [1] * (image.mode == "F") + [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
    top = next((top for top in tops if high <= top), None)
    if not low >= 0 or top is None:  # NaN, too, is refused
        raise UserError(
            f"{path} has pixels from {low:g} to {high:g}; convert it to 8 bits a channel"
        )
    if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose white is 0
        values = top - values
    values[values == image.info.get("transparency")] = top
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8)).convert("RGB")


_decoded, _lock = threading.local(), threading.Lock()
_under_way, _show_others = 0, warnings.showwarning
# For each file, though Pillow's texts name none.
_PILLOW = re.compile(r"(PIL|cnnsp)\.")
_FILTERS = [("always", None, kind, _PILLOW, 0) for kind in (UserWarning, RuntimeWarning)]


def _show(message: Warning | str, *details: Any) -> None:
    if (path := getattr(_decoded, "path", None)) is None:
        _show_others(message, *details)
    else:
        # In one piece, or the lines of two threads may mix.
        sys.stderr.write(f"warning: {path}: {' '.join(str(message).split())}\n")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context, Pillow's warnings go to stderr in one line with the file's name.

    In this thread alone; after the last of several threads, Python's warnings are what they were.
    """
    # Python's own context serves one thread, and forgets what other code has warned of before.
    global _under_way, _show_others
    _decoded.path = path
    with _lock:
        _under_way += 1
        if _under_way == 1:
            warnings.filters[:0] = _FILTERS  # type: ignore[index]
            if warnings.showwarning is not _show:
                _show_others = warnings.showwarning
                warnings.showwarning = _show  # type: ignore[assignment]
    try:
        yield
    finally:
        with _lock:
            _under_way -= 1
            if _under_way == 0:
                others = [entry for entry in warnings.filters if entry not in _FILTERS]
                warnings.filters[:] = others  # type: ignore[index]
                if warnings.showwarning is _show:
                    warnings.showwarning = _show_others
        del _decoded.path
