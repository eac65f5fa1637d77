"""A study: train.py for recipes, pools and seeds, one run after the other."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from .. import files
from ..data.batches import ImageBank
from ..data.images import load_folder
from ..errors import UserError, quoted
from ..interruption import ENDS, Interrupted, Requests
from ..training import checkpoint
from ..training.recipe import TrainOptions
from . import study_report
from .evaluation import evaluate
from .history import EpochResult
from .inference import load_network

# Flags of train.py that the study itself gives.
OWN_FLAGS = ("--recipe", "--pool", "--seed", "--data-dir", "--output-dir", "--device", "--resume")
_BATCH = 64


class Case(NamedTuple):
    """One run of a study; as text, the name of its folder."""

    recipe: str
    pool: str
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe}-{self.pool}-{self.seed}"


def cases(recipes: Sequence[str], pools: Sequence[str], seeds: int) -> list[Case]:
    """Seed by seed, so that a study that is interrupted can compare what it has."""
    return [Case(r, p, s) for s in range(seeds) for r in recipes for p in pools]


def evaluate_run(folder: Path, case: Case, machine: str) -> dict[str, Any]:
    """What came out of the run in ``folder``, by its ``last.pt``: a row of ``runs.csv``.

    Accuracies and sensitivities are in per cent; those of the training images, as they are, and
    the sensitivities are computed here, on the CPU and in fp32, so that no second process takes
    memory of the GPU. ``seconds``: of training and evaluation; of an epoch that was interrupted,
    only since then. ``machine``: of a run that went on elsewhere, where it ended.

    Raises:
        UserError: when the checkpoint or the images cannot be read.
    """
    path = folder / "last.pt"
    network = load_network(path)
    state = network.state
    options = TrainOptions(**state["options"])
    history = [EpochResult(**row) for row in state["progress"]["history"]]
    train, test = load_folder(options.data_dir, validate=options.validate)
    checkpoint.check_classes(state, path, test.classes)
    model = network.model.to(memory_format=torch.channels_last)
    on_train, on_test = (
        evaluate(model, ImageBank(images, channels_last=True), _BATCH) for images in (train, test)
    )
    sensitivities = zip(network.classes, on_test.sensitivities, strict=True)
    return {
        **case._asdict(),
        "epochs": history[-1].epoch,
        "train_images": len(train),
        "test_images": len(test),
        "test_accuracy": history[-1].test_accuracy,
        "test_loss": history[-1].test_loss,
        "best_test_accuracy": max(row.test_accuracy for row in history),
        "lowest_test_loss": min(row.test_loss for row in history),
        "train_accuracy": on_train.accuracy,
        "train_loss": on_train.loss,
        **{f"sensitivity {name}": share for name, share in sensitivities},
        "seconds": round(sum(row.seconds for row in history)),
        "machine": machine,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_name(device: torch.device) -> str:
    """The GPU's name; of a CPU, what PyTorch knows of its instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} ({cpu})"


