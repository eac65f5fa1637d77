"""What a run leaves for its reader: pictures, TensorBoard's events, the progress."""

from __future__ import annotations

import errno
import importlib
import math
import os
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from torch import nn
from wcwidth import wcswidth

from cnnsp import CNN_SP, UserError
from cnnsp.cli import align, exit_status, importing, patience
from cnnsp.data.batches import ImageBank
from cnnsp.data.images import ImageSet
from cnnsp.results import board as boards
from cnnsp.results import pictures
from cnnsp.results.evaluation import Evaluation
from cnnsp.results.history import EpochResult

from .scripts import ENVIRONMENT, run_code


def random_evaluation(classes: int, images: int) -> Evaluation:
    """One that is right more often than not; the last class has no images."""
    labels = torch.randint(0, classes - 1, (images,))
    logits = torch.randn(images, classes) + 2 * nn.functional.one_hot(labels, classes)
    return Evaluation(logits.log_softmax(1), labels)


def make_history(epochs: int) -> list[EpochResult]:
    return [
        EpochResult(e, 1 / e, 0.5 + 0.1 * e, 70 + e, 0.01, 100.0, 5.0) for e in range(1, epochs + 1)
    ]


@pytest.fixture(autouse=True)
def _numbers_of_a_process(monkeypatch) -> None:
    """Each process numbers its event files from 0; of one second, 10 would be read before 9."""
    counter = event_file_writer.AtomicCounter(0)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard reads in ``folder``, images whole."""
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_curves_show_the_test_loss_with_the_training_loss() -> None:
    losses, accuracy = pictures.curves(make_history(3), "title").axes
    assert list(accuracy.lines[0].get_ydata()) == [71, 72, 73]
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert drawn["test"] == pytest.approx([0.6, 0.7, 0.8])
    assert drawn["training"] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize(
    "classes",
    [
        ("no", "yes"),
        ("daisy", "dandelion", "rose"),
        tuple(f"tea no. {n} of $a_{{rather}}$ long name" for n in range(20)),
    ],
    ids=len,
)
def test_confusion_matrix_is_readable(classes: tuple[str, ...]) -> None:
    """Every count stands in its cell, every name in the picture, whatever their number."""
    evaluation = random_evaluation(len(classes), 5000)
    figure = pictures.confusion(evaluation, classes, "a title " + "and/a/path" * 8)
    pictures.pixels(figure)  # lays it out
    (axis,) = figure.axes
    counts = evaluation.confusion.tolist()
    shown = {(int(y), int(x)): text for text in axis.texts for x, y in [text.get_position()]}
    cell = axis.get_window_extent().width / len(classes)
    for row, column in np.ndindex(len(classes), len(classes)):
        if (row, column) not in shown:
            assert counts[row][column] == 0
            continue
        text = shown[row, column]
        assert text.get_text() == str(counts[row][column])
        assert text.get_window_extent().width < cell
    (right,) = axis.child_axes
    labels = [*axis.get_xticklabels(), *axis.get_yticklabels(), *right.get_yticklabels()]
    percents = [f"{100 * row[place] / sum(row):.1f} %" for place, row in enumerate(counts[:-1])]
    assert [label.get_text() for label in labels] == [*classes, *classes, *percents, "none"]
    assert not any(label.get_parse_math() for label in axis.get_xticklabels())
    assert not any(label.get_parse_math() for label in axis.get_yticklabels())
    whole = figure.bbox
    assert figure.get_suptitle().splitlines()[-1] == f"accuracy {evaluation.accuracy:.2f} %"
    for text in (*labels, figure._suptitle):
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("installed", [False, True])
def test_class_names_that_matplotlibs_own_font_lacks(installed: bool, monkeypatch, capsys) -> None:
    """An installed font draws them; without one, a line says once why there are boxes.

    Chinese names, as a rule; a font that matplotlib brings along stands for theirs here.
    """
    monkeypatch.setattr(pictures, "_FONTS", ("no such font", *["STIXGeneral"] * installed))
    pictures._say_once_what_is_missing.cache_clear()
    pictures._installed_fonts.cache_clear()
    classes = ("\u1d84\u1d8a", "rose", "\u1d81")
    for _ in range(2):
        pictures.pixels(pictures.confusion(random_evaluation(3, 50), classes, "title"))
    error = capsys.readouterr().err
    assert error.count("\n") == (0 if installed else 1)
    assert ("boxes" in error) != installed
    pictures._installed_fonts.cache_clear()


def test_captions_name_true_and_predicted_class() -> None:
    log_probs = torch.tensor([[0.03, 0.97], [0.75, 0.25]]).log()
    images = torch.rand(2, 3, 8, 8)
    figure = pictures.mistakes(images, torch.tensor([0, 1]), log_probs, ("ox", "yak"))
    captions = [axis.get_xlabel() for axis in figure.axes]
    assert captions == ["ox → yak p=0.97", "yak → ox p=0.75"]
    names = ["a.jpg", f"{'x' * 50}.jpg"]
    figure = pictures.mistakes(images, torch.tensor([0, 1]), log_probs, ("ox", "yak"), names)
    named = [axis.get_xlabel().split("\n") for axis in figure.axes]
    assert named == [[captions[0], "a.jpg"], [captions[1], f"{'x' * 13}…{'x' * 10}.jpg"]]
    for axis, image in zip(figure.axes, images, strict=True):
        assert np.array_equal(axis.images[0].get_array(), image.permute(1, 2, 0).numpy())


def test_the_title_fits_above_one_image() -> None:
    log_probs = torch.tensor([[0.03, 0.97]]).log()
    figure = pictures.mistakes(torch.rand(1, 3, 8, 8), torch.tensor([0]), log_probs, ("ox", "yak"))
    pictures.pixels(figure)
    (title,) = figure.texts
    assert title.get_window_extent().width < figure.bbox.width


def test_board_shows_an_epoch(tmp_path: Path) -> None:
    """All in the run's own folder: a folder within would show as another run."""
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    bank = ImageBank(ImageSet(images, torch.tensor([0, 1, 1]), ("a", "b")))
    evaluation = Evaluation(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]).log(), bank.labels)
    board = boards.Board(tmp_path)
    board.train_loss(0.25, 7)
    board.epoch(make_history(1)[0], 7, memory_mib=512.0)
    confusion = pictures.confusion(evaluation, ("a", "b"), "title")
    pictures.write(confusion, tmp_path / "confusion.png")
    before = pictures.pixels(confusion)
    board.evaluation(confusion, evaluation, bank, 7)
    assert np.shares_memory(before, pictures.pixels(confusion))  # it is drawn once for both
    options = {"lr": 0.01, "pool": "max", "amp": None, "fast": True, "seeds": (1, 2)}
    board.hyper_parameters(options, {"best_accuracy": 71.0})
    board.close()

    assert all(path.is_file() for path in tmp_path.iterdir())
    seen = events(tmp_path)
    last = {tag: seen.Scalars(tag)[-1] for tag in seen.Tags()["scalars"]}
    assert {tag: event.value for tag, event in last.items()} == pytest.approx(
        {
            "train/loss": 0.25,
            "test/loss": 0.6,
            "test/accuracy": 71,
            "lr": 0.01,
            "images_per_second": 100,
            "memory_mib": 512,
            "best_accuracy": 71,
        }
    )
    assert last["test/loss"].step == 7
    assert set(seen.Tags()["images"]) == {"test/confusion", "test/most_wrong"}
    content = seen.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["lr"].number_value == 0.01
    texts = {name: told[name].string_value for name in ("pool", "fast", "seeds")}
    assert texts == {"pool": "max", "fast": "True", "seeds": "(1, 2)"}
    assert "amp" not in told


