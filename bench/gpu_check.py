"""Everything that needs a GPU, in less than nine minutes; scripts/gpu_check.sh starts it.

    python bench/gpu_check.py OUT [--device cuda|cpu] [--data-dir FOLDER] [--seconds N]

Each part is a process with a limit of time, so that one that fails, hangs or lacks a package stops
none of the others; the most valuable come first. In the folder OUT, as they come:

    summary.md       every part and what it says; written anew after each
    checks.log       all that the parts print
    benchmarks.*     what pytest-benchmark measured, as a table and as a chart
    training.*       the epochs of the training run, and their curves
    counters.json    what Nsight Compute read

`--device cpu` runs the same parts on small work. The exit status is 0 if no part failed; parts that
cannot run here are skipped, and say why.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import counters
from flowers import draw_flowers, photographs

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 535.0
# A part that is asked to stop has this long to say what it has.
GRACE = 15.0
LEAST = 10.0  # seconds with which a part is still worth starting

# The tests whose tensors lie on the GPU when there is one, the most telling first. Left out: what
# compiles for other GPUs, runs onnxruntime or starts processes that train on CPUs.
GPU_TESTS = (
    "tests/test_kernels.py",
    "tests/test_properties.py",
    "tests/test_extremes.py",
    "tests/test_pooling.py",
    "tests/test_in_pytorch.py",
    "tests/test_volumes.py",
    "tests/test_memory.py::test_account_agrees_with_a_gpu",
    "tests/test_transforms.py",
    "tests/test_compile.py",
    "tests/test_augment.py",
)
NOT_ON_GPU = ("compile_for", "emulator", "onnx", "data_parallel", "numba")
# Compiling is most of it, and in channels_last every layer has kernels of its own. All of bench/
# takes longer than there is here.
GPU_BENCHMARKS = (
    "(network and float16 and not avg) or (operator and cnnsp_pool1 and fp16)"
    " or (operator and resnet_stem and training)"
)
ON_CPU = ("any_strides", "same_cells", "a_volume_of_one_slice", "agrees_with_a_gpu")


@dataclass(frozen=True)
class Part:
    """A process of the run.

    Attributes:
        name: for the summary.
        command: what runs, in the project's folder.
        seconds: its limit.
        says: one line out of what it printed.
        needs: modules without which it cannot run.
        reads: a file of an earlier part without which it cannot run.
        absent: why it cannot run here, or "".
        stop: the signal that ends it at its limit and lets it sum up.
        shown: whether the summary holds all that it prints.
        results: files of its own, and the names that they get in OUT.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    says: Callable[[str], str]
    needs: tuple[str, ...] = ()
    reads: Path | None = None
    absent: str = ""
    stop: signal.Signals = signal.SIGTERM
    shown: bool = False
    results: tuple[tuple[Path, str], ...] = ()

    def reason_to_skip(self) -> str:
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if self.reads is not None and not self.reads.exists():
            missing.append(self.reads.name)
        return self.absent or (f"{', '.join(missing)} missing" if missing else "")


@dataclass(frozen=True)
class Result:
    part: Part
    outcome: str  # "passed", "FAILED" or "skipped"
    seconds: float
    says: str
    output: str = ""


# ---------------------------------------------------------------- the parts


