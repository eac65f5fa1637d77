"""Make the tables of ``docs/study.md`` and the pictures from the CSV files beside this one.

    python docs/study/report.py [STUDY ...]

Each STUDY is a folder that ``scripts/study.py`` wrote: its runs are first added to ``runs.csv`` and
``epochs.csv``, in place of those of the same recipe, pool and seed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from cnnsp.results import pictures
from cnnsp.results.study_report import (
    CASE,
    COLOURS,
    cell,
    differences,
    dots,
    draw,
    markdown,
    means,
    origins,
    read,
    table,
)

HERE = Path(__file__).parent
FIGURES = {
    "accuracy": ("test accuracy, %", 2),
    "loss": ("negative log-likelihood", 3),
    "calibration_error": ("calibration error, points", 1),
    "confidence_finds": ("wrong images found by the confidence", 3),
    "spread_finds": ("by the spread", 3),
}


def add(studies: Sequence[Path]) -> None:
    """Take the rows of studies into those that are kept here."""
    for name in ("runs.csv", "epochs.csv"):
        for study in studies:
            kept = pd.read_csv(HERE / name) if (HERE / name).exists() else pd.DataFrame()
            found = pd.read_csv(study / name)
            if not kept.empty:
                same = kept[CASE].apply(tuple, axis=1).isin(found[CASE].apply(tuple, axis=1))
                found = pd.concat([kept[~same], found])
            found.to_csv(HERE / name, index=False, float_format="%.6g")


def tables() -> dict[str, str]:
    """What stands between ``<!-- NAME -->`` and ``<!-- end -->`` in the page."""
    runs = read(HERE / "runs.csv")
    digits = pd.read_csv(HERE / "digits.csv")
    digits["images"] = digits["train_images"].astype(str)
    of_digits = digits.groupby(["pool", "images"], sort=False)["test_accuracy"].agg(cell)
    paired = differences(runs)
    draws = means(pd.read_csv(HERE / "draws.csv"), ["recipe", "pool", "method"], FIGURES)
    return {
        "runs": f"{table(runs)}\n\n{origins(runs)}",
        "differences": paired or "",
        "draws": markdown(draws.replace({r"nan.*": ""}, regex=True)),  # no spread of one pass
        "digits": markdown(of_digits.unstack().reset_index()[["pool", *digits["images"].unique()]]),
    }


def fill(page: str, texts: dict[str, str]) -> str:
    """The page with its tables made anew."""
    for name, text in texts.items():
        place = re.compile(f"(<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        page, count = place.subn(lambda found, text=text: f"{found[1]}\n{text}\n\n", page)
        assert count == 1, f"the page has {count} places for {name}"
    return page


def why() -> Figure:
    """Noise beside the signal at every pool; digits by the number of training images."""
    noise, digits = pd.read_csv(HERE / "noise.csv"), pd.read_csv(HERE / "digits.csv")
    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
    names = {"paper": "CNN_SP, stride 1, five times", "digits": "digits, stride 2, three times"}
    for (recipe, name), colour in zip(names.items(), ("#CC79A7", "#56B4E9"), strict=True):
        at = noise[noise["recipe"] == recipe].groupby("pool")[["own", "all"]].mean()
        left.plot(at.index, at["all"], "o-", color=colour, label=name)
        left.plot(at.index, at["own"], "o:", color=colour, label="  this pool's own draws alone")
    left.set(title="Noise of the draws / variance of the signal", xlabel="Pool", ylim=(0, None))
    left.set_xticks(range(1, 6))
    sizes = list(digits["train_images"].unique())
    for (pool, size), rows in digits.groupby(["pool", "train_images"]):
        place = 4 * sizes.index(size) + list(COLOURS).index(str(pool))
        dots(right, place, rows["test_accuracy"], COLOURS[str(pool)])
    for pool, colour in COLOURS.items():
        right.plot([], [], "o", color=colour, label=pool)
    right.margins(y=0.1)  # for the means above the highest dots
    right.set_xticks([4 * n + 1 for n in range(len(sizes))], map(str, sizes))
    right.set(title="Digits, pools of stride 2: test accuracy (%)", xlabel="Training images")
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False)
    return figure


def main() -> None:
    add([Path(folder) for folder in sys.argv[1:]])
    page = HERE.parent / "study.md"
    page.write_text(fill(page.read_text("utf-8"), tables()), "utf-8")
    draw(read(HERE / "runs.csv"), read(HERE / "epochs.csv"), HERE / "runs.png")
    pictures.write(why(), HERE / "why.png")


if __name__ == "__main__":
    main()
