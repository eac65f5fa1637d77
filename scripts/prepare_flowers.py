#!/usr/bin/env python
"""Turn an unpacked Kaggle folder of flowers into the folders that train.py reads.

Exact duplicates (the same bytes) and near duplicates (the same picture at another size or quality)
are left out, across all classes, so no picture is in both splits. The choice depends on the names
of the files and the seed only.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cnnsp import UserError, files
from cnnsp.cli import ArgumentParser, exit_status, expanded, importing, number
from cnnsp.data.folder import SPLITS, check_folder, entries

if TYPE_CHECKING:
    import numpy as np

PROG = "prepare_flowers.py"
EXAMPLES = """\
  prepare_flowers.py flowers
  prepare_flowers.py flowers --classes tulip rose --train 200 --test 100 --output tulips"""
# Thumbnails whose correlation exceeds this show the same picture. Among 900 photographs of flowers
# it was 0.93 at most for two different ones, and 0.99 at least for one of them and its copy at two
# thirds of the size and JPEG quality 50.
_SAME_LOOK = 0.97


class Photo(NamedTuple):
    """A readable photograph."""

    path: Path
    digest: str  # SHA-256 of the file
    # 16 by 16 RGB pixels as a vector, float64 [768], of mean 0 and length 1: the product of two is
    # their correlation. One colour gives zeros, so nothing but the same file is its twin.
    look: np.ndarray

    @classmethod
    def of(cls, path: Path) -> Photo:
        """Decode ``path`` whole and hash it; raises UserError."""
        import numpy as np
        from PIL import Image

        from cnnsp.data.decoding import naming, read

        with naming(path):
            small = read(path).resize((16, 16), Image.Resampling.BOX)
        look = np.asarray(small, dtype=np.float64).ravel()
        look = look - look.mean()
        look /= max(float(np.linalg.norm(look)), 1e-9)
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest(), look)

    def is_twin(self, other: Photo) -> bool:
        """Whether both show the same picture."""
        return self.digest == other.digest or float(self.look @ other.look) > _SAME_LOOK


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__, EXAMPLES)
    add = parser.add_argument
    add("source", type=expanded, help="the unpacked folder; it holds a folder for each class")
    add("--output", type=expanded, default="datasets", help="folder to make")
    add("--classes", nargs="+", default=["daisy", "dandelion", "rose"], help="folders to take")
    add("--train", type=number(int, 1), default=100, help="training images of each class")
    add("--test", type=number(int, 1), default=200, help="test images of each class")
    add("--seed", type=number(int, 0), default=0, help="of the choice")
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    output: Path = args.output
    if output.exists() and (not output.is_dir() or entries(output)):
        raise UserError(f"{output} exists and is not empty; remove it or choose another --output")
    folders = class_folders(args.source, args.classes)
    with importing(PROG):
        import cnnsp.data.decoding  # noqa: F401
    chosen: dict[str, list[Photo]] = {}
    with files.claimed(output):
        for folder in folders:
            chosen[folder.name] = []
            choose(folder, chosen, args.train + args.test, args.seed)
            if (found := len(chosen[folder.name])) < args.train + args.test:
                raise UserError(
                    f"{folder} has {found} usable photographs; {args.train} for training and "
                    f"{args.test} for testing make {args.train + args.test}"
                )
        try:
            write(chosen, output, args.train)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}") from None
    print(
        f"wrote {output}: {args.train} training and {args.test} test images of "
        f"{', '.join(args.classes)}"
    )


def choose(folder: Path, chosen: dict[str, list[Photo]], most: int, seed: int) -> None:
    """Add photographs of ``folder`` to those ``chosen``, and say which were left out and why."""
    paths = entries(folder)
    for path in paths:
        if not path.is_file():
            print(f"left out {path}: a folder, or a link to nothing")
    paths = [path for path in paths if path.is_file()]
    random.Random(os.fsencode(f"{seed}/{folder.name}")).shuffle(paths)
    for path in paths:
        if len(chosen[folder.name]) == most:
            break
        try:
            photo = Photo.of(path)
        except UserError as error:
            print(f"left out {path}: not a readable image ({error})")
            continue
        seen = (other for others in chosen.values() for other in others)
        if (twin := next(filter(photo.is_twin, seen), None)) is None:
            chosen[folder.name].append(photo)
        else:
            how = "the same file as" if twin.digest == photo.digest else "looks the same as"
            print(f"left out {path}: {how} {twin.path}")


def class_folders(source: Path, classes: Sequence[str]) -> list[Path]:
    """The folders of ``classes`` in what was unpacked; raises UserError."""
    check_folder(source, "source folder")
    # Kaggle's archive unpacks to flowers/, which in some versions holds another flowers/.
    for root in (source, source / "flowers", source / "flowers" / "flowers"):
        if any((root / name).is_dir() for name in classes):
            break
    else:
        raise UserError(f"{source} holds none of the class folders {', '.join(classes)}")
    if len({(root / name).name for name in classes}) < len(classes):
        raise UserError(f"--classes names a folder twice: {' '.join(classes)}")
    for name in classes:
        if not (root / name).is_dir():
            raise UserError(f"class folder {root / name} does not exist")
    return [root / name for name in classes]


def write(chosen: dict[str, list[Photo]], output: Path, train: int) -> None:
    """Copy the photographs of each class, the first ``train`` to train on; all or none of them."""
    # Within the output, which may be a link or another file system, so that a rename is enough.
    with tempfile.TemporaryDirectory(prefix=".", dir=output) as temporary:
        for name, photos in chosen.items():
            for split, some in zip(SPLITS, (photos[:train], photos[train:]), strict=True):
                whole = Path(temporary, split, name)
                whole.mkdir(parents=True)
                for photo in some:
                    shutil.copyfile(photo.path, whole / photo.path.name)
        for split in SPLITS:
            os.replace(Path(temporary, split), output / split)


main = partial(exit_status, PROG, run)

if __name__ == "__main__":
    sys.exit(main())
