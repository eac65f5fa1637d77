"""What a training step takes of a GPU's memory, by an account that needs no GPU.

A real step (forward, loss, backward, optimiser) runs on PyTorch's fake tensors, which have shapes,
types and lifetimes but no memory. Every storage is counted from its birth to its death, so the peak
is what ``torch.cuda.max_memory_allocated`` would say, but for two assumptions:

- cuDNN does not tell its workspace without a GPU. Its fast kernels take channels last, in multiples
  of 16 bytes, so a convolution is taken to copy each operand that is laid out otherwise, such as
  three-channel images. ``LIBRARY_WORKSPACE`` bytes more are for cuBLAS and for partial sums.
- Making a batch on the GPU comes before the step. With the batch before, it takes 1.6 MB an image
  and 0.2 GB: less than the step does from about 200 images on, so it is left out.

Of a card's memory, ``CONTEXT`` bytes are for CUDA and its kernels, and the allocator is taken to
lose a share ``FRAGMENTATION`` of the rest. A GB has 10⁹ bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cli import ArgumentParser, align, exit_status, importing, number
from ..errors import UserError
from ..network import CNN_SP, IMAGE_SIZE, POOLINGS
from .devices import autocast
from .recipe import TrainOptions, add_options

PROG = "python -m cnnsp.training.memory"
LIBRARY_WORKSPACE = 128 * 2**20
CONTEXT = 600_000_000
FRAGMENTATION = 0.1

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class Account(NamedTuple):
    """What a training step takes, in bytes. ``peak`` is the sum of the other lines."""

    parameters: int  # the weights, fp32
    gradients: int  # one of each weight, counted for the whole step, as when they accumulate
    optimizer_state: int  # momentum of SGD; two moments of Adam and AdamW
    weight_average: int  # the averaged weights, if there are any
    image_bank: int  # the images that batches are made from, as given
    input_batch: int  # the images of the step, in the training's type, and their labels
    weight_copies: int  # autocast's half-precision copies of weights, kept for backward
    saved_for_backward: int  # what else forward leaves; linear in the batch but for the loss
    transient: int  # what the most demanding operator needs on top of all the above
    workspace: int  # by how much cuDNN's copies raise the peak, and LIBRARY_WORKSPACE; assumed
    peak: int  # most bytes allocated at any one time


@lru_cache(maxsize=256)
def account(
    batch_size: int, options: TrainOptions, *, num_classes: int = 3, image_bank_bytes: int = 0
) -> Account:
    """The memory of a training step of :class:`CNN_SP` on a GPU.

    ``batch_size`` are the images in a step, at least 1; if gradients accumulate, in one pass. That
    of ``options``, and their ``accumulate``, do not count here.
    """
    # Autograd refuses fake CUDA tensors where there is no CUDA, so these are a CPU's. Its autocast
    # takes the same convolutions and linear layers to half precision, and the pools follow. What
    # differs, the class scores and the mask of dropout, is 0.2 KB an image.
    with FakeTensorMode(), _LiveStorages() as storages:
        step = _Step("cpu", batch_size, options, num_classes)
        parameters = list(step.model.parameters())
        # The first step makes gradients and optimiser state; with these in place the second is
        # like all that follow.
        for _ in range(2):
            before = storages.live
            storages.peak = storages.peak_with_copies = 0
            loss = step.forward()
            kept = storages.live
            step.backward(loss)
            del loss
        weights = _bytes(parameters)
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        weight_copies = 0 if step.amp_dtype is None else _bytes(matrices) // 2
        lines = {
            "parameters": weights,
            "gradients": _bytes(parameter.grad for parameter in parameters),
            "optimizer_state": _bytes(tree_leaves([*step.optimizer.state.values()])),
            "weight_average": weights if options.ema > 0 else 0,
            "image_bank": image_bank_bytes,
            "input_batch": _bytes([step.images, step.labels]),
            "weight_copies": weight_copies,
            "saved_for_backward": kept - before - weight_copies,
            "transient": storages.peak - kept,
            "workspace": storages.peak_with_copies - storages.peak + LIBRARY_WORKSPACE,
        }
    return Account(**lines, peak=sum(lines.values()))


def measure(batch_size: int, options: TrainOptions, *, num_classes: int = 3) -> int:
    """The ``peak`` of :func:`account`, measured in two steps on the current CUDA device."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = _Step("cuda", batch_size, options, num_classes)
    for _ in range(2):
        step.backward(step.forward())
    return torch.cuda.max_memory_allocated() - before


def largest_batch(memory_bytes: float, options: TrainOptions, **others: int) -> int:
    """The largest batch that fits a card of ``memory_bytes``; 0 if not one image does.

    ``options`` and ``others`` are those of :func:`account`.
    """
    usable = (memory_bytes - CONTEXT) * (1 - FRAGMENTATION)

    def peak(batch_size: int) -> int:
        return account(batch_size, options, **others).peak

    # The peak is linear but for the smallest batches, so the line gives all but the last few steps.
    slope = (peak(1024) - peak(512)) / 512
    batch_size = max(0, 512 + int((usable - peak(512)) / slope))
    while batch_size > 0 and peak(batch_size) > usable:
        batch_size -= 1
    while peak(batch_size + 1) <= usable:
        batch_size += 1
    return batch_size


def limit(device: torch.device, gigabytes: float | None) -> float | None:
    """Let this process take no more of a GPU's memory than of a card with ``gigabytes``.

    Returns the bytes of the card, or of the smaller one that it plays; None of anything but CUDA.
    Raises UserError when there is no GPU to limit.
    """
    if device.type != "cuda":
        if gigabytes is not None:
            raise UserError("--gpu-memory-gb needs a GPU")
        return None
    total = float(torch.cuda.get_device_properties(device).total_memory)
    if gigabytes is None:
        return total
    # What CUDA itself takes of such a card, PyTorch does not count.
    share = max(0.0, gigabytes * 1e9 - CONTEXT) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    return min(total, gigabytes * 1e9)


