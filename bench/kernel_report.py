"""Compile every kernel variant for GPUs that need not be there, and report what each one costs.

    python bench/kernel_report.py [--target sm_86 ...] [--dtype float16 ...]
                                  [--window "3x3 s1 p1" ...] [--json FILE] [--check FILE]

The operator's own launchers run on CPU tensors that are never read, with a stand-in for Triton's
driver that names the target, so what is compiled is what a GPU of that kind would get. Registers
and spills are the assembler's own figures: `cuobjdump --dump-resource-usage` for NVIDIA, the
metadata of the code object for AMD. Instructions are counted in NVIDIA's machine code,
instructions.py says how; the time is modelled, model.py says how. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import instructions
import model
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stochastic_pooling.gpu import launch as backend
from stochastic_pooling.window import Window

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 86, 89, 90, 100, 120)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
DTYPES = {n: getattr(torch, n) for n in ("float16", "bfloat16", "float32", "float64")}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CNN_SP = "3x3 s1 p1"
WINDOWS = {
    CNN_SP: Window(3, 3, 1, 1, 1, 1, 1, 1, False),
    "3x3 s2 p1": Window(3, 3, 2, 2, 1, 1, 1, 1, False),
    "2x2 s2": Window(2, 2, 2, 2, 0, 0, 1, 1, False),
    "5x5 s1 p2": Window(5, 5, 1, 1, 2, 2, 1, 1, False),
    "7x5 s3x2 p2 d2": Window(7, 5, 3, 2, 2, 2, 2, 2, True),
}
# The input that the kernels are compiled and counted for.
SHAPE = (256, 40, 86, 86)

# The figures that --check guards, all of them better when smaller, and by how much they may grow.
CHECKED = ("registers", "spills", "instructions_per_output", "bytes_per_output")
TOLERANCE = 0.03


class Case(NamedTuple):
    """A call of the operator that compiles to code of its own."""

    call: str
    variant: str
    dtype: str
    launch: functools.partial[Any]
    outputs: int


def cases(dtypes: list[str], windows: list[str], device: str = "cpu") -> Iterator[Case]:
    """Every combination of call, window, layout and dtype."""
    batch, channels, height, width = SHAPE
    for dtype, (layout, form), shape in itertools.product(dtypes, LAYOUTS.items(), windows):
        window = WINDOWS[shape]
        like = {"dtype": DTYPES[dtype], "memory_format": form, "device": device}
        # Gigabytes, but on a CPU of pages that nobody touches.
        x = torch.empty(*SHAPE, **like)
        y = torch.empty(batch, channels, *window.output_size(height, width), **like)
        code = torch.empty_like(y, dtype=window.code_dtype)
        bias = torch.empty(channels, device=device)
        seed = torch.empty((), dtype=torch.int64, device=device)
        calls: dict[str, tuple[Any, ...]] = {
            "sample": (x, bias, seed, window),
            "sample_backward": (y, code, (height, width), window, True),
            "expectation": (x, bias, window),
            "expectation_backward": (y, x, bias, window, True),
        }
        for call, arguments in calls.items():
            launch = functools.partial(getattr(backend, call), *arguments)
            yield Case(call, f"{call} {shape} {layout}", dtype, launch, y.numel())


# ---------------------------------------------------------------- compiling


class _AbsentGpu:
    """The part of a Triton driver that a compilation asks."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: target  # a key of the caches: one for each target
        self.get_current_stream = lambda device: 0


