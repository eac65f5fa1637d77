"""Read the GPU's counters of the main kernels with Nsight Compute, beside what was counted.

    python bench/gpu_counters.py [--json FILE]

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
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kernel_report
import torch
from tabulate import tabulate

DTYPES, WINDOWS = ["float16"], [kernel_report.CNN_SP]
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
)


def launch(device: str = "cuda") -> None:
    """Run every kernel, compiled and warm, between the profiler's start and stop."""
    cases = list(kernel_report.cases(DTYPES, WINDOWS, device))
    for case in cases:
        for tensor in case.launch.args:
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


def profile() -> str:
    """What ncu writes of the launches."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        command = [
            "ncu", "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
            "--metrics", ",".join(METRICS), "--clock-control", "none",
            "--profile-from-start", "off", "--kernel-name", "regex:.*_sliding_kernel.*",
            sys.executable, __file__, "--launch",
        ]  # fmt: skip
        # With points for decimals.
        subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, check=False)
        return log.read_text(errors="replace")


def beside_the_report(text: str, report: list[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    """For each kernel in ncu's output what was measured, NaN where ncu does not say, and what the
    kernel report counts or models for `target`, None where it does not. Bytes and instructions are
    per output of the pooling.

    Raises:
        SystemExit: with ncu's own error, if kernels are missing.
    """
    lines = text.splitlines()
    # Beside messages (==PROF== …); a header, a row of units, and a row for each launch.
    kernels = list(csv.DictReader(line for line in lines if line.startswith('"')))[1:]
    variants = [case.variant for case in kernel_report.cases(DTYPES, WINDOWS)]
    if len(kernels) != len(variants):
        said = sorted(line for line in lines if line.startswith(("==ERROR==", "==WARNING==")))
        why = said[0] if said else text[-300:]
        sys.exit(f"{len(kernels)} of {len(variants)} kernels were profiled: {why}")
    counted = {(row["target"], row["dtype"], row["variant"]): row for row in report}
    outputs = math.prod(kernel_report.SHAPE)  # the window keeps the planes' size
    rows = []
    for kernel, variant in zip(kernels, variants, strict=True):
        numbers = [kernel[metric].replace(",", "") for metric in METRICS]
        time, read, written, instructions, registers, memory, compute = (
            float(number) if re.match(r"\d", number) else math.nan for number in numbers
        )
        expected = counted.get((target, DTYPES[0], variant), {})
        rows.append(
            {
                "variant": variant,
                "us": time / 1e3,
                "us modelled": expected.get("modelled_us"),
                "bytes": (read + written) / outputs,
                "bytes counted": expected.get("bytes_per_output"),
                "instructions": 32 * instructions / outputs,  # of warps
                "instructions counted": expected.get("instructions_per_output"),
                "registers": registers,
                "registers counted": expected.get("registers"),
                "memory %": memory,
                "compute %": compute,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--launch", action="store_true", help="only run the kernels")
    arguments = parser.parse_args()
    if arguments.launch:
        launch()
        return
    if shutil.which("ncu") is None:
        print("ncu, of NVIDIA Nsight Compute, is not installed")
        sys.exit(77)  # which gpu_check.sh takes for what cannot run here
    (report,) = Path(__file__).parent.glob("results/kernel_report-*.json")
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    rows = beside_the_report(profile(), json.loads(report.read_text()), target)
    print(f"{torch.cuda.get_device_name()}, {target}; counted and modelled in {report.name}")
    print(tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f"))
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
