"""A run: its epochs and evaluations, what it writes, and how it stops and goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, report
from .augment import ImageBank, epoch_batches
from .distributed import Team
from .errors import UserError
from .evaluation import Evaluation, log_probabilities
from .interruption import Interrupted, Requests
from .learner import Learner
from .recipe import TrainOptions, learning_rate


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: the epoch under way, from 0.
        step: optimiser steps done in that epoch.
        loss_sum: training loss summed over the images of those steps.
        images: their number.
        total_steps: optimiser steps since the run began.
        best_accuracy: best test accuracy so far, in per cent; -1 before the first evaluation.
        history: one result per evaluated epoch.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    total_steps: int = 0
    best_accuracy: float = -1.0
    history: list[report.EpochResult] = field(default_factory=list)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Progress:
        history = [report.EpochResult(**row) for row in state["history"]]
        return cls(**{**state, "history": history})


def check_output(folder: Path, *, resuming: bool = False) -> None:
    """Check that a run can be written to ``folder``, without creating anything.

    Raises:
        UserError: when it is no folder, is not writable, or holds another run.
    """
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"output folder {folder}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output folder {folder}: {parent} is not writable")
    if not resuming and (folder / "last.pt").exists():
        raise UserError(
            f"output folder {folder} holds another run; choose another, or go on with it: "
            f"--resume {folder / 'last.pt'}"
        )


class Trainer:
    """Trains one CNN_SP and writes what it learns to a folder.

    Args:
        options: the recipe.
        train: training images, augmented.
        test: test images; on the same device.
        classes: names of the classes.
        output: folder for checkpoints, ``args.json``, ``summary.csv``, pictures and TensorBoard's
            events; :meth:`run` creates it.
        team: the processes that train together, each with a trainer of its own.
    """

    def __init__(
        self,
        options: TrainOptions,
        train: ImageBank,
        test: ImageBank,
        classes: tuple[str, ...],
        output: Path,
        team: Team | None = None,
    ) -> None:
        self.options, self.train, self.test = options, train, test
        self.classes, self.output = classes, output
        self.team = team or Team()
        self.device = train.device
        self.learner = Learner(options, len(classes), self.device, self.team)
        self.progress = Progress()
        self._saved_at = time.monotonic()

    def run(self) -> Progress:
        """Train to the last epoch, or for ``max_steps``; returns where that ended.

        Raises:
            UserError: when the output folder cannot be written, or the loss is not finite.
            Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
        """
        if self.team.leads:
            self._write_options()
        board = (
            report.Board(self.output, first_step=self.progress.total_steps)
            if self.team.leads
            else None
        )
        try:
            with Requests() as requests:
                steps_left = self.options.max_steps
                while self.progress.epoch < self.options.epochs and steps_left != 0:
                    before = self.progress.total_steps
                    self._epoch(board, requests, steps_left)
                    if steps_left is not None:
                        steps_left -= self.progress.total_steps - before
        finally:
            if board is not None:
                board.close()
        return self.progress

    def _write_options(self) -> None:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(self.options), indent=2)
            (self.output / "args.json").write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {self.output}: {error.strerror}") from None

    def _epoch(
        self, board: report.Board | None, requests: Requests, steps_left: int | None
    ) -> None:
        """Train one epoch, or what is left of it, evaluate, and write everything."""
        progress = self.progress
        steps = math.ceil(len(self.train) / self.options.batch_size)

        start = time.perf_counter()
        before = progress.images
        lr = self._train_steps(board, requests, steps, steps_left)
        images_per_second = (progress.images - before) / (time.perf_counter() - start)
        train_loss = progress.loss_sum / progress.images
        test = self.evaluate()

        result = report.EpochResult(
            progress.epoch + 1,
            train_loss,
            test.loss,
            test.accuracy,
            lr,
            images_per_second,
            time.perf_counter() - start,
        )
        progress.history = [r for r in progress.history if r.epoch != result.epoch] + [result]
        if progress.step == steps:
            progress.epoch += 1
            progress.step = progress.images = 0
            progress.loss_sum = 0.0
        is_best = test.accuracy > progress.best_accuracy
        progress.best_accuracy = max(progress.best_accuracy, test.accuracy)
        self._save(also_best=is_best)
        if board is not None:
            self._report(board, result, test)

    def _train_steps(
        self,
        board: report.Board | None,
        requests: Requests,
        steps: int,
        steps_left: int | None,
    ) -> float:
        """Optimiser steps to the end of the epoch, ``steps_left`` at most; the last one's rate."""
        options, progress = self.options, self.progress
        last = steps if steps_left is None else min(steps, progress.step + steps_left)
        watch = _LossWatch(self.device, progress.loss_sum)
        batches = epoch_batches(
            len(self.train),
            options.batch_size,
            seed=options.seed,
            epoch=progress.epoch,
            first=progress.step,
            rank=self.team.rank,
            world_size=self.team.size,
        )
        # Where an interrupted run had done the last step already, there is nothing left to train.
        lr = learning_rate(options, progress.epoch, max(progress.step - 1, 0), steps)
        name = f"epoch {progress.epoch + 1}/{options.epochs}"
        bar = report.EpochProgress(name, steps, progress.step, silent=board is None)
        with bar:
            for _, images, labels in self.train.batches(batches, progress.epoch, reuse=True):
                if board is not None and progress.total_steps == 0:
                    board.first_batch(images)
                    board.graph(self.learner.model, images[:1])
                lr = learning_rate(options, progress.epoch, progress.step, steps)
                left = len(self.train) - progress.step * options.batch_size
                size = min(options.batch_size, left)
                loss = self.learner.step(
                    images, labels, batch_size=size, number=progress.total_steps, lr=lr
                )
                watch.add(loss, size, progress.total_steps)
                progress.step += 1
                progress.total_steps += 1
                progress.images += size
                bar.advance(size)
                if progress.step % options.log_interval == 0 or progress.step == last:
                    watch.send(progress.total_steps)
                for step, value in watch.arrived(wait=progress.step == last):
                    if not math.isfinite(value):
                        self._check_finite(watch)
                    bar.report(value)
                    if board is not None:
                        board.train_loss(value, step)
                self._stop_if_asked(requests, watch)
                if progress.step == last:
                    break
                if time.monotonic() - self._saved_at > options.checkpoint_interval:
                    self._save_within_epoch(watch)
        self._check_finite(watch)
        progress.loss_sum = watch.loss_sum()
        return lr

    def _stop_if_asked(self, requests: Requests, watch: _LossWatch) -> None:
        # The signal need not have come to every process, nor at the same step.
        number = self.team.highest(requests.signal or 0)
        if number == 0:
            return
        self._save_within_epoch(watch)
        raise Interrupted(
            number,
            f"{signal.Signals(number).name}: stopped in epoch {self.progress.epoch + 1} after step "
            f"{self.progress.step}; --resume {self.output / 'last.pt'} goes on from there",
        )

    def _save_within_epoch(self, watch: _LossWatch) -> None:
        self._check_finite(watch)
        self.progress.loss_sum = watch.loss_sum()
        self._save()

    def _check_finite(self, watch: _LossWatch) -> None:
        """Raise UserError, rather than save weights that are lost."""
        step = watch.first_bad_step()
        if step is None:
            return
        kept = self.output / "last.pt"
        back = f"; {kept} is from before it" if kept.exists() else ""
        raise UserError(
            f"the training loss was not finite in epoch {self.progress.epoch + 1}, at step "
            f"{step + 1} of the run; a lower --lr may help, or --warmup-epochs{back}"
        )

    def evaluate(self) -> Evaluation:
        """The network on the test images, each process taking its share."""
        options, team = self.options, self.team
        items = torch.arange(len(self.test))
        batch_size = math.ceil(options.batch_size / options.accumulate)
        mine = log_probabilities(
            self.learner.network,
            self.test,
            items[team.rank :: team.size],
            batch_size,
            self.learner.amp_dtype,
        )
        return Evaluation.of(team.rows(mine, len(items)), self.test.labels.cpu())

    def _report(self, board: report.Board, result: report.EpochResult, test: Evaluation) -> None:
        """Show an epoch's results in the folder, in TensorBoard and on the terminal."""
        progress, pool = self.progress, self.options.pool
        report.write_summary(progress.history, self.output / "summary.csv")
        title = f"CNN_SP, {pool} pooling"
        report.draw_curves(progress.history, self.output / "curves.png", title)
        report.draw_confusion(
            test, self.classes, self.output / "confusion.png", f"{title}, epoch {result.epoch}"
        )
        cuda = self.device.type == "cuda"
        memory_mib = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else None
        board.epoch(result, progress.total_steps, memory_mib)
        board.evaluation(test, self.test, self.classes, progress.total_steps)
        if progress.epoch == self.options.epochs:
            board.hyper_parameters(
                asdict(self.options),
                {
                    "last_accuracy": result.test_accuracy,
                    "last_loss": result.test_loss,
                    "lowest_loss": min(row.test_loss for row in progress.history),
                },
            )
        print(
            f"Epoch {result.epoch}/{self.options.epochs}: train loss {result.train_loss:.4f}, "
            f"lr {result.lr:.3g}, {result.images_per_second:.0f} images/s, "
            f"{result.seconds:.0f} s\n"
            f"Test set: average loss {test.loss:.4f}, "
            f"accuracy {test.correct}/{test.total} ({test.accuracy:.2f}%)",
            flush=True,
        )

    def _save(self, *, also_best: bool = False) -> None:
        self._saved_at = time.monotonic()
        if not self.team.leads:
            return
        state = {
            "format": checkpoint.FORMAT,
            "pooling": self.options.pool,
            "classes": list(self.classes),
            "options": asdict(self.options),
            "progress": asdict(self.progress),
            "items": len(self.train),
            **self.learner.state(),
        }
        checkpoint.save(state, self.output / "last.pt")
        if also_best:
            checkpoint.save(state, self.output / "best.pt")

    def restore(self, state: dict[str, Any], path: str | Path) -> None:
        """Go on from ``state``, which :func:`cnnsp.checkpoint.load` read from ``path``.

        Settings that the options give anew, such as the learning rate, hold from here on. The
        number of processes may be another one.

        Raises:
            UserError: when the state does not fit the options or the data, or is already at the
                last epoch.
        """
        before, options = TrainOptions(**state["options"]), self.options
        progress = Progress.from_dict(state["progress"])
        if before.opt != options.opt:
            raise UserError(f"checkpoint {path} was trained with --opt {before.opt}")
        if progress.epoch >= options.epochs:
            raise UserError(
                f"checkpoint {path} has finished {progress.epoch} of {options.epochs} epochs; "
                "a larger --epochs goes on"
            )
        # Within an epoch, the number of steps says which images are left only if these agree.
        here = (options.augment, options.batch_size, options.seed, len(self.train))
        there = (before.augment, before.batch_size, before.seed, state["items"])
        if progress.step > 0 and here != there:
            raise UserError(
                f"checkpoint {path} stopped within an epoch: it goes on only with the same images, "
                f"--augment {before.augment}, --batch-size {before.batch_size} and "
                f"--seed {before.seed}"
            )
        try:
            self.learner.load(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {path} does not fit: {str(error).splitlines()[0]}"
            ) from None
        self.progress = progress


