"""A second data point: small networks with overlapping pools of stride 2, as in the first paper.

Zeiler & Fergus 2013 (arXiv 1301.3557, section 4) pool 3 × 3 cells by a stride of 2, three times,
and find stochastic pooling ahead of max and average pooling, the more so the fewer the training
images. Here: scikit-learn's 1,797 digits of 8 × 8 pixels, three convolutions with such a pool
behind each, nothing else that regularises. Writes ``digits.csv``: a row for each network.

    python docs/study/digits.py
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stochastic_pooling import StochasticPool2d

HERE = Path(__file__).parent
# The original paper's pools reach over the border: 8 -> 4 -> 2 -> 1 cells a side.
POOLS = {
    "stochastic": lambda: StochasticPool2d(3, 2, ceil_mode=True),
    "max": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "avg": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
}
SIZES = (100, 200, 400, 800)
STEPS, BATCH, LR = 2000, 64, 0.02
TEST_IMAGES = 897


def network(pool: str) -> nn.Sequential:
    """Log-probabilities of ten digits ``[N, 10]`` from images ``[N, 1, 8, 8]``."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((1, 32, 32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), POOLS[pool]()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10), nn.LogSoftmax(1))


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels in an order that follows from ``seed``; the last ones are for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.5
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order], torch.tensor(data.target)[order]


def train(pool: str, images: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """Train on all of ``images``; the rate falls to 0 along a cosine."""
    torch.manual_seed(seed)
    model = network(pool)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.nll_loss(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in per cent, and mean loss; the stochastic pools take the expectation."""
    output = model(images)
    right = (output.argmax(1) == labels).float().mean()
    return 100 * float(right), float(F.nll_loss(output, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed, size, pool in itertools.product(range(args.seeds), SIZES, POOLS):
        images, labels = digits(seed)
        model = train(pool, images[:size], labels[:size], seed)
        row: dict[str, object] = {"pool": pool, "train_images": size, "seed": seed}
        row["train_accuracy"], row["train_loss"] = score(model, images[:size], labels[:size])
        test = slice(-TEST_IMAGES, None)
        row["test_accuracy"], row["test_loss"] = score(model, images[test], labels[test])
        rows.append(row)
        print(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        pd.DataFrame(rows).to_csv(HERE / "digits.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
