"""Compile every kernel variant for GPUs that need not be there, and report what each one costs.

    python bench/kernel_report.py [--target sm_86 ...] [--dtype float16 ...] [--json FILE]

The operator's own launchers run on CPU tensors that are never read, with a stand-in for Triton's
driver that names the target, so what is compiled is what a GPU of that kind would get. Registers
and spills are the assembler's own figures: `cuobjdump --dump-resource-usage` for NVIDIA, the
metadata of the code object for AMD.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stochastic_pooling import triton_kernels
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
    "2x2 s2": Window(2, 2, 2, 2, 0, 0, 1, 1, False),
    "7x5 s3x2 p2 d2": Window(7, 5, 3, 2, 2, 2, 2, 2, True),
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


def compiled(launch: Callable[[], Any], target: GPUTarget) -> list[Any]:
    """The kernels that `launch` would run on a GPU of the kind `target`, compiled."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **{**kwargs, "warmup": True}))
        return kernels[-1]

    triton.runtime.driver.set_active(_AbsentGpu(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        launch()
    return kernels


def launches(dtypes: list[torch.dtype]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(variant, dtype, launch) for every combination that compiles to code of its own."""
    for dtype in dtypes:
        for layout, memory_format in LAYOUTS.items():
            for shape, window in WINDOWS.items():
                x = torch.empty(2, 40, 86, 86, dtype=dtype, memory_format=memory_format)
                y = torch.empty(
                    2, 40, *window.output_size(86, 86), dtype=dtype, memory_format=memory_format
                )
                code = torch.empty_like(y, dtype=window.code_dtype)
                bias, seed = torch.empty(40), torch.empty((), dtype=torch.int64)
                calls: dict[str, tuple[Any, ...]] = {
                    "sample": (x, bias, seed, window),
                    "sample_backward": (y, code, 86, 86, window, True),
                    "expectation": (x, bias, window),
                    "expectation_backward": (y, x, bias, window, True),
                }
                for call, arguments in calls.items():
                    function = getattr(triton_kernels, call)
                    yield (
                        f"{call} {shape} {layout}",
                        str(dtype).removeprefix("torch."),
                        lambda function=function, arguments=arguments: function(*arguments),
                    )


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, bytes spilled per thread and shared memory per block."""
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
        "spills": 4 * (metadata("vgpr_spill_count") + metadata("sgpr_spill_count")),
        "shared_bytes": metadata("group_segment_fixed_size"),
    }


def report(targets: list[str], dtypes: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each kernel, variant, dtype and target."""
    for target in targets:
        for variant, dtype, launch in launches([DTYPES[name] for name in dtypes]):
            for kernel in compiled(launch, TARGETS[target]):
                yield {
                    "kernel": kernel.metadata.name.strip("_"),
                    "variant": variant,
                    "dtype": dtype,
                    "target": target,
                    **resources(kernel),
                }


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: unset it, the interpreter compiles nothing")
    rows = []
    for row in report(arguments.target, arguments.dtype):
        rows.append(row)
        print(
            f"{row['target']:7} {row['dtype']:9} {row['kernel']:20} {row['variant']:52}"
            f" {row['registers']:4} registers {row['spills']:4} spilled"
            f" {row['shared_bytes']:6} shared",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    spilling = sum(row["spills"] > 0 for row in rows)
    print(f"{len(rows)} kernels compiled, {spilling} spill registers")
    sys.exit(1 if spilling else 0)


if __name__ == "__main__":
    main()