class _LossWatch:
    """The losses of an epoch's steps, on the device, where adding them up stops nobody.

    Args:
        device: where the losses are computed.
        loss_sum: sum over the images of the epoch's earlier steps.
    """

    def __init__(self, device: torch.device, loss_sum: float) -> None:
        self._device = device
        self._sum = torch.tensor(loss_sum, device=device)
        self._loss = self._sum
        self._first_bad = torch.tensor(-1, device=device)
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, loss: Tensor, images: int, step: int) -> None:
        """Take in the mean loss of step ``step`` over ``images`` images."""
        self._loss = loss
        self._sum = self._sum + loss * images
        bad = ~torch.isfinite(loss) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, step, self._first_bad)

    def send(self, step: int) -> None:
        """Start the last loss on its way to the host, as that of ``step``."""
        if self._device.type != "cuda":
            self._sent.append((step, self._loss, None))
            return
        value = torch.empty((), pin_memory=True)
        value.copy_(self._loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent.append((step, value, event))

    def arrived(self, *, wait: bool = False) -> Iterator[tuple[int, float]]:
        """Steps and losses that have come to the host, or with ``wait`` all that were sent."""
        while self._sent:
            step, value, event = self._sent[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._sent.popleft()
            yield step, float(value)

    def loss_sum(self) -> float:
        """The sum over the epoch's images; waits for the device."""
        return float(self._sum)

    def first_bad_step(self) -> int | None:
        """The first step whose loss is not finite; waits for the device."""
        step = int(self._first_bad)
        return None if step < 0 else step
