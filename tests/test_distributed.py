"""Two processes, as torchrun starts them, train the network that one process trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnnsp.errors import UserError
from cnnsp.training.devices import choose_device
from cnnsp.training.processes import own_device

from .scripts import ENVIRONMENT, ROOT, load_script
from .test_train import load, make_photographs, read_summary

main = load_script("train").main
# train.py, after a question to each process.
CODE = """
import runpy, sys
from cnnsp.training import processes
def start(device, start=processes.start):
    team = start(device)
    assert [team.highest(n) for n in (team.rank, 1 - team.rank, 5)] == [1, 1, 5]
    return team
processes.start = start
sys.argv[0] = {!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_two_processes_and_then_one_make_the_run_of_one(tmp_path: Path) -> None:
    """Pools that draw nothing, so that the runs may be compared; 8 items in batches of 7.

    The two processes get 4 and 3 images of a batch, in as many parts, and 1 and 0 of an epoch's
    last.
    """
    photos = make_photographs(tmp_path / "photos")
    flags = ["--pool", "max", "--dropout", "0", "--augment", "random", "--repeats", "2", "-b", "7"]
    flags += ["--epochs", "3", "--ema", "0.5", "--accumulate", "4", "--lr", "0.001"]
    flags += ["--device", "cpu", "--data-dir", str(photos), "--output-dir"]
    assert main([*flags, str(tmp_path / "one")]) == 0

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code = tmp_path / "process.py"
    code.write_text(CODE.format(str(ROOT / "scripts/train.py")))
    script = [str(code), *flags, str(tmp_path / "two"), "--max-steps", "3"]
    result = subprocess.run(
        [*launch, *script],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == 1
    assert len(read_summary(tmp_path / "two")) == 2
    assert main(["--device", "cpu", "--resume", str(tmp_path / "two" / "last.pt")]) == 0

    one, two = load(tmp_path / "one" / "last.pt"), load(tmp_path / "two" / "last.pt")
    for part in ("model", "average"):
        for name in one[part]:
            torch.testing.assert_close(one[part][name], two[part][name], rtol=1e-4, atol=1e-5)
    for row, other in zip(
        read_summary(tmp_path / "one"), read_summary(tmp_path / "two"), strict=True
    ):
        assert row["test_accuracy"] == other["test_accuracy"]
        for name in ("train_loss", "test_loss"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)


def test_each_process_takes_its_gpu(monkeypatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    for name, index in (("cuda", 0), ("cuda:1", 1)):
        assert own_device(choose_device(name)) == torch.device("cuda", index)
    with pytest.raises(UserError, match=r"there are 2 GPUs, numbered from 0"):
        choose_device("cuda:2")
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert own_device(choose_device("cuda")) == torch.device("cuda", 1)
    assert taken == [0, 1, 1]
    with pytest.raises(UserError, match="without a number"):
        own_device(choose_device("cuda:1"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"more processes here than there are GPUs \(2\)"):
        own_device(choose_device("cuda"))
