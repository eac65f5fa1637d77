"""Photographs in memory and in files, and the synthetic flowers."""

from __future__ import annotations

from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from cnnsp.data import images
from cnnsp.data.augment import PAPER_VARIANTS
from cnnsp.data.batches import ImageBank, epoch_batches
from cnnsp.data.folder import find_images, list_folder
from cnnsp.data.images import ImageFiles, ImageSet, load_folder
from cnnsp.data.synthetic import CLASSES, synthetic_flowers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images in each split, in several modes, beside junk."""
    rng = np.random.default_rng(0)
    for split in ("train_data", "test_data"):
        for name in ("tulip", "aster"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number, mode in enumerate(("RGB", "L", "RGBA", "P")):
                pixels = rng.integers(0, 256, (50 + number, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{number}.png")
            (folder / ".DS_Store").write_bytes(b"junk")
            (folder / "Thumbs.db").write_bytes(b"junk")
    return tmp_path


def test_folder_is_decoded_as_torchvision_decodes_it(folder: Path) -> None:
    train, test = load_folder(folder, workers=2, size=32)
    assert isinstance(train, ImageSet)
    assert isinstance(test, ImageSet)
    assert train.classes == test.classes == ("aster", "tulip")
    assert train.images.shape == (8, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    transform = v2.Resize((32, 32))
    for position, path in enumerate(sorted((folder / "train_data").rglob("*.png"))):
        expected = v2.functional.pil_to_tensor(transform(Image.open(path).convert("RGB")))
        assert torch.equal(train.images[position], expected), path


def test_the_order_of_classes_and_files_is_the_same_on_every_system(
    folder: Path, monkeypatch
) -> None:
    """Windows ignores case where paths are compared."""
    for split in ("train_data", "test_data"):
        (folder / split / "tulip").rename(folder / split / "Tulip")
    (folder / "test_data" / "aster" / "3.png").rename(folder / "test_data" / "aster" / "B.png")
    (folder / "test_data" / "aster" / "2.png").rename(folder / "test_data" / "aster" / "a.png")
    monkeypatch.setattr(PurePath, "__lt__", lambda a, b: str(a).lower() < str(b).lower())
    for split in list_folder(folder).values():
        assert list(split) == ["Tulip", "aster"]
    assert [path.name for path in split["aster"]] == ["0.png", "1.png", "B.png", "a.png"]
    found, _ = find_images([folder / "test_data" / "aster"])
    assert [source.path for source in found] == split["aster"]


def test_a_split_above_the_budget_stays_in_its_files(folder: Path, monkeypatch) -> None:
    (folder / "test_data" / "aster" / "0.png").unlink()
    monkeypatch.setattr(images, "HOST_BUDGET", 7 * 32 * 32 * 3)
    train, test = load_folder(folder, size=32)
    assert isinstance(train, ImageFiles)
    assert isinstance(test, ImageSet)
    assert len(train) == 8
    assert train.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_files_make_the_batches_of_those_in_memory(folder: Path, workers: int, monkeypatch) -> None:
    in_memory, _ = load_folder(folder, size=32)
    monkeypatch.setattr(images, "HOST_BUDGET", 0)
    in_files, _ = load_folder(folder, size=32)
    expected = ImageBank(in_memory, PAPER_VARIANTS[:3])
    bank = ImageBank(in_files, PAPER_VARIANTS[:3], workers=workers)
    assert len(bank) == len(expected) == 24
    assert "files" in bank.images.placement
    # Batches of 4, 4 and 1 items, of which the last leaves a second rank without any.
    order = [*epoch_batches(9, 4, seed=0, epoch=0), torch.empty(0, dtype=torch.int64)]
    state = torch.get_rng_state()
    made = list(bank.batches(iter(order)))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(made) == len(order)
    for items, (same_items, *batch) in zip(order, made, strict=True):
        assert torch.equal(same_items, items)
        for got in (batch, bank.batch(items)):
            assert torch.equal(got[0], expected.batch(items)[0])
            assert torch.equal(got[1], expected.batch(items)[1])


def test_synthetic_flowers_depend_on_the_seed_alone() -> None:
    few = synthetic_flowers(2, seed=3, size=64)
    more = synthetic_flowers(4, seed=3, size=64)
    assert few.classes == CLASSES
    assert few.names[3] == "dandelion 1"
    assert more.images.shape == (12, 3, 64, 64)
    for label in range(3):
        assert torch.equal(few.images[few.labels == label], more.images[more.labels == label][:2])
    others = [
        synthetic_flowers(2, seed=4, size=64),
        synthetic_flowers(2, seed=3, split="test", size=64),
    ]
    for other in others:
        assert not (few.images == other.images).flatten(1).all(1).any()


def test_synthetic_flowers_are_not_told_apart_by_colour() -> None:
    """A linear classifier of the colours' means and deviations stays near chance, a third."""
    train = synthetic_flowers(60, size=32)
    test = synthetic_flowers(40, size=32, split="test")

    def statistics(images: torch.Tensor) -> torch.Tensor:
        pixels = images.double().flatten(2) / 255
        ones = torch.ones(len(images), 1, dtype=torch.float64)
        return torch.cat([pixels.mean(2), pixels.std(2), ones], 1)

    target = torch.nn.functional.one_hot(train.labels).double()
    weights = torch.linalg.lstsq(statistics(train.images), target).solution
    found = (statistics(test.images) @ weights).argmax(1)
    assert (found == test.labels).double().mean() < 0.65