def test_board_shows_the_settings_of_the_last_end(tmp_path: Path) -> None:
    """Of several in a folder TensorBoard keeps the first."""
    for step, rate in enumerate((0.01, 0.05)):
        board = boards.Board(tmp_path, first_step=step)
        board.hyper_parameters({"lr": rate}, {"last_loss": rate})
        board.close()
    seen = events(tmp_path)
    content = seen.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["lr"].number_value == 0.05
    assert [event.value for event in seen.Scalars("last_loss")] == pytest.approx([0.05])


def test_a_run_after_one_that_left_no_checkpoint_is_shown_alone(tmp_path: Path) -> None:
    for loss in (math.inf, 1.0):
        board = boards.Board(tmp_path)
        board.train_loss(loss, 1)
        board.close()
    assert [event.value for event in events(tmp_path).Scalars("train/loss")] == [1.0]


def test_board_without_mistakes_shows_none(tmp_path: Path) -> None:
    bank = ImageBank(
        ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), ("a",))
    )
    board = boards.Board(tmp_path)
    evaluation = Evaluation(torch.zeros(1, 1), bank.labels)
    board.evaluation(pictures.confusion(evaluation, ("a",), "title"), evaluation, bank, 1)
    board.close()
    assert events(tmp_path).Tags()["images"] == ["test/confusion"]


@pytest.mark.parametrize("pooling", ["stochastic", "max"])
def test_graph_does_not_disturb_training(tmp_path: Path, pooling: str) -> None:
    """Not even of a network whose pools draw in evaluation, too."""
    model = CNN_SP(pooling=pooling).train()
    model.pool.sample_in_eval = True
    images = torch.randn(2, 3, 256, 256)
    before = torch.get_rng_state()
    board = boards.Board(tmp_path)
    board.graph(model, images)
    board.close()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    names = [node.name for node in events(tmp_path).Graph().node]
    for layer in ("conv1", "conv5", "pool", "fc2"):
        assert any(f"[{layer}]" in name for name in names), layer


class _Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not with me")


def test_graph_that_cannot_be_drawn_ends_nothing(tmp_path: Path, capsys) -> None:
    board = boards.Board(tmp_path)
    board.graph(_Untraceable(), torch.zeros(1, 3))
    board.train_loss(math.pi, 1)
    board.close()
    out, error = capsys.readouterr()
    assert out == ""
    assert "no graph of the network: not with me" in error
    assert events(tmp_path).Tags()["scalars"] == ["train/loss"]


