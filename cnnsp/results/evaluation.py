"""How well a network recognises images: loss, accuracy, confusion matrix, sensitivities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cli import printable
from ..data.batches import ImageBank
from ..errors import UserError
from ..training.devices import autocast
from ..training.processes import Team


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network says about labelled images, at least one."""

    log_probs: Tensor  # float32 [N, C], on the CPU
    labels: Tensor  # int64 [N], on the CPU

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood."""
        return float(F.nll_loss(self.log_probs.double(), self.labels))

    @cached_property
    def confusion(self) -> Tensor:
        """In row t, column p the images of class t taken for class p: int64 ``[C, C]``."""
        classes = self.log_probs.shape[1]
        cells = self.labels * classes + self.log_probs.argmax(1)
        return torch.bincount(cells, minlength=classes**2).view(classes, classes)

    @property
    def correct(self) -> int:
        """Number of images that were recognised."""
        return int(self.confusion.trace())

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """In per cent."""
        return 100 * self.correct / self.total

    @property
    def sensitivities(self) -> list[float | None]:
        """Of each class, the share of its images that were recognised, in per cent, if any are."""
        rows = enumerate(self.confusion.tolist())
        return [100 * row[label] / sum(row) if any(row) else None for label, row in rows]

    def most_wrong(self, k: int) -> Tensor:
        """The ``k`` images with the highest loss among those not recognised, worst first.

        Returns positions, int64 ``[k]``; fewer when fewer are wrong.
        """
        wrong = (self.log_probs.argmax(1) != self.labels).nonzero().squeeze(1)
        losses = F.nll_loss(self.log_probs[wrong], self.labels[wrong], reduction="none")
        return wrong[losses.argsort(descending=True, stable=True)[:k]]


def evaluate(
    model: nn.Module,
    bank: ImageBank,
    batch_size: int,
    amp_dtype: torch.dtype | None = None,
    team: Team | None = None,
) -> Evaluation:
    """What ``model`` says, in evaluation mode, about all items of ``bank``.

    It gives log-probabilities ``[B, C]``, in ``amp_dtype`` or fp32; its mode is restored. Processes
    of a ``team`` share the images, and each gets the whole evaluation.

    Raises:
        UserError: when what it says is not finite.
    """
    team, training, outputs = team or Team(), model.training, []
    items = torch.arange(len(bank))
    model.eval()
    with torch.no_grad():
        mine = items[team.rank :: team.size].split(batch_size)
        for _, images, _ in bank.batches(mine, reuse=True):
            with autocast(bank.device, amp_dtype):
                outputs.append(model(images).float())
    model.train(training)
    # The host waits for the device once, here.
    log_probs = team.rows(torch.cat(outputs).cpu(), len(items))
    if not log_probs.isfinite().all():
        raise UserError("the network's outputs are not finite: it diverged; a lower --lr may help")
    return Evaluation(log_probs, bank.labels.cpu().repeat_interleave(bank.repeats))


def confusion_rows(evaluation: Evaluation, classes: Sequence[str]) -> list[list[str]]:
    """The confusion matrix and the sensitivities as the cells of a table, header first."""
    classes = [printable(name) for name in classes]
    rows = [["true \\ predicted", *classes, "images", "sensitivity"]]
    counts = evaluation.confusion.tolist()
    for name, row, share in zip(classes, counts, evaluation.sensitivities, strict=True):
        percent = "none" if share is None else f"{share:.2f} %"
        rows.append([name, *map(str, row), str(sum(row)), percent])
    return rows
