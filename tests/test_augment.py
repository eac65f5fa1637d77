"""The 61 variants of an image, random augmentation, and the order of an epoch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from cnnsp.data import augment
from cnnsp.data.augment import IMAGENET_MEAN, IMAGENET_STD, PAPER_VARIANTS, RandomAugment, Variant
from cnnsp.data.batches import ImageBank, epoch_batches
from cnnsp.data.images import GPU_BUDGET, ImageSet

# Of normalised images.
TOLERANCE = 1e-3


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


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled(request: pytest.FixtureRequest, device) -> bool:
    """Whether the compiled loops make the batches, which only a CPU has, or plain PyTorch."""
    if request.param:
        if device.type != "cpu":
            pytest.skip("the compiled loops serve CPUs")
        pytest.importorskip("cnnsp.data.augment_numba")
    return request.param


FORMATS = pytest.mark.parametrize("channels_last", [False, True])
RECIPES = pytest.mark.parametrize(
    "recipe", [{"variants": PAPER_VARIANTS}, {"augment": RandomAugment()}], ids=["paper", "random"]
)


@FORMATS
def test_variants_equal_torchvision(compiled: bool, device, poisoned, channels_last: bool) -> None:
    """Every level of every pixel, of images that hold every level."""
    images = random_images(2, 40, 56)
    images.images[0, :, :16, :16] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    options = {"device": device, "channels_last": channels_last, "compiled": compiled}
    bank = ImageBank(images, PAPER_VARIANTS, **options)
    batch, labels = bank.batch(torch.arange(len(bank)))
    assert batch.dtype == torch.float32
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.is_contiguous(memory_format=form)
    assert labels.tolist() == [0] * 61 + [1] * 61
    expected = [reference_variant(image, v) for image in images.images for v in PAPER_VARIANTS]
    torch.testing.assert_close(batch.cpu(), torch.stack(expected), rtol=0, atol=2e-6)


@RECIPES
def test_a_batch_does_not_depend_on_its_company(compiled: bool, device, recipe) -> None:
    bank = ImageBank(random_images(3), **recipe, device=device, compiled=compiled)
    items = torch.randperm(len(bank))[:21]
    together, labels = bank.batch(items, 5)
    for position, item in enumerate(items):
        alone, label = bank.batch(item[None], 5)
        # A GPU may add up an image's mean in an order that depends on the batch.
        tolerance = 0 if device.type == "cpu" else 1e-5
        torch.testing.assert_close(alone[0], together[position], rtol=0, atol=tolerance)
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


def test_ranks_share_each_batch() -> None:
    def batches(rank: int = 0, world_size: int = 1) -> list[Tensor]:
        return [*epoch_batches(41, 8, seed=0, epoch=3, rank=rank, world_size=world_size)]

    ranks = [batches(rank, 3) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [6, 6, 6]
    for step, whole in enumerate(batches()):
        parts = [batches[step] for batches in ranks]
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
        assert parts[0].tolist() == whole.tolist()[::3]
    assert [len(batches[-1]) for batches in ranks] == [1, 0, 0]


HEIGHT, WIDTH = 40, 56
# Draws nothing at all. The ratio is that of the pixels, so the whole image has that of its sides.
STILL = RandomAugment(
    repeats=5, degrees=0, scale=(1, 1), ratio=(WIDTH / HEIGHT, WIDTH / HEIGHT), flip=0,
    gamma=(1, 1), brightness=0, contrast=0, saturation=0,
)  # fmt: skip


def crop(image: Tensor, drawn: augment.Draw) -> Tensor:
    top, left, height, width = (int(n) for n in drawn[:4])
    return tv.resized_crop(image, top, left, height, width, [HEIGHT, WIDTH], antialias=False)


def rotate(image: Tensor, drawn: augment.Draw) -> Tensor:
    return tv.rotate(image, float(drawn.angle), InterpolationMode.BILINEAR)


def flip(image: Tensor, drawn: augment.Draw) -> Tensor:
    return tv.hflip(image) if drawn.flip else image


def colour(image: Tensor, drawn: augment.Draw) -> Tensor:
    image = tv.adjust_brightness(image, float(drawn.brightness))
    image = tv.adjust_contrast(image, float(drawn.contrast))
    image = tv.adjust_saturation(image, float(drawn.saturation))
    return tv.adjust_gamma(image, float(drawn.gamma))


# The draws of one operator, or of several whose composition interpolates once.
OPERATORS: dict[str, tuple[Sequence[Callable[..., Tensor]], dict[str, object]]] = {
    "nothing": ([], {}),
    "crop": ([crop], {"scale": (0.1, 1.0), "ratio": (0.5, 2.0)}),
    "rotation": ([rotate], {"degrees": 180}),
    "flip": ([flip], {"flip": 0.5}),
    "crop and flip": ([crop, flip], {"scale": (0.3, 0.9), "flip": 0.5}),
    "rotation and flip": ([rotate, flip], {"degrees": 15, "flip": 0.5}),
    "brightness": ([colour], {"brightness": 1}),
    "contrast": ([colour], {"contrast": 1}),
    "saturation": ([colour], {"saturation": 1}),
    "gamma": ([colour], {"gamma": (0.7, 1.3)}),
    "all colour": (
        [colour], {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "gamma": (0.7, 1.3)}
    ),
}  # fmt: skip


@FORMATS
@pytest.mark.parametrize("name", OPERATORS)
def test_random_operators_equal_torchvision(
    compiled: bool, device, poisoned, name: str, channels_last: bool
) -> None:
    operators, ranges = OPERATORS[name]
    recipe = dataclasses.replace(STILL, **ranges)
    images = random_images(2, HEIGHT, WIDTH)
    options = {"device": device, "channels_last": channels_last, "compiled": compiled}
    bank = ImageBank(images, augment=recipe, **options)
    items = torch.arange(len(bank))
    batch, labels = bank.batch(items, 7)
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.is_contiguous(memory_format=form)
    assert labels.tolist() == [0] * 5 + [1] * 5
    drawn = recipe.draw(items, 7, HEIGHT, WIDTH)
    for item in range(len(bank)):
        one = augment.Draw(*(numbers[item] for numbers in drawn))
        image = images.images[item // 5] / 255
        for operator in operators:
            image = operator(image, one)
        expected = tv.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
        torch.testing.assert_close(batch[item].cpu(), expected, rtol=0, atol=TOLERANCE)


def test_compiled_loops_equal_torch() -> None:
    """All operators together, on an image as smooth as a photograph."""
    pytest.importorskip("cnnsp.data.augment_numba")
    images, recipe = random_images(3, 64, 48), RandomAugment(repeats=20)
    banks = [ImageBank(images, augment=recipe, compiled=compiled) for compiled in (True, False)]
    looped, plain = (bank.batch(torch.arange(60))[0] for bank in banks)
    torch.testing.assert_close(looped, plain, rtol=0, atol=TOLERANCE)


def test_draws_depend_on_seed_epoch_and_item_alone() -> None:
    recipe, items = RandomAugment(seed=1), torch.randperm(1000)
    whole = torch.stack(recipe.draw(items, 4, 256, 256))
    part = torch.stack(recipe.draw(items[300:310], 4, 256, 256))
    assert torch.equal(whole[:, 300:310], part)
    for other in (
        recipe.draw(items, 5, 256, 256),
        RandomAugment(seed=2).draw(items, 4, 256, 256),
        RandomAugment(seed=1 + 2**32).draw(items, 4, 256, 256),
        recipe.draw(items + 2**32, 4, 256, 256),
    ):
        assert not (whole[4] == other.angle).any()


def test_draws_fill_their_ranges() -> None:
    recipe = RandomAugment(contrast=0.3, saturation=0.4)
    drawn = recipe.draw(torch.arange(20_000), 0, 256, 256)
    for numbers, low, high in (
        (drawn.angle, -15, 15),
        (drawn.gamma, 0.7, 1.3),
        (drawn.brightness, 0.8, 1.2),
        (drawn.contrast, 0.7, 1.3),
        (drawn.saturation, 0.6, 1.4),
    ):
        # Of a uniform distribution; the standard error of the mean is range / 490.
        assert low <= numbers.min() < low + 0.001 * (high - low)
        assert high >= numbers.max() > high - 0.001 * (high - low)
        assert numbers.mean() == pytest.approx((low + high) / 2, abs=(high - low) / 100)
    assert set(drawn.flip.tolist()) == {0, 1}
    assert drawn.flip.mean() == pytest.approx(0.5, abs=0.015)
    area = drawn.height * drawn.width / 256**2
    assert 0.59 < area.min() < 0.61
    assert area.max() > 0.95
    ratio = drawn.width / drawn.height
    assert 0.79 < ratio.min() < 0.81
    assert 1.24 < ratio.max() < 1.26
    for start, size in ((drawn.top, drawn.height), (drawn.left, drawn.width)):
        assert start.min() == 0
        assert (start + size).max() == 256
    # No parameter says anything about another one, but for the crop's.
    correlations = torch.corrcoef(torch.stack(drawn[4:])) - torch.eye(6)
    assert correlations.abs().max() < 0.04


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@RECIPES
def test_batches_come_in_the_training_dtype(compiled: bool, device, dtype, recipe) -> None:
    images = random_images(2)
    items = torch.arange(0, 122, 5)
    options = {"device": device, "compiled": compiled}
    expected, _ = ImageBank(images, **recipe, **options).batch(items)
    for channels_last in (False, True):
        bank = ImageBank(images, **recipe, dtype=dtype, channels_last=channels_last, **options)
        # Rounded once more: a last bit of fp32 may make a last bit of the type.
        batch = bank.batch(items)[0]
        assert batch.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(batch, expected.to(dtype), rtol=eps, atol=1e-6)


@FORMATS
@pytest.mark.parametrize("budget_bytes", [0, GPU_BUDGET])
def test_batches_are_those_of_batch(device, channels_last: bool, budget_bytes: int) -> None:
    """From the device's memory, and through the host's; a CPU has one memory."""
    bank = ImageBank(
        random_images(5), PAPER_VARIANTS, device=device, channels_last=channels_last,
        budget_bytes=budget_bytes,
    )  # fmt: skip
    assert bank.images.device_bytes == (
        5 * 24 * 24 * 3 if device.type != "cpu" and budget_bytes else 0
    )
    batches = [*epoch_batches(50, 16, seed=0, epoch=0), torch.empty(0, dtype=torch.int64)]
    kept = list(bank.batches(batches))
    seen = set()
    reused = bank.batches(batches, reuse=True)
    for items, kept_batch, again in zip(batches, kept, reused, strict=True):
        images, labels = bank.batch(items)
        seen.add(again[1].data_ptr())
        for got in (kept_batch, again):
            assert torch.equal(got[0], items)
            assert torch.equal(got[1], images)
            assert torch.equal(got[2], labels)
    assert len(seen - {0}) == 1


@pytest.mark.parametrize("items", [[-1], [0, 122]])
def test_items_that_are_not_there_are_refused(compiled: bool, items: list[int]) -> None:
    bank = ImageBank(random_images(2), PAPER_VARIANTS, compiled=compiled)
    with pytest.raises(IndexError, match=r"items must be in range\(122\)"):
        bank.batch(torch.tensor(items))


def test_many_python_threads_at_once() -> None:
    """As where one evaluates while another trains; numba's own threads would end the process."""
    bank, items = ImageBank(random_images(4), augment=RandomAugment()), torch.arange(60)
    expected, _ = bank.batch(items)
    with ThreadPoolExecutor(8) as pool:
        for images, _ in pool.map(bank.batch, [items] * 16):
            assert torch.equal(images, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"repeats": 0},
        {"degrees": 181},
        {"scale": (0.5, 1.5)},
        {"ratio": (2, 1)},
        {"gamma": (-1, 1)},
        {"flip": 1.5},
        {"contrast": float("inf")},
        {"seed": -1},
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"^{name} must be .* got {re.escape(repr(value))}"):
        RandomAugment(**arguments)


def test_variants_and_random_augmentation_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give variants or augment, not both"):
        ImageBank(random_images(1), PAPER_VARIANTS, augment=RandomAugment())
