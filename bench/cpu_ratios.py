"""Time the CPU path against what a user would take instead, side by side in one run.

    python bench/cpu_ratios.py [--threads N] [--rounds N] [--json FILE]

Every round runs each contestant once, in turn, so that a drift of the machine hits all of them;
what is compared are medians over the rounds. The pools run forward and backward in training mode,
ReLU included; the network's step is forward, loss and backward.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from cnnsp import CNN_SP
from stochastic_pooling import stochastic_pool2d

SHAPES = ((16, 40, 86, 86), (16, 80, 28, 28), (16, 120, 10, 10))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def max_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(F.relu(x), 3, 1, 1)


def stochastic(x: torch.Tensor) -> torch.Tensor:
    return stochastic_pool2d(x, 3, 1, 1)


def gist(x: torch.Tensor) -> torch.Tensor:
    """Unfold, multinomial, gather: what is usually written by hand. It cannot draw from a dead
    window, so it is given weights that are never 0."""
    n, c, h, w = x.shape
    weights = F.unfold((F.relu(x) + 1e-6).flatten(0, 1).unsqueeze(1), 3, padding=1)
    weights = weights.transpose(1, 2).reshape(-1, 9)
    drawn = torch.multinomial(weights.detach(), 1)
    return weights.gather(1, drawn).view(n, c, h, w)


def forward_backward(pool: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    x.grad = None
    output = pool(x)
    output.backward(torch.ones_like(output))


def reference(x: torch.Tensor) -> None:
    """Forward and backward on the plain PyTorch path, as where numba is missing."""
    os.environ["STOCHASTIC_POOLING_BACKEND"] = "torch"
    try:
        forward_backward(stochastic, x)
    finally:
        del os.environ["STOCHASTIC_POOLING_BACKEND"]


def training_step(pooling: str, layout: torch.memory_format, dtype: torch.dtype, batch: int):
    """A function that runs one step of CNN_SP."""
    model = CNN_SP(pooling=pooling).to(memory_format=layout)
    images = torch.randn(batch, 3, 256, 256).contiguous(memory_format=layout)
    labels = torch.arange(batch) % 3

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.nll_loss(model(images), labels)
        loss.backward()

    return step


def medians(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each contestant, the median of interleaved rounds after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def pool_rows(rounds: int) -> list[dict[str, object]]:
    rows = []
    for shape in SHAPES:
        for name, layout in LAYOUTS.items():
            x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
            contestants = {
                "max": functools.partial(forward_backward, max_pool, x),
                "stochastic": functools.partial(forward_backward, stochastic, x),
                "reference": functools.partial(reference, x),
            }
            seconds = medians(contestants, rounds)
            if shape == SHAPES[0] and name == "contiguous":
                seconds |= medians({"gist": functools.partial(forward_backward, gist, x)}, 1)
            case = f"pool {'x'.join(map(str, shape))} fp32 {name}"
            rows += _rows(case, seconds, {"stochastic": "max", "reference": "max"})
            if "gist" in seconds:
                rows += _rows(case, seconds, {"gist": "stochastic"})
    return rows


def network_rows(rounds: int, batch: int, dtypes: list[torch.dtype]) -> list[dict[str, object]]:
    rows = []
    for dtype in dtypes:
        steps = {
            f"{pooling} {name}": training_step(pooling, layout, dtype, batch)
            for pooling in ("max", "stochastic")
            for name, layout in LAYOUTS.items()
        }
        seconds = medians(steps, rounds)
        # The better memory format of each.
        best = {
            pooling: min(seconds[f"{pooling} {name}"] for name in LAYOUTS)
            for pooling in ("max", "stochastic")
        }
        case = f"CNN_SP step, batch {batch}, {str(dtype).removeprefix('torch.')}"
        rows += _rows(case, seconds, {})
        rows += _rows(case, {f"{k}, better format": v for k, v in best.items()}, {
            "stochastic, better format": "max, better format"
        })  # fmt: skip
    return rows


def _rows(case: str, seconds: dict[str, float], against: dict[str, str]) -> list[dict[str, object]]:
    """One row for each contestant, or for each one that is set against another."""
    return [
        {"case": case, "what": name, "milliseconds": 1e3 * seconds[name],
         "against": base, "ratio": seconds[name] / seconds[base] if base else None}
        for name, base in (against or dict.fromkeys(seconds)).items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="of PyTorch and of the kernels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64, help="images in a step of the network")
    parser.add_argument("--no-network", action="store_true", help="time the pools alone")
    parser.add_argument("--bf16", action="store_true", help="also the network under bf16 autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = pool_rows(arguments.rounds)
    if not arguments.no_network:
        dtypes = [torch.float32, torch.bfloat16] if arguments.bf16 else [torch.float32]
        rows += network_rows(max(arguments.rounds // 2, 1), arguments.batch, dtypes)
    for row in rows:
        ratio = f"  {row['ratio']:6.2f} x {row['against']}" if row["against"] else ""
        print(f"{row['case']:42} {row['what']:28} {row['milliseconds']:9.1f} ms{ratio}")
    if arguments.json:
        machine = {
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        arguments.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
