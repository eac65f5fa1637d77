"""Stochastic pooling against what a user would take instead, ReLU included."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple
from unittest import mock

import model
import torch
import torch.nn.functional as F
from contest import Contestant, Makers
from torch import Tensor

from stochastic_pooling import stochastic_pool2d


class Layer(NamedTuple):
    """A pooling layer of a network that people know, and how many images of it are pooled."""

    name: str
    channels: int
    side: int
    window: tuple[int, int, int]  # size, stride, padding
    cpu_batch: int
    cuda_batch: int


LAYERS = (
    Layer("cnnsp_pool1", 40, 86, (3, 1, 1), 16, 256),
    Layer("cnnsp_pool2", 80, 28, (3, 1, 1), 16, 256),
    Layer("cnnsp_pool3to5", 120, 10, (3, 1, 1), 16, 256),
    Layer("resnet_stem", 64, 112, (3, 2, 1), 4, 128),
    Layer("vgg_pool1", 64, 224, (2, 2, 0), 1, 32),
    Layer("vgg_pool5", 512, 14, (2, 2, 0), 16, 256),
)
COMPILED = ("cnnsp_pool1", "resnet_stem", "vgg_pool1")  # Inductor takes seconds for each
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MAIN_DTYPE = {"cpu": "fp32", "cuda": "fp16"}
# A context, and a decorator, in which our pools are plain PyTorch, as where nothing faster serves.
IN_PYTORCH = mock.patch.dict(os.environ, STOCHASTIC_POOLING_BACKEND="torch")


def cases(device: torch.device) -> dict[str, Makers]:
    """Every layer and format in the type that the device trains in, the first layer in all."""
    main, contestants = MAIN_DTYPE[device.type], {}
    for form in FORMATS:
        for layer, step in product(LAYERS, ("training", "forward", "backward", "evaluation")):
            names = ["stochastic", "max", "avg"]
            if step == "training" and layer.name in COMPILED:
                names.append("max_compiled")
            if step == "training" and form == "contiguous":  # once a layer: they take an age
                names += ["gist", "reference"] if device.type == "cpu" else ["gist"]
            contestants[Pooling(layer, main, form, step, device)] = names
        for dtype, step in product(sorted(DTYPES.keys() - {main}), ("training", "evaluation")):
            contestants[Pooling(LAYERS[0], dtype, form, step, device)] = ["stochastic", "max"]
    return {
        f"{work.layer.name}-{work.dtype}-{work.form}-{work.step}": {
            name: partial(work.contestant, name) for name in names
        }
        for work, names in contestants.items()
    }


class Pooling(NamedTuple):
    """What the contestants of a case do.

    A ``step`` of ``training`` is forward and backward, ``forward`` and ``backward`` are its halves,
    and ``evaluation`` is the forward pass of a network in use, without a graph.
    """

    layer: Layer
    dtype: str
    form: str
    step: str
    device: torch.device

    def contestant(self, name: str) -> Contestant:
        self.check(name)
        pool = self.pool(name)
        leaves = self.inputs(getattr(self.layer, f"{self.device.type}_batch"))
        moved = self.bytes_moved(len(leaves[0])) if name == "stochastic" else None

        def forward() -> Tensor:
            return pool(*leaves)

        if self.step in ("forward", "evaluation"):
            return Contestant(forward, moved=moved)
        gradient = torch.randn_like(forward(), requires_grad=False)

        def backward(output: Tensor) -> object:
            return torch.autograd.grad(output, leaves, gradient)

        def both() -> object:
            return backward(forward())

        if self.step == "backward":
            return Contestant(backward, prepare=lambda: (forward(),), moved=moved)
        return Contestant(IN_PYTORCH(both) if name == "reference" else both, moved=moved)

    def pool(self, name: str) -> Callable[..., Tensor]:
        """Bias, ReLU and pooling by that contestant."""
        layer, training = self.layer, self.step != "evaluation"

        def pool(x: Tensor, bias: Tensor | None = None) -> Tensor:
            if name in ("stochastic", "reference"):
                return stochastic_pool2d(x, *layer.window, bias=bias, training=training)
            rectified = F.relu(x if bias is None else x + bias.view(-1, 1, 1))
            return POOLS[name.removesuffix("_compiled")](rectified, *layer.window)

        return torch.compile(pool, dynamic=False) if name.endswith("_compiled") else pool

    def inputs(self, batch: int) -> list[Tensor]:
        """And a bias on a GPU, where to add one is a pass over memory; on a CPU a convolution adds
        its own for nothing."""
        generator, layer = torch.Generator(self.device).manual_seed(0), self.layer
        shapes = [(batch, layer.channels, layer.side, layer.side), (layer.channels,)]
        random = (torch.randn(s, generator=generator, device=self.device) for s in shapes)
        x, bias = (tensor.to(DTYPES[self.dtype]) for tensor in random)
        leaves = [x.contiguous(memory_format=FORMATS[self.form])]
        if self.device.type == "cuda":
            leaves.append(bias)
        return [leaf.requires_grad_(self.step != "evaluation") for leaf in leaves]

    def check(self, name: str) -> None:
        """Ours is held against the reference, and what the gist draws against the expectation; on
        two images. The others are PyTorch's own."""
        if name == "gist":
            leaves = self.inputs(2)
            drawn = self.pool(name)(*leaves).double().mean()
            expected = self._replace(step="evaluation").pool("stochastic")(*leaves).double().mean()
            torch.testing.assert_close(drawn, expected, rtol=0.01, atol=0)
        if name == "stochastic":
            relative = 1e-4 if self.dtype == "fp32" else 2e-2
            for mine, right in zip(self.results(), IN_PYTORCH(self.results)(), strict=True):
                far = int((~torch.isclose(mine, right, rtol=relative, atol=relative)).sum())
                # On a GPU a draw may differ where rounding decides it.
                allowed = 0 if self.device.type == "cpu" else max(2, round(1e-5 * mine.numel()))
                assert far <= allowed, f"{name} differs from the reference in {far} numbers"

    def results(self) -> list[Tensor]:
        """Output and gradients of our pool."""
        leaves = self.inputs(2)
        torch.manual_seed(0)
        output = self.pool("stochastic")(*leaves)
        if self.step == "evaluation":
            return [output]
        ramp = torch.linspace(0, 1, output.numel(), device=self.device).to(output.dtype)
        return [output, *torch.autograd.grad(output, leaves, ramp.view(output.shape))]

    def bytes_moved(self, batch: int) -> int:
        """Those that our pool must move."""
        layer, itemsize = self.layer, DTYPES[self.dtype].itemsize
        size, stride, padding = layer.window
        outputs = (layer.side + 2 * padding - size) // stride + 1  # along a side
        inputs = (layer.side / outputs) ** 2
        per_output = model.bytes_moved("stochastic", self.step, itemsize, inputs)
        return round(per_output * batch * layer.channels * outputs**2)


def gist(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Unfold, multinomial, gather: what is usually written by hand, of square planes. It cannot
    draw from a dead window, so it is given weights that are never 0."""
    planes = (x + 1e-6).reshape(-1, 1, *x.shape[2:])
    weights = F.unfold(planes, size, padding=padding, stride=stride)
    side = math.isqrt(weights.shape[2])
    weights = weights.transpose(1, 2).reshape(-1, size**2)
    drawn = torch.multinomial(weights.detach(), 1)
    return weights.gather(1, drawn).view(*x.shape[:2], side, side)


POOLS = {"max": F.max_pool2d, "avg": F.avg_pool2d, "gist": gist}


def test_operator(record) -> None:
    record()
