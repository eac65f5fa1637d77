"""A roofline model of a kernel's time on GPUs that are not there, and what the alternatives move.

A kernel takes as long as the busiest of: the memory, which moves its bytes; the warp schedulers,
which issue its instructions; each pipe, which executes its share of them. Nothing is assumed to
overlap badly, and no latency is left exposed: the time is a lower bound but for the instructions,
which are counted from above.

Sources of the constants. None was measured here, and of the documents only the forum note was at
hand to check against:

- lanes: the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ programming guide
  (results per clock and multiprocessor). Compute capability 8.0 / 8.6, 8.9 / 9.0:
      fp32 add, multiply, multiply-add          64 / 128 / 128
      fp16 add, multiply, multiply-add         256 / 128 / 256   (two results an instruction)
      fp64 add, multiply, multiply-add          32 /   2 /  64
      32-bit integer multiply, multiply-add     64 /  64 /  64
      integer add, compare, min, max, shift, logic: 64 everywhere
      conversions from and to 64-bit types      16 /   2 /  16
      reciprocal and the like, other conversions: 16 everywhere (the fast ones are the alu's)
- which pipe executes what: the Nsight Compute profiling guide, and NVIDIA's note on the pipes at
  https://forums.developer.nvidia.com/t/separate-cuda-core-pipeline-for-fp16-and-fp32/302018/7:
  8.0 has one pipe for fp32 and IMAD, 8.6 to 9.0 have a heavy half (fp32, IMAD) and a light half
  (fp32), and a half precision instruction occupies both. F2FP runs on the alu since 8.0.
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
_PIPES_80 = _COMMON | {
    "fma": {"fp32": 64, "imad": 64},
    "half": {"half": 128},
    "fp64": {"fp64": 32, "conversion64": 16},
}
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
    "sm_80": Device("A100 SXM 40 GB", 108, 1.41e9, 1555e9, _PIPES_80),
    # The laptop card boosts to between 1.283 and 1.703 GHz, depending on its power limit.
    "sm_86": Device("RTX 3060 Laptop", 30, 1.5e9, 336e9, _PIPES_86),
    "sm_89": Device("RTX 4090", 128, 2.52e9, 1008e9, _PIPES_86),
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
    clocks = {"issue": sum(instructions.values()) / ISSUED}
    for name, rates in device.pipes.items():
        clocks[name] = sum(instructions.get(unit, 0) / rate for unit, rate in rates.items())
    per_second = device.multiprocessors * device.clock
    seconds = {"memory": memory_time(device, moved)}
    seconds |= {name: needed / per_second for name, needed in clocks.items()}
    limit = max(seconds, key=lambda name: seconds[name])
    return seconds[limit] + LAUNCH_SECONDS, limit


class Passes(NamedTuple):
    """What the kernels of a pooling, ReLU included, read and write: passes over tensors of the
    input's size and of the output's, and bytes of code or index per output; with a bias, further
    passes over tensors of the input's size.

    Everything is read and written once: caches hold the overlap of neighbouring windows, and no
    tensor stays in a cache from one kernel to the next.
    """

    inputs: int
    outputs: int
    code: int
    bias: int


PASSES = {
    # PyTorch, eager. The bias is added (read, written), the ReLU applied (read, written); the
    # pooling reads its input, and writes values and, for max, int64 indices.
    ("max", "forward"): Passes(3, 1, 8, 2),
    ("avg", "forward"): Passes(3, 1, 0, 2),
    # Max pooling's backward reads gradient and indices, fills the input's gradient with zeros and
    # writes it; average pooling's reads and writes. The ReLU's reads the gradient and the saved
    # output and writes; the bias's gradient is summed (read).
    ("max", "backward"): Passes(5, 1, 8, 1),
    ("avg", "backward"): Passes(4, 1, 0, 1),
    # By Inductor: bias and ReLU in one kernel (read, written), then the pooling (read, values
    # written), which for training writes the cell in its window as an int8.
    ("max_compiled", "forward"): Passes(3, 1, 1, 0),
    # The pooling's and the ReLU's backward in one kernel, which reads gradient, int8 and the saved
    # output of the ReLU and writes the input's gradient; the bias's gradient is summed (read).
    ("max_compiled", "backward"): Passes(2, 1, 1, 1),
    # Ours: input read, output written and, for training, a code of one byte. Backward from a
    # sample: gradient and code read, the input's gradient written. The partial sums of the bias's
    # gradient, one per block and channel, are left out.
    ("stochastic", "forward"): Passes(1, 1, 1, 0),
    ("stochastic", "backward"): Passes(1, 1, 1, 0),
}


def bytes_moved(
    pool: str, step: str, itemsize: int, inputs: float = 1, *, bias: bool = True
) -> float:
    """Bytes per output that a pooling moves in a "forward" or "backward" of :data:`PASSES`, in
    "training", which is both, or in an "evaluation", a forward that writes no codes (but eager max
    pooling, which always does).

    `itemsize` is the dtype's, `inputs` the number of inputs per output: 1 at stride 1, 4 at 2x2.
    Without `bias` there is none to add, as after a convolution that has added its own.
    """
    if step == "training":
        halves = ("forward", "backward")
        return sum(bytes_moved(pool, half, itemsize, inputs, bias=bias) for half in halves)
    passes = PASSES[pool, "backward" if step == "backward" else "forward"]
    code = 0 if step == "evaluation" and pool != "max" else passes.code
    return itemsize * (inputs * (passes.inputs + bias * passes.bias) + passes.outputs) + code
