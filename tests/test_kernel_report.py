"""What bench/ reads from machine code and makes of it, on a kernel whose counts are known."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from .scripts import ROOT, run_python

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def worked_on(x):
    for _ in tl.static_range(100):  # or the assembler would unroll the loop around it
        x = x * 0.5 + 1
    return x


@triton.jit
def kernel(input_ptr, output_ptr, count, limit):
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    total = tl.zeros([32], tl.float32)
    for _ in range(count):
        total += worked_on(tl.load(input_ptr + at))
        input_ptr += limit
    if limit > 5:
        tl.store(output_ptr + at + 64, total)
    if tl.max(total) > 7:
        for i in range(limit):
            tl.store(output_ptr + at * limit + i, tl.exp(total))
    tl.store(output_ptr + at, total)


@triton.jit
def unrolled(input_ptr, output_ptr, count):
    at = tl.arange(0, 32)
    total = tl.zeros([32], tl.float32)
    for i in range(count):
        total += tl.load(input_ptr + at + i * 32)
    tl.store(output_ptr + at, total)
"""
COMPILE = """
import json, sys
import torch
import instructions, kernel_report, tiny

def counts(target, kernel, *arguments, averages={}):
    launch = lambda: kernel[(3,)](*tensors, *arguments, num_warps=1)
    [compiled] = kernel_report.compiled(launch, kernel_report.TARGETS[target])
    assert compiled.programs == 3
    assert compiled.bytes() == 2 * 4 * 4096
    averages = {"tl.max(total) > 7": 0, **averages}
    return instructions.count(compiled.kernel, compiled.arguments, averages)

tensors = torch.empty(4096), torch.empty(4096)
found = {
    "one": counts("sm_86", tiny.kernel, 40, 3),
    "more": counts("sm_86", tiny.kernel, 50, 3),
    "average": counts("sm_86", tiny.kernel, 40, 3, averages={"count": 50}),
    "taken": counts("sm_86", tiny.kernel, 40, 3, averages={"limit > 5": 1}),
    "not taken": counts("sm_86", tiny.kernel, 40, 3, averages={"limit > 5": 0}),
}
refused = []
for target, kernel, *arguments in ("sm_86", tiny.unrolled, 40), ("gfx942", tiny.kernel, 40, 3):
    try:
        counts(target, kernel, *arguments)
    except ValueError as error:
        refused.append(str(error))
json.dump([found, refused], sys.stdout)
"""


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("kernel_report")


def sass(*lines: str | tuple[str, ...]) -> str:
    """nvdisasm's layout: a label, an instruction, or a tuple of `file:line` from the inside out."""
    written = []
    for line in lines:
        if isinstance(line, tuple):
            chain = [place.rsplit(":", 1) for place in line]
            written += [f'\t//## File "{file}", line {number}' for file, number in chain]
        elif line.endswith(":"):
            written.append(line)
        else:
            written.append(f"        /*{len(written):04x}*/                   {line} ;")
    return "\n".join(written)


def test_code_is_parsed_without_its_padding(bench: ModuleType) -> None:
    code = bench.instructions.parse_sass(
        sass(
            ("a.py:3", "a.py:9"), "MOV R1, c[0x0][0x28]", "@!P0 FADD R0, R0, 1",
            ("a.py:4",), ".L_x_0:", "@P1 BRA `(.L_x_0)", "EXIT",
            ".L_x_1:", "BRA `(.L_x_1)", "NOP",
        )
    )  # fmt: skip
    assert [i.opcode for i in code] == ["MOV", "FADD", "BRA", "EXIT"]
    assert code[1].chain == (("a.py", 3), ("a.py", 9))
    assert code[2].chain == (("a.py", 4),)
    assert code[2].target == 2
    assert [loop.body for loop in bench.instructions.find_loops(code)] == [{2}]


def test_cold_code_behind_the_rest_is_no_loop(bench: ModuleType) -> None:
    code = bench.instructions.parse_sass(
        sass(
            ("a.py:1",), "@P0 BRA `(.L_x_1)", ".L_x_0:", "FADD R0, R0, 1", "EXIT",
            ".L_x_1:", "FMUL R0, R0, 2", "BRA `(.L_x_0)",
        )
    )  # fmt: skip
    assert bench.instructions.find_loops(code) == []


