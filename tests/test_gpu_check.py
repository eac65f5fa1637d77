"""The check of a GPU: its parts, their limits, and what it reads from other programs' output."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cnnsp.training import memory
from stochastic_pooling import reference

from .scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def bench_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module(name)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return bench_module("gpu_check", monkeypatch)


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return bench_module("counters", monkeypatch)


# ---------------------------------------------------------------- the parts


def part(check: ModuleType, name: str, code: str, seconds: float = 60, **options):
    return check.Part(name, (sys.executable, "-c", code), seconds, check.last_line, **options)


def test_each_part_fails_alone(check: ModuleType, tmp_path: Path) -> None:
    planned = [
        part(check, "good", "print('first'); print('it | works')", shown=True),
        part(check, "bad", "import sys; print('why'); sys.exit(3)"),
        part(check, "without its package", "print(1)", needs=("sys", "no_such_package")),
        part(check, "without its file", "print(1)", reads=tmp_path / "none.json"),
        part(check, "elsewhere", "print(1)", absent="needs a GPU"),
        part(check, "last", "print('still here')"),
    ]
    results = check.run(planned, tmp_path, dict(os.environ), 600)
    assert [result.outcome for result in results] == [
        "passed", "FAILED", "skipped", "skipped", "skipped", "passed",
    ]  # fmt: skip
    assert results[2].says == "no_such_package missing"
    assert results[3].says == "none.json missing"
    text = (tmp_path / "summary.md").read_text()
    assert re.search(r"^\| good \| passed \| \d+ \| it \\\| works \|$", text, re.M)
    assert re.search(r"^\| bad \| FAILED \| \d+ \| why \|$", text, re.M)
    assert "| elsewhere | skipped | 0 | needs a GPU |" in text
    assert "Failed: bad." in text
    assert "first\n" in text  # what is shown is there in full
    assert "still here" in (tmp_path / "checks.log").read_text()


@POSIX
def test_a_part_ends_at_its_limit_with_what_it_has(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked first, then killed, and the processes that it started with it."""
    monkeypatch.setattr(check, "GRACE", 5.0)  # a busy machine takes its time
    polite = """
import time
try:
    print("half", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("summed up")
"""
    beats = tmp_path / "beats"
    child = f"""
import time
while True:
    with open({str(beats)!r}, "a") as file:
        file.write("x")
    time.sleep(0.05)
"""
    deaf = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(60)
"""
    planned = [
        part(check, "polite", polite, 2, stop=signal.SIGINT),
        part(check, "deaf", deaf, 2),
    ]
    start = time.monotonic()
    first, second = check.run(planned, tmp_path, dict(os.environ), 600)
    assert time.monotonic() - start < 30
    assert (first.outcome, first.says) == ("FAILED", "stopped at its limit of 2 s: summed up")
    assert second.outcome == "FAILED"
    size = beats.stat().st_size
    assert size > 0
    time.sleep(0.5)
    assert beats.stat().st_size == size, "the part's child lives on"


def test_what_there_is_no_time_for_is_skipped(check: ModuleType, tmp_path: Path) -> None:
    (result,) = check.run([part(check, "late", "print(1)")], tmp_path, dict(os.environ), 5)
    assert (result.outcome, result.says) == ("skipped", "no time was left")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_is_one_that_its_program_takes(
    check: ModuleType, tmp_path: Path, device: str
) -> None:
    """Those for a GPU, too, which do not run here."""
    train, tested = load_script("train").make_parser(), 0
    names = [part.name for part in check.parts(device, tmp_path, tmp_path, None)]
    assert names[:3] == ["conditions", "smoke", "tests"]
    assert len(set(names)) == len(names)
    for planned in check.parts(device, tmp_path, tmp_path, tmp_path):
        program, *flags = planned.command[planned.command.index("-u") + 1 :]
        if program == "scripts/train.py":
            options = train.parse_args(flags)
            assert options.amp
            assert options.data_dir == str(tmp_path)
            tested += 1
        elif flags[:1] == ["cnnsp.training.memory"]:
            memory.make_parser().parse_args(flags[1:])
            tested += 1
        elif program != "-m":
            text = (ROOT / program).read_text() if (ROOT / program).exists() else ""
            # The table of the benchmarks may come with them.
            assert text or program == "bench/report.py"
            assert all(f'"{flag}"' in text for flag in flags if flag.startswith("--"))
            tested += 1
    assert tested >= 9


def test_selected_tests_exist(check: ModuleType) -> None:
    text = ""
    for name in check.GPU_TESTS:
        file, _, test = name.partition("::")
        text += (ROOT / file).read_text()
        assert f"def {test}" in text
    for word in (*check.NOT_ON_GPU, *check.ON_CPU):
        assert word in text, word


def test_output_of_pytest_is_read(check: ModuleType) -> None:
    text = """
