"""What came out of a study: the results of its runs, and a table and a figure of them."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import files
from ..errors import UserError
from ..network import POOLINGS
from ..training.recipe import RECIPES
from . import pictures
from .history import EpochResult

# Colours that the colour-blind can tell apart (Okabe and Ito).
_COLOURS = {"stochastic": "#D55E00", "max": "#0072B2", "avg": "#009E73"}


@dataclass(frozen=True)
class Result:
    """What came out of one run; ``result.json`` in its folder.

    Accuracies and sensitivities are in per cent.

    Attributes:
        recipe, pool, seed: what was run.
        flags: the other flags of train.py.
        epochs: epochs trained.
        train_images, test_images: their numbers, without augmentation.
        accuracy, loss: of the test images after the last epoch, as train.py computed them.
        best_accuracy: highest test accuracy of an epoch.
        lowest_loss: lowest test loss of an epoch.
        sensitivities: of each class, the share of its test images that were recognised.
        train_accuracy, train_loss: of the training images as they are, not augmented.
        seconds: training and evaluation; of an epoch that was interrupted, only since then.
        machine: what it ran on; for a run that went on elsewhere, where it ended.
        torch_version: of PyTorch.
        threads: of PyTorch on the CPU.
        date: on which it was finished, year-month-day.
    """

    recipe: str
    pool: str
    seed: int
    flags: list[str]
    epochs: float
    train_images: int
    test_images: int
    accuracy: float
    loss: float
    best_accuracy: float
    lowest_loss: float
    sensitivities: dict[str, float]
    train_accuracy: float
    train_loss: float
    seconds: float
    machine: str
    torch_version: str = str(torch.__version__)
    threads: int = field(default_factory=torch.get_num_threads)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    @property
    def gap(self) -> float:
        """Training accuracy minus test accuracy, in points."""
        return self.train_accuracy - self.accuracy

    @property
    def loss_ratio(self) -> float:
        """The last test loss over the lowest, NaN where that is 0."""
        return self.loss / self.lowest_loss if self.lowest_loss else math.nan

    @property
    def place(self) -> tuple[int, int, int]:
        """Where it stands in tables: recipes and pools in the order of ``--help``."""
        return list(RECIPES).index(self.recipe), POOLINGS.index(self.pool), self.seed

    @property
    def origin(self) -> str:
        """What it was computed with."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.machine}, torch {self.torch_version}, {threads}"

    def write(self, path: Path) -> None:
        """Write to ``path`` as JSON; raises UserError."""
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what :meth:`write` wrote; raises UserError."""
        content = files.read_json(path)
        try:
            return cls(**content)
        except TypeError:
            raise UserError(f"{path} is no result of study.py; delete it to make it anew") from None


Groups = dict[tuple[str, str], list[Result]]


def _groups(results: Iterable[Result]) -> Groups:
    """The seeds of each recipe and pool."""
    groups: Groups = {}
    for result in sorted(results, key=lambda result: result.place):
        groups.setdefault((result.recipe, result.pool), []).append(result)
    return groups


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None in place of that of a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))


def _cell(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns stand to the left, the others to the right."""
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def table(results: Sequence[Result]) -> str:
    """Markdown: one row for each recipe and pool, mean ± sample standard deviation over seeds.

    A row whose runs were not all made on the same machine and PyTorch has a star;
    :func:`origins` names them.
    """
    classes = list(results[0].sensitivities)
    header = ["recipe", "pooling", "seeds", "test accuracy, %"]
    header += ["test loss, last epoch", "lowest test loss", "last / lowest"]
    header += ["training accuracy, %", "training minus test, points"]
    header += [f"sensitivity {name}, %" for name in classes]
    rows = []
    for (recipe, pool), group in _groups(results).items():
        star = r" \*" if len({r.origin for r in group}) > 1 else ""
        row = [recipe, pool, f"{len(group)}{star}", _cell([r.accuracy for r in group])]
        row += [_cell([r.loss for r in group], 3), _cell([r.lowest_loss for r in group], 3)]
        row += [_cell([r.loss_ratio for r in group]), _cell([r.train_accuracy for r in group])]
        row += [_cell([r.gap for r in group])]
        row += [_cell([r.sensitivities[name] for r in group]) for name in classes]
        rows.append(row)
    return _markdown(header, rows, left=2)


def origins(results: Sequence[Result]) -> str:
    """Markdown: which machines and versions of PyTorch the rows of :func:`table` come from."""
    found: dict[str, Groups] = {}
    for result in results:
        group = found.setdefault(result.origin, {})
        group.setdefault((result.recipe, result.pool), []).append(result)
    if len(found) == 1:
        return f"All runs: {next(iter(found))}."
    lines = ["**Not all runs were made alike**; a row with a star mixes several of these:", ""]
    for origin, group in found.items():
        which = [
            f"{recipe} {pool} (seed {', '.join(str(r.seed) for r in runs)})"
            for (recipe, pool), runs in group.items()
        ]
        lines.append(f"- {origin}: {'; '.join(which)}")
    return "\n".join(lines)


