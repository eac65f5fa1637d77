"""Turn what `pytest bench/ --benchmark-only --benchmark-json FILE` wrote into tables and a chart.

    python bench/report.py FILE.json [FILE.json ...] [--output FOLDER]

Writes FILE.md and FILE.png, named after the first. Times are medians; a ratio is a time over that
of the contestant that the case is measured against, which ran in turn with it. Files of several
machines, or of several settings of one, are refused: their times do not compare.
"""

# ruff: noqa: RUF001 - a multiplication sign in a table

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# What each file of bench/ is measured against, and what its contestants are called.
BASES = {"operator": "max", "network": "max", "data": "replication"}
NAMES = {
    "stochastic": "stochastic",
    "stochastic_compiled": "stochastic, compiled",
    "max": "max",
    "max_compiled": "max, compiled",
    "avg": "average",
    "avg_compiled": "average, compiled",
    "fractional": "fractional max",
    "gist": "unfold + multinomial",
    "reference": "stochastic, plain PyTorch",
    "replication": "the replication's",
    "paper": "paper's, channels_last",
    "paper_contiguous": "paper's, contiguous",
    "paper_without_numba": "paper's, without numba",
    "random": "random, bilinear",
    "random_nearest": "random, nearest",
    "random_without_numba": "random, without numba",
}
SHOWN = ("stochastic", "max_compiled", "avg", "fractional")


class UnusableError(Exception):
    """The files cannot be reported on; the message says why."""


# {section: {case: {contestant: benchmark}}}
Sections = dict[str, dict[str, dict[str, dict[str, Any]]]]


def load(paths: Sequence[Path]) -> tuple[dict[str, Any], Sections]:
    """The machine of all files, and their benchmarks."""
    machine: dict[str, Any] = {}
    sections: Sections = {section: {} for section in BASES}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            here = content["machine_info"]
            benchmarks = content["benchmarks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnusableError(f"{path} is no file of --benchmark-json: {error!r}") from None
        differing = [key for key in {*here, *machine} if here.get(key) != machine.get(key)]
        if machine and differing:
            differences = "; ".join(
                f"{key}: {machine.get(key)} and {here.get(key)}" for key in sorted(differing)
            )
            raise UnusableError(
                f"{paths[0]} and {path} are of different machines or settings, whose times do not "
                f"compare. {differences}. Report on each file by itself."
            )
        machine = here
        for benchmark in benchmarks:
            section = benchmark["fullname"].partition("bench_")[2].partition(".py")[0]
            if section in sections:
                case, name = benchmark["group"], benchmark["params"]["contestant"]
                sections[section].setdefault(case, {})[name] = benchmark
    if not any(sections.values()):
        raise UnusableError(f"{', '.join(map(str, paths))}: no benchmark of bench/ is in there")
    return machine, sections


def median(benchmark: Mapping[str, Any]) -> float:
    return benchmark["stats"]["median"]


def ratio(case: Mapping[str, Mapping[str, Any]], name: str, base: str) -> float | None:
    """A contestant's time over that of the base, or None where one of them did not run."""
    if name not in case or base not in case:
        return None
    return median(case[name]) / median(case[base])


def markdown(machine: Mapping[str, Any], sections: Sections) -> str:
    lines = ["# Benchmarks", "", conditions(machine), ""]
    texts = {
        "operator": "Pooling, ReLU included: time over that of eager ReLU + `F.max_pool2d` (with a "
        "bias on GPUs, and where the case says so). GB/s and share of the copy bandwidth, of what "
        "stochastic pooling must move; peak memory of stochastic and max pooling.",
        "network": "CNN_SP, channels_last: time over that with max pooling, eager; images per "
        "second with stochastic pooling.",
        "data": "Batches of augmented images: how many times the rate of the replication's "
        "pipeline.",
    }
    for section, cases in sections.items():
        if not cases:
            continue
        base = BASES[section]
        names = [name for name in NAMES if any(name in case for case in cases.values())]
        others = [name for name in names if name != base]
        lines += [f"## {section.capitalize()}", "", texts[section], ""]
        extra = {"operator": ["GB/s", "of copy", "MB", "MB, max"], "network": ["images/s"]}
        header = ["case", f"{NAMES[base]}, ms", *(NAMES[n] for n in others)]
        header += extra.get(section, ["ms an image"])
        lines += [row(header), row(["---", *["---:"] * (len(header) - 1)])]
        for title, case in cases.items():
            cells = [f"{1e3 * median(case[base]):.2f}" if base in case else ""]
            for name in others:
                value = ratio(case, name, base)
                if value is not None and section == "data":
                    value = 1 / value
                cells.append("" if value is None else f"{value:.{2 if value < 9.995 else 1}f} ×")
            lines.append(row([title, *cells, *details(section, case)]))
        lines.append("")
    return "\n".join(lines)


def details(section: str, case: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ours = case.get("paper" if section == "data" else "stochastic", {}).get("extra_info", {})
    if section == "operator":
        theirs = case.get("max", {}).get("extra_info", {})
        return [
            f"{ours['gb_per_second']:.1f}" if ours else "",
            f"{ours['share_of_copy_bandwidth']:.2f}" if ours else "",
            f"{ours['peak_memory_bytes'] / 1e6:.1f}" if ours else "",
            f"{theirs['peak_memory_bytes'] / 1e6:.1f}" if theirs else "",
        ]
    if not ours:
        return [""]
    rate = ours["images_per_second"]
    return [f"{rate:.0f}" if section == "network" else f"{1e3 / rate:.3f}"]


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def conditions(machine: Mapping[str, Any]) -> str:
    cpu = machine.get("cpu", {})
    processor = (
        f"{cpu.get('brand_raw', 'CPU')}, {cpu.get('count')} cores, {machine['threads']} threads"
    )
    packages = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "numba") if machine.get(name)
    )
    gpu = ""
    if "gpu" in machine:
        gpu = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}; "
    return (
        f"Measured on: {gpu}{processor} ({machine['cpu_capability']}); {packages}, "
        f"Python {machine['python_version']}, {machine['system']}. Medians of runs in turn."
    )


