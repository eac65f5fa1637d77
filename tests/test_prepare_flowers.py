"""Choosing a training and a test set from a folder of photographs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnsp.data.folder import SPLITS

from .scripts import load_script

main = load_script("prepare_flowers").main
SIZES = ["--train", "2", "--test", "3"]


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Seven different photographs of each class, nested as in Kaggle's archive."""
    for number, name in enumerate(("daisy", "dandelion", "rose")):
        folder = tmp_path / "archive" / "flowers" / name
        folder.mkdir(parents=True)
        for seed in range(7):
            picture(10 * number + seed).save(folder / f"{name}{seed}.jpg", quality=95)
    return tmp_path / "archive"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.jpg")}


def test_splits_by_seed(kaggle: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)  # as on one that is new
    (tmp_path / "b").symlink_to("disk")
    for output, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arguments = [str(kaggle), "--output", str(tmp_path / output), "--seed", seed, *SIZES]
        assert main(arguments) == 0
    assert names(tmp_path / "a") == names(tmp_path / "b") != names(tmp_path / "c")
    for name in ("daisy", "dandelion", "rose"):
        train = list((tmp_path / "a" / "train_data" / name).iterdir())
        test = list((tmp_path / "a" / "test_data" / name).iterdir())
        assert (len(train), len(test)) == (2, 3)
        for path in (*train, *test):
            assert path.read_bytes() == (kaggle / "flowers" / name / path.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "archive", "b", "c", "disk"]
    assert {p.name for p in (tmp_path / "b").iterdir()} == {*SPLITS, "lost+found"}


def test_leaves_out_duplicates_and_unreadable_files(kaggle: Path, tmp_path: Path, capsys) -> None:
    """Whichever file comes first; with a few seeds each of the bad ones is met."""
    daisies = kaggle / "flowers" / "daisy"
    original = daisies / "daisy0.jpg"
    (daisies / "copy.jpg").write_bytes(original.read_bytes())
    Image.open(original).resize((80, 60)).save(daisies / "smaller.jpg", quality=60)
    (daisies / "cut.jpg").write_bytes(original.read_bytes()[:900])
    (daisies / "page.jpg").write_text("<html>404</html>")
    (daisies / ".DS_Store").write_bytes(b"junk")
    for seed in range(4):
        output = tmp_path / f"out{seed}"
        arguments = ["--output", str(output), "--seed", str(seed), "--train", "3", "--test", "4"]
        assert main([str(kaggle), *arguments]) == 0
        chosen = [path for path in output.rglob("*.jpg") if path.parent.name == "daisy"]
        assert len({path.read_bytes() for path in chosen}) == len(chosen) == 7
        assert len({p.name for p in chosen} & {"daisy0.jpg", "copy.jpg", "smaller.jpg"}) == 1
    printed = capsys.readouterr().out
    assert "copy.jpg: the same file as" in printed or "daisy0.jpg: the same file as" in printed
    assert "looks the same as" in printed
    for name in ("cut.jpg", "page.jpg"):
        assert f"left out {daisies / name}: not a readable image" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_of_another_encoding(kaggle: Path, tmp_path: Path) -> None:
    roses = kaggle / "flowers" / os.fsdecode(b"\xe9glantine")
    (kaggle / "flowers" / "rose").rename(roses)
    arguments = ["--output", str(tmp_path / "out"), "--classes", roses.name, *SIZES]
    assert main([str(kaggle), *arguments]) == 0
    assert len(names(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "source folder missing does not exist"),
        (["{kaggle}", "--classes", "daisy", "tulip"], "tulip does not exist"),
        (["{kaggle}", "--classes", "daisy", "./daisy"], "a folder twice: daisy ./daisy"),
        (["{kaggle}", "--train", "5"], "has 7 usable photographs"),
        (["{kaggle}", "--output", "{kaggle}"], "is not empty"),
        (["{kaggle}", "--train", "0"], "--train: must be at least 1, got 0"),
    ],
)
def test_bad_input(
    kaggle: Path, tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    before = names(tmp_path)
    given = ["--output", str(tmp_path / "out"), *SIZES]
    given += [argument.format(kaggle=kaggle) for argument in arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare_flowers.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert names(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["archive"]
