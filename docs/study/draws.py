"""What can be averaged over at test time, and how large the noise of the draws is in each layer.

Takes the runs of studies (``scripts/study.py``) and writes beside this file

- ``draws.csv``: the test images seen in one pass, as the average of several views of each and, with
  stochastic pooling, as averages over draws (Zeiler & Fergus 2013, section 4.6): accuracy, negative
  log-likelihood, calibration, and whether the spread over draws finds the images that are wrong;
- ``noise.csv``: how large the noise of the draws is beside the signal, at every pool.

    python docs/study/draws.py runs/paper runs/best --data-dir datasets
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from digits import HERE, digits, train
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cnnsp.data.augment import RandomAugment
from cnnsp.data.batches import ImageBank
from cnnsp.data.images import ImageSet, load_folder
from cnnsp.results.inference import load_network
from stochastic_pooling import StochasticPool2d, sampling

DRAWS = 100
BATCH = 100
# Crops, rotations and flips as in training, without its changes of colour.
VIEWS = RandomAugment(repeats=16, brightness=0, contrast=0, saturation=0, gamma=(1, 1))


@torch.inference_mode()
def probabilities(model: nn.Module, images: ImageSet, views: RandomAugment | None = None) -> Tensor:
    """Of each class, ``[N, C]``: in one pass, or averaged over views of each image."""
    bank = ImageBank(images, augment=views, channels_last=True)
    parts = torch.arange(len(bank)).split(BATCH)
    return (
        torch.cat([model(bank.batch(part)[0]).exp() for part in parts])
        .unflatten(0, (-1, bank.repeats))
        .mean(1)
    )


def passes(model: nn.Module, images: Tensor, draws: int) -> Tensor:
    """Probabilities of each image in each of ``draws`` passes that draw, ``[draws, N, C]``."""
    torch.manual_seed(0)
    with torch.inference_mode(), sampling(model):
        return torch.stack(
            [torch.cat([model(part).exp() for part in images.split(BATCH)]) for _ in range(draws)]
        )


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in points (Guo et al. 2017, arXiv 1706.04599, equation 3)."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    of = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double).index_add_(0, of, right - confidence.double())
    return 100 * float(gaps.abs().sum()) / len(labels)


def quality(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy (%), negative log-likelihood and calibration error of ``[N, C]``.

    ``confidence_finds``: the area under the curve that tells the wrong images from the right ones
    by their largest probability.
    """
    wrong = probabilities.argmax(1) != labels
    return {
        "accuracy": 100 * float((~wrong).float().mean()),
        "loss": float(F.nll_loss(probabilities.clamp(min=1e-30).log(), labels)),
        "calibration_error": calibration_error(probabilities, labels),
        "confidence_finds": float(roc_auc_score(wrong, -probabilities.max(1).values)),
    }


def average_passes(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[dict[str, Any]]:
    """A row for averages over 1, 5, 20 and 100 draws each.

    Fewer draws are averaged as often as they fit into 100, and their figures are means over that.
    """
    drawn = passes(model, images, DRAWS)
    for count in (1, 5, 20, 100):
        groups = []
        for group in drawn.split(count):
            mean = group.mean(0)
            figures = quality(mean, labels)
            if count > 1:
                predicted = mean.argmax(1)
                spread = group.std(0).gather(1, predicted[:, None]).squeeze(1)
                figures["spread_finds"] = float(roc_auc_score(predicted != labels, spread))
            groups.append(figures)
        name = f"{count} draw{'s' * (count > 1)}"
        yield {"method": name, **pd.DataFrame(groups).mean().to_dict()}


@contextlib.contextmanager
def hooked(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(pool, arguments, keywords, output)`` behind each pool of the model."""
    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, StochasticPool2d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def noise(model: nn.Module, images: Tensor, labels: Tensor, draws: int = 10) -> pd.DataFrame:
    """A row for each pool, in the order of the calls.

    ``own`` and ``all``: mean square of a draw minus the expectation, over the variance of the
    expectation within a channel; with the expectation at all pools before, and with draws there.
    ``accuracy``: per cent, when this pool alone draws.
    """
    torch.manual_seed(0)
    expected: list[Tensor] = []
    own: list[float] = []
    signals: list[float] = []

    def observe(pool: nn.Module, args: Any, keywords: Any, output: Tensor) -> None:
        signals.append(float(output.var((0, 2, 3)).mean()))
        with sampling(pool):
            squares = [(pool.forward(*args, **keywords) - output).square() for _ in range(draws)]
        own.append(float(torch.stack(squares).mean()) / signals[-1])
        expected.append(output)

    with hooked(model, observe):
        model(images)

    squares, places = [0.0] * len(own), itertools.cycle(range(len(own)))

    def compare(pool: nn.Module, args: Any, keywords: Any, output: Tensor) -> None:
        place = next(places)
        squares[place] += float((output - expected[place]).square().mean()) / draws

    with sampling(model), hooked(model, compare):
        for _ in range(draws):
            model(images)

    right = [0.0] * len(own)
    for alone in range(len(own)):

        def draw_here(
            pool: nn.Module, args: Any, keywords: Any, output: Tensor, alone: int = alone
        ) -> Tensor | None:
            if next(places) != alone:
                return None
            with sampling(pool):
                return pool.forward(*args, **keywords)

        with hooked(model, draw_here):
            for _ in range(draws):
                right[alone] += 100 * float((model(images).argmax(1) == labels).float().mean())
    return pd.DataFrame(
        {
            "pool": range(1, len(own) + 1),
            "own": own,
            "all": [s / signal for s, signal in zip(squares, signals, strict=True)],
            "accuracy": [value / draws for value in right],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", nargs="+", type=Path, help="folders that study.py wrote")
    parser.add_argument("--data-dir", type=Path, required=True, help="with test_data/<class>/")
    args = parser.parse_args()
    _, test = load_folder(args.data_dir)
    bank = ImageBank(test, channels_last=True)
    images, labels = bank.batch(torch.arange(len(bank)))
    methods: list[dict[str, Any]] = []
    noises = []
    for path in sorted(path for study in args.studies for path in study.glob("*/result.json")):
        recipe, pool, seed = path.parent.name.split("-")
        network = load_network(path.with_name("last.pt"))
        model = network.model.to(memory_format=torch.channels_last)
        rows = [{"method": "one pass", **quality(probabilities(model, test), labels)}]
        if recipe == "best":
            seen = probabilities(model, test, VIEWS)
            rows.append({"method": f"{VIEWS.repeats} views", **quality(seen, labels)})
        if pool == "stochastic":
            rows += average_passes(model, images, labels)
            measured = noise(model, images[::3], labels[::3])
            noises.append(measured.assign(recipe=recipe, seed=int(seed)))
        methods += [{"recipe": recipe, "pool": pool, "seed": int(seed), **row} for row in rows]
        print(path.parent, pd.DataFrame(rows), sep="\n")
    for seed in range(3):
        small, of_small = digits(seed)
        model = train("stochastic", small[:400], of_small[:400], seed)
        measured = noise(model, small[-400:], of_small[-400:])
        noises.append(measured.assign(recipe="digits", seed=seed))
        print(noises[-1])
    write = {"index": False, "float_format": "%.5g"}
    pd.DataFrame(methods).to_csv(HERE / "draws.csv", **write)
    pd.concat(noises).to_csv(HERE / "noise.csv", **write)


if __name__ == "__main__":
    main()
