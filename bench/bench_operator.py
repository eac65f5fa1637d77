"""Stochastic pooling against what a user would take instead, ReLU included."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import model
import torch
import torch.nn.functional as F
from contest import Case, Contestant
from torch import Tensor

from stochastic_pooling import stochastic_pool2d


@dataclass(frozen=True)
class Layer:
    """A pooling layer of a network that people know, and how many images of it are pooled."""

    name: str
    channels: int
    side: int
    kernel_size: int
    stride: int
    padding: int
    batch_cpu: int
    batch_cuda: int

    @property
    def window(self) -> tuple[int, int, int]:
        return self.kernel_size, self.stride, self.padding

    @property
    def outputs(self) -> int:
        """Along a side."""
        return (self.side + 2 * self.padding - self.kernel_size) // self.stride + 1


LAYERS = (
    Layer("cnnsp_pool1", 40, 86, 3, 1, 1, 16, 256),
    Layer("cnnsp_pool2", 80, 28, 3, 1, 1, 16, 256),
    Layer("cnnsp_pool3to5", 120, 10, 3, 1, 1, 16, 256),
    Layer("resnet_stem", 64, 112, 3, 2, 1, 4, 128),
    Layer("vgg_pool1", 64, 224, 2, 2, 0, 1, 32),
    Layer("vgg_pool5", 512, 14, 2, 2, 0, 16, 256),
)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MAIN_DTYPE = {"cpu": "fp32", "cuda": "fp16"}
PASSES = ("training", "forward", "backward", "evaluation")


def cases(device: torch.device) -> list[PoolCase]:
    """Every layer and format in the type that the device trains in, the first layer in all."""
    main = MAIN_DTYPE[device.type]
    # On a CPU a convolution adds its bias for nothing; on a GPU that is a pass over memory.
    bias = device.type == "cuda"
    chosen = [
        PoolCase(layer, main, form, what, bias, device)
        for layer in LAYERS
        for form in FORMATS
        for what in PASSES
    ]
    for form in FORMATS:
        chosen += [
            PoolCase(LAYERS[0], dtype, form, what, bias, device)
            for dtype in DTYPES
            if dtype != main
            for what in ("training", "evaluation")
        ]
        if not bias:
            chosen.append(PoolCase(LAYERS[0], main, form, "training", True, device))
    return chosen


class PoolCase(Case):
    """One layer, in one type and memory format.

    ``training`` is forward and backward, ``forward`` and ``backward`` are its halves, and
    ``evaluation`` is the forward pass of a network in use, without a graph.
    """

    def __init__(
        self, layer: Layer, dtype: str, form: str, what: str, bias: bool, device: torch.device
    ) -> None:
        self.layer, self.dtype, self.form, self.what = layer, dtype, form, what
        self.bias, self.device = bias, device
        on_cpu = device.type == "cpu"
        names = ["stochastic", "max"]
        if dtype == MAIN_DTYPE[device.type]:
            # Inductor compiles for seconds.
            few = layer.name in ("cnnsp_pool1", "resnet_stem", "vgg_pool1")
            if few and what == "training" and bias != on_cpu:
                names.append("max_compiled")
            names.append("avg")
            if form == "contiguous" and bias != on_cpu:
                names.append("fractional")
                if what == "training":  # once a layer: they take an age
                    names += ["gist", "reference"] if on_cpu else ["gist"]
        self.names = tuple(names)

    def __str__(self) -> str:
        bias = "-bias" if self.bias and self.device.type == "cpu" else ""
        return f"{self.layer.name}-{self.dtype}-{self.form}-{self.what}{bias}"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        batch = self.layer.batch_cpu if self.device.type == "cpu" else self.layer.batch_cuda
        x, bias = self._inputs(batch)
        return {name: functools.partial(self._contestant, name, x, bias) for name in self.names}

    def _contestant(self, name: str, x: Tensor, bias: Tensor | None) -> Contestant:
        pool = self._pool(name)
        moved = self._bytes_moved(name, len(x))
        wanted = [tensor for tensor in (x, bias) if tensor is not None]
        rows = self.layer.outputs
        if name == "fractional":
            rows = fractional_outputs(self.layer)
        gradient = self._random((len(x), self.layer.channels, rows, rows))

        def forward(_: object) -> Tensor:
            return pool(x, bias)

        def backward(output: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, wanted, gradient)

        def both(_: object) -> tuple[Tensor, ...]:
            return backward(forward(_))

        run: Callable[[Any], object]
        if self.what == "backward":
            return Contestant(backward, prepare=lambda: forward(None), moved=moved)
        run = both if self.what == "training" else forward
        return Contestant(by_reference(run) if name == "reference" else run, moved=moved)

    def _pool(self, name: str) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Bias, ReLU and pooling by that contestant."""
        training = self.what != "evaluation"
        if name in ("stochastic", "reference"):
            pool = functools.partial(stochastic, layer=self.layer, training=training)
        else:
            pool = functools.partial(POOLS[name], layer=self.layer)
        if name == "max_compiled":
            pool = torch.compile(pool, dynamic=False)
        return pool if training else torch.no_grad()(pool)

    def check(self, name: str, contestant: Contestant) -> None:
        """Ours is held against the reference, compiled max pooling against eager, and what the
        gist draws against the expectation; on two images. The others are PyTorch's own."""
        x, bias = self._inputs(2)
        if name == "gist":
            with torch.no_grad():
                expected = stochastic(x, bias, self.layer, training=False).double().mean()
                drawn = self._pool(name)(x, bias).double().mean()
            torch.testing.assert_close(drawn, expected, rtol=0.01, atol=0)
        oracle = {"stochastic": "reference", "max_compiled": "max"}.get(name)
        if oracle is None:
            return

        def outputs_and_gradients(who: str) -> list[Tensor]:
            torch.manual_seed(0)
            output = self._pool(who)(x, bias)
            if self.what == "evaluation":
                return [output]
            wanted = [tensor for tensor in (x, bias) if tensor is not None]
            ramp = torch.linspace(0, 1, output.numel(), device=x.device).to(output.dtype)
            return [output, *torch.autograd.grad(output, wanted, ramp.view(output.shape))]

        ours = outputs_and_gradients(name)
        if oracle == "reference":
            expected = by_reference(outputs_and_gradients)(oracle)
        else:
            expected = outputs_and_gradients(oracle)
        relative = 1e-4 if x.dtype == torch.float32 else 2e-2
        for mine, right in zip(ours, expected, strict=True):
            far = int((~torch.isclose(mine, right, rtol=relative, atol=relative)).sum())
            # On a GPU a draw may differ where rounding decides it.
            allowed = 0 if self.device.type == "cpu" else max(2, round(1e-5 * mine.numel()))
            assert far <= allowed, f"{self}: {name} differs from {oracle} in {far} numbers"

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(shape, generator=generator, device=self.device).to(DTYPES[self.dtype])
        return x.contiguous(memory_format=FORMATS[self.form]) if len(shape) == 4 else x

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor | None]:
        wanted = self.what != "evaluation"
        layer = self.layer
        x = self._random((batch, layer.channels, layer.side, layer.side)).requires_grad_(wanted)
        if not self.bias:
            return x, None
        return x, self._random((layer.channels,)).requires_grad_(wanted)

    def _bytes_moved(self, name: str, batch: int) -> int | None:
        if name not in TRAFFIC:
            return None
        forward, backward = TRAFFIC[name]
        layer = self.layer
        inputs = (layer.side / layer.outputs) ** 2
        options = {"bias": self.bias}
        if self.what == "evaluation" and name in ("stochastic", "max_compiled"):
            options["training"] = False
        passes = {"forward": [forward], "backward": [backward], "training": [forward, backward]}
        itemsize = DTYPES[self.dtype].itemsize
        traffic = [f(itemsize, inputs, **options).bytes for f in passes.get(self.what, [forward])]
        return round(sum(traffic) * batch * layer.channels * layer.outputs**2)