FAILED tests/test_kernels.py::test_a[1] - AssertionError
ERROR tests/test_b.py::test_c
==== 1 failed, 41 passed, 1 error in 90.25s (0:01:30) ====
"""
    assert check.pytest_says(text) == (
        "1 failed, 41 passed, 1 error in 90.25s (0:01:30): test_kernels.py::test_a[1], "
        "test_b.py::test_c"
    )
    assert check.pytest_says("..\n12 passed in 3.2s\n") == "12 passed in 3.2s"


def test_epochs_of_training_are_read(check: ModuleType, tmp_path: Path) -> None:
    header = "epoch,train_loss,test_loss,test_accuracy,lr,images_per_second,seconds\n"
    first, other = tmp_path / "first.csv", tmp_path / "other.csv"
    first.write_text(header + "1,1,1,40,0.1,10,9\n2,1,1,61.5,0.1,900,2\n3,1,1,70.25,0.1,1100,2\n")
    other.write_text(header + "1,1,1,50,0.1,500,4\n")
    says = check.training_says("x\nPeak GPU memory: 700 MiB allocated\n", first, first)
    assert says == (
        "3 epochs in 13 s, 1,000 images/s, accuracy 70.2 %; Peak GPU memory: 700 MiB allocated"
    )
    assert "0.50 times the rate" in check.training_says("", other, first)
    error = "train.py: error: out of GPU memory"
    assert check.training_says(error + "\n", tmp_path / "none.csv", first) == error


# ---------------------------------------------------------------- the smoke test


def test_smoke_names_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = bench_module("smoke", monkeypatch)
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "torch")
    assert smoke.check("float16-channels_last", "cpu") == []
    backward = reference.sample_backward

    def late(*arguments):
        grad_input, grad_bias = backward(*arguments)
        return grad_input.roll(1, 3), grad_bias

    def scaled(*arguments):
        return 1.01 * reference._laid_out(expectation(*arguments), arguments[0])

    expectation = reference.expectation
    broken = type("Broken", (), {k: staticmethod(v) for k, v in vars(reference).items()})
    broken.sample_backward, broken.expectation = staticmethod(late), staticmethod(scaled)
    monkeypatch.setattr(smoke.ops, "backend_for", lambda *_: broken)
    faults = smoke.check("float32-contiguous", "cpu")
    found = {" ".join(fault.split(" Tensor-likes")[0].split()) for fault in faults}
    assert "float32-contiguous sample_backward: input:" in found
    assert "float32-contiguous expectation:" in found
    assert not any("drawn cells" in fault for fault in faults)


# ---------------------------------------------------------------- Nsight Compute

# Numbers made up, in ncu's format: messages, a header, a row of units, the kernels.
NCU = """==PROF== Connected to process 77 (python)
==PROF== Profiling "sample_sliding_kernel" - 0: 0%....50%....100% - 3 passes
"ID","Process ID","Process Name","Kernel Name","Block Size","dram__bytes_read.sum",\
"dram__bytes_write.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread",\
"sm__throughput.avg.pct_of_peak_sustained_elapsed","smsp__inst_executed.sum"
"","","","","","byte","byte","%","ns","register/thread","%","inst"
"0","77","python","sample_sliding_kernel","(128, 1, 1)","2,000","3,000","80.5","150,000","60",\
"70.1","1,500"
"1","77","python","gather_sliding_kernel","(128, 1, 1)","2,000","n/a","80","99","60","70","100"
"2","77","python","sample_sliding_kernel","(128, 1, 1)","4,000","4,000","80","2","60","70","30"
"""


def test_counters_are_set_beside_the_report(counters: ModuleType) -> None:
    kernels = counters.parse(NCU)
    assert kernels[0] == {
        "kernel": "sample_sliding_kernel", "nanoseconds": 150e3, "read": 2000, "written": 3000,
        "warp_instructions": 1500, "registers": 60, "memory_percent": 80.5, "compute_percent": 70.1,
    }  # fmt: skip
    assert kernels[1]["written"] is None
    report = [
        {
            "target": target, "dtype": "float16", "kernel": "sample_sliding_kernel",
            "variant": f"sample 3x3 s1 p1 {layout}", "bytes_per_output": size, "registers": 60,
            "instructions_per_output": 40.0, "modelled_us": 100.0,
        }
        for target in ("sm_86", "sm_90")
        for layout, size in (("contiguous", 5.0), ("channels_last", 4.0))
    ]  # fmt: skip
    first, second, third = counters.beside_the_report(kernels, report, "sm_90", outputs=1000)
    assert first["measured_bytes_per_output"] == 5.0
    assert first["measured_instructions_per_output"] == 48.0
    assert (first["measured_us"], first["modelled_us"]) == (150.0, 100.0)
    assert (first["call"], first["layout"]) == ("sample", "contiguous")
    # The second launch of a kernel is the one on channels_last.
    assert (third["layout"], third["counted_bytes_per_output"]) == ("channels_last", 4.0)
    assert second["measured_bytes_per_output"] is None
    assert second["counted_bytes_per_output"] is None
    lines = counters.table([first, second, third])
    assert "150 / 100 (1.50 x)" in lines[2]
    assert "48.0 / 40.0 (1.20 x)" in lines[2]
    assert "not measured" in lines[3]


def test_times_and_bytes_of_other_units(counters: ModuleType) -> None:
    text = NCU.replace('"byte","byte"', '"Kbyte","Mbyte"').replace('"ns"', '"us"')
    kernel = counters.parse(text)[0]
    assert (kernel["read"], kernel["written"], kernel["nanoseconds"]) == (2e6, 3e9, 150e6)


def test_what_ncu_complains_of_is_told(counters: ModuleType) -> None:
    said = "==WARNING== No kernels\n==ERROR== ERR_NVGPUCTRPERM - no permission to read counters\n"
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        counters.parse("==PROF== Connected\n" + said)


def test_counters_know_the_kernels_of_the_report(counters: ModuleType) -> None:
    """The committed report has a row for each kernel and layout that ncu would read."""
    path = counters.newest_report("0.0")
    report = json.loads(path.read_text())
    for kernel, call in counters.CALLS.items():
        for layout in counters.LAYOUTS:
            row = (counters.DTYPE, kernel, f"{call} {counters.SHAPE} {layout}")
            assert any((r["dtype"], r["kernel"], r["variant"]) == row for r in report), row


def test_profiled_launches_are_those_of_the_report(
    counters: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the GPU: what is launched, and that the profiler sees each launch once."""
    kernel_report = pytest.importorskip("kernel_report", exc_type=ImportError)
    events: list[str] = []
    monkeypatch.setattr(kernel_report, "SHAPE", (1, 2, 6, 8))
    for name in counters.CALLS.values():
        monkeypatch.setattr(
            kernel_report.backend, name, lambda *tensors, name=name: events.append(name)
        )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: events.append(name))
    counters.launch("cpu")
    calls = ["sample", "sample_backward", "expectation", "expectation_backward"] * 2
    assert events == [*calls, "start", *calls, "stop"]
