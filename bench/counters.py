"""Read the GPU's counters of the main kernels with Nsight Compute, beside what was counted.

    python bench/counters.py [--json FILE]

The launches are those of kernel_report.py, CNN_SP's window in fp16 with a bias, on random numbers:
bytes that really go through the memory against the bytes counted, instructions that run against
those counted in the machine code, and the time against the model's. Nsight Compute empties the
caches before each kernel, and leaves the clocks alone here. What a kernel has written and the L2
still holds when it ends is in no count of the memory's, so fewer bytes than counted are possible.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

DTYPE, SHAPE = "float16", "3x3 s1 p1"
# As kernel_report.py orders its cases: the second launch of a kernel is that on channels_last.
LAYOUTS = ("contiguous", "channels_last")
CALLS = {
    "sample_sliding_kernel": "sample",
    "gather_sliding_kernel": "sample_backward",
    "expectation_sliding_kernel": "expectation",
    "gradient_sliding_kernel": "expectation_backward",
}

METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "smsp__inst_executed.sum": "warp_instructions",
    "launch__registers_per_thread": "registers",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
}
WARP = 32
# To bytes and nanoseconds; nothing else has a unit that ncu scales.
UNITS = {
    "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9,
}  # fmt: skip


def find_ncu() -> str | None:
    places = [shutil.which("ncu"), "/usr/local/cuda/bin/ncu"]
    places += sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*/ncu")), reverse=True)
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def command(ncu: str, log: Path) -> list[str]:
    """What profiles :func:`launch`, once for each kernel."""
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
        "--metrics", ",".join(METRICS), "--clock-control", "none", "--profile-from-start", "off",
        "--kernel-name", f"regex:.*({'|'.join(CALLS)}).*",
        sys.executable, str(Path(__file__).resolve()), "--launch",
    ]  # fmt: skip


def launch(device: str = "cuda") -> None:
    """Run every kernel, compiled and warm, between the profiler's start and stop."""
    import kernel_report
    import torch

    with torch.device(device):
        cases = list(kernel_report.cases([DTYPE], [SHAPE]))
    for case in cases:
        for tensor in case.launch.args:  # type: ignore[attr-defined]
            if isinstance(tensor, torch.Tensor):
                # Numbers, and cells of a window of nine.
                tensor.normal_() if tensor.is_floating_point() else tensor.random_(0, 9)
        case.launch()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for case in cases:
        case.launch()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def parse(text: str) -> list[dict[str, Any]]:
    """The kernels in ncu's `--csv --page raw` output, in the order in which they ran.

    Each has `kernel` and the values of :data:`METRICS`, in bytes and nanoseconds; None for those
    that ncu does not give.

    Raises:
        ValueError: with ncu's own error, if there is no kernel.
    """
    lines = text.splitlines()
    # Beside messages (==PROF== …); a header, a row of units, and a row for each kernel.
    table = [line for line in lines if line.startswith('"')]
    rows = list(csv.DictReader(table))
    if len(rows) < 2 or "Kernel Name" not in rows[0]:
        said = [line for line in lines if line.startswith(("==ERROR==", "==WARNING=="))]
        said.sort()  # errors first
        raise ValueError(said[0] if said else f"no kernel was profiled: {text[-300:]!r}")
    units, *kernels = rows

    def value(row: dict[str, str], metric: str) -> float | None:
        try:
            number = float((row.get(metric) or "").replace(",", ""))
        except ValueError:
            return None
        return number * UNITS.get(units.get(metric) or "", 1.0)

    return [
        {"kernel": row["Kernel Name"].split("(")[0]}
        | {name: value(row, metric) for metric, name in METRICS.items()}
        for row in kernels
    ]


