"""The processes that train together, as ``torchrun`` starts them; mostly there is one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..cli import is_launched
from ..errors import UserError


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them; every method is called by all at once."""

    rank: int = 0  # this process's number
    size: int = 1  # their number

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's ``tensor``, which is overwritten."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, number: int) -> int:
        """The largest of everybody's ``number``, exchanged without the GPUs."""
        box = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def rows(self, mine: Tensor, total: int) -> Tensor:
        """Of a table of ``total`` rows, each process has every ``size``-th; all of them, in order.

        ``mine`` are the rows ``rank, rank + size, …``, ``[R, C]``, on the CPU.
        """
        table = mine.new_zeros(total, *mine.shape[1:])
        table[self.rank :: self.size] = mine
        return self.sum(table)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, made the current one; ``torchrun`` starts one process a GPU.

    Another device than CUDA serves all processes.

    Raises:
        UserError: when a GPU is named for several processes, or there are too few.
    """
    if device.type != "cuda":
        return device
    index = device.index or 0
    if is_launched():
        if device.index is not None:
            raise UserError("torchrun gives each process its GPU: --device cuda, without a number")
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"torchrun starts more processes here than there are GPUs ({count})")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start(device: torch.device) -> Team:
    """Join the processes that ``torchrun`` started; alone, without it."""
    if not is_launched():
        return Team()
    # CPU tensors go by gloo in any case, so that the hosts can agree without stopping the GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Team(dist.get_rank(), dist.get_world_size())


def stop() -> None:
    """Leave the processes that :func:`start` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
