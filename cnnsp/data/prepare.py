"""Choose a training and a test set from a folder of photographs, with no picture in both."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .decoding import naming, read
from .folder import check_folder, is_junk

# Thumbnails whose correlation exceeds this show the same picture. Among 900 photographs of flowers
# it was 0.93 at most for two different ones, and 0.99 at least for one of them and its copy at two
# thirds of the size and JPEG quality 50.
_SAME_LOOK = 0.97


@dataclass(frozen=True)
class Photo:
    """A readable photograph.

    Attributes:
        path: where it lies.
        digest: SHA-256 of the file.
        look: see :func:`thumbnail`.
    """

    path: Path
    digest: str
    look: np.ndarray


def prepare_flowers(
    source: str | Path,
    output: str | Path,
    *,
    classes: Sequence[str] = ("daisy", "dandelion", "rose"),
    train: int = 100,
    test: int = 200,
    seed: int = 0,
) -> Iterator[str]:
    """Copy ``train`` + ``test`` photographs of each class to the layout that ``train.py`` reads.

    Exact duplicates (the same bytes) and near duplicates (the same picture at another size or
    quality) are left out, across all classes, so no picture is in both splits. The choice
    depends on the names of the files and ``seed`` only. ``output`` appears when it is complete.

    Args:
        source: a folder with a folder of each class, or with such a folder in ``flowers/``.
        output: becomes ``train_data/<class>/`` and ``test_data/<class>/``; missing or empty.
        classes: the folders to take.
        train: photographs of each class for training.
        test: photographs of each class for testing.
        seed: of the choice.

    Yields:
        Lines for the user: what was left out and why, and what was written.

    Raises:
        UserError: when a class is missing or has too few photographs, or ``output`` is in use or
            cannot be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; remove it or choose another --output")
    folders = _class_folders(Path(source), classes)

    chosen: dict[str, list[Photo]] = {}
    seen: list[Photo] = []
    for name, folder in zip(classes, folders, strict=True):
        inside = sorted(p for p in folder.iterdir() if not is_junk(p))
        for path in inside:
            if not path.is_file():
                yield f"left out {path}: a folder, or a link to nothing"
        paths = [path for path in inside if path.is_file()]
        random.Random(f"{seed}/{name}").shuffle(paths)
        chosen[name] = []
        for path in paths:
            if len(chosen[name]) == train + test:
                break
            try:
                photo = read_photo(path)
            except UserError as error:
                yield f"left out {path}: not a readable image ({error})"
                continue
            twin = find_twin(photo, seen)
            if twin is not None:
                how = "the same file as" if twin.digest == photo.digest else "looks the same as"
                yield f"left out {path}: {how} {twin.path}"
                continue
            seen.append(photo)
            chosen[name].append(photo)
        if len(chosen[name]) < train + test:
            raise UserError(
                f"{folder} has {len(chosen[name])} usable photographs; "
                f"{train} for training and {test} for testing make {train + test}"
            )

    try:
        _write(chosen, output, train)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
    yield f"wrote {output}: {train} training and {test} test images of {', '.join(classes)}"


def read_photo(path: Path) -> Photo:
    """Decode ``path`` whole and hash it; raises UserError."""
    with naming(path):
        look = thumbnail(read(path))
    return Photo(path, hashlib.sha256(path.read_bytes()).hexdigest(), look)


def thumbnail(image: Image.Image) -> np.ndarray:
    """An RGB picture in 16 × 16 pixels as a vector, float64 ``[768]``, of mean 0 and length 1.

    The product of two is their correlation. An image of one colour gives zeros, so nothing but
    the same file is its twin.
    """
    small = image.resize((16, 16), Image.Resampling.BOX)
    look = np.asarray(small, dtype=np.float64).ravel()
    look = look - look.mean()
    return look / max(float(np.linalg.norm(look)), 1e-9)


def find_twin(photo: Photo, others: Sequence[Photo]) -> Photo | None:
    """The first of ``others`` that shows the same picture as ``photo``."""
    for other in others:
        if other.digest == photo.digest or float(other.look @ photo.look) > _SAME_LOOK:
            return other
    return None


def _class_folders(source: Path, classes: Sequence[str]) -> list[Path]:
    check_folder(source, "source folder")
    # Kaggle's archive unpacks to flowers/, which in some versions holds another flowers/.
    for root in (source, source / "flowers", source / "flowers" / "flowers"):
        if any((root / name).is_dir() for name in classes):
            break
    else:
        raise UserError(f"{source} holds none of the class folders {', '.join(classes)}")
    for name in classes:
        if not (root / name).is_dir():
            raise UserError(f"class folder {root / name} does not exist")
    return [root / name for name in classes]


def _write(chosen: dict[str, list[Photo]], output: Path, train: int) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the rename at the end stays on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        whole = Path(temporary) / "data"
        for name, photos in chosen.items():
            for number, photo in enumerate(photos):
                split = "train_data" if number < train else "test_data"
                folder = whole / split / name
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(photo.path, folder / photo.path.name)
        if output.exists():
            output.rmdir()
        os.replace(whole, output)
