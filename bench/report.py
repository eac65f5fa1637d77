"""Turn what `pytest bench/ --benchmark-only --benchmark-json FILE` wrote into tables and a chart.

    python bench/report.py FILE.json

Writes FILE.md and, of the operator, FILE.png. Times are medians; a ratio is a time over that of the
contestant that the case is measured against, which ran in turn with it.
"""

# ruff: noqa: RUF001 - a multiplication sign in a table

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

# For each file of bench/: what its contestants are measured against, which of them is ours, and
# what the table says.
SECTIONS = {
    "operator": (
        "max",
        "stochastic",
        "Pooling, ReLU included: time over that of eager ReLU + `F.max_pool2d` (on GPUs with a "
        "bias). `gist` is unfold + multinomial + gather, `reference` ours in plain PyTorch. GB/s "
        "and share of the copy bandwidth, of what stochastic pooling must move; peak memory.",
    ),
    "network": (
        "max",
        "stochastic",
        "CNN_SP, channels_last: time over that with max pooling, eager; peak memory, and images "
        "per second with stochastic pooling.",
    ),
    "data": (
        "replication",
        "paper",
        "Batches of augmented images: how many times the rate of the replication's pipeline, which "
        "makes one image at a time; channels_last unless contiguous. Images per second of the "
        "paper's variants.",
    ),
}


def markdown(content: dict[str, Any]) -> str:
    """Of the content of a file of --benchmark-json.

    Raises:
        KeyError, TypeError: where it is none, or not one of bench/'s.
    """
    blocks = ["# Benchmarks", conditions(content["machine_info"])]
    for section, (base, ours, says) in SECTIONS.items():
        rows = []
        for title, case in cases(content, section).items():
            row = {"case": title}
            medians = {name: found["stats"]["median"] for name, found in case.items()}
            if unit := medians.pop(base, None):
                row[f"{base}, ms"] = f"{1e3 * unit:.2f}"
                for name, median in medians.items():
                    value = unit / median if section == "data" else median / unit
                    row[name] = f"{value:.{2 if value < 9.995 else 1}f} ×"
            info = {name: found["extra_info"] for name, found in case.items()}
            if "gb_per_second" in info.get(ours, {}):
                row["GB/s"] = f"{info[ours]['gb_per_second']:.1f}"
                row["of copy"] = f"{info[ours]['share_of_copy_bandwidth']:.2f}"
            if "images_per_second" in info.get(ours, {}):
                row["images/s"] = f"{info[ours]['images_per_second']:.0f}"
            for name in (ours, base):
                if section != "data" and name in case:
                    row[f"MB, {name}"] = f"{info[name]['peak_memory_bytes'] / 1e6:.1f}"
            rows.append(row)
        if rows:
            table = tabulate(
                rows, headers="keys", tablefmt="pipe", disable_numparse=True, stralign="right"
            )
            blocks += [f"## {section.capitalize()}", says, table]
    return "\n\n".join(blocks) + "\n"


def cases(content: dict[str, Any], section: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured of each contestant of each case of bench_`section`.py."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in content["benchmarks"]:
        if f"bench_{section}.py" in benchmark["fullname"]:
            contestant = benchmark["params"]["contestant"]
            found.setdefault(benchmark["group"], {})[contestant] = benchmark
    return found


def conditions(machine: dict[str, Any]) -> str:
    cpu, gpu = machine["cpu"], ""
    names = ("torch", "triton", "numba")
    packages = "".join(f"{name} {machine[name]}, " for name in names if machine[name])
    if "gpu" in machine:
        gpu = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}; "
    return (
        f"Measured on: {gpu}{cpu.get('brand_raw', 'CPU')}, {cpu['count']} cores, "
        f"{machine['threads']} threads ({machine['cpu_capability']}); {packages}"
        f"Python {machine['python_version']}, {machine['system']}. Medians of runs in turn."
    )


def chart(content: dict[str, Any], path: Path) -> None:
    """Draw the operator's training cases as PNG: of each contestant, its times' ratios."""
    points: dict[str, dict[str, float]] = {}  # of each contestant
    for title, case in cases(content, "operator").items():
        if title.endswith("-training") and "max" in case:
            for name, found in case.items():
                ratio = found["stats"]["median"] / case["max"]["stats"]["median"]
                points.setdefault(name, {})[title.removesuffix("-training")] = ratio
    if "max" not in points:
        return
    height = 1.4 + 0.25 * len(points.pop("max"))
    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, ratios in points.items():
        axis.plot([*ratios.values()], [*ratios], "oD"[name == "stochastic"], label=name)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="time over that of eager ReLU + max pooling: less is better")
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    path = parser.parse_args(arguments).file
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        text = markdown(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{path} is no file of bench/'s --benchmark-json: {error!r}")
    chart(content, path.with_suffix(".png"))
    output = path.with_suffix(".md")
    output.write_text(text, encoding="utf-8")
    print(f"{text}\nWritten: {output}")


if __name__ == "__main__":
    main()