def rectified(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(x if bias is None else x + bias.view(-1, 1, 1))


def stochastic(x: Tensor, bias: Tensor | None, layer: Layer, training: bool) -> Tensor:
    return stochastic_pool2d(x, *layer.window, bias=bias, training=training)


def max_pool(x: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    return F.max_pool2d(rectified(x, bias), *layer.window)


def avg_pool(x: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    return F.avg_pool2d(rectified(x, bias), *layer.window)


def fractional_max_pool(x: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    size = fractional_outputs(layer)
    return F.fractional_max_pool2d(rectified(x, bias), layer.kernel_size, size)


def fractional_outputs(layer: Layer) -> int:
    """Fractional pooling knows no padding, so it may give a little less."""
    return min(layer.outputs, layer.side - layer.kernel_size + 1)


def gist(x: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    """Unfold, multinomial, gather: what is usually written by hand. It cannot draw from a dead
    window, so it is given weights that are never 0."""
    n, c, h, w = x.shape
    planes = (rectified(x, bias) + 1e-6).reshape(n * c, 1, h, w)
    weights = F.unfold(planes, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    weights = weights.transpose(1, 2).reshape(-1, layer.kernel_size**2)
    drawn = torch.multinomial(weights.detach(), 1)
    return weights.gather(1, drawn).view(n, c, layer.outputs, layer.outputs)


POOLS = {
    "max": max_pool,
    "max_compiled": max_pool,
    "avg": avg_pool,
    "fractional": fractional_max_pool,
    "gist": gist,
}
# Of the others nobody has counted what they move.
TRAFFIC = {
    "stochastic": (model.stochastic_forward, model.stochastic_backward),
    "max": (model.eager_forward, model.eager_backward),
    "max_compiled": (model.inductor_forward, model.inductor_backward),
    "avg": (model.average_forward, model.average_backward),
}


def by_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with our pools on plain PyTorch, which serves where nothing faster can."""
    return mock.patch.dict(os.environ, STOCHASTIC_POOLING_BACKEND="torch")(function)


def test_operator(contest: Callable[[Case, str], None], case: PoolCase, contestant: str) -> None:
    contest(case, contestant)
