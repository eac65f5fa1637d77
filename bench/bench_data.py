"""Augmented batches against the pipeline of the replication, on the same CPU cores.

The pipeline makes one image at a time: decode with Pillow, rotate or correct gamma, resize, to
tensor, normalise. As many processes run it as ours has threads. The images are the photographs in
datasets/, or beside the project, or synthetic flowers where there are none; those of a batch are
drawn from the whole epoch, and its memory is used again, as in training.
"""

from __future__ import annotations

import atexit
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from contest import Case, Contestant
from flowers import draw_flowers, photographs
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tv

from cnnsp.data.augment import IMAGENET_MEAN, IMAGENET_STD, PAPER_VARIANTS, RandomAugment, Variant
from cnnsp.data.batches import ImageBank
from cnnsp.data.images import ImageSet, load_folder

SIZE = 256

resized = transforms.Compose(
    [
        transforms.Resize((SIZE, SIZE)),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def cases(device: torch.device) -> list[DataCase]:
    return [DataCase(device)]


class DataCase(Case):
    names = (
        "replication",
        "paper",
        "paper_contiguous",
        "paper_without_numba",
        "random_nearest",
        "random",
        "random_without_numba",
    )

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.batch = 256 if device.type == "cuda" else 64
        self.folder = photographs()
        self._results: dict[str, torch.Tensor] = {}
        if device.type == "cuda":  # there it is PyTorch that makes the batches
            self.names = tuple(name for name in self.names if "numba" not in name)

    def __str__(self) -> str:
        source = "photographs" if self.folder else "synthetic"
        return f"data-batch{self.batch}-{source}"

    def check(self, name: str, contestant: Contestant) -> None:
        """The first batches of banks that should make the same are the same, but for rounding."""
        result = contestant.run(None)
        if name == "replication":
            return
        _, images, _ = result
        images = images.float().cpu().clone()
        assert images.shape == (self.batch, 3, SIZE, SIZE)
        kind = name.removesuffix("_without_numba").removesuffix("_contiguous")
        expected = self._results.setdefault(kind, images)
        assert (images - expected).abs().mean() < 0.01, f"{self}: {name} differs from {kind}"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        folder = self.folder
        if folder is None:
            temporary = tempfile.TemporaryDirectory()
            atexit.register(temporary.cleanup)
            folder = Path(temporary.name)
            draw_flowers(folder, 8, ".jpg", quality=90)
        train, _ = load_folder(folder, workers=torch.get_num_threads())
        assert isinstance(train, ImageSet), "a set for this bench fits in memory"
        paths = sorted(path for path in (folder / "train_data").glob("*/*") if path.is_file())
        last = {"channels_last": True, "device": self.device}
        nearest = RandomAugment(interpolation="nearest")
        banks = {
            "paper": ImageBank(train, PAPER_VARIANTS, **last),
            "paper_contiguous": ImageBank(train, PAPER_VARIANTS, device=self.device),
            "paper_without_numba": ImageBank(train, PAPER_VARIANTS, compiled=False, **last),
            "random_nearest": ImageBank(train, augment=nearest, **last),
            "random": ImageBank(train, augment=RandomAugment(), **last),
            "random_without_numba": ImageBank(
                train, augment=RandomAugment(), compiled=False, **last
            ),
        }

        def contestant(name: str) -> Contestant:
            items = self._items(len(train))
            if name == "replication":
                return Contestant(pipeline(paths, items), images=self.batch)
            batches = banks[name].batches(items, reuse=True)
            return Contestant(lambda _: next(batches), images=self.batch)

        return {name: partial(contestant, name) for name in self.names}

    def _items(self, images: int) -> Iterator[torch.Tensor]:
        """Without end: the numbers of variants that a batch is made of."""
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(images * len(PAPER_VARIANTS), (self.batch,), generator=generator)


def replicate(items: list[tuple[Path, Variant]]) -> None:
    """The replication's pipeline, in one process on one core."""
    for path, variant in items:
        with Image.open(path) as file:
            image = file.convert("RGB")
        if variant.angle:
            image = tv.rotate(image, variant.angle)
        if variant.gamma != 1:
            image = tv.adjust_gamma(image, variant.gamma)
        resized(image)


def one_thread() -> None:
    torch.set_num_threads(1)


def pipeline(paths: list[Path], batches: Iterator[torch.Tensor]) -> Callable[[object], object]:
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(threads, mp_context=context, initializer=one_thread)
    atexit.register(pool.shutdown)

    def run(_: object) -> object:
        work = []
        for item in next(batches).tolist():
            image, variant = divmod(item, len(PAPER_VARIANTS))
            work.append((paths[image % len(paths)], PAPER_VARIANTS[variant]))
        return list(pool.map(replicate, [work[part::threads] for part in range(threads)]))

    return run


def test_data(contest: Callable[[Case, str], None], case: Case, contestant: str) -> None:
    contest(case, contestant)
