"""Time augmented batches against the pipeline of the replication, on the same CPU cores.

    python bench/data_ratios.py [--threads N] [--rounds N] [--images FOLDER] [--output NAME]

The pipeline makes one image at a time: decode with Pillow, rotate or correct gamma, resize, to
tensor, normalise. As many processes run it as ours has threads. Every round runs each contestant
once, in turn, so that a drift of the machine hits all of them; what is compared are medians. The
images of a contestant are drawn from the whole epoch, and its memory is reused, as in training.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from cpu_ratios import medians
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tv

from cnnsp import augment, synthetic
from cnnsp.augment import IMAGENET_MEAN, IMAGENET_STD, PAPER_VARIANTS, ImageBank, RandomAugment
from cnnsp.data import ImageSet, load_folder

FLOWERS = Path(__file__).resolve().parents[2] / "shared" / "flowers"
RESULTS = Path(__file__).resolve().parent / "results"

resize = transforms.Compose(
    [
        transforms.Resize((256, 256)),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def replicate(items: list[tuple[Path, augment.Variant]]) -> None:
    """The replication's pipeline, in one process on one core."""
    for path, variant in items:
        with Image.open(path) as file:
            image = file.convert("RGB")
        if variant.angle:
            image = tv.rotate(image, variant.angle)
        if variant.gamma != 1:
            image = tv.adjust_gamma(image, variant.gamma)
        resize(image)


def one_thread() -> None:
    torch.set_num_threads(1)


def write_synthetic(folder: Path) -> None:
    """A few synthetic flowers as JPEG files."""
    for split in ("train", "test"):
        images = synthetic.synthetic_flowers(8, split=split)
        for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            path = folder / f"{split}_data" / images.classes[label] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            tv.to_pil_image(image).save(path, quality=90)


def plain_bank(*arguments, **options) -> ImageBank:
    """A bank that makes its batches with plain PyTorch, as where numba is missing."""
    compiled, augment._compiled_loops = augment._compiled_loops, lambda: None
    try:
        return ImageBank(*arguments, **options)
    finally:
        augment._compiled_loops = compiled


def measure(folder: Path, threads: int, rounds: int, batch: int) -> list[dict[str, object]]:
    train, _ = load_folder(folder, workers=threads)
    assert isinstance(train, ImageSet), "a set for this bench fits in memory"
    paths = sorted(path for path in (folder / "train_data").glob("*/*") if path.is_file())
    last = {"channels_last": True}
    nearest = RandomAugment(interpolation="nearest")
    banks = {
        "paper, channels_last": ImageBank(train, PAPER_VARIANTS, **last),
        "paper, contiguous": ImageBank(train, PAPER_VARIANTS),
        "paper, without numba": plain_bank(train, PAPER_VARIANTS, **last),
        "random nearest": ImageBank(train, augment=nearest, **last),
        "random bilinear": ImageBank(train, augment=RandomAugment(), **last),
        "random bilinear, without numba": plain_bank(train, augment=RandomAugment(), **last),
    }
    generator = torch.Generator().manual_seed(0)

    def forever():
        while True:
            yield torch.randint(len(train) * 61, (batch,), generator=generator)

    def next_batch(bank: ImageBank) -> Callable[[], None]:
        batches = bank.batches(forever(), reuse=True)
        return lambda: next(batches) and None

    def run_pipeline() -> None:
        items = [divmod(int(item), 61) for item in next(drawn)]
        work = [(paths[image % len(paths)], PAPER_VARIANTS[variant]) for image, variant in items]
        list(pool.map(replicate, [work[part::threads] for part in range(threads)]))

    drawn = forever()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(threads, mp_context=context, initializer=one_thread) as pool:
        contestants = {"pipeline of the replication": run_pipeline}
        contestants |= {name: next_batch(bank) for name, bank in banks.items()}
        seconds = medians(contestants, rounds)
    pipeline = seconds["pipeline of the replication"]
    return [
        {"what": name, "ms_per_image": 1e3 * time / batch, "times_faster": pipeline / time}
        for name, time in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=256, help="images in a batch")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        default=FLOWERS if FLOWERS.is_dir() else None,
        help="with train_data and test_data; default: the flowers beside the project, or synthetic",
    )
    parser.add_argument(
        "--output", metavar="NAME", help="also write the rows to results/data_ratios-NAME.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.images
        if folder is None:
            folder = Path(temporary)
            write_synthetic(folder)
        rows = measure(folder, arguments.threads, arguments.rounds, arguments.batch)
    print(f"{arguments.threads} threads, batches of {arguments.batch}, milliseconds an image")
    for row in rows:
        print(f"{row['what']:32} {row['ms_per_image']:8.3f} {row['times_faster']:8.1f} x")
    if arguments.output:
        conditions = {
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "images": "synthetic" if arguments.images is None else "photographs",
            "batch": arguments.batch,
            "rounds": arguments.rounds,
        }
        path = RESULTS / f"data_ratios-{arguments.output}.json"
        path.write_text(json.dumps({**conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