def advice(
    memory_bytes: float | None, options: TrainOptions, *, processes: int = 1, **others: int
) -> str:
    """One line for the user whose step ran out of memory: which batch fits.

    ``memory_bytes`` is what :func:`limit` returned; ``processes`` share each batch; ``others`` are
    those of :func:`account`.
    """
    if memory_bytes is None:
        return "out of memory: --accumulate computes a batch in parts, with less"
    batch_size, accumulate = math.ceil(options.batch_size / processes), options.accumulate
    fits = largest_batch(memory_bytes, options, **others)
    card = f"{memory_bytes / 1e9:.1f} GB"
    start = f"out of GPU memory at --batch-size {batch_size}"
    if accumulate > 1:
        start += f" --accumulate {accumulate}"
    if fits == 0:
        return f"{start}: not one image fits in {card}; train with --device cpu"
    if fits >= math.ceil(batch_size / accumulate):
        return (
            f"{start}, though about {fits:,} images should fit in {card}: close what else uses the "
            "GPU, or choose a smaller --batch-size"
        )
    return (
        f"{start}: about {fits:,} images fit in {card}; --accumulate "
        f"{math.ceil(batch_size / fits)} computes the same batch in parts that fit"
    )


class _Step:
    """A network, its optimiser and a batch, and the two halves of a step with them."""

    def __init__(
        self, device: str, batch_size: int, options: TrainOptions, num_classes: int
    ) -> None:
        from .step import make_optimizer

        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        shape = (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        self.amp_dtype = getattr(torch, options.amp_dtype) if options.amp_dtype else None
        with torch.device(device):
            # The bank makes images in autocast's type.
            dtype = self.amp_dtype or torch.float32
            self.images = torch.empty(shape, dtype=dtype, memory_format=layout).zero_()
            self.labels = torch.zeros(batch_size, dtype=torch.int64)
            self.model = CNN_SP(num_classes, options.pool)
        for conv in self.model.modules():
            if isinstance(conv, nn.Conv2d):  # `model.to` cannot exchange fake parameters
                conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=layout))
        # As on a GPU, which takes fused optimisers.
        self.optimizer = make_optimizer(self.model.parameters(), options, torch.device("cuda"))

    def forward(self) -> Tensor:
        with autocast(self.images.device, self.amp_dtype):
            output = self.model(self.images)
        return F.nll_loss(output.float(), self.labels)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes, until it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes alive now
        self.peak = 0  # most bytes alive after an operator
        self.peak_with_copies = 0  # the same with what cuDNN copies in that operator
        self._sizes: dict[int, int] = {}  # of the storages alive, by their identities

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for output in outputs:
            storage = output.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        copies = 0
        if func in _CONVOLUTIONS:
            operands = [*(arg for arg in args if isinstance(arg, Tensor)), *outputs]
            copies = sum(_cudnn_copy(operand) for operand in operands if operand.dim() == 4)
        self.peak = max(self.peak, self.live)
        self.peak_with_copies = max(self.peak_with_copies, self.live + copies)
        return result

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _cudnn_copy(operand: Tensor) -> int:
    """Bytes of the copy that cuDNN is taken to make of a convolution's operand."""
    channels, aligned = operand.shape[1], 16 // operand.element_size()
    if channels % aligned == 0 and operand.is_contiguous(memory_format=torch.channels_last):
        return 0
    padded = math.ceil(channels / aligned) * aligned
    return operand.numel() // channels * padded * operand.element_size()


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__.splitlines()[0] if __doc__ else None)
    add_options(parser, ["batch_size", "pool", "opt", "amp_dtype"])
    parser.add_argument(
        "--gpu-memory-gb",
        type=number(float, 0, exclusive=True, most=10**6),
        default=6.0,
        help="of a card, in GB of 10⁹ bytes",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mixed precision, channels last; without it fp32, contiguous, as train.py has it",
    )
    parser.set_defaults(pool=None, amp_dtype="float16")  # without --pool all, side by side
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    with importing(PROG):
        import tabulate  # noqa: F401  for the table

        from . import step  # noqa: F401
    pools = [args.pool] if args.pool else POOLINGS
    precision = {"amp_dtype": args.amp_dtype if args.amp else None, "channels_last": args.amp}
    recipes = [TrainOptions(pool=pool, opt=args.opt, **precision) for pool in pools]
    columns = [account(args.batch_size, recipe)._asdict() for recipe in recipes]
    table = [[f"MB at batch {args.batch_size}", *pools]]
    for line in Account._fields:
        table += [[line.replace("_", " "), *(f"{column[line] / 1e6:,.1f}" for column in columns)]]
    if torch.cuda.is_available():
        table += [["measured here", *(_measured(args.batch_size, recipe) for recipe in recipes)]]
    fitting = (largest_batch(args.gpu_memory_gb * 1e9, recipe) for recipe in recipes)
    table += [[f"batch for {args.gpu_memory_gb:g} GB", *(f"{batch:,}" for batch in fitting)]]
    print(*align(table), sep="\n")


def _measured(batch_size: int, options: TrainOptions) -> str:
    try:
        return f"{measure(batch_size, options) / 1e6:,.1f}"
    except torch.OutOfMemoryError:
        return "out of memory"


main = partial(exit_status, PROG, run)

if __name__ == "__main__":
    sys.exit(main())
