"""The check of a GPU: its parts, their limits, and what it reads of Nsight Compute's."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _pytest.mark.expression import Expression

from cnnsp.training import memory

from .scripts import ROOT, load_script

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs bash and GNU's timeout")


def program(path: Path, code: str) -> None:
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)


# ---------------------------------------------------------------- the parts


def run_parts(folder: Path, parts: str) -> subprocess.CompletedProcess[str]:
    """The script with other parts than its own."""
    head, _, _ = SCRIPT.read_text().partition("# ---")
    (folder / "scripts").mkdir()
    (folder / "scripts" / "check.sh").write_text(f"{head}\n{parts}\n((failed == 0))\n")
    program(folder / "python", "")
    command = ["bash", "scripts/check.sh", "out", "--device", "cpu"]
    environment = {**os.environ, "PYTHON": str(folder / "python")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@LINUX
def test_each_part_fails_alone(tmp_path: Path) -> None:
    parts = """
part good 60 9 sh -c 'echo first; echo "it | works"'
part bad 60 1 sh -c 'echo why; exit 3'
part "not installed" 60 1 no-such-program
part elsewhere 60 1 sh -c 'echo needs a GPU; exit 77'
part last 60 1 echo still here
"""
    assert run_parts(tmp_path, parts).returncode == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(r"^\| good \| passed \| \d+ \| it \\\| works \|$", text, re.M)
    assert re.search(r"^\| bad \| FAILED \| \d+ \| why \|$", text, re.M)
    assert re.search(r"^\| not installed \| skipped \| \d+ \| .*no-such-program.*\|$", text, re.M)
    assert re.search(r"^\| elsewhere \| skipped \| \d+ \| needs a GPU \|$", text, re.M)
    assert "Parts that failed: 1." in text
    assert "## good\n\n```\nfirst\nit | works\n```" in text
    assert "## bad\n\n```\nwhy\n```" in text
    assert "still here" in (tmp_path / "out" / "checks.log").read_text()


@pytest.mark.slow
@LINUX
def test_a_part_ends_at_its_limit_with_what_it_has(tmp_path: Path) -> None:
    """Asked first, then killed, and the processes that it started with it."""
    (tmp_path / "polite.py").write_text(
        """
import time
try:
    print("half", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("summed up")
"""
    )
    (tmp_path / "child.py").write_text(
        """
import time
while True:
    with open("beats", "a") as file:
        file.write("x")
    time.sleep(0.05)
"""
    )
    (tmp_path / "deaf.py").write_text(
        """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "child.py"])
time.sleep(60)
"""
    )
    parts = f"""
