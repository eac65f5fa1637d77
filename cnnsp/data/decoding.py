"""One way from a file to pixels, for training, evaluation and prediction alike."""

from __future__ import annotations

import contextlib
import importlib
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import IMAGE_SIZE
from ..errors import UserError

# What Pillow raises for a damaged file, beside OSError (truncated, or no image at all).
_ERRORS = (
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
# By the value of EXIF's tag 274: what stands the picture upright.
_ORIENTATION, _UPRIGHT = 274, {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
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
            with contextlib.suppress(*_ERRORS):  # a picture is whole, though its EXIF be damaged
                orientation = image.getexif().get(_ORIENTATION)
                if orientation in _UPRIGHT:
                    image = image.transpose(_UPRIGHT[orientation])
            if image.mode[0] in "IF":
                return _scaled(image, path)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except _ERRORS as error:
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


_named, _lock = threading.local(), threading.Lock()
_inside = 0
_filters: warnings.catch_warnings[None]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context, Pillow's warnings go to stderr in one line with the file's name.

    Python's own context for warnings is no use to several threads at once, and Pillow's texts name
    no files, so that one warning would stand for all files that lead to it.
    """
    global _inside, _filters
    with _lock:
        if _inside == 0:
            others = warnings.showwarning

            def show(message: Warning | str, *details: Any, **more: Any) -> None:
                name = getattr(_named, "path", None)
                if name is None:
                    others(message, *details, **more)
                else:
                    print(f"warning: {name}: {' '.join(str(message).split())}", file=sys.stderr)

            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.showwarning = show
            warnings.filterwarnings("always", module=r"(PIL|cnnsp)\.")
        _inside += 1
    _named.path = path
    try:
        yield
    finally:
        _named.path = None
        with _lock:
            _inside -= 1
            if _inside == 0:
                _filters.__exit__(None, None, None)