@dataclass(frozen=True)
class Study:
    """The runs of train.py in one folder."""

    script: Path  # train.py
    folder: Path  # of the study; each run has a folder in it
    data_dir: Path  # of the photographs
    flags: Sequence[str]  # other flags of train.py, the same for all runs
    device: str | None  # of train.py; None leaves the choice to it
    machine: str  # name of what the runs are made on, for the results
    started_with: str  # the command that started the study, for study.md

    def check(self, planned: Iterable[Case]) -> None:
        """Check that the runs in the folder were started with the same flags; raises UserError."""
        for flag in self.flags:
            if flag.split("=")[0] in OWN_FLAGS:
                raise UserError(f"{flag} is a flag that the study gives itself; leave it out")
        for path in sorted(self.folder.glob("*/flags.json")):
            theirs = files.read_json(path)
            if path.with_name("last.pt").exists() and theirs != self._recorded_flags():
                raise UserError(
                    f"{path.parent} was run with {quoted(*theirs)}: give the same "
                    "--data-dir, and the rest after --, or another --output-dir"
                )
        for case in planned:
            folder = self.folder / str(case)
            if (folder / "last.pt").exists() and not (folder / "flags.json").exists():
                raise UserError(f"{folder} holds a run of something else: another --output-dir")

    def _recorded_flags(self) -> list[str]:
        return ["--data-dir", str(self.data_dir), *self.flags]

    def _train(self, case: Case, place: str, requests: Requests) -> int:
        """Train ``case``, or go on with it; returns the exit status of train.py."""
        folder = self.folder / str(case)
        command = [sys.executable, str(self.script), "--recipe", case.recipe, "--pool", case.pool]
        command += ["--seed", str(case.seed), "--data-dir", str(self.data_dir)]
        command += ["--output-dir", str(folder)]
        if self.device is not None:
            command += ["--device", self.device]
        command += self.flags
        if (folder / "last.pt").exists():
            command += ["--resume", str(folder / "last.pt")]
        files.make_folder(folder)
        files.write_json(folder / "flags.json", self._recorded_flags())
        print(f"{place} {quoted(*command)}", flush=True)
        return call(command, requests)

    def run(self, planned: Sequence[Case]) -> list[str]:
        """Run what is not finished, in this order; returns what failed, and how.

        Raises:
            UserError: when the study cannot be written.
            Interrupted: on Ctrl-C or SIGTERM, after the run has written its checkpoint.
        """
        failures = []
        with Requests("the run under way is stopped and saved first") as requests:
            for number, case in enumerate(planned, start=1):
                folder, place = self.folder / str(case), f"[{number}/{len(planned)}]"
                where, status = f"{case}, run {number} of {len(planned)}", 0
                _stop_if_asked(requests, where)
                if (folder / "result.json").exists():
                    print(f"{place} {case} is finished", flush=True)
                    continue
                try:
                    if not _is_trained(folder):
                        status = self._train(case, place, requests)
                    _stop_if_asked(requests, where)
                    if status != 0:
                        raise UserError(f"exit status {status}")
                    result = evaluate_run(folder, case, self.machine)
                except UserError as error:
                    failures.append(f"{case} ({error})")
                    # What train.py refuses at its start, it would refuse of the others as well.
                    if status == 2 and not (folder / "last.pt").exists():
                        break
                    continue
                files.write_json(folder / "result.json", result)
                self.write()
                print(
                    f"{place} {case}: test accuracy {result['test_accuracy']:.2f} %, "
                    f"training accuracy {result['train_accuracy']:.2f} %",
                    flush=True,
                )
        self.write()
        return failures

    def write(self) -> None:
        """Write ``runs.csv``, ``epochs.csv``, ``study.md`` and ``study.png`` of all finished runs.

        Raises:
            UserError: when one cannot be written, or a result cannot be read.
        """
        paths = sorted(self.folder.glob("*/result.json"))
        if not paths:
            return
        results = [files.read_json(path) for path in paths]
        histories = [
            study_report.read_csv(path.with_name("summary.csv")).assign(
                recipe=row["recipe"], pool=row["pool"], seed=row["seed"]
            )
            for path, row in zip(paths, results, strict=True)
        ]
        tables = {"runs.csv": pd.DataFrame(results), "epochs.csv": pd.concat(histories)}
        for name, rows in tables.items():
            text = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
            files.write(self.folder / name, text.encode(errors="backslashreplace"))
        runs, epochs = (study_report.read(self.folder / name) for name in tables)
        flags = quoted(*self._recorded_flags())
        text = study_report.document(runs, self.started_with, flags)
        files.write(self.folder / "study.md", text.encode(errors="backslashreplace"))
        study_report.draw(runs, epochs, self.folder / "study.png")


def _is_trained(folder: Path) -> bool:
    """Whether an earlier study ended after the run and before its evaluation."""
    if not (folder / "last.pt").exists():
        return False
    state = checkpoint.load(folder / "last.pt")
    return bool(state["progress"]["epoch"] >= state["options"]["epochs"])


def _stop_if_asked(requests: Requests, where: str) -> None:
    if requests.signal is not None:
        name = signal.Signals(requests.signal).name
        raise Interrupted(
            requests.signal, f"{name}: stopped at {where}; the same command goes on from there"
        )


def call(command: Sequence[str], requests: Requests) -> int:
    """Run a command to its end and return its exit status.

    Ctrl-C comes to it from the terminal; other signals are passed on.
    """
    with subprocess.Popen(command) as process:
        passed_on = False
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if requests.signal and requests.signal in ENDS and not passed_on:
                    process.send_signal(requests.signal)
                    passed_on = True