def differences(results: Sequence[Result]) -> str | None:
    """Markdown: for each recipe, test accuracy with stochastic pooling minus the others', paired.

    The runs of one seed start from the same weights and take the images in the same order. None
    where there is nothing to compare.
    """
    groups = _groups(results)
    rows = []
    for (recipe, pool), others in groups.items():
        ours = {r.seed: r.accuracy for r in groups.get((recipe, "stochastic"), [])}
        points = [ours[r.seed] - r.accuracy for r in others if r.seed in ours]
        if pool == "stochastic" or not points:
            continue
        better = f"{sum(p > 0 for p in points)} of {len(points)}"
        if ties := points.count(0):
            better += f", {ties} equal"
        rows.append([recipe, f"stochastic minus {pool}", _cell(points, sign="+"), better])
    header = ["recipe", "test accuracy", "points", "seeds that favour stochastic"]
    return _markdown(header, rows, left=2) if rows else None


def document(results: Sequence[Result], started_with: str, flags: Sequence[str]) -> str:
    """``study.md``.

    Args:
        results: of all finished runs.
        started_with: the command that started the study.
        flags: what each run of train.py was given, beside recipe, pool and seed.
    """
    dates = sorted({result.date for result in results})
    sizes = sorted({(r.train_images, r.test_images) for r in results})
    epochs = {r.recipe: r.epochs for r in results}
    parts = [
        "# Pools and recipes compared",
        table(results),
        "Mean ± sample standard deviation over the seeds. Test accuracy, training accuracy and "
        "sensitivities are those after the last epoch; training images as they are, not "
        "augmented. Sensitivities and training accuracy: in fp32 on the CPU.",
        origins(results),
    ]
    if (paired := differences(results)) is not None:
        parts += ["## Stochastic pooling against the others, seed by seed", paired]
    images = " or ".join(f"{train} training and {test} test images" for train, test in sizes)
    parts += [
        "## Conditions",
        "\n".join(
            [
                f"- started with `{started_with}`",
                "- each run: `train.py --recipe RECIPE --pool POOL --seed SEED "
                f"{shlex.join(flags)}`",
                f"- {images}; epochs: {', '.join(f'{n} ({r})' for r, n in epochs.items())}",
                f"- finished on {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
                f"{sum(r.seconds for r in results) / 3600:.1f} hours of training in all",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def draw(results: Sequence[Result], histories: Sequence[Sequence[EpochResult]], path: Path) -> None:
    """Draw test accuracies, and test losses over the epochs, as PNG.

    Args:
        results: of all finished runs.
        histories: theirs, in the same order.
        path: file to write.
    """
    groups = _groups(results)
    recipes = list(dict.fromkeys(recipe for recipe, _ in groups))
    losses = {
        (r.recipe, r.pool, r.seed): [row.test_loss for row in history]
        for r, history in zip(results, histories, strict=True)
    }
    left = max(4.2, 0.85 * len(groups))  # inches
    widths = [left, *[4.2] * len(recipes)]
    figure = Figure(figsize=(sum(widths), 4), dpi=120, layout="constrained")
    accuracy, *curves = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_accuracies(accuracy, groups, recipes)
    highest = max(max(values) for values in losses.values())
    for axis, recipe in zip(curves, recipes, strict=True):
        for (of, pool), group in groups.items():
            if of == recipe:
                runs = [losses[recipe, pool, r.seed] for r in group]
                _draw_losses(axis, runs, pool)
        axis.set_title(f"Test loss, recipe {recipe}")
        axis.set_xlabel("Epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_ylim(0, highest * 1.05)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    pictures.write(figure, path)


def _draw_accuracies(axis: Axes, groups: Groups, recipes: Sequence[str]) -> None:
    """A dot for each seed, and a bar for the mean."""
    place, ticks, names = 0.0, [], []
    for recipe in recipes:
        first = place
        for (of, pool), group in groups.items():
            if of != recipe:
                continue
            values = [r.accuracy for r in group]
            # Side by side in the order of the seeds, so that equal ones do not hide each other.
            step = 0.4 / max(len(values) - 1, 1)
            x = [place + (n - (len(values) - 1) / 2) * step for n in range(len(values))]
            mean, _ = mean_and_deviation(values)
            axis.hlines(mean, place - 0.36, place + 0.36, color=_COLOURS[pool], linewidth=2.5)
            axis.scatter(x, values, s=34, color=_COLOURS[pool], edgecolors="white", zorder=3)
            axis.annotate(
                f"{mean:.1f}",
                (place, max(values)),
                (0, 7),
                textcoords="offset points",
                ha="center",
            )
            ticks.append(place)
            names.append(pool)
            place += 1
        axis.text(
            (first + place - 1) / 2,
            -0.085,
            f"recipe {recipe}",
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="top",
        )
        place += 0.5
    axis.set_xticks(ticks, names)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.7, place - 0.8)
    axis.margins(y=0.12)
    axis.set_title("Last test accuracy (%): seeds and mean")
    axis.grid(axis="y", alpha=0.3)


def _draw_losses(axis: Axes, runs: Sequence[Sequence[float]], pool: str) -> None:
    """A thin line for each seed, and a thick one for their mean."""
    for losses in runs:
        axis.plot(range(1, len(losses) + 1), losses, color=_COLOURS[pool], alpha=0.3, linewidth=0.8)
    means = [math.fsum(column) / len(runs) for column in zip(*runs, strict=False)]
    axis.plot(range(1, len(means) + 1), means, color=_COLOURS[pool], linewidth=2, label=pool)
