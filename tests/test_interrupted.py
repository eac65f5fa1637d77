"""Runs that are killed, interrupted or out of disk, and what is left of them.

The number of kills is 2, or that of the environment variable ``CNNSP_KILLS``.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnsp.data import images
from cnnsp.errors import UserError
from cnnsp.interruption import Requests
from cnnsp.results import board
from cnnsp.training import checkpoint, run
from cnnsp.training.step import Learner

from .scripts import ENVIRONMENT, ROOT, load_script, run_code
from .test_train import assert_equal, load, make_photographs

TRAIN = str(ROOT / "scripts/train.py")
KILLS = int(os.environ.get("CNNSP_KILLS", "2"))
EPOCHS = 1 + KILLS
main = load_script("train").main


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("photos"))


def recipe(photos: Path, output: Path, epochs: int) -> list[str]:
    """Everything that keeps a state: moments, a schedule, averages, draws and augmentation."""
    # Seven steps an epoch, the last of two images.
    flags = ["--augment", "random", "--repeats", "5", "-b", "3", "--epochs", str(epochs)]
    flags += ["--opt", "adam", "--lr", "0.001", "--ema", "0.9", "--dropout", "0.5"]
    flags += ["--schedule", "cosine", "--warmup-epochs", "1"]
    flags += ["--device", "cpu", "--log-interval", "1", "--checkpoint-interval", "0"]
    return [*flags, "--data-dir", str(photos), "--output-dir", str(output)]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    assert main([*recipe(photos, output, EPOCHS), "--checkpoint-interval", "3600"]) == 0
    return output


def assert_same_run(one: Path, other: Path) -> None:
    a, b = load(one / "last.pt"), load(other / "last.pt")
    for part in ("model", "average", "optimizer"):
        assert_equal(a[part], b[part])
    for key in ("epoch", "step", "total_steps", "best_accuracy", "best_epoch"):
        assert a["progress"][key] == b["progress"][key]
    timeless = ("epoch", "train_loss", "test_loss", "test_accuracy", "lr")
    rows, others = a["progress"]["history"], b["progress"]["history"]
    assert [[r[k] for k in timeless] for r in rows] == [[r[k] for k in timeless] for r in others]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_run_equals_undisturbed_run(photos: Path, whole: Path, tmp_path: Path) -> None:
    """Killed at random moments, in steps, evaluations and checkpoints, and resumed each time."""
    output = tmp_path / "parts"
    first = [sys.executable, TRAIN, *recipe(photos, output, EPOCHS)]
    resume = [*first[:2], "--device", "cpu", "--resume", str(output / "last.pt")]
    moments = random.Random(0)
    for kill in range(KILLS):
        command = resume if (output / "last.pt").exists() else first
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert process.stdout is not None
        for line in process.stdout:
            if "  step " in line:
                break
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.wait()
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL, f"the run was over before kill {kill + 1}"
    assert main((resume if (output / "last.pt").exists() else first)[2:]) == 0
    assert_same_run(whole, output)


@pytest.mark.slow
def test_signal_saves_the_run_and_ends_it(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Ctrl-C in the first epoch, SIGTERM and a terminal that closes in the second."""
    step, last = Learner.step, tmp_path / "last.pt"
    arguments = [*recipe(photos, tmp_path, EPOCHS), "--checkpoint-interval", "3600"]
    arguments += ["--log-interval", "3"]  # so that some losses are not yet added up
    for number, status, when, where in [
        (signal.SIGINT, 130, 3, "1 after step 4"),
        (signal.SIGTERM, 143, 8, "2 after step 2"),
        (getattr(signal, "SIGHUP", signal.SIGTERM), 129, 10, "2 after step 4"),
    ]:
        before = signal.getsignal(number)

        def step_and_signal(self: Learner, *args, sent=number, at=when, **kwargs):
            if kwargs["number"] == at:
                signal.raise_signal(sent)
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "step", step_and_signal)
            assert main(arguments) in (status, 128 + number)
        error = capsys.readouterr().err
        assert f"{number.name}: a checkpoint is written as soon as the step is done" in error
        assert ("Ctrl-C again ends it without" in error) == (number == signal.SIGINT)
        assert f"{number.name}: stopped in epoch {where}; --resume {last} goes on" in error
        assert load(last)["progress"]["total_steps"] == when + 1
        assert signal.getsignal(number) == before
        arguments = ["--device", "cpu", "--resume", str(last)]
    assert main(arguments) == 0
    assert_same_run(whole, tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_what_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Requests("nothing follows") as requests:
            signal.raise_signal(signal.SIGHUP)
        assert requests.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("where", ["decoding", "evaluation"])
def test_a_signal_acts_while_the_run_waits(
    photos: Path, tmp_path: Path, monkeypatch, capsys, where: str
) -> None:
    """For a disk that does not answer, or in an evaluation of many images, whatever it calls: numba
    compiles again without its cache where that raises an Exception."""
    release, asked = threading.Event(), threading.Event()

    def block(*args, **kwargs):
        if not asked.is_set():
            asked.set()
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with contextlib.suppress(Exception):
            release.wait(60)
        return decode(*args, **kwargs)

    monkeypatch.setattr(images, "HOST_BUDGET", 0)
    decode = images.decode
    if where == "decoding":
        monkeypatch.setattr(images, "decode", block)
    else:
        monkeypatch.setattr(run, "evaluate", block)
    start = time.monotonic()
    flags = ["--augment", "random", "--repeats", "1", "--epochs", "1", "-b", "4"]
    flags += ["--schedule", "cosine", "--device", "cpu"]
    flags += ["--data-dir", str(photos), "--output-dir", str(tmp_path / "run")]
    try:
        assert main(flags) == 143
    finally:
        release.set()
    assert time.monotonic() - start < 55
    done = 0 if where == "decoding" else 1
    assert f"SIGTERM: stopped in epoch 1 after step {done}" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["--device", "cpu", "--resume", str(tmp_path / "run")]) == 0
    (row,) = load(tmp_path / "run" / "last.pt")["progress"]["history"]
    assert row["lr"] == 0.01  # of the step, not of what would follow
    assert math.isnan(row["images_per_second"]) == (where == "evaluation")
    assert (" images/s, " in capsys.readouterr().out) != (where == "evaluation")


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
@pytest.mark.parametrize("what", ["pipe", "terminal"])
def test_a_reader_that_goes_is_no_full_disk(
    photos: Path, tmp_path: Path, monkeypatch, capsys, what: str
) -> None:
    """As `| head` does, or a terminal that a run outlives; what was trained is kept."""
    lines, reader = 0, os.pipe()
    with os.fdopen(reader[1], "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        report = board.EpochProgress.report

        def close_and_report(self, loss: float) -> None:
            nonlocal lines
            lines += 1
            if lines == 3:
                os.close(reader[0])
                if what == "terminal":
                    raise OSError(errno.EIO, "Input/output error")
            report(self, loss)

        monkeypatch.setattr(board.EpochProgress, "report", close_and_report)
        assert main([*recipe(photos, tmp_path / "run", 2), "--checkpoint-interval", "60"]) == 141
    error = capsys.readouterr().err
    assert "nobody reads the output any more: stopped in epoch 1 after step 3" in error
    assert "cannot write" not in error
    assert load(tmp_path / "run" / "last.pt")["progress"]["total_steps"] == 3


@pytest.mark.skipif(os.name == "nt", reason="signals are otherwise there")
def test_ctrl_c_during_imports_is_one_line() -> None:
    code = (
        "import os, signal\nfrom cnnsp.cli import importing\n"
        "with importing('train.py'):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT); print('went on')\n"
        "    except BaseException: print('a library caught it')"
    )
    done = run_code(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "train.py: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="signals are otherwise there")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_nothing_is_left_of_what_ends_before_it_writes(
    photos: Path, tmp_path: Path, name: str, status: int
) -> None:
    """A signal while PyTorch is imported or a photograph is decoded."""
    code = (
        "import os, runpy, signal, sys\nfrom PIL import Image\n"
        "def end(*_): os.kill(os.getpid(), signal.{})\n"
        "class Finder: find_spec = lambda self, name, *_: name == 'torch' and end() or None\n"
        "sys.meta_path.insert(0, Finder())\nImage.open = end\n"
        "sys.argv = {}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    chosen = ["--train", "1", "--test", "1", "--classes", "daisy"]
    prepare = ["prepare_flowers.py", str(photos / "train_data"), *chosen, "--output", "set"]
    for arguments, sent, ends in (
        (["train.py", "--data-dir", str(photos)], "SIGINT", 130),
        (prepare, name, status),
    ):
        script, *rest = arguments
        command = code.format(sent, [str(ROOT / "scripts" / script), *rest])
        done = run_code(command, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (ends, 1), done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a mount namespace is Linux's")
def test_little_shared_memory_is_enough(photos: Path, tmp_path: Path) -> None:
    """Docker gives 64 MiB; here it is 64 KiB, less than an image."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    code = "import sys; from cnnsp.data import images; images.HOST_BUDGET = 0\n"
    code += f"import runpy; sys.argv = {[TRAIN, *recipe(photos, tmp_path / 'run', 1)]!r}\n"
    code += "sys.argv += ['--max-steps', '2']; runpy.run_path(sys.argv[0], run_name='__main__')"
    shell = 'mount -t tmpfs -o size=64k none /dev/shm || exit 77; exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", shell, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    if done.returncode in (1, 77):
        pytest.skip(f"no mount namespace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "images in files, decoded batch by batch" in done.stdout


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before_it(
    photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    step = Learner.step

    def spoil(self: Learner, images: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        images = images * float("nan") if kwargs["number"] == 5 else images
        return step(self, images, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", spoil)
    output = tmp_path / "run"
    assert main([*recipe(photos, output, 2), "--log-interval", "4"]) == 2
    error = capsys.readouterr().err
    assert "the training loss was not finite in epoch 1, at step 6 of the run" in error
    assert f"{output / 'last.pt'} is from before it" in error
    assert error.count("\n") == 1
    state = load(output / "last.pt")
    assert state["progress"]["total_steps"] == 5
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_out_of_memory_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch, capsys, allocate
) -> None:
    """Whoever asks for it: PyTorch or NumPy."""
    monkeypatch.setattr(Learner, "step", lambda *_, **__: allocate(2**59))
    assert main(recipe(photos, tmp_path / "run", 1)) == 2
    error = capsys.readouterr().err
    assert "error: out of memory: --accumulate computes" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_missing_compiler_is_one_line(photos: Path, tmp_path: Path) -> None:
    flags = [*recipe(photos, tmp_path / "run", 1), "--torchcompile"]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *flags]
    # A cache of its own, for another run's would do without a compiler.
    lacking = {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | lacking)
    assert done.returncode == 2
    assert "--torchcompile needs a C++ compiler" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("interval", ["0", "3600"])
def test_weights_that_are_not_finite_are_not_saved(
    photos: Path, tmp_path: Path, monkeypatch, capsys, interval: str
) -> None:
    """The last step of an epoch spoils them: no loss of the epoch can show it."""
    step = Learner.step

    def spoil(self: Learner, *args, **kwargs) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if kwargs["number"] == 6:
            with torch.no_grad():
                self.model.fc2.bias[0] = float("inf")
        return loss

    monkeypatch.setattr(Learner, "step", spoil)
    output = tmp_path / "run"
    assert main([*recipe(photos, output, 2), "--checkpoint-interval", interval]) == 2
    assert "the weights were not finite in epoch 1, at step 7 of the run" in capsys.readouterr().err
    if interval != "0":
        assert not (output / "last.pt").exists()
        return
    state = load(output / "last.pt")
    assert state["progress"]["total_steps"] == 6
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_disk_that_is_full_keeps_the_checkpoint_before(
    photos: Path, tmp_path: Path, capsys
) -> None:
    """The disk here is a limit on the size of files, which a checkpoint of 20 MB exceeds."""
    import resource

    output = tmp_path / "run"
    assert main([*recipe(photos, output, 2), "--max-steps", "1"]) == 0
    before = (output / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        capsys.readouterr()
        assert main(["--device", "cpu", "--resume", str(output / "last.pt")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    reason = os.strerror(errno.EFBIG)
    assert f"train.py: error: cannot write {output / 'last.pt'}: {reason}; the one" in error
    assert "the one before it is intact" in error
    assert error.count("\n") == 1
    assert (output / "last.pt").read_bytes() == before
    assert [path.name for path in output.glob("*last.pt*")] == ["last.pt"]


def test_a_table_that_is_locked_does_not_end_the_run(photos: Path, tmp_path: Path, capsys) -> None:
    """As on Windows by a spreadsheet that shows it."""
    output = tmp_path / "run"
    for name in ("summary.csv", "curves.png"):
        (output / f"unfinished-{name}").mkdir(parents=True)  # nothing can be written there
    assert main([*recipe(photos, output, 1), "--max-steps", "1"]) == 0
    error = capsys.readouterr().err
    assert f"warning: cannot write {output / 'summary.csv'}: " in error
    assert f"warning: cannot write {output / 'curves.png'}: " in error
    assert checkpoint.load(output)["progress"]["total_steps"] == 1


@pytest.mark.slow
def test_the_best_may_have_been_stopped_within_an_epoch(
    photos: Path, tmp_path: Path, capsys
) -> None:
    """The history drops it; `best.pt`, and what is said of it, stay."""
    output = tmp_path / "run"
    assert main([*recipe(photos, output, 1), "--max-steps", "1"]) == 0
    for name in ("last.pt", "best.pt"):
        state = load(output / name)
        state["progress"]["best_accuracy"] = 101.0
        checkpoint.save(state, output / name)
    before = (output / "best.pt").read_bytes()
    assert main(["--device", "cpu", "--resume", str(output)]) == 0
    assert "Best test accuracy 101.00 % after epoch 0.1429, last " in capsys.readouterr().out
    assert (output / "best.pt").read_bytes() == before


def test_folder_that_cannot_be_written_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"before")
    path.with_name("unfinished-last.pt").mkdir()  # nothing can be written there, not even by root
    with pytest.raises(UserError, match=r"cannot write .*last\.pt: .*; the one before it is intac"):
        checkpoint.save({"format": checkpoint.FORMAT}, path)
    assert path.read_bytes() == b"before"
    with pytest.raises(UserError, match=r"cannot write .*first\.pt: [^;]*$"):
        checkpoint.save({"format": checkpoint.FORMAT}, tmp_path / "none" / "first.pt")


def test_a_checkpoint_that_is_being_read_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    """As evaluate.py reads it, on Windows, while the run writes the next one, which is on the disk
    before it takes that one's name."""
    path, replace, done = tmp_path / "last.pt", os.replace, []

    def refuse(*paths: Path) -> None:
        done.append("renamed")
        if len(done) < 4:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", refuse)
    checkpoint.save({"format": checkpoint.FORMAT}, path)
    assert done == [path.stat().st_size, *["renamed"] * 3]
    done.clear()
    monkeypatch.setattr(time, "sleep", lambda _: done.clear())  # it is read for ever
    with pytest.raises(UserError, match=r"last\.pt: Access is denied; the one before it is intact"):
        checkpoint.save({"format": checkpoint.FORMAT}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_checkpoint_with_one_bit_changed_is_damaged(tmp_path: Path) -> None:
    """torch.load alone takes it for whole."""
    path = tmp_path / "last.pt"
    torch.save({"format": checkpoint.FORMAT, "model": torch.zeros(100_000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"].count_nonzero() == 1
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path)
    torch.save(path, path)  # what only code can make
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path)