grace=2
part polite 4 1 {sys.executable} polite.py
part deaf 2 1 {sys.executable} deaf.py
"""
    start = time.monotonic()
    assert run_parts(tmp_path, parts).returncode == 1
    assert time.monotonic() - start < 30
    text = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(r"polite \| FAILED \| \d \| stopped at its limit of 4 s: summed up", text)
    assert "| deaf | FAILED |" in text
    size = (tmp_path / "beats").stat().st_size
    assert size > 0
    time.sleep(0.5)
    assert (tmp_path / "beats").stat().st_size == size, "the part's child lives on"


@LINUX
def test_what_there_is_no_time_for_is_skipped(tmp_path: Path) -> None:
    assert run_parts(tmp_path, "total=20\npart late 60 1 echo 1").returncode == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| late | skipped | 0 | no time was left |" in text


@LINUX
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_is_one_that_its_program_takes(tmp_path: Path, device: str) -> None:
    """Those for a GPU, too, which do not run here."""
    log = tmp_path / "log"
    note = f"import json, sys; print(json.dumps(sys.argv), file=open({str(log)!r}, 'a'))\n"
    for name in ("python", "git", "compute-sanitizer"):
        program(tmp_path / name, note)
    program(tmp_path / "nvidia-smi", note + "print(80_000)")
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), "--device", device]
    command += ["--data-dir", "."]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHON"] = str(tmp_path / "python")
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    calls = [json.loads(line)[1:] for line in log.read_text().splitlines()]
    assert len(calls) == (17 if device == "cuda" else 10)
    trainings = 0
    for module, *flags in [call[1:] if call[0] == "-m" else call for call in calls]:
        if module == "scripts/train.py":
            options = load_script("train").make_parser().parse_args(flags)
            assert (options.amp, options.data_dir) == (True, str(tmp_path))
            trainings += 1
        elif module == "cnnsp.training.memory":
            memory.make_parser().parse_args(flags)
        elif module.startswith("bench/"):
            text = (ROOT / module).read_text()
            assert all(f'"{flag}"' in text for flag in flags if flag.startswith("--"))
        elif module == "pytest":
            expression = flags[flags.index("-k") + 1]
            Expression.compile(expression)
            if "bench/" in flags:
                continue
            files = [flag.split("::") for flag in flags if flag.startswith("tests/")]
            text = "".join((ROOT / file).read_text() for file, *_ in files)
            assert all(f"def {test}(" in text for _, *tests in files for test in tests)
            words = re.findall(r"\w+", expression)
            text += (ROOT / "tests" / "windows.py").read_text()
            assert all(word in text for word in words if word not in ("and", "or", "not")), words
    assert trainings == (4 if device == "cuda" else 2)


# ---------------------------------------------------------------- Nsight Compute

# Numbers made up, in ncu's format: messages, a header, a row of units, the kernels.
NCU = """==PROF== Connected to process 77 (python)
==PROF== Profiling "sample_sliding_kernel" - 0: 0%....50%....100% - 3 passes
"ID","Kernel Name","Block Size","dram__bytes_read.sum","dram__bytes_write.sum",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__throughput.avg.pct_of_peak_sustained_elapsed",\
"smsp__inst_executed.sum"
"","","","byte","byte","%","ns","register/thread","%","inst"
"0","sample_sliding_kernel","(128, 1, 1)","2,000","3,000","80.5","150,000","60","70.1","1,500"
"""
NA = '"1","gather_sliding_kernel","(128, 1, 1)","2,000","n/a","80","99","60","70","100"\n'


@pytest.fixture
def counters(monkeypatch) -> ModuleType:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = importlib.import_module("gpu_counters")
    monkeypatch.setattr(module.kernel_report, "SHAPE", (1, 10, 10, 10))
    return module


def test_counters_are_set_beside_the_report(counters: ModuleType) -> None:
    (file,) = ROOT.glob("bench/results/kernel_report-*.json")
    report = json.loads(file.read_text())
    first, second, *others = counters.beside_the_report(NCU + 7 * NA, report, "sm_90")
    assert (first["us"], first["bytes"], first["instructions"]) == (150.0, 5.0, 48.0)
    assert (first["memory %"], first["compute %"], first["registers"]) == (80.5, 70.1, 60)
    assert first["bytes counted"] == 5.0
    assert math.isnan(second["bytes"])
    # The committed report has a row for each kernel and layout that ncu would read.
    rows = [first, second, *others]
    assert all(row["us modelled"] and row["instructions counted"] for row in rows)
    assert rows[6]["variant"] == "expectation 3x3 s1 p1 channels_last"
    assert counters.beside_the_report(NCU + 7 * NA, report, "sm_1")[0]["us modelled"] is None


def test_what_ncu_complains_of_is_told(counters: ModuleType) -> None:
    said = "==WARNING== No kernels\n==ERROR== ERR_NVGPUCTRPERM - no permission to read counters\n"
    with pytest.raises(SystemExit, match=r"0 of 8 .*ERR_NVGPUCTRPERM"):
        counters.beside_the_report("==PROF== Connected\n" + said, [], "sm_90")


def test_profiled_launches_are_those_of_the_report(counters: ModuleType, monkeypatch) -> None:
    """Without the GPU: what is launched, and that the profiler sees each launch once."""
    events: list[str] = []
    names = ["sample", "sample_backward", "expectation", "expectation_backward"]
    for name in names:
        monkeypatch.setattr(
            counters.kernel_report.backend, name, lambda *_, name=name: events.append(name)
        )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: events.append(name))
    counters.launch("cpu")
    assert events == [*names, *names, "start", *names, *names, "stop"]