@pytest.mark.parametrize(
    ("opcode", "unit"),
    [
        ("FFMA", "fp32"), ("FSEL", "alu"), ("IMAD.WIDE.U32", "imad"), ("HADD2.F32", "half"),
        ("F2FP.PACK_AB", "alu"), ("F2F.F64.F32", "conversion64"), ("MUFU.RCP64H", "conversion"),
        ("LDG.E.U16", "lsu"), ("UIADD3", "uniform"), ("BRA", "other"),
    ],
)  # fmt: skip
def test_classes(bench: ModuleType, opcode: str, unit: str) -> None:
    assert bench.instructions.classify_sass(opcode) == unit


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assemblers come with Linux wheels")
def test_a_compiled_kernel_is_counted(tmp_path: Path, monkeypatch) -> None:
    """In a process of its own: this one may run Triton's interpreter."""
    (tmp_path / "tiny.py").write_text(KERNEL)
    folders = (tmp_path, ROOT / "bench", ROOT / "kernels", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # its binaries name our tiny.py
    run = run_python("-c", COMPILE)
    assert run.returncode == 0, run.stderr
    found, (unrolled, amd) = json.loads(run.stdout)
    one, more, average, taken, not_taken = map(Counter, found.values())
    # Ten turns more, of a load, 100 multiply-adds and an addition.
    assert [more[unit] - one[unit] for unit in ("lsu", "fp32")] == [10, 1010]
    assert 1020 <= more.total() - one.total() <= 1100
    # 40 loads and two stores: the rare store, its exponentials and its loop are left out, whereas
    # the shuffles of its condition are the lsu's too.
    assert 42 <= one["lsu"] <= 48
    assert average == more
    # A branch's weight holds for its body; without one it counts as taken.
    assert taken == one
    assert taken["lsu"] - not_taken["lsu"] == 1
    assert 1 <= taken.total() - not_taken.total() <= 10
    assert "was unrolled in part" in unrolled
    assert "only NVIDIA's" in amd


def test_check_lists_what_is_worse(bench: ModuleType) -> None:
    row = {
        "target": "sm_86", "dtype": "float16", "kernel": "k", "variant": "v",
        "registers": 40, "spills": 0, "instructions_per_output": 50.0, "bytes_per_output": 5.0,
    }  # fmt: skip
    assert bench.compare([row], [row]) == []
    assert bench.compare([{**row, "registers": 41}], [row]) == []  # within 3 %
    assert bench.compare([{**row, "spills": 4, "registers": 30}], [row]) == [
        "better: sm_86 float16 v k: registers 40 -> 30",
        "worse: sm_86 float16 v k: spills 0 -> 4",
    ]
    # One side not counted.
    uncounted = {**row, "instructions_per_output": None}
    change = "sm_86 float16 v k: instructions_per_output"
    assert bench.compare([uncounted], [row]) == [f"worse: {change} 50.0 -> None"]
    assert bench.compare([row], [uncounted]) == [f"better: {change} None -> 50.0"]
    assert bench.compare([uncounted], [uncounted]) == []
    # A report of some targets and windows says nothing of the others.
    others = [{**row, "target": "sm_90"}, {**row, "variant": "w"}]
    assert bench.compare([{**row, "kernel": "l"}], [row, *others]) == [
        "better: sm_86 float16 v l: new",
        "worse: sm_86 float16 v k: gone",
    ]


def test_a_kernel_takes_as_long_as_its_busiest_resource(bench: ModuleType) -> None:
    card = bench.model.DEVICES["sm_86"]
    free = bench.model.LAUNCH_SECONDS
    moved = 0.9 * card.bandwidth  # in one second
    cycle = card.multiprocessors * card.clock
    assert bench.model.kernel_time(card, {"alu": 1}, moved) == (1 + free, "memory")
    assert bench.model.kernel_time(card, {"alu": 128 * cycle}, moved) == (2 + free, "alu")
    fp32 = {"fp32": 64 * cycle, "uniform": 192 * cycle}
    assert bench.model.kernel_time(card, fp32, moved) == (2 + free, "issue")


def test_bytes_of_the_baselines(bench: ModuleType) -> None:
    moved = bench.model.bytes_moved
    assert moved("max", "training", 2) == 42
    assert moved("max_compiled", "training", 2) == 18
    steps = ("forward", "backward", "training", "evaluation")
    assert [moved("stochastic", step, 2) for step in steps] == [5, 5, 10, 4]
    assert moved("stochastic", "evaluation", 4, inputs=4) == 20