def beside_the_report(
    kernels: Iterable[dict[str, Any]], report: list[dict[str, Any]], target: str, outputs: int
) -> list[dict[str, Any]]:
    """A row for each kernel with what was measured and what the kernel report counts for `target`;
    per output of the pooling."""
    seen: Counter[str] = Counter()
    rows = []
    for measured in kernels:
        name = measured["kernel"]
        call, layout = CALLS[name], LAYOUTS[seen[name] % len(LAYOUTS)]
        seen[name] += 1
        variant = f"{call} {SHAPE} {layout}"
        counted = next(
            (
                row
                for row in report
                if (row["target"], row["dtype"], row["kernel"], row["variant"])
                == (target, DTYPE, name, variant)
            ),
            {},
        )
        read, written = measured["read"], measured["written"]
        moved = None if read is None or written is None else read + written
        executed = measured["warp_instructions"]
        time = measured["nanoseconds"]
        rows.append(
            {
                "call": call,
                "layout": layout,
                "kernel": name,
                "measured_us": None if time is None else time / 1e3,
                "modelled_us": counted.get("modelled_us"),
                "measured_bytes_per_output": None if moved is None else moved / outputs,
                "counted_bytes_per_output": counted.get("bytes_per_output"),
                "measured_instructions_per_output": (
                    None if executed is None else executed * WARP / outputs
                ),
                "counted_instructions_per_output": counted.get("instructions_per_output"),
                "measured_registers": measured["registers"],
                "counted_registers": counted.get("registers"),
                "memory_percent": measured["memory_percent"],
                "compute_percent": measured["compute_percent"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: measured / counted, and their ratio."""

    def pair(row: dict[str, Any], what: str, of: str, digits: int) -> str:
        measured, counted = row[f"measured_{what}"], row[f"{of}_{what}"]
        if measured is None:
            return "not measured"
        if not counted:
            return f"{measured:.{digits}f}"
        return f"{measured:.{digits}f} / {counted:.{digits}f} ({measured / counted:.2f} x)"

    def percent(row: dict[str, Any], what: str) -> str:
        return "" if row[f"{what}_percent"] is None else f"{row[f'{what}_percent']:.0f} %"

    head = ["kernel", "layout", "µs, measured / modelled", "bytes an output, measured / counted"]
    head += ["instructions an output, measured / counted", "memory", "compute", "registers"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row["kernel"], row["layout"],
            pair(row, "us", "modelled", 0),
            pair(row, "bytes_per_output", "counted", 2),
            pair(row, "instructions_per_output", "counted", 1),
            percent(row, "memory"), percent(row, "compute"),
            pair(row, "registers", "counted", 0),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def newest_report(triton_version: str) -> Path:
    """The committed kernel report of this Triton, else of the newest."""
    own = RESULTS / f"kernel_report-triton{triton_version}.json"
    if own.exists():
        return own

    def version(path: Path) -> list[int]:
        number = path.stem.removeprefix("kernel_report-triton")
        return [int(part) for part in number.split(".") if part.isdigit()]

    return max(RESULTS.glob("kernel_report-triton*.json"), key=version)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--launch", action="store_true", help="only run the kernels")
    arguments = parser.parse_args()
    if arguments.launch:
        launch()
        return 0
    ncu = find_ncu()
    if ncu is None:
        print("ncu, of NVIDIA Nsight Compute, is not installed")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        # With points for decimals.
        run = subprocess.run(command(ncu, log), env={**os.environ, "LC_ALL": "C"}, check=False)
        text = log.read_text(errors="replace") if log.exists() else ""
    try:
        kernels = parse(text)
    except ValueError as error:
        print(f"ncu ended with status {run.returncode}: {error}")
        return 1

    import kernel_report
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    report = newest_report(triton.__version__)
    outputs = math.prod(kernel_report.SHAPE)  # the window keeps the planes' size
    counted = json.loads(report.read_text())
    rows = beside_the_report(kernels, counted, f"sm_{major}{minor}", outputs)
    print(
        f"{DTYPE} {kernel_report.SHAPE}, {SHAPE}, with bias, on {torch.cuda.get_device_name()}, "
        f"Triton {triton.__version__}; measured by ncu, counted and modelled in {report.name}"
    )
    print(*table(rows), sep="\n")
    if arguments.json:
        conditions = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "report": report.name,
            "dtype": DTYPE,
            "shape": list(kernel_report.SHAPE),
            "window": SHAPE,
        }
        result = json.dumps({"conditions": conditions, "kernels": rows}, indent=1)
        arguments.json.write_text(result + "\n")
    missing = 2 * len(CALLS) - len(rows)
    if missing:
        print(f"{missing} of {2 * len(CALLS)} kernels were not profiled")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