def test_progress_elsewhere_than_on_a_terminal(capsys) -> None:
    with boards.EpochProgress("epoch 1/2", 5, done=2, rest=8) as progress:
        for step in range(3):
            progress.advance(8)
            if step != 1:
                progress.report(0.5 / (step + 1))
    out, error = capsys.readouterr()
    first, last = out.splitlines()
    assert first.startswith("epoch 1/2  step 3/5  loss 0.5000  ")
    assert last.startswith("epoch 1/2  step 5/5  loss 0.1667  ")
    assert re.search(r"  \d+ images/s  [0-9:]+ left$", last)
    assert error == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has other terminals")
@pytest.mark.parametrize("columns", [0, 80])
def test_progress_on_a_terminal(columns: int, monkeypatch, capsys) -> None:
    """It fits 80 columns; where nothing tells their number, as in Docker, there are lines."""
    import fcntl
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with boards.EpochProgress("epoch 12/30", 1144, done=1100, rest=9999) as progress:
            progress.advance(256)
            progress.report(0.5)
            monkeypatch.undo()
            shown = capsys.readouterr().out
            while columns and "loss" not in shown:
                shown += os.read(master, 9999).decode()
    os.close(master)
    assert "loss 0.5000" in shown
    assert shown.rstrip().endswith(" left")


def test_the_time_left_is_that_of_the_run(monkeypatch, capsys) -> None:
    """Two of five steps take 20 s; 5 more of this epoch and the next are left."""
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(boards.time, "perf_counter", lambda: next(clock))
    with boards.EpochProgress("epoch 1/2", 5, done=1, rest=7) as progress:
        progress.advance(8)
        progress.advance(8)
        progress.report(0.5)
    assert capsys.readouterr().out == ("epoch 1/2  step 3/5  loss 0.5000  1 images/s  00:50 left\n")


def test_names_that_are_too_long_are_shortened() -> None:
    """A picture stays a picture, and names with one beginning differ."""
    long = [f"{'very ' * 40}{number} long" for number in range(3)]
    chinese = "玫瑰" * 30
    figure = pictures.confusion(random_evaluation(4, 50), [*long, chinese], "title")
    assert max(figure.get_size_inches()) < 12
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(set(shown)) == 4
    assert all(wcswidth(name) <= 40 and "…" in name for name in shown)
    assert pictures.shortened("rose") == "rose"


def test_what_takes_long_is_announced(capsys) -> None:
    with patience("compiling", seconds=60):
        pass
    assert capsys.readouterr().out == ""
    with patience("compiling", seconds=0.01):
        time.sleep(0.5)
    assert capsys.readouterr() == ("compiling\n", "")


def test_what_the_system_refuses_is_one_line(capsys, monkeypatch) -> None:
    def work() -> None:
        Path("x" * 300).stat()

    assert exit_status("x", work) == 2
    error = capsys.readouterr().err
    assert error.startswith("x: error: cannot use xxx")
    assert error.count("\n") == 1
    monkeypatch.setattr(sys, "stderr", None)  # closed, as by 2>&-
    assert exit_status("x", lambda: print("text", file=sys.stderr)) == 0
    assert capsys.readouterr().out == ""


def test_threads_that_cannot_write_say_nothing(capsys) -> None:
    """Of a full disk and a reader that is gone, the main thread speaks."""

    def fail() -> None:
        raise BrokenPipeError

    def work() -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    before = threading.excepthook
    assert exit_status("x", work) == 0
    assert capsys.readouterr().err == ""
    assert threading.excepthook is before


def test_packages_that_are_missing_are_named() -> None:
    text = """'no_such_package': pip install -e "\\.\\[train\\]"$"""
    with pytest.raises(UserError, match=text), importing("train.py"):
        importlib.import_module("no_such_package")


def test_a_notebook_s_backend_is_left_alone() -> None:
    """Which no other environment can import; no figure here needs it."""
    code = "from cnnsp.cli import exit_status\n"
    code += "exit(exit_status('x', lambda: __import__('matplotlib')))"
    environment = {**ENVIRONMENT, "MPLBACKEND": "module://no_such_notebook.backend"}
    run_code(code, env=environment, check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_a_full_disk_under_the_output_is_named() -> None:
    code = "from cnnsp.cli import exit_status\n"
    code += "exit(exit_status('x', lambda: print('text')))"
    with open("/dev/full", "w") as full:
        done = run_code(code, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    message = f"x: error: cannot write the output: {os.strerror(errno.ENOSPC)}\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_tables_are_aligned() -> None:
    """By columns of the terminal, of which a Chinese character takes two."""
    rows = [["file", "class", "p"], ["玫瑰.jpg", "雏菊", "0.5"], ["b", "rose", "0.25"]]
    assert align(rows, left=2) == [
        "file      class     p",
        "玫瑰.jpg  雏菊    0.5",
        "b         rose   0.25",
    ]
