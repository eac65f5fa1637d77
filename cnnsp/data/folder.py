"""Folders of photographs: which files they hold. Nothing is decoded here, nor PyTorch needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, distinctly, quoted, raise_all

SPLITS = ("train_data", "test_data")
# What operating systems and network drives leave in folders. Hidden files are ignored too.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r", "lost+found", "$recycle.bin"}
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
_LAYOUT = "expected {0}/train_data/<class>/ and {0}/test_data/<class>/"

Split = dict[str, list[Path]]  # the files of each class, both in alphabetical order


def entries(folder: Path) -> list[Path]:
    """What is in ``folder`` in alphabetical order, but for hidden files and other junk."""
    shown = (p for p in folder.iterdir() if p.name[0] != "." and p.name.lower() not in _JUNK)
    # By their names: paths in themselves have another order on Windows, which ignores case.
    return sorted(shown, key=lambda path: path.name)


def check_folder(path: Path, what: str, hint: str = "") -> None:
    """Check that ``path`` is a folder; raises UserError, with ``hint`` where there is nothing."""
    if not path.exists():
        raise UserError(f"{what} {path} does not exist{hint}")
    if not path.is_dir():
        unpack = "; unpack it, and name the folder" if path.suffix.lower() in _ARCHIVES else ""
        raise UserError(f"{what} {path} is a file, not a folder{unpack}")


def list_split(folder: Path, problems: list[str]) -> Split:
    """The files of each class folder in ``folder``; what is wrong is added to ``problems``."""
    if not folder.is_dir():
        makes = "scripts/prepare_flowers.py makes them"
        if folder.parent.name in SPLITS:
            makes = f"--data-dir {quoted(folder.parent.parent)} may hold them"
        problems.append(f"{folder} is missing: {_LAYOUT.format(folder.parent)} ({makes})")
        return {}
    files: Split = {}
    inside = entries(folder)
    problems += [f"{path} is a link to nothing" for path in inside if not path.exists()]
    for class_folder in filter(Path.is_dir, inside):
        paths = entries(class_folder)
        if not paths:
            problems.append(f"{class_folder} holds no images")
        problems += [
            f"{path} is not a file: images lie directly in their class folder"
            if path.exists()
            else f"{path} is a link to nothing"
            for path in paths
            if not path.is_file()
        ]
        files[class_folder.name] = paths
    if not files:
        problems.append(f"{folder} holds no class folders: {_LAYOUT.format(folder.parent)}")
    return files


def list_folder(
    data_dir: str | Path,
    *,
    validate: int | None = None,
    splits: Sequence[str] = SPLITS,
    named_by: Path | None = None,
) -> dict[str, Split]:
    """The files of ``data_dir``, by split.

    Args:
        data_dir: holds ``train_data/<class>/`` and ``test_data/<class>/``.
        validate: a number from 0 to 3. What stands for ``test_data`` then is this quarter of
            ``train_data``, which that lacks: every fourth image of each class.
        splits: those that are wanted; others need not be there.
        named_by: the checkpoint that ``data_dir`` comes from, if it does.

    Raises:
        UserError: naming all that is at fault: a missing folder, a class that is empty or holds
            a folder, classes that differ between the splits, or one class alone.
    """
    data_dir = Path(data_dir)
    origin = f"; {named_by} was trained on it, and --data-dir names another" if named_by else ""
    check_folder(data_dir, "data folder", origin)
    if validate is not None:
        splits = SPLITS[:1]
    problems: list[str] = []
    try:
        found = {name: list_split(data_dir / name, problems) for name in splits}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    raise_all(problems)
    classes = [set(split) for split in found.values()]
    show = distinctly(set().union(*classes))
    if differ := [
        f"{show(name)} is only in {split}"
        for split, mine in zip(splits, classes, strict=True)
        for name in sorted(mine - classes[0].intersection(*classes))
    ]:
        raise UserError(f"classes of {data_dir} differ between the splits: {', '.join(differ)}")
    if len(classes[0]) < 2 and (len(found) > 1 or validate is not None):
        name = next(iter(classes[0]))
        raise UserError(f"{data_dir} holds one class, {name!r}; it takes two or more")
    if validate is None:
        return found
    (whole,) = found.values()
    few = {name: len(paths) for name, paths in whole.items() if len(paths) < 4}
    raise_all([f"class {name!r} has {n} images: too few for quarters" for name, n in few.items()])
    held = {name: paths[validate::4] for name, paths in whole.items()}
    kept = {
        name: [path for number, path in enumerate(paths) if number % 4 != validate]
        for name, paths in whole.items()
    }
    return dict(zip(SPLITS, (kept, held), strict=True))


class Source(NamedTuple):
    """A file to classify, and whether it was found, in a folder or by a pattern, or named."""

    path: Path
    in_folder: bool


def find_images(paths: Sequence[str | Path]) -> tuple[list[Source], list[str]]:
    """The files named, or matched, and all in the folders, in alphabetical order, without junk.

    Links are followed, but not into a folder that holds them.

    Returns:
        the files, and why folders were passed over.

    Raises:
        UserError: when a folder cannot be read, or for an address of the web.
    """
    sources: list[Source] = []
    passed_over = []

    def walk(folder: Path, above: tuple[Path, ...] = ()) -> None:
        real = folder.resolve()
        if real in above:
            passed_over.append(f"{folder} links to a folder that it lies in")
            return
        try:
            inside = entries(folder)
        except OSError as error:
            raise UserError(f"cannot read folder {folder}: {error.strerror}") from None
        sources.extend(Source(path, in_folder=True) for path in inside if not path.is_dir())
        for path in inside:
            if path.is_dir():
                walk(path, (*above, real))

    for name in map(os.path.expanduser, map(str, paths)):
        if "://" in name:
            raise UserError(f"{name} is no file: download it, and name that")
        # Windows' shells leave *.jpg to programs.
        found = [] if Path(name).exists() else sorted(glob(name))
        for path in map(Path, found or [name]):
            if path.is_dir():
                walk(path)
            else:
                sources.append(Source(path, in_folder=bool(found)))
    return sources, passed_over