def parts(device: str, out: Path, work: Path, data_dir: Path | None) -> list[Part]:
    """What runs on ``device``, in order; the training runs write to the folder ``work``."""
    cuda = device == "cuda"
    gpu_only = "" if cuda else "needs a GPU"
    train_needs = ("PIL", "matplotlib", "numpy", "tensorboard", "torchvision", "tqdm")
    benchmarks = out / "benchmarks.json"
    drawn = work / "flowers"
    sanitizer = shutil.which("compute-sanitizer")

    def training(name: str, flags: str, limit: float, results: tuple = ()) -> Part:
        folder = work / name.replace(" ", "-")
        flags += " --amp --output-dir"
        command = ["scripts/train.py", *flags.split(), str(folder)]
        command += ["--data-dir", str(data_dir or drawn)]
        first = work / "training" / "summary.csv"
        says = partial(training_says, summary=folder / "summary.csv", first=first)
        files = tuple((folder / file, result) for file, result in results)
        return Part(name, python(*command), limit, says, train_needs, results=files)

    on_card = "-b 256 --gpu-memory-gb 6"
    capped = on_card if cuda else "-b 8 --max-steps 2"
    epochs = (("summary.csv", "training.csv"), ("curves.png", "training.png"))
    return [
        Part(
            "conditions",
            python("bench/smoke.py", "--device", device, "--conditions"),
            40,
            lambda text: _line(text, "card: ") or _line(text, "torch: "),
            shown=True,
        ),
        Part("smoke", python("bench/smoke.py", "--device", device), 60 if cuda else 90, last_line),
        Part(
            "tests",
            python(*test_command(cuda)),
            170 if cuda else 120,
            pytest_says,
            needs=("pytest",),
            stop=signal.SIGINT,
        ),
        Part(
            "benchmarks",
            python(*benchmark_command(device, benchmarks)),
            200,
            pytest_says,
            needs=("pytest", "pytest_benchmark"),
            stop=signal.SIGINT,
        ),
        Part(
            "chart of the benchmarks",
            python("bench/report.py", str(benchmarks)),
            30,
            last_line,
            needs=("matplotlib",),
            reads=benchmarks,
        ),
        Part(
            "synthetic flowers",
            python("bench/gpu_check.py", "--draw", "100" if cuda else "4", str(drawn)),
            60,
            last_line,
            needs=("PIL", "numpy"),
            absent=f"there are photographs: {data_dir.name}" if data_dir else "",
        ),
        training("training", f"{capped} --epochs 30", 95, epochs),
        Part(
            "memory",
            python("-m", "cnnsp.training.memory", "-b", "256", "--gpu-memory-gb", "6"),
            50,
            memory_says,
            shown=True,
        ),
        Part(
            "counters",
            python("bench/counters.py", "--json", str(out / "counters.json")),
            75,
            counters_say,
            shown=True,
            absent=gpu_only or ("" if counters.find_ncu() else "ncu is not installed"),
        ),
        training("max pooling", f"{capped} --pool max --epochs 6", 45),
        replace(
            training("batch 1024 in 6 GB", f"{on_card} -b 1024 --max-steps 3", 40), absent=gpu_only
        ),
        replace(
            training("CUDA graphs", f"{on_card} --epochs 3 --torchcompile reduce-overhead", 75),
            absent=gpu_only,
        ),
        Part(
            "memcheck",
            (
                *(sanitizer or "compute-sanitizer", "--error-exitcode", "9"),
                *python("bench/smoke.py", "--device", device, "--case", "float16-channels_last"),
            ),
            60,
            last_line,
            absent=gpu_only or ("" if sanitizer else "compute-sanitizer is not installed"),
        ),
    ]


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-u", *arguments)


def test_command(cuda: bool) -> list[str]:
    command = ["-m", "pytest", *GPU_TESTS, "-q", "-rfEs", "--tb=short", "--durations=15"]
    # Without the project's own options, which may be those of a plugin that is not here.
    command += ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    if not cuda:
        return [*command, "-k", " or ".join(ON_CPU)]
    command += ["-k", "not (" + " or ".join(NOT_ON_GPU) + ")"]
    workers = test_workers()
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    return command


def benchmark_command(device: str, result: Path) -> list[str]:
    cuda = device == "cuda"
    command = ["-m", "pytest", "bench/", "--benchmark-only", "-q", "-rfEs", "--tb=short"]
    command += ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    command += ["-k", GPU_BENCHMARKS if cuda else "operator and cnnsp_pool3to5"]
    command += ["--device", device, "--budget", "40" if cuda else "5"]
    return [*command, "--benchmark-json", str(result)]


