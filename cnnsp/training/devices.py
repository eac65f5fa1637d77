"""Where a network runs, and in which precision."""

from __future__ import annotations

import ctypes
import os

import torch

from ..errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of that name; when not given, CUDA if there is one, else the CPU.

    Raises:
        UserError: when PyTorch or this machine does not have it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: PyTorch knows no such device") from None
    if device.type == "cuda":
        # Asked without taking any of its memory: another process may be the one to use it.
        count = torch.cuda.device_count()
        if count == 0:
            raise UserError(f"--device {name}: this machine, or this PyTorch, has no CUDA")
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: there are {count} GPUs, numbered from 0")
        return device
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: not available on this machine") from None
    return device


def choose_amp_dtype(
    amp: bool | None, name: str | None, device: torch.device, before: str | None = None
) -> str | None:
    """The type for :func:`autocast`, or None for fp32 throughout.

    A run that goes on keeps the one ``before``, but not a GPU's fp16 on a CPU, where it is slow.
    """
    if amp is False:
        return None
    if before == "float16" and device.type == "cpu":
        amp, before = True, None
    if name or before or not amp:
        return name or before
    if device.type == "cpu" and not has_bfloat16_instructions():
        print(
            "--amp: this CPU has no bf16 instructions, so training stays in fp32, which is faster "
            "here; --amp-dtype bfloat16 forces bf16."
        )
        return None
    return "float16" if device.type == "cuda" else "bfloat16"


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors leave, for the tensors of the next step.

    A training step allocates gigabytes. glibc gives large blocks back to the system, so that each
    step begins with page faults, which took a quarter of its time where it was measured. Elsewhere
    than with glibc this does nothing. PyTorch may use huge pages on Linux, for fewer faults; it
    looks at that wish at its first allocation, so call this before.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def has_bfloat16_instructions() -> bool:
    """Whether bf16 is faster than fp32 on this CPU."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN, or a later one
        return False


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """A context of mixed precision; without a ``dtype`` it changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
