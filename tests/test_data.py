"""Photographs in memory, their 61 variants, the order of an epoch, and the synthetic flowers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from cnnsp.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PAPER_VARIANTS,
    ImageBank,
    Variant,
    epoch_batches,
)
from cnnsp.data import ImageSet, decode, load_folder
from cnnsp.synthetic import CLASSES, synthetic_flowers


def random_images(count: int, height: int = 24, width: int = 24) -> ImageSet:
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 2, ("a", "b"))


def reference_variant(image: torch.Tensor, variant: Variant) -> torch.Tensor:
    """One image through torchvision on PIL, as a DataLoader of the replication has it."""
    picture = tv.to_pil_image(image)
    picture = tv.adjust_gamma(tv.rotate(picture, variant.angle), variant.gamma)
    return tv.normalize(tv.to_tensor(picture), IMAGENET_MEAN, IMAGENET_STD)


def test_recipe_has_61_variants() -> None:
    assert len(set(PAPER_VARIANTS)) == len(PAPER_VARIANTS) == 61
    assert PAPER_VARIANTS[0] == Variant(0, 1.0)
    assert sorted(v.angle for v in PAPER_VARIANTS if v.gamma == 1 and v.angle) == [
        angle for angle in range(-15, 16) if angle
    ]
    gammas = sorted(v.gamma for v in PAPER_VARIANTS if v.gamma != 1)
    assert gammas == pytest.approx([0.7 + 0.02 * k for k in range(31) if k != 15])


@pytest.mark.parametrize("channels_last", [False, True])
def test_variants_equal_torchvision(channels_last: bool) -> None:
    """Every level of every pixel, of images that hold every level."""
    images = random_images(2, 40, 56)
    images.images[0, :, :16, :16] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    bank = ImageBank(images, PAPER_VARIANTS, channels_last=channels_last)
    batch, labels = bank.batch(torch.arange(len(bank)))
    assert batch.dtype == torch.float32
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.is_contiguous(memory_format=form)
    assert labels.tolist() == [0] * 61 + [1] * 61
    expected = [reference_variant(image, v) for image in images.images for v in PAPER_VARIANTS]
    torch.testing.assert_close(batch, torch.stack(expected), rtol=0, atol=2e-6)


def test_a_batch_does_not_depend_on_its_company() -> None:
    bank = ImageBank(random_images(3), PAPER_VARIANTS)
    items = torch.randperm(len(bank))[:21]
    together, labels = bank.batch(items)
    for position, item in enumerate(items):
        alone, label = bank.batch(item[None])
        assert torch.equal(alone[0], together[position])
        assert label[0] == labels[position]


def test_an_epoch_takes_each_item_once_in_an_order_of_its_own() -> None:
    def order(epoch: int, seed: int = 0, first: int = 0) -> list[int]:
        return torch.cat([*epoch_batches(50, 8, seed=seed, epoch=epoch, first=first)]).tolist()

    assert sorted(order(0)) == list(range(50))
    assert order(0) == order(0)
    assert len({tuple(order(e, s)) for e in range(3) for s in range(3)}) == 9
    assert order(1, first=4) == order(1)[32:]
    sizes = [len(batch) for batch in epoch_batches(50, 8, seed=0, epoch=0)]
    assert sizes == [8] * 6 + [2]


def test_folder_is_decoded_as_torchvision_decodes_it(tmp_path: Path) -> None:
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
    train, test = load_folder(tmp_path, workers=2, size=32)
    assert train.classes == test.classes == ("aster", "tulip")
    assert train.images.shape == (8, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    transform = v2.Resize((32, 32))
    for position, path in enumerate(sorted((tmp_path / "train_data").rglob("*.png"))):
        expected = v2.functional.pil_to_tensor(transform(Image.open(path).convert("RGB")))
        assert torch.equal(train.images[position], expected), path


def test_photographs(photographs: Path) -> None:
    path = next(iter(sorted((photographs / "test_data" / "rose").iterdir())))
    expected = tv.pil_to_tensor(tv.resize(Image.open(path).convert("RGB"), [256, 256]))
    assert torch.equal(torch.from_numpy(decode(path).copy()).permute(2, 0, 1), expected)


def test_synthetic_flowers_depend_on_the_seed_alone() -> None:
    few = synthetic_flowers(2, seed=3, size=64, workers=1)
    more = synthetic_flowers(4, seed=3, size=64, workers=3)
    assert few.classes == CLASSES
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