def test_workers() -> int:
    """Processes that compile kernels side by side: of two cores fewer than there are, and with
    6 GB of the GPU each, for some tests take 4 GiB at a time."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        gigabytes = float(run.stdout) / 1000
    except (OSError, subprocess.SubprocessError, ValueError):
        gigabytes = 6.0
    return max(1, min(12, (os.cpu_count() or 1) - 2, int(gigabytes / 6)))


# ---------------------------------------------------------------- what their output says


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _line(text: str, start: str) -> str:
    return next((line for line in text.splitlines() if line.startswith(start)), "")


def pytest_says(text: str) -> str:
    """The counts, and the first tests that failed."""
    counts = re.findall(r"^=*\s*((?:no tests ran|\d+ \w+).* in [\d.]+s.*?)[ =]*$", text, re.M)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    names = ", ".join(name.rsplit("/", 1)[-1] for name in failed[:5])
    more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
    says = counts[-1] if counts else last_line(text)
    return f"{says}: {names}{more}" if failed else says


def training_says(text: str, summary: Path, first: Path) -> str:
    """Of the epochs in ``summary``; the rate also beside that in ``first``."""
    rows = _epochs(summary)
    error = _line(text, "train.py: error")
    if not rows:
        return error or last_line(text)
    rate = _rate(rows)
    says = (
        f"{len(rows)} epochs in {sum(float(row['seconds']) for row in rows):.0f} s, "
        f"{rate:,.0f} images/s, accuracy {float(rows[-1]['test_accuracy']):.1f} %"
    )
    if summary != first and (others := _epochs(first)):
        says += f", {rate / _rate(others):.2f} times the rate of the training above"
    peak = re.search(r"^Peak GPU memory: .*$", text, re.M)
    return "; ".join(filter(None, (says, peak and peak[0], error)))


def _epochs(summary: Path) -> list[dict[str, str]]:
    if not summary.exists():
        return []
    with summary.open(newline="") as file:
        return list(csv.DictReader(file))


def _rate(rows: list[dict[str, str]]) -> float:
    """The median over epochs, without the first, which compiles, where there are others."""
    return statistics.median(float(row["images_per_second"]) for row in rows[1:] or rows)


def memory_says(text: str) -> str:
    lines = (_line(text, start) for start in ("MB at batch", "peak", "measured here", "batch for"))
    return "; ".join(" ".join(line.split()) for line in lines if line)


def counters_say(text: str) -> str:
    rows = [line for line in text.splitlines() if "_kernel |" in line]
    return f"{len(rows)} kernels, below" if rows else last_line(text)


# ---------------------------------------------------------------- running them


def run_part(part: Part, log: Path, out: Path, environment: dict[str, str], limit: float) -> Result:
    """Run a part for at most ``limit`` seconds, its output going to the end of ``log``."""
    reason = part.reason_to_skip()
    if reason:
        return Result(part, "skipped", 0.0, reason)
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n######## {part.name}: {' '.join(part.command)}\n".encode())
        file.flush()
        begin = file.tell()
        # In a session of its own, whose processes can be ended together.
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        stopped = False
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(part.stop if os.name == "posix" else signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            status = -1
        finally:
            _kill(process)
    seconds = time.monotonic() - start
    with log.open("rb") as file:
        file.seek(begin)
        output = file.read().decode(errors="replace").replace("\r", "\n")
    for path, name in part.results:
        if path.exists():
            shutil.copyfile(path, out / name)
    says = part.says(output)
    if stopped:
        says = f"stopped at its limit of {limit:.0f} s: {says}"
    return Result(part, "FAILED" if status else "passed", seconds, says, output)


def _kill(process: subprocess.Popen) -> None:
    """End what is left of a part."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def run(
    planned: Iterable[Part], out: Path, environment: dict[str, str], seconds: float
) -> list[Result]:
    """Run the parts, one after the other, within ``seconds``."""
    log = out / "checks.log"
    log.write_bytes(b"")
    end = time.monotonic() + seconds
    results: list[Result] = []
    for part in planned:
        left = end - time.monotonic() - GRACE
        if left < LEAST and not part.reason_to_skip():
            result = Result(part, "skipped", 0.0, "no time was left")
        else:
            result = run_part(part, log, out, environment, min(part.seconds, left))
        results.append(result)
        print(f"{part.name}: {result.outcome}, {result.seconds:.0f} s: {result.says}", flush=True)
        (out / "summary.md").write_text(summary(results), encoding="utf-8")
        if part.name == "conditions" and result.outcome == "FAILED":
            break  # nothing else could run
    return results


def summary(results: list[Result]) -> str:
    """Markdown: the table of the parts, then what some of them print and where others failed."""
    lines = ["# GPU check", "", "| part | result | seconds | what it says |", "|---|---|---|---|"]
    for result in results:
        says = result.says.replace("|", "\\|")
        lines.append(f"| {result.part.name} | {result.outcome} | {result.seconds:.0f} | {says} |")
    failed = [result.part.name for result in results if result.outcome == "FAILED"]
    skipped = [result.part.name for result in results if result.outcome == "skipped"]
    lines += [
        "",
        f"Failed: {', '.join(failed) or 'none'}. Skipped: {', '.join(skipped) or 'none'}.",
    ]
    for result in results:
        if result.part.shown and result.outcome == "passed":
            lines += ["", f"## {result.part.name}", "", *_quoted(result.output)]
        elif result.outcome == "FAILED":
            end = result.output.strip().splitlines()[-15:]
            lines += [
                "",
                f"## {result.part.name}: the end of its output",
                "",
                *_quoted("\n".join(end)),
            ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[str]:
    """Markdown's tables as they are, other text as a block."""
    lines = text.strip().splitlines()
    table = [line for line in lines if line.startswith("|")]
    rest = [line for line in lines if not line.startswith("|")]
    return ["```", *rest, "```", *(["", *table] if table else [])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="photographs to train on; when not given: datasets/ or shared/flowers here, or "
        "shared/flowers beside the project, or synthetic flowers",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument(
        "--draw", type=int, metavar="N", help="only draw N synthetic flowers of each class into OUT"
    )
    args = parser.parse_args(arguments)
    if args.draw:
        # Stand-ins for the photographs, in as many files, so that an epoch is as long.
        draw_flowers(args.out, args.draw, ".bmp")
        made = f"{args.draw} synthetic flowers of each class, to train and to test"
        print(f"no photographs here: {made}")
        return 0
    if importlib.util.find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data_dir = photographs() if args.device == "cuda" else None
    if args.data_dir is not None:
        data_dir = args.data_dir.resolve()

    path = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    # The tests choose the interpreter where they need it; a forced backend would hide another.
    for name in ("TRITON_INTERPRET", "STOCHASTIC_POOLING_BACKEND"):
        environment.pop(name, None)
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # A stop from outside, too, ends the part that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A script's background starts us with this one ignored, and so the parts that it stops.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        planned = parts(args.device, out, Path(work), data_dir)
        results = run(planned, out, environment, args.seconds)
    print("\n" + (out / "summary.md").read_text(encoding="utf-8"))
    return 1 if any(result.outcome == "FAILED" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