class Launch(NamedTuple):
    """A kernel that was compiled instead of run, and what it would have been run with.

    Simulators of a GPU make these, too, and choose cases by their call: they know the fields.
    """

    kernel: Any
    arguments: dict[str, Any]
    programs: int
    warp_size: int

    @property
    def name(self) -> str:
        return str(self.kernel.metadata.name.strip("_"))

    def instructions(self) -> collections.Counter[str]:
        """Those that all threads of all programs execute, by class."""
        threads = self.programs * self.kernel.metadata.num_warps * self.warp_size
        known = averages(self.name, self.arguments)
        per_thread = instructions.count(self.kernel, self.arguments, known)
        return collections.Counter({unit: threads * n for unit, n in per_thread.items()})

    def bytes(self) -> int:
        """Those of the tensors it was given: what it moves if it reads or writes each just once,
        which is what it does where the caches hold the overlap of the windows."""
        tensors = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def compiled(launch: Callable[[], Any], target: GPUTarget) -> list[Launch]:
    """The kernels that `launch` would run on a GPU of the kind `target`, compiled."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        given = kwargs | dict(zip(self.arg_names, args, strict=False))
        arguments = {name: value for name, value in given.items() if name in self.arg_names}
        grid = kwargs["grid"]
        programs = math.prod(grid(arguments) if callable(grid) else grid)
        kernels.append(Launch(kernel, arguments, programs, target.warp_size))
        return kernel

    triton.runtime.driver.set_active(_AbsentGpu(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        launch()
    return kernels


def averages(kernel: str, arguments: dict[str, Any]) -> dict[str, float]:
    """What a launch does on average where its arguments do not say: how often a loop turns, by the
    text of its range's arguments, and how often a branch is taken, by the text of its condition."""
    rare = {"any_unusual > 0": 0.0, "tl.max(overflow.to(tl.int32)) > 0": 0.0}
    if "strip_rows" not in arguments:
        return rare
    # A sliding kernel: the last strip of a plane is shorter, and its last rows are edge rows. The
    # gradient's strips begin with an edge row, and with some of the strip before.
    size, inner = arguments["strip_rows"], arguments["inner_rows"]
    start, stop = arguments.get("start_row", 0), arguments.get("stop_row", arguments["out_height"])
    ahead = int(kernel == "gradient_sliding_kernel")
    strips = [(first + ahead, min(first + size, stop)) for first in range(start, stop, size)]
    group = int(arguments["v"].rows)
    kernel_h, stride_h = int(arguments["v"].kernel_h), int(arguments["v"].stride_h)
    prior = (kernel_h - 1) // stride_h
    groups = [max(min(last, inner) - first, 0) // group for first, last in strips]
    edges = [last - first - group * n for (first, last), n in zip(strips, groups, strict=True)]
    again = [(rows + 3) // 4 for rows in edges]
    return rare | {
        # Where they are loops, in which the first rows are read: of large windows.
        "top, top + KEPT": kernel_h - stride_h,
        "top, top + v.kernel_h - v.stride_h": kernel_h - stride_h,
        "first_row - (v.kernel_h - 1) // v.stride_h, first_row": prior,
        # The gradient's are in a loop that turns twice.
        "groups": sum(groups) / len(strips) / (1 + ahead),
        "edge_row, end_row": sum(edges) / len(strips),
        "begin, end": (sum(edges) / len(strips) + prior + ahead) / 2,
        # Rare, which not every Triton's line numbers tell: a strip again.
        "end_row - first_row": 0,
        "first_row - (v.kernel_h - 1) // v.stride_h, end_row": 0,
        "v.folded | (out_row % 4 == 0)": sum(again) / max(sum(edges), 1),
    }


# ---------------------------------------------------------------- the report


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, bytes of memory that a thread spills to, and shared memory per block.

    Scalar registers that AMD's compiler keeps in lanes of a vector register touch no memory.
    """
    if "cubin" in kernel.asm:
        told = instructions.cuda_tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage")
        registers, spilled, shared = "REG", ("STACK", "LOCAL"), "SHARED"
    else:
        told, registers = kernel.asm["amdgcn"], "vgpr_count"
        spilled, shared = ("private_segment_fixed_size",), "group_segment_fixed_size"
    found = {name: int(number) for name, number in re.findall(r"(\w+):\s*(\d+)", told)}
    spills = sum(found[name] for name in spilled)
    return {"registers": found[registers], "spills": spills, "shared_bytes": found[shared]}


def report(targets: list[str], dtypes: list[str], windows: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each kernel, variant, dtype and target. What is per output is per output of the
    pooling, in a backward too. There is no time where model.py has no device for the target, and
    no instructions either where they cannot be counted."""
    for target, case in ((target, case) for target in targets for case in cases(dtypes, windows)):
        for launch in compiled(case.launch, TARGETS[target]):
            row = {
                "kernel": launch.name,
                "variant": case.variant,
                "dtype": case.dtype,
                "target": target,
                **resources(launch.kernel),
                "instructions_per_output": None,
                "bytes_per_output": round(launch.bytes() / case.outputs, 2),
                "modelled_us": None,
                "limit": None,
            }
            try:
                executed = launch.instructions()
                row["instructions_per_output"] = round(executed.total() / case.outputs, 2)
                if device := model.DEVICES.get(target):
                    seconds, row["limit"] = model.kernel_time(device, executed, launch.bytes())
                    row["modelled_us"] = round(1e6 * seconds, 1)
            except ValueError as error:
                print(f"{target}: {launch.name} not counted: {error}", file=sys.stderr)
            yield row


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Forward and backward of CNN_SP's window in training, against max pooling's, where there is a
    device to model."""
    ours: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for row in rows:
        if row["limit"] and re.match(f"sample(_backward)? {CNN_SP}", row["variant"]):
            ours[row["target"], row["dtype"], row["variant"].split()[-1]] += row["modelled_us"]
    for (target, dtype, layout), microseconds in ours.items():
        device = model.DEVICES[target]
        size, outputs = DTYPES[dtype].itemsize, math.prod(SHAPE)  # the window keeps planes' sizes
        eager, inductor = (
            1e3 * model.memory_time(device, outputs * model.bytes_moved(pool, "training", size))
            for pool in ("max", "max_compiled")
        )
        yield (
            f"{device.name}, {dtype}, {layout}: training {microseconds / 1e3:.2f} ms modelled, "
            f"bias + ReLU + max pooling {eager:.2f} eager, {inductor:.2f} by Inductor"
        )


def compare(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """What is better than before or new, then what is worse, of the variants, dtypes and targets
    that `rows` has. What was counted before and is not now, is worse."""
    names = ("target", "dtype", "variant", "kernel")
    now, then = ({tuple(row[n] for n in names): row for row in found} for found in (rows, before))
    compiled = {key[:3] for key in now}
    gone = [key for key in then.keys() - now.keys() if key[:3] in compiled]
    changes = [f"better: {' '.join(key)}: new" for key in now.keys() - then.keys()]
    changes += [f"worse: {' '.join(key)}: gone" for key in gone]
    for key, name in itertools.product(now.keys() & then.keys(), CHECKED):
        old, new = (math.inf if row[key][name] is None else row[key][name] for row in (then, now))
        change = f"{' '.join(key)}: {name} {then[key][name]} -> {now[key][name]}"
        if new > old * (1 + TOLERANCE):
            changes.append(f"worse: {change}")
        elif new < old:
            changes.append(f"better: {change}")
    return sorted(changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, choices in (("--target", TARGETS), ("--dtype", DTYPES), ("--window", WINDOWS)):
        parser.add_argument(option, nargs="+", action="extend", choices=choices)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail if a row has got worse")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: unset it, the interpreter compiles nothing")
    before = json.loads(arguments.check.read_text()) if arguments.check else []
    rows = []
    targets, dtypes = arguments.target or list(TARGETS), arguments.dtype or list(DTYPES)
    for row in report(targets, dtypes, arguments.window or list(WINDOWS)):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    spilling = sum(row["spills"] > 0 for row in rows)
    changes = compare(rows, before) if arguments.check else []
    total = f"{len(rows)} kernels compiled, {spilling} spill registers"
    print(*summary(rows), total, *changes, sep="\n")
    sys.exit(1 if spilling or any(change.startswith("worse") for change in changes) else 0)


if __name__ == "__main__":
    main()
