"""Say what this machine has, and whether the operator works on it at all, within seconds.

    python bench/smoke.py [--device cuda|cpu] [--conditions] [--case float16-contiguous]

The four functions of the device's backend are held against the reference on planes of CNN_SP, each
dtype and memory format in a process of its own: they compile side by side, and a fault that breaks
one process leaves the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from stochastic_pooling import ops, reference, stochastic_pool2d
from stochastic_pooling.window import Window

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [f"{dtype}-{layout}" for dtype in ("float16", "float32") for layout in LAYOUTS]
WINDOW = Window(3, 3, 1, 1, 1, 1, 1, 1, False)
SHAPES = {"cuda": (8, 40, 86, 86), "cpu": (1, 6, 20, 22)}

# Of results that are rounded to the dtype once; gradients add up terms that may cancel.
RTOL = {torch.float16: 2.0**-10, torch.float32: 1e-5}
ATOL, GRADIENT_ATOL, BIAS_ATOL = 1e-6, 1e-4, 1e-2

PACKAGES = (
    "torch", "triton", "numpy", "numba", "torchvision", "tensorboard", "matplotlib", "pillow",
    "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "timm", "onnx",
)  # fmt: skip
GPU_QUERY = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,"
    "clocks.max.mem,power.draw,power.limit,temperature.gpu,mig.mode.current"
)


def conditions(device: str) -> Iterator[str]:
    """What the results of this machine depend on, a line each."""
    yield f"commit: {_told('git', '-C', str(ROOT), 'describe', '--always', '--dirty')}"
    yield f"Python: {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield f"torch: {torch.__version__}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    versions = {name: _version(name) for name in PACKAGES}
    yield "packages: " + ", ".join(f"{name} {v}" for name, v in versions.items() if v)
    yield "missing: " + (", ".join(name for name, v in versions.items() if not v) or "nothing")
    tools = ("ncu", "compute-sanitizer", "nvcc", "gcc")
    yield "tools: " + (", ".join(name for name in tools if shutil.which(name)) or "none")
    if device != "cuda":
        return
    card = torch.cuda.get_device_properties(0)
    yield (
        f"card: {card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} "
        f"multiprocessors, {card.total_memory / 1e9:.1f} GB, cuDNN "
        f"{torch.backends.cudnn.version()}"
    )
    names = GPU_QUERY.split(",")
    values = _told("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader", "--id=0")
    if values == "unknown":
        yield "nvidia-smi: does not answer"
        return
    for name, value in zip(names, values.split(","), strict=False):
        yield f"{name}: {value.strip()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _told(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip().split("\n")[0] or "unknown"


def check(case: str, device: str) -> list[str]:
    """Each of the four functions on `device` against the reference there; what differs."""
    name, layout = case.split("-")
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    x = torch.randn(SHAPES[device], device=device).to(dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    bias = torch.randn(x.shape[1], device=device) / 2
    seed = torch.tensor(-(2**62) + 12345, device=device)
    size = x.shape[2:]
    backend = ops.backend_for(x.device)
    faults: list[str] = []

    def compare(what: str, got: torch.Tensor, expected: torch.Tensor, atol: float = ATOL) -> None:
        try:
            exact = not expected.is_floating_point() or what == "sample: output"
            rtol, atol = (0.0, 0.0) if exact else (RTOL.get(expected.dtype, 1e-4), atol)
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
        except AssertionError as error:
            faults.append(f"{case} {what}: {' '.join(str(error).split())}")

    expected, expected_code = reference.sample(x, bias, seed, WINDOW)
    output, code = backend.sample(x, bias, seed, WINDOW)
    compare("sample: drawn cells", code, expected_code)
    compare("sample: output", output, expected)
    grad = torch.randn_like(expected)
    results = backend.sample_backward(grad, expected_code, size, WINDOW, True)
    references = reference.sample_backward(grad, expected_code, size, WINDOW, True)
    compare("sample_backward: input", results[0], references[0], GRADIENT_ATOL)
    compare("sample_backward: bias", results[1], references[1], BIAS_ATOL)
    mean = backend.expectation(x, bias, WINDOW)
    compare("expectation", mean, reference.expectation(x, bias, WINDOW))
    results = backend.expectation_backward(grad, x, bias, WINDOW, True)
    references = reference.expectation_backward(grad, x, bias, WINDOW, True)
    compare("expectation_backward: input", results[0], references[0], GRADIENT_ATOL)
    compare("expectation_backward: bias", results[1], references[1], BIAS_ATOL)
    for tensor in (output, code, mean, results[0]):
        if not tensor.is_contiguous(memory_format=LAYOUTS[layout]):
            faults.append(f"{case}: a result is not {layout}")

    # As users call it: from the device's own random numbers, and back to the parameters.
    leaf, parameter = x.clone().requires_grad_(), bias.clone().requires_grad_()
    torch.manual_seed(1)
    first = stochastic_pool2d(leaf, 3, 1, 1, bias=parameter)
    other = stochastic_pool2d(leaf, 3, 1, 1, bias=parameter)
    torch.manual_seed(1)
    again = stochastic_pool2d(leaf, 3, 1, 1, bias=parameter)
    if not torch.equal(first, again) or torch.equal(first, other):
        faults.append(f"{case}: a seed does not draw the same, or two calls do")
    first.float().sum().backward()
    live = (first > 0).sum((0, 2, 3)).float()
    compare("bias gradient of a sum", parameter.grad, live)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SHAPES), default="cuda")
    parser.add_argument("--conditions", action="store_true", help="print those and check nothing")
    parser.add_argument("--case", choices=CASES, help="one case, in this process")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA here; --device cpu runs the same parts, small")
        return 1
    if arguments.conditions:
        for line in conditions(device):
            print(line, flush=True)
        return 0
    if arguments.case:
        # A sanitizer then sees every allocation, not PyTorch's large ones alone.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        faults = check(arguments.case, device)
        print(*faults, f"{arguments.case}: {len(faults)} faults", sep="\n")
        return 1 if faults else 0
    bad = 0
    cases = CASES if device == "cuda" else CASES[-1:]  # compiled for a CPU, each takes long
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = min(len(cases), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {case: pool.submit(check, case, device) for case in cases}
        for case, future in futures.items():
            try:
                faults = future.result()
            except Exception as error:  # a process that died, too, is a fault of that case
                faults = [f"{case}: {type(error).__name__}: {error}"]
            print(
                *faults, f"{case}: {'FAULTY' if faults else 'agrees with the reference'}", sep="\n"
            )
            sys.stdout.flush()
            bad += bool(faults)
    print(f"{len(cases) - bad} of {len(cases)} cases agree with the reference")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
