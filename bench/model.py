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

# Lanes that the four warp schedulers of a multiprocessor serve per clock.
ISSUE_LANES = 4 * 32

# Copies reach about 90 % of the bandwidth on the data sheet; an assumption, not a measurement.
ACHIEVABLE_BANDWIDTH = 0.9

# What a kernel costs beside its work, between its neighbours in a stream. Also an assumption.
LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Pipe:
    """Lanes per clock and multiprocessor, and the lanes that a thread's instruction of each class
    (see instructions.py) occupies for a clock."""

    lanes: int
    occupied: Mapping[str, float]


@dataclass(frozen=True)
class Device:
    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second, on the data sheet
    pipes: Mapping[str, Pipe]


# Classes that no pipe lists (uniform, control, other) count to the issue alone.
_COMMON = {
    "alu": Pipe(64, {"alu": 1}),
    "conversion": Pipe(16, {"conversion": 1}),
    "lsu": Pipe(32, {"lsu": 1}),
}
_PIPES_80 = {
    **_COMMON,
    "fma": Pipe(64, {"fp32": 1, "imad": 1}),
    "half": Pipe(128, {"half": 1}),
    "fp64": Pipe(32, {"fp64": 1, "conversion64": 2}),
}
_PIPES_86 = {
    **_COMMON,
    "fma": Pipe(128, {"fp32": 1, "imad": 1, "half": 2}),
    "imad": Pipe(64, {"imad": 1, "half": 1}),
    "fp64": Pipe(2, {"fp64": 1, "conversion64": 1}),
}
_PIPES_90 = {
    **_COMMON,
    "fma": Pipe(128, {"fp32": 1, "imad": 1, "half": 1}),
    "imad": Pipe(64, {"imad": 1, "half": 0.5}),
    "fp64": Pipe(64, {"fp64": 1, "conversion64": 4}),
}

# The device that stands for a target of kernel_report.py; the others have none.
DEVICES = {
    "sm_80": Device("A100 SXM 40 GB", 108, 1.41e9, 1555e9, _PIPES_80),
    # The laptop card boosts to between 1.283 and 1.703 GHz, depending on its power limit.
    "sm_86": Device("RTX 3060 Laptop", 30, 1.5e9, 336e9, _PIPES_86),
    "sm_89": Device("RTX 4090", 128, 2.52e9, 1008e9, _PIPES_86),
    "sm_90": Device("H100 SXM", 132, 1.7e9, 3350e9, _PIPES_90),
}


def kernel_time(
    device: Device, instructions: Mapping[str, float], moved: float
) -> tuple[float, str]:
    """Seconds that a kernel takes, and the resource that sets them ("memory", "issue" or a pipe).

    `instructions` are those of all threads together by class, `moved` the bytes.
    """
    per_second = device.multiprocessors * device.clock
    seconds = {
        "memory": moved / (device.bandwidth * ACHIEVABLE_BANDWIDTH),
        "issue": sum(instructions.values()) / (ISSUE_LANES * per_second),
    }
    for name, pipe in device.pipes.items():
        occupied = sum(n * pipe.occupied.get(unit, 0) for unit, n in instructions.items())
        seconds[name] = occupied / (pipe.lanes * per_second)
    limit = max(seconds, key=lambda name: seconds[name])
    return seconds[limit] + LAUNCH_SECONDS, limit


# ---------------------------------------------------------------- what is moved per output


@dataclass(frozen=True)
class Traffic:
    """Bytes per output of the pooling, and the number of kernels that move them.

    Everything is read and written once: caches hold the overlap of neighbouring windows, and no
    tensor stays in a cache from one kernel to the next.
    """

    bytes: float
    kernels: int

    def time(self, device: Device, outputs: int) -> float:
        """Seconds, where nothing but the memory counts."""
        moved = self.bytes * outputs / (device.bandwidth * ACHIEVABLE_BANDWIDTH)
        return moved + self.kernels * LAUNCH_SECONDS

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.kernels + other.kernels)


# `itemsize` is the dtype's, `inputs` the number of inputs per output: 1 at stride 1, 4 at 2x2.
# Without `bias` there is none to add, as after a convolution that has added its own.


def eager_forward(itemsize: int, inputs: float = 1, *, bias: bool = True) -> Traffic:
    """Bias + ReLU + F.max_pool2d as PyTorch runs them: the bias is added (read, written), the ReLU
    applied (read, written), and the pooling reads its input and writes values and int64 indices."""
    return _rectified(itemsize, inputs, bias) + Traffic(itemsize * inputs + itemsize + 8, 1)


def eager_backward(itemsize: int, inputs: float = 1, *, bias: bool = True) -> Traffic:
    """Their backwards: the pooling's reads gradient and indices, fills the input's gradient with
    zeros and writes it; the ReLU's reads the gradient and the saved output and writes; the bias's
    gradient is summed (read)."""
    pool = Traffic(itemsize + 8 + 2 * itemsize * inputs, 2)
    return pool + _rectified_backward(itemsize, inputs, bias)


def average_forward(itemsize: int, inputs: float = 1, *, bias: bool = True) -> Traffic:
    """Bias + ReLU + F.avg_pool2d: as eager max pooling, without indices."""
    return _rectified(itemsize, inputs, bias) + Traffic(itemsize * inputs + itemsize, 1)


def average_backward(itemsize: int, inputs: float = 1, *, bias: bool = True) -> Traffic:
    """Its backward reads the gradient and writes the input's; then as eager max pooling."""
    pool = Traffic(itemsize + itemsize * inputs, 1)
    return pool + _rectified_backward(itemsize, inputs, bias)


def _rectified(itemsize: int, inputs: float, bias: bool) -> Traffic:
    kernels = 1 + bias
    return Traffic(2 * itemsize * inputs * kernels, kernels)


def _rectified_backward(itemsize: int, inputs: float, bias: bool) -> Traffic:
    relu = Traffic(3 * itemsize * inputs, 1)
    return relu + Traffic(itemsize * inputs, 1) if bias else relu


def inductor_forward(
    itemsize: int, inputs: float = 1, *, training: bool = True, bias: bool = True
) -> Traffic:
    """The same through torch.compile: bias and ReLU in one kernel (read, written), then the pooling
    (read, values written), which for training writes the cell in its window as an int8."""
    return Traffic(3 * itemsize * inputs + itemsize + training, 2)


def inductor_backward(itemsize: int, inputs: float = 1, *, bias: bool = True) -> Traffic:
    """The pooling's and the ReLU's backward in one kernel, which reads gradient, int8 and the saved
    output of the ReLU and writes the input's gradient; the bias's gradient is summed (read)."""
    pool = Traffic(itemsize + 1 + 2 * itemsize * inputs, 1)
    return pool + Traffic(itemsize * inputs, 1) if bias else pool


def stochastic_forward(
    itemsize: int, inputs: float = 1, *, training: bool = True, bias: bool = True
) -> Traffic:
    """Ours: input read, output written and, for training, a code of one byte."""
    return Traffic(itemsize * inputs + itemsize + training, 1)


def stochastic_backward(itemsize: int, inputs: float = 1, *, bias: bool = True) -> Traffic:
    """Ours, from a sample: gradient and code read, the input's gradient written. The partial sums
    of the bias's gradient, one per block and channel, are left out."""
    return Traffic(itemsize + 1 + itemsize * inputs, 1 + bias)
