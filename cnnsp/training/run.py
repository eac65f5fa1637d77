"""A run: its epochs and evaluations, what it writes, and how it stops and goes on."""

from __future__ import annotations

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

from .. import files
from ..data.batches import ImageBank, epoch_batches
from ..errors import UserError
from ..results import board as report
from ..results import pictures as figures
from ..results.evaluation import Evaluation, log_probabilities
from ..results.history import EpochResult, write_summary
from . import checkpoint
from .interruption import Interrupted, Requests
from .processes import Team
from .recipe import TrainOptions, learning_rate
from .step import Learner


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
    history: list[EpochResult] = field(default_factory=list)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Progress:
        history = [EpochResult(**row) for row in state["history"]]
        return cls(**{**state, "history": history})


def check_output(folder: Path, resumed: Path | None = None) -> None:
    """Check that a run can be written to ``folder``, without creating anything.

    Args:
        folder: output folder.
        resumed: the checkpoint that the run goes on from; its own folder may hold it.

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
    last = folder / "last.pt"
    if last.exists() and (resumed is None or last.resolve() != resumed.resolve()):
        raise UserError(
            f"output folder {folder} holds another run; choose another, or go on with it: "
            f"--resume {last}"
        )


# What is due beside a signal, whose numbers are larger: 2 for SIGINT, 15 for SIGTERM.
_CHECKPOINT = 1


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
        try:
            self._run()
        except OSError as error:
            raise UserError(f"cannot write to {self.output}: {error.strerror}") from None
        return self.progress

    def _run(self) -> None:
        board = None
        if self.team.leads:
            self.output.mkdir(parents=True, exist_ok=True)
            files.write_json(self.output / "args.json", asdict(self.options))
            board = report.Board(self.output, first_step=self.progress.total_steps)
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

        result = EpochResult(
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
        if board is not None:
            # Before the checkpoint: a run that is killed in between does the epoch again.
            write_summary(progress.history, self.output / "summary.csv")
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
                    bar.report(value)
                    if board is not None:
                        board.train_loss(value, step)
                self._do_what_is_due(requests, watch)
                if progress.step == last:
                    break
        self._check_finite(watch)
        progress.loss_sum = watch.loss_sum()
        return lr

    def _do_what_is_due(self, requests: Requests, watch: _LossWatch) -> None:
        """Save within the epoch, and stop there if a signal asks for it."""
        due = time.monotonic() - self._saved_at > self.options.checkpoint_interval
        wish = requests.signal or (_CHECKPOINT if due or watch.lost else 0)
        # Signals, clocks and losses need not come to every process at the same step.
        wish = self.team.highest(wish)
        if wish == 0:
            return
        self._check_finite(watch)
        self.progress.loss_sum = watch.loss_sum()
        self._save()
        if wish != _CHECKPOINT:
            raise Interrupted(
                wish,
                f"{signal.Signals(wish).name}: stopped in epoch {self.progress.epoch + 1} after "
                f"step {self.progress.step}; --resume {self.output / 'last.pt'} goes on from there",
            )

    def _check_finite(self, watch: _LossWatch) -> None:
        """Raise UserError, rather than save weights that are lost."""
        step = watch.first_bad_step()
        if step is not None:
            what = "training loss was"
        elif not self.learner.is_finite():
            what, step = "weights were", self.progress.total_steps - 1
        else:
            return
        kept = self.output / "last.pt"
        back = f"; {kept} is from before it" if kept.exists() else ""
        raise UserError(
            f"the {what} not finite in epoch {self.progress.epoch + 1}, at step {step + 1} of the "
            f"run; a lower --lr may help, or --warmup-epochs{back}"
        )

    def evaluate(self) -> Evaluation:
        """The network on the test images, each process taking its share."""
        options, team = self.options, self.team
        items = torch.arange(len(self.test))
        batch_size = math.ceil(options.batch_size / options.accumulate / team.size)
        mine = log_probabilities(
            self.learner.network,
            self.test,
            items[team.rank :: team.size],
            batch_size,
            self.learner.amp_dtype,
        )
        return Evaluation.of(team.rows(mine, len(items)), self.test.labels.cpu())

    def _report(self, board: report.Board, result: EpochResult, test: Evaluation) -> None:
        """Show an epoch's results in the folder, in TensorBoard and on the terminal."""
        progress, pool = self.progress, self.options.pool
        title = f"CNN_SP, {pool} pooling"
        figures.write(figures.curves(progress.history, title), self.output / "curves.png")
        confusion = figures.confusion(test, self.classes, f"{title}, epoch {result.epoch}")
        figures.write(confusion, self.output / "confusion.png")
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
        # In this order, for a run that is killed in between does the epoch again.
        if also_best:
            checkpoint.save(state, self.output / "best.pt")
        checkpoint.save(state, self.output / "last.pt")

    def restore(self, state: dict[str, Any], path: str | Path) -> None:
        """Go on from ``state``, which :func:`cnnsp.checkpoint.load` read from ``path``.

        Settings that the options give anew, such as the learning rate, hold from here on. The
        number of processes may be another one.

        Raises:
            UserError: when the state does not fit the options or the data, or is already at the
                last epoch.
        """
        try:
            before = TrainOptions(**state["options"])
            progress = Progress.from_dict(state["progress"])
        except (KeyError, TypeError):
            raise UserError(f"checkpoint {path} was written by another version") from None
        options = self.options
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
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"checkpoint {path} does not fit: {reason}") from None
        self.progress = progress


class _LossWatch:
    """The losses of an epoch's steps, on the device, where adding them up stops nobody.

    Args:
        device: where the losses are computed.
        loss_sum: sum over the images of the epoch's earlier steps.

    Attributes:
        lost: whether a loss that came to the host was not finite.
    """

    def __init__(self, device: torch.device, loss_sum: float) -> None:
        self._device = device
        self._sum = torch.tensor(loss_sum, device=device)
        self._loss = self._sum
        self._first_bad = torch.tensor(-1, device=device)
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.lost = False

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
        event.record(torch.cuda.current_stream(self._device))
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
            loss = float(value)
            self.lost |= not math.isfinite(loss)
            yield step, loss

    def loss_sum(self) -> float:
        """The sum over the epoch's images; waits for the device."""
        return float(self._sum)

    def first_bad_step(self) -> int | None:
        """The first step whose loss is not finite; waits for the device."""
        step = int(self._first_bad)
        return None if step < 0 else step
