"""A study's table and figure, from the rows of its ``runs.csv`` and ``epochs.csv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import UserError
from ..network import POOLINGS
from ..training.recipe import RECIPES
from . import pictures

# Colours that the colour-blind can tell apart (Okabe and Ito).
COLOURS = {"stochastic": "#D55E00", "max": "#0072B2", "avg": "#009E73"}
CASE = ["recipe", "pool", "seed"]
# What runs must have in common to be compared without a word.
_ORIGIN = ["machine", "torch", "threads"]
# Columns of the table: title and decimals.
_COLUMNS = {
    "test_accuracy": ("test accuracy, %", 2),
    "test_loss": ("test loss, last epoch", 3),
    "lowest_test_loss": ("lowest test loss", 3),
    "train_accuracy": ("training accuracy, %", 2),
}


def read_csv(path: Path) -> pd.DataFrame:
    """A file's rows; raises UserError."""
    try:
        return pd.read_csv(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is no table") from None


def read(path: Path) -> pd.DataFrame:
    """``runs.csv`` or ``epochs.csv``, in the order of ``--help``; raises UserError."""
    rows = read_csv(path)
    if not {*CASE} <= {*rows.columns}:
        raise UserError(f"{path} is none that study.py wrote")
    rows["recipe"] = pd.Categorical(rows["recipe"], [*RECIPES])
    rows["pool"] = pd.Categorical(rows["pool"], POOLINGS)
    return rows.sort_values(CASE, kind="stable", ignore_index=True)


def cell(values: pd.Series, digits: int = 2, sign: str = "") -> str:
    """Mean ± sample standard deviation (n - 1) of values, or the only one."""
    text = f"{values.mean():{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {values.std():.{digits}f}"


def markdown(table: pd.DataFrame) -> str:
    """A table of texts; numbers stand to the right."""
    sides = ["right" if texts.str.match(r"[+-]?\d").all() else "left" for _, texts in table.items()]
    return table.to_markdown(index=False, disable_numparse=True, colalign=sides)


def means(
    rows: pd.DataFrame, by: list[str], columns: Mapping[str, tuple[str, int]]
) -> pd.DataFrame:
    """A row of texts for each group, :func:`cell` of each column: its title and decimals."""
    groups = rows.groupby(by, observed=True, sort=False)
    cells = {
        title: groups[name].agg(lambda values, digits=digits: cell(values, digits))
        for name, (title, digits) in columns.items()
    }
    return pd.DataFrame(cells).reset_index()


def table(runs: pd.DataFrame) -> str:
    """Markdown: one row for each recipe and pool, mean ± sample standard deviation over seeds.

    A row whose runs were not all made on the same machine and PyTorch has a star;
    :func:`origins` names them.
    """
    columns = dict(_COLUMNS)
    for name in runs.columns[runs.columns.str.startswith("sensitivity ")]:
        columns[name] = (f"{name}, %", 2)
    rows = means(runs, CASE[:2], columns).rename(columns={"pool": "pooling"})
    seeds = []
    for _, group in runs.groupby(CASE[:2], observed=True, sort=False):
        star = r" \*" if len(group[_ORIGIN].drop_duplicates()) > 1 else ""
        seeds.append(f"{len(group)}{star}")
    rows.insert(2, "seeds", seeds)
    return markdown(rows.astype(str))


def origins(runs: pd.DataFrame) -> str:
    """Markdown: which machines and versions of PyTorch the rows of :func:`table` come from."""
    lines = []
    for (machine, version, threads), group in runs.groupby(_ORIGIN, sort=False):
        name = f"{machine}, torch {version}, {threads} thread{'s' * (threads > 1)}"
        which = "; ".join(
            f"{recipe} {pool} (seed {', '.join(map(str, seeds))})"
            for (recipe, pool), seeds in group.groupby(CASE[:2], observed=True)["seed"]
        )
        lines.append((name, which))
    if len(lines) == 1:
        return f"All runs: {lines[0][0]}."
    head = "**Not all runs were made alike**; a row with a star mixes several of these:\n"
    return "\n".join([head, *(f"- {name}: {which}" for name, which in lines)])


def differences(runs: pd.DataFrame) -> str | None:
    """Markdown: for each recipe, test accuracy with stochastic pooling minus the others', paired.

    The runs of one seed start from the same weights and take the images in the same order. None
    where there is nothing to compare.
    """
    wide = runs.pivot(index=["recipe", "seed"], columns="pool", values="test_accuracy")
    rows = []
    for recipe, group in wide.groupby("recipe", observed=True):
        for pool in POOLINGS:
            if pool == "stochastic" or not {pool, "stochastic"} <= {*group.columns}:
                continue
            points = (group["stochastic"] - group[pool]).dropna()
            if points.empty:
                continue
            better = f"{(points > 0).sum()} of {len(points)}"
            if ties := (points == 0).sum():
                better += f", {ties} equal"
            name = f"stochastic minus {pool}"
            rows.append((recipe, name, cell(points, sign="+"), better))
    header = ["recipe", "test accuracy", "points", "seeds that favour stochastic"]
    return markdown(pd.DataFrame(rows, columns=header)) if rows else None


def document(runs: pd.DataFrame, started_with: str, flags: str) -> str:
    """``study.md``.

    Args:
        runs: all finished runs.
        started_with: the command that started the study.
        flags: what each run of train.py was given, beside recipe, pool and seed.
    """
    parts = [
        "# Pools and recipes compared",
        table(runs),
        "Mean ± sample standard deviation over the seeds. Test accuracy, training accuracy and "
        "sensitivities are those after the last epoch; training images as they are, not "
        "augmented. Sensitivities and training accuracy: in fp32 on the CPU.",
        origins(runs),
    ]
    if (paired := differences(runs)) is not None:
        parts += ["## Stochastic pooling against the others, seed by seed", paired]
    images = runs[["train_images", "test_images"]].drop_duplicates().itertuples(index=False)
    epochs = runs.groupby("recipe", observed=True)["epochs"].max().items()
    sizes = " or ".join(f"{train} training and {test} test images" for train, test in images)
    dates = " to ".join(dict.fromkeys((runs["date"].min(), runs["date"].max())))
    parts += [
        "## Conditions",
        f"- started with `{started_with}`\n"
        f"- each run: `train.py --recipe RECIPE --pool POOL --seed SEED {flags}`\n"
        f"- {sizes}; epochs: {', '.join(f'{number:g} ({recipe})' for recipe, number in epochs)}\n"
        f"- finished on {dates}; {runs['seconds'].sum() / 3600:.1f} hours of training in all",
    ]
    return "\n\n".join(parts) + "\n"


def draw(runs: pd.DataFrame, epochs: pd.DataFrame, path: Path) -> None:
    """Draw the last test accuracies, and each recipe's test losses, as PNG."""
    recipes: Sequence[str] = list(runs["recipe"].unique())
    groups = runs.groupby(CASE[:2], observed=True)["test_accuracy"]
    widths = [max(4.2, 0.85 * len(groups)), *[4.2] * len(recipes)]
    figure = Figure(figsize=(sum(widths), 4), dpi=120, layout="constrained")
    accuracy, *curves = figure.subplots(1, len(widths), width_ratios=widths)
    places = []
    for place, ((recipe, pool), values) in enumerate(groups):
        places.append(place + 0.5 * recipes.index(recipe))
        dots(accuracy, places[-1], values, COLOURS[pool])
    names = [f"{pool}\n{recipe if recipes[1:] else ''}" for (recipe, pool), _ in groups]
    accuracy.set_xticks(places, names)
    accuracy.tick_params(axis="x", length=0)
    accuracy.margins(y=0.12)
    accuracy.set_title("Last test accuracy (%): seeds and mean")
    accuracy.grid(axis="y", alpha=0.3)
    for axis, recipe in zip(curves, recipes, strict=True):
        lines(axis, epochs[epochs["recipe"] == recipe], "test_loss")
        top = epochs["test_loss"].max() * 1.05
        axis.set(title=f"Test loss, recipe {recipe}", ylim=(0, top))
    pictures.write(figure, path)


def dots(axis: Axes, place: float, values: pd.Series, colour: str) -> None:
    """A dot for each seed, and a bar for the mean."""
    # Side by side in the order of the seeds, so that equal ones do not hide each other.
    step = 0.4 / max(len(values) - 1, 1)
    x = [place + (n - (len(values) - 1) / 2) * step for n in range(len(values))]
    axis.hlines(values.mean(), place - 0.36, place + 0.36, color=colour, linewidth=2.5)
    axis.scatter(x, values, s=34, color=colour, edgecolors="white", zorder=3)
    top = (place, values.max())
    axis.annotate(f"{values.mean():.1f}", top, (0, 7), textcoords="offset points", ha="center")


def lines(axis: Axes, epochs: pd.DataFrame, column: str) -> None:
    """Over the epochs, for each pool, a thin line for each seed and a thick one for their mean."""
    for pool, of_pool in epochs.groupby("pool", observed=True):
        colour = COLOURS[str(pool)]
        for _, run in of_pool.groupby("seed"):
            axis.plot(run["epoch"], run[column], color=colour, alpha=0.3, linewidth=0.8)
        mean = of_pool.groupby("epoch")[column].mean()
        marker = "o" if len(mean) == 1 else None  # one epoch is no line
        axis.plot(mean.index, mean, color=colour, marker=marker, linewidth=2, label=pool)
    axis.set_xlabel("Epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
