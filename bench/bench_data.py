"""Augmented batches against the pipeline of the replication, on the same CPU cores.

The pipeline makes one image at a time: decode with Pillow, rotate or correct gamma, resize, to
tensor, normalise. As many processes run it as ours has threads. The images are the photographs in
datasets/, or beside the project, or synthetic flowers where there are none; those of a batch are
drawn from the whole epoch, and its memory is used again, as in training.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from contest import Contestant, Makers
from PIL import Image
from torchvision.transforms import functional as tv

from cnnsp import IMAGE_SIZE
from cnnsp.data.augment import IMAGENET_MEAN, IMAGENET_STD, PAPER_VARIANTS, RandomAugment
from cnnsp.data.batches import ImageBank
from cnnsp.data.images import ImageSet, load_folder
from cnnsp.data.synthetic import synthetic_flowers

ROOT = Path(__file__).resolve().parents[1]
# Where the flower photographs may be, and where they are.
FOLDERS = (ROOT / "datasets", ROOT / "shared" / "flowers", ROOT.parent / "shared" / "flowers")
PHOTOGRAPHS = next((folder for folder in FOLDERS if (folder / "train_data").is_dir()), None)

BANKS = {
    "paper": {"variants": PAPER_VARIANTS},
    "paper_contiguous": {"variants": PAPER_VARIANTS, "channels_last": False},
    "paper_without_numba": {"variants": PAPER_VARIANTS, "compiled": False},
    "random": {"augment": RandomAugment()},
    "random_without_numba": {"augment": RandomAugment(), "compiled": False},
}


def cases(device: torch.device) -> dict[str, Makers]:
    batch = 256 if device.type == "cuda" else 64
    makers = {"replication": lambda: replication(batch)}
    for name in BANKS:
        if device.type == "cpu" or "numba" not in name:  # on a GPU it is PyTorch that makes them
            makers[name] = functools.partial(ours, name, batch, device)
    source = "photographs" if PHOTOGRAPHS else "synthetic"
    return {f"data-batch{batch}-{source}": makers}


@functools.cache
def images() -> tuple[ImageSet, list[Path]]:
    """Decoded, and their files."""
    if PHOTOGRAPHS:
        train, _ = load_folder(PHOTOGRAPHS, workers=torch.get_num_threads())
        assert isinstance(train, ImageSet), "a set for this bench fits in memory"
        return train, sorted(p for p in (PHOTOGRAPHS / "train_data").glob("*/*") if p.is_file())
    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    drawn = synthetic_flowers(8)
    paths = [Path(temporary.name, f"{name}.jpg") for name in drawn.names]
    for path, pixels in zip(paths, drawn.images, strict=True):
        tv.to_pil_image(pixels).save(path, quality=90)
    return drawn, paths


def items(batch: int) -> Iterator[torch.Tensor]:
    """Without end: the numbers of variants that a batch is made of."""
    generator = torch.Generator().manual_seed(0)
    number = len(images()[0]) * len(PAPER_VARIANTS)
    while True:
        yield torch.randint(number, (batch,), generator=generator)


def ours(name: str, batch: int, device: torch.device) -> Contestant:
    options = {"channels_last": True, "device": device, **BANKS[name]}
    made = ImageBank(images()[0], **options).batches(items(batch), reuse=True)
    assert next(made)[1].shape == (batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return Contestant(lambda: next(made), images=batch)


def replication(batch: int) -> Contestant:
    context = multiprocessing.get_context("spawn")
    pool = context.Pool(torch.get_num_threads(), torch.set_num_threads, (1,))
    atexit.register(pool.terminate)
    numbers, (_, paths) = items(batch), images()

    def run() -> object:
        work = [divmod(item, len(PAPER_VARIANTS)) for item in next(numbers).tolist()]
        return pool.starmap(replicate, [(paths[image], variant) for image, variant in work])

    return Contestant(run, images=batch)


def replicate(path: Path, variant: int) -> None:
    """The replication's pipeline, in one process on one core."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    angle, gamma = PAPER_VARIANTS[variant].angle, PAPER_VARIANTS[variant].gamma
    if angle:
        image = tv.rotate(image, angle)
    if gamma != 1:
        image = tv.adjust_gamma(image, gamma)
    image = tv.resize(image, [IMAGE_SIZE, IMAGE_SIZE])
    tv.normalize(tv.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


def test_data(record) -> None:
    record()
