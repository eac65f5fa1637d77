"""Compile every kernel variant for GPUs that need not be there, and report what each one costs.

    python bench/kernel_report.py [--target sm_86 ...] [--dtype float16 ...]
                                  [--window "3x3 s1 p1" ...] [--json FILE] [--check FILE]

The operator's own launchers run on CPU tensors that are never read, with a stand-in for Triton's
driver that names the target, so what is compiled is what a GPU of that kind would get. Registers
and spills are the assembler's own figures: `cuobjdump --dump-resource-usage` for NVIDIA, the
metadata of the code object for AMD. Instructions are counted in the machine code, instructions.py
says how; the time is modelled, model.py says how. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import instructions
import model
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stochastic_pooling.gpu import launch as backend
from stochastic_pooling.window import Window

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WINDOWS = {
    "3x3 s1 p1": Window(3, 3, 1, 1, 1, 1, 1, 1, False),
    "3x3 s2 p1": Window(3, 3, 2, 2, 1, 1, 1, 1, False),
    "2x2 s2": Window(2, 2, 2, 2, 0, 0, 1, 1, False),
    "7x5 s3x2 p2 d2": Window(7, 5, 3, 2, 2, 2, 2, 2, True),
}


# The input that the kernels are compiled and counted for.
SHAPE = (256, 40, 86, 86)

# The figures that --check guards, all of them better when smaller, and by how much they may grow.
CHECKED = ("registers", "spills", "instructions_per_output", "bytes_per_output")
TOLERANCE = 0.03


def averages(kernel: str, arguments: dict[str, Any]) -> dict[str, float]:
    """What a launch does on average where its arguments do not say: how often a loop turns, by the
    text of its range's arguments, and how often a branch is taken, by the text of its condition."""
    if "strip_rows" not in arguments:
        return {}
    # A sliding kernel: the last strip of a plane is shorter, and its last rows are edge rows.
    size, inner = arguments["strip_rows"], arguments["inner_rows"]
    start, stop = arguments.get("start_row", 0), arguments.get("stop_row", arguments["out_height"])
    strips = [(first, min(first + size, stop)) for first in range(start, stop, size)]

    def average(groups: list[int]) -> float:
        return sum(groups) / len(strips)

    group = int(arguments["v"].rows)
    # The gradient's strips begin with an edge row, and with some of the strip before.
    ahead = int(kernel == "gradient_sliding_kernel")
    prior = (arguments["v"].kernel_h - 1) // arguments["v"].stride_h
    groups = [max(min(last, inner) - first - ahead, 0) // group for first, last in strips]
    edges = [
        last - first - ahead - group * n for (first, last), n in zip(strips, groups, strict=True)
    ]
    again = [max(rows - 1, 0) // group for rows in edges]
    return {
        "groups": average(groups),
        "end_row - edge_row": average(edges),
        "edge_row, end_row": average(edges),
        "prior_row, inner_row": int(prior) + ahead,
        # Rare, which not every Triton's line numbers tell: a strip again.
        "end_row - first_row": 0,
        "first_row - (v.kernel_h - 1) // v.stride_h, end_row": 0,
        "FIRST, FIRST + COLUMNS": 0,
        "(edge > 0) & (out_row % 4 == 0)": sum(again) / max(sum(edges), 1),
    }


class _AbsentGpu:
    """The part of a Triton driver that a compilation asks."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # a key of the compiler's caches: one for each target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """A kernel that was compiled instead of run, and what it would have been run with."""

    kernel: Any
    arguments: dict[str, Any]
    programs: int
    warp_size: int

    @property
    def name(self) -> str:
        return self.kernel.metadata.name.strip("_")

    def instructions(self) -> Counter[str]:
        """Those that all threads of all programs execute, by class."""
        threads = self.programs * self.kernel.metadata.num_warps * self.warp_size
        known = averages(self.name, self.arguments)
        per_thread = instructions.count(self.kernel, self.arguments, known)
        return Counter({unit: threads * n for unit, n in per_thread.items()})

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
        named = {name: value for name, value in kwargs.items() if name in self.arg_names}
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **named}
        grid = kwargs["grid"]
        programs = math.prod(grid(arguments) if callable(grid) else grid)
        kernels.append(Launch(kernel, arguments, programs, target.warp_size))
        return kernel

    triton.runtime.driver.set_active(_AbsentGpu(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        launch()
    return kernels


@dataclass(frozen=True)
class Case:
    """A call of the operator that compiles to code of its own."""

    call: str
    shape: str
    layout: str
    dtype: str
    launch: Callable[[], Any]
    itemsize: int
    inputs: int
    outputs: int

    @property
    def variant(self) -> str:
        return f"{self.call} {self.shape} {self.layout}"

    def baselines(self) -> tuple[model.Traffic, model.Traffic]:
        """What max pooling moves for it, eager and through Inductor."""
        of = (self.itemsize, self.inputs / self.outputs)
        if self.call.endswith("_backward"):
            return model.eager_backward(*of), model.inductor_backward(*of)
        training = self.call == "sample"
        return model.eager_forward(*of), model.inductor_forward(*of, training=training)


def cases(dtypes: list[str], windows: list[str]) -> Iterator[Case]:
    """Every combination of call, window, layout and dtype."""
    for dtype in dtypes:
        for layout, memory_format in LAYOUTS.items():
            for shape in windows:
                window = WINDOWS[shape]
                like = {"dtype": DTYPES[dtype], "memory_format": memory_format}
                batch, channels, height, width = SHAPE
                # Gigabytes, but of pages that nobody touches.
                x = torch.empty(*SHAPE, **like)
                y = torch.empty(batch, channels, *window.output_size(height, width), **like)
                code = torch.empty_like(y, dtype=window.code_dtype)
                bias, seed = torch.empty(channels), torch.empty((), dtype=torch.int64)
                calls: dict[str, tuple[Any, ...]] = {
                    "sample": (x, bias, seed, window),
                    "sample_backward": (y, code, (height, width), window, True),
                    "expectation": (x, bias, window),
                    "expectation_backward": (y, x, bias, window, True),
                }
                for call, arguments in calls.items():
                    launch = functools.partial(getattr(backend, call), *arguments)
                    size = x.element_size()
                    yield Case(call, shape, layout, dtype, launch, size, x.numel(), y.numel())


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, bytes of memory that a thread spills to, and shared memory per block.

    Scalar registers that AMD's compiler keeps in lanes of a vector register touch no memory.
    """
    if "cubin" in kernel.asm:
        text = _cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
        usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
        spills = usage["STACK"] + usage["LOCAL"]
        return {"registers": usage["REG"], "spills": spills, "shared_bytes": usage["SHARED"]}
    text = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the AMD code object does not state {name}")
        return int(found[1])

    return {
        "registers": metadata("vgpr_count"),
        "spills": metadata("private_segment_fixed_size"),
        "shared_bytes": metadata("group_segment_fixed_size"),
    }


def report(targets: list[str], dtypes: list[str], windows: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each kernel, variant, dtype and target. What is per output is per output of the
    pooling, in a backward too; the baselines are those of the whole call."""
    for target in targets:
        for case in cases(dtypes, windows):
            eager, inductor = case.baselines()
            for launch in compiled(case.launch, TARGETS[target]):
                yield {
                    "kernel": launch.name,
                    "variant": case.variant,
                    "dtype": case.dtype,
                    "target": target,
                    **resources(launch.kernel),
                    **costs(launch, target, case.outputs),
                    "eager_max_pool_bytes": round(eager.bytes, 2),
                    "inductor_bytes": round(inductor.bytes, 2),
                }


def costs(launch: Launch, target: str, outputs: int) -> dict[str, Any]:
    """Instructions and bytes per output, and the modelled time and what it is spent on; no time
    where model.py has no device for the target, and no instructions either where a compiler left
    loops that instructions.py cannot count."""
    moved = launch.bytes()
    row = {
        "instructions_per_output": None,
        "bytes_per_output": round(moved / outputs, 2),
        "modelled_us": None,
        "limit": None,
    }
    try:
        executed = launch.instructions()
    except ValueError as error:
        print(f"{target}: not counted: {error}", file=sys.stderr)
        return row
    row["instructions_per_output"] = round(sum(executed.values()) / outputs, 2)
    if target in model.DEVICES:
        seconds, limit = model.kernel_time(model.DEVICES[target], executed, moved)
        row.update(modelled_us=round(1e6 * seconds, 1), limit=limit)
    return row


def summary(rows: list[dict[str, Any]], target: str, shape: str) -> Iterator[str]:
    """A training step's forward and backward on the target's device, against max pooling's."""
    device = model.DEVICES[target]
    batch, channels, height, width = SHAPE
    out_height, out_width = WINDOWS[shape].output_size(height, width)
    outputs = batch * channels * out_height * out_width
    inputs = batch * channels * height * width / outputs
    yield f"{shape} of {SHAPE} on {device.name}, modelled: forward + backward in ms"
    yield f"{'dtype':9} {'layout':14} {'ours':>7} {'its bytes':>10} {'eager':>7} {'Inductor':>9}"
    for dtype in DTYPES:
        size = DTYPES[dtype].itemsize
        others = (
            model.stochastic_forward(size, inputs) + model.stochastic_backward(size, inputs),
            model.eager_forward(size, inputs) + model.eager_backward(size, inputs),
            model.inductor_forward(size, inputs) + model.inductor_backward(size, inputs),
        )
        for layout in LAYOUTS:
            step = {f"sample {shape} {layout}", f"sample_backward {shape} {layout}"}
            ours = [
                row["modelled_us"]
                for row in rows
                if (row["target"], row["dtype"]) == (target, dtype) and row["variant"] in step
            ]
            if ours and None not in ours:
                floor, eager, inductor = (1e3 * t.time(device, outputs) for t in others)
                yield (
                    f"{dtype:9} {layout:14} {sum(ours) / 1e3:7.2f} {floor:10.2f}"
                    f" {eager:7.2f} {inductor:9.2f}"
                )


def compare(
    rows: list[dict[str, Any]], before: list[dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """What is worse than before and what is better or new, of the variants, dtypes and targets that
    `rows` has."""

    def by_name(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
        names = ("target", "dtype", "kernel", "variant")
        return {tuple(row[name] for name in names): row for row in rows}

    now, then = by_name(rows), by_name(before)
    compiled = {(target, dtype, variant) for target, dtype, _, variant in now}
    worse = [
        f"{' '.join(key)}: gone"
        for key in then
        if (*key[:2], key[3]) in compiled and key not in now
    ]
    better = [f"{' '.join(key)}: new" for key in now if key not in then]
    for key in now.keys() & then.keys():
        for name in CHECKED:
            new, old = now[key][name], then[key][name]
            change = f"{' '.join(key)}: {name} {old} -> {new}"
            if new is None or old is None:  # not counted
                continue
            if new > old * (1 + TOLERANCE):
                worse.append(change)
            elif new < old:
                better.append(change)
    return sorted(worse), sorted(better)


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run(
            [tool, option, str(path)], check=True, capture_output=True, text=True
        ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--window", nargs="+", choices=WINDOWS, default=list(WINDOWS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="fail if a row is worse than in FILE"
    )
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: unset it, the interpreter compiles nothing")
    before = json.loads(arguments.check.read_text()) if arguments.check else None
    for target in arguments.target:
        device = model.DEVICES.get(target)
        print(f"{target}: {'time modelled on ' + device.name if device else 'no device modelled'}")
    rows = []
    for row in report(arguments.target, arguments.dtype, arguments.window):
        rows.append(row)
        print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    if "sm_86" in arguments.target and "3x3 s1 p1" in arguments.window:
        print(*summary(rows, "sm_86", "3x3 s1 p1"), sep="\n")
    spilling = sum(row["spills"] > 0 for row in rows)
    print(f"{len(rows)} kernels compiled, {spilling} spill registers")
    worse: list[str] = []
    if before is not None:
        worse, better = compare(rows, before)
        print(*(f"better: {change}" for change in better), sep="\n")
        print(*(f"WORSE: {change}" for change in worse), sep="\n")
    sys.exit(1 if spilling or worse else 0)


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    time = f"{row['modelled_us']:9.1f} us ({row['limit']})" if row["limit"] else ""
    instructions = row["instructions_per_output"]
    counted = "uncounted" if instructions is None else f"{instructions:8.1f}"
    return (
        f"{row['target']:7} {row['dtype']:9} {row['kernel']:20} {row['variant']:52}"
        f" {row['registers']:4} registers {row['spills']:4} spilled"
        f" {row['shared_bytes']:6} shared {counted} instructions"
        f" {row['bytes_per_output']:6.1f} bytes {time}"
    )


if __name__ == "__main__":
    main()
