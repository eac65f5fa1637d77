"""A roofline model of a kernel's time on GPUs that are not there, and what the alternatives move.

A kernel takes as long as the busiest of: the memory, which moves its bytes; the warp schedulers,
which issue its instructions; each pipe, which executes its share of them. Nothing is assumed to
overlap badly, and no latency is left exposed: the time is a lower bound but for the instructions,
which are counted from above.

Sources of the constants. None was measured here, and of the documents only the forum note was at
hand to check against:

- lanes: the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ programming guide,
  in results per clock and multiprocessor, of which an instruction in half precision has two.
- which pipe executes what: the Nsight Compute profiling guide, and NVIDIA's note on the pipes at
  https://forums.developer.nvidia.com/t/separate-cuda-core-pipeline-for-fp16-and-fp32/302018/7:
  there are a heavy half (fp32, IMAD) and a light half (fp32), and a half precision instruction
  occupies both. F2FP runs on the alu.
- 32 loads or stores per clock and multiprocessor; four schedulers that issue a warp each per clock.
- multiprocessors, clocks and bandwidths: NVIDIA's data sheets and architecture white papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# Threads' instructions that the four warp schedulers of a multiprocessor issue per clock.
ISSUED = 4 * 32
# Copies reach about 90 % of the bandwidth on the data sheet; an assumption, not a measurement.
ACHIEVABLE_BANDWIDTH = 0.9
# What a kernel costs beside its work, between its neighbours in a stream. Also an assumption.
LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Device:
    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second, on the data sheet
    pipes: Mapping[str, Mapping[str, int]]


# For each pipe how many threads' instructions of a class (see instructions.py) it executes
# per clock and multiprocessor, if it does nothing else. Classes that no pipe lists (uniform, other)
# count to the issue alone.
_COMMON = {"alu": {"alu": 64}, "conversion": {"conversion": 16}, "lsu": {"lsu": 32}}
_PIPES_86 = _COMMON | {
    "fma": {"fp32": 128, "imad": 128, "half": 64},
    "imad": {"imad": 64, "half": 64},
    "fp64": {"fp64": 2, "conversion64": 2},
}
_PIPES_90 = _COMMON | {
    "fma": {"fp32": 128, "imad": 128, "half": 128},
    "imad": {"imad": 64, "half": 128},
    "fp64": {"fp64": 64, "conversion64": 16},
}

# The device that stands for a target of kernel_report.py; the others have none.
DEVICES = {
    # The laptop card boosts to between 1.283 and 1.703 GHz, depending on its power limit.
    "sm_86": Device("RTX 3060 Laptop", 30, 1.5e9, 336e9, _PIPES_86),
    "sm_90": Device("H100 SXM", 132, 1.7e9, 3350e9, _PIPES_90),
}


def memory_time(device: Device, moved: float) -> float:
    """Seconds for so many bytes."""
    return moved / (device.bandwidth * ACHIEVABLE_BANDWIDTH)


def kernel_time(
    device: Device, instructions: Mapping[str, float], moved: float
) -> tuple[float, str]:
    """Seconds that a kernel takes, and the resource that sets them ("memory", "issue" or a pipe).

    `instructions` are those of all threads together by class, `moved` the bytes.
    """
    per_second = device.multiprocessors * device.clock
    seconds = {"memory": memory_time(device, moved)}
    seconds["issue"] = sum(instructions.values()) / ISSUED / per_second
    for name, rates in device.pipes.items():
        clocks = sum(instructions.get(unit, 0) / rate for unit, rate in rates.items())
        seconds[name] = clocks / per_second
    limit = max(seconds, key=lambda name: seconds[name])
    return seconds[limit] + LAUNCH_SECONDS, limit


class Passes(NamedTuple):
    """What the kernels of a pooling, bias and ReLU included, read and write: passes over tensors of
    the input's size and of the output's, and bytes of codes or indices per output.

    Everything is read and written once: caches hold the overlap of neighbouring windows, and no
    tensor stays in a cache from one kernel to the next.
    """

    inputs: int
    outputs: int
    codes: int


PASSES = {
    # Ours: input read, output written and, for training, a code of one byte. Backward from a
    # sample: gradient and code read, the input's gradient written. The partial sums of the bias's
    # gradient, one per block and channel, are left out.
    ("stochastic", "evaluation"): Passes(1, 1, 0),
    ("stochastic", "forward"): Passes(1, 1, 1),
    ("stochastic", "backward"): Passes(1, 1, 1),
    ("stochastic", "training"): Passes(2, 2, 2),
    # PyTorch, eager. The bias is added (read, written), the ReLU applied (read, written); the
    # pooling reads its input, and writes values and int64 indices. Its backward reads gradient and
    # indices, fills the input's gradient with zeros and writes it; the ReLU's reads the gradient
    # and the saved output and writes; the bias's gradient is summed (read).
    ("max", "training"): Passes(5 + 6, 1 + 1, 8 + 8),
    # By Inductor: bias and ReLU in one kernel (read, written), then the pooling (read, values
    # written), which writes the cell in its window as an int8. The pooling's and the ReLU's
    # backward in one kernel, which reads gradient, int8 and the saved output of the ReLU and writes
    # the input's gradient; the bias's gradient is summed (read).
    ("max_compiled", "training"): Passes(3 + 3, 1 + 1, 1 + 1),
}


def bytes_moved(pool: str, step: str, itemsize: int, inputs: float = 1) -> float:
    """Bytes per output of a step of :data:`PASSES`; "training" is forward and backward.

    `itemsize` is the dtype's, `inputs` the number of inputs per output: 1 at stride 1, 4 at 2x2.
    """
    passes = PASSES[pool, step]
    return itemsize * (inputs * passes.inputs + passes.outputs) + passes.codes