def chart(machine: Mapping[str, Any], sections: Sections) -> Figure:
    """Ratios of training, by layer, as bars on a logarithmic axis; the network's below."""
    rows = [
        (title, case, "operator")
        for title, case in sections["operator"].items()
        if title.endswith(("-training", "-training-bias"))
    ]
    rows += [(title, case, "network") for title, case in sections["network"].items()]
    if not rows:
        rows = [(title, case, "operator") for title, case in sections["operator"].items()]
    figure = Figure(figsize=(9, 1.6 + 0.62 * len(rows)), dpi=110, layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(SHOWN)
    for place, name in enumerate(SHOWN):
        points = [
            (index + (place - (len(SHOWN) - 1) / 2) * height, value)
            for index, (_, case, section) in enumerate(rows)
            if (value := ratio(case, name, BASES[section])) is not None
        ]
        if points:
            places, values = zip(*points, strict=True)
            bars = axis.barh(places, values, height, label=NAMES[name], color=f"C{place}")
            axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.margins(x=0.12, y=0.01)
    axis.set_yticks(range(len(rows)), [title for title, *_ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time over that of max pooling, eager (left of the line is faster)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(SHOWN), frameon=False)
    where = machine.get("gpu") or machine.get("cpu", {}).get("brand_raw", "CPU")
    figure.suptitle(f"{where}, torch {machine['torch']}, {machine['threads']} threads", fontsize=10)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--output", type=Path, help="folder; when not given: that of the first file"
    )
    args = parser.parse_args(arguments)
    try:
        machine, sections = load(args.files)
    except UnusableError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    folder = args.output or args.files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / args.files[0].stem
    text = markdown(machine, sections)
    path.with_name(path.name + ".md").write_text(text, encoding="utf-8")
    FigureCanvasAgg(chart(machine, sections)).print_png(path.with_name(path.name + ".png"))
    print(text)
    print(f"Written: {path}.md and {path.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
