"""The training script from end to end, on tiny sets, and what it says to bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnnsp import CNN_SP, UserError, files
from cnnsp.data import images, synthetic
from cnnsp.data.batches import ImageBank, epoch_batches
from cnnsp.data.images import ImageSet
from cnnsp.results import pictures
from cnnsp.results.evaluation import Evaluation, evaluate
from cnnsp.results.history import EpochResult
from cnnsp.training import checkpoint, devices, run
from cnnsp.training.recipe import SHORT_RECIPE, TrainOptions, defaults
from cnnsp.training.step import Learner

from .scripts import ENVIRONMENT, ROOT, load_script, run_code

script = load_script("train")
main = script.main
CPU = ["--device", "cpu", "--log-interval", "1"]
ONE_STEP = [*CPU, "--pool", "max", "-b", "4", "--epochs", "2", "--max-steps", "1"]
ONE_STEP += ["--data-dir", "photos"]
Edit = Callable[[Path], object]


def make_photographs(folder: Path, classes: tuple[str, ...] = ("daisy", "rose")) -> Path:
    """Two training images and one test image of each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train_data", 2), ("test_data", 1)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.jpg")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photographs(tmp_path / "photos")


@pytest.fixture
def few_flowers(monkeypatch, tmp_path: Path) -> None:
    """The default run, with four training and three test images, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "PER_CLASS", {"train": 2, "test": 1})
    monkeypatch.setattr(synthetic, "VARIANTS", synthetic.VARIANTS[:2])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one step with max pooling on two classes."""
    root = tmp_path_factory.mktemp("trained")
    make_photographs(root / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*ONE_STEP, "--output-dir", "run"]) == 0
    return root / "run"


def read_summary(output: Path) -> list[dict[str, str]]:
    with (output / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


# To the last bit, and all that containers hold.
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.mark.usefixtures("few_flowers")
def test_default_run(tmp_path: Path, monkeypatch, capsys) -> None:
    """Without photographs, the script draws its own and says so."""
    titles, write = [], pictures.write

    def write_and_remember(figure, path: Path) -> None:
        if path.name == "confusion.png":
            titles.append(figure.get_suptitle())
        write(figure, path)

    monkeypatch.setattr(pictures, "write", write_and_remember)
    assert main([*CPU, "--epochs", "3", "-b", "6"]) == 0
    printed = capsys.readouterr().out
    assert "2 variants of an image, not 61; " in printed
    assert "synthetic" in printed
    assert "--data-dir FOLDER" in printed
    assert "3 epochs (30), batches of 6 (256), adam" in printed
    assert "Test set: average loss " in printed
    (output,) = (tmp_path / "runs").iterdir()
    assert output.name.startswith("stochastic-")
    names = {path.name.split(".tfevents")[0] for path in output.iterdir()}
    expected = {"args.json", "best.pt", "last.pt", "summary.csv", "events.out"}
    expected |= {"curves.png", "confusion.png"}
    assert names == expected
    rows = read_summary(output)
    best = max(float(row["test_accuracy"]) for row in rows)
    first = next(row["epoch"] for row in rows if float(row["test_accuracy"]) == best)
    last = printed.splitlines()[-1]
    assert last.startswith(f"Best test accuracy {best:.2f} % after epoch {first}, last ")
    assert last.endswith(f"all of it is in {output.relative_to(tmp_path)}")
    told = json.loads((output / "args.json").read_text())
    assert (told["batch_size"], told["device"], told["workers"]) == (6, "cpu", 4)
    with Image.open(output / "curves.png") as curves:
        assert curves.width > 1000
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 < float(row["train_loss"]) < 3 for row in rows)
    assert titles == [  # not of the second epoch, which ends at once
        f"CNN_SP, stochastic pooling, epoch {n + 1}\n"
        f"accuracy {float(rows[n]['test_accuracy']):.2f} %"
        for n in (0, 2)
    ]
    state = load(output / "best.pt")
    assert state["classes"] == list(synthetic.CLASSES)
    CNN_SP(3).load_state_dict(state["model"])


@pytest.mark.slow
def test_half_precision_in_contiguous_format_runs(
    photos: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("RANK", "3")  # of something else than torchrun
    arguments = ["--amp-dtype", "bfloat16", "--no-channels-last", "--opt", "adam", "-b", "2"]
    arguments += ["--data-dir", str(photos), "--output-dir", str(tmp_path / "out")]
    assert main([*CPU, *arguments, "--max-steps", "1"]) == 0
    assert load(tmp_path / "out" / "last.pt")["model"]["conv1.weight"].dtype == torch.float32


def test_amp_on_a_cpu_without_bfloat16_says_so(
    photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: False)
    arguments = ["--amp", "--pool", "max", "-b", "2", "--max-steps", "1"]
    arguments += ["--data-dir", str(photos), "--output-dir", str(tmp_path / "out")]
    assert main([*CPU, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "no bf16 instructions" in printed
    assert "on cpu, float32, channels_last" in printed


def test_a_type_of_a_run_is_kept_but_for_a_gpu_s_fp16_on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: True)
    for arguments, expected in (
        ((None, None, "cpu"), None),
        ((True, None, "cuda"), "float16"),
        ((None, None, "cuda", "float16"), "float16"),
        ((True, None, "cuda", "bfloat16"), "bfloat16"),
        ((None, None, "cpu", "float16"), "bfloat16"),
        ((None, "float16", "cpu", "float16"), "float16"),
        ((None, "bfloat16", "cuda", "float16"), "bfloat16"),
        ((False, None, "cuda", "float16"), None),
    ):
        amp, name, device, *before = arguments
        assert devices.choose_amp_dtype(amp, name, torch.device(device), *before) == expected


def test_evaluation_counts_each_image_once_and_keeps_the_mode() -> None:
    images = torch.randint(0, 256, (5, 3, 256, 256), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1])
    bank = ImageBank(ImageSet(images, labels, ("a", "b", "c")))
    model = CNN_SP(pooling="max")
    result = evaluate(model, bank, batch_size=2)
    assert model.training
    batch, _ = bank.batch(torch.arange(5))
    with torch.no_grad():
        output = model.eval()(batch)
    torch.testing.assert_close(result.log_probs, output)
    assert torch.equal(result.labels, labels)
    with torch.no_grad():
        model.fc2.weight.fill_(3e38)  # finite, but what follows is not
    with pytest.raises(UserError, match="outputs are not finite: it diverged; a lower --lr may"):
        evaluate(model, bank, batch_size=2)


def _cut(folder: Path) -> None:
    path = folder / "train_data" / "rose" / "1.jpg"
    path.write_bytes(path.read_bytes()[:400])


BAD_PHOTOS: list[Any] = [
    pytest.param(shutil.rmtree, "{photos} does not exist", id="missing-folder"),
    pytest.param(
        lambda p: shutil.rmtree(p / "test_data"), "{photos}/test_data is missing", id="no-split"
    ),
    pytest.param(
        lambda p: (p / "test_data" / "rose").rename(p / "test_data" / "tulip"),
        "'rose' is only in train_data, 'tulip' is only in test_data",
        id="classes-differ",
    ),
    pytest.param(
        lambda p: (p / "test_data" / "tulip").symlink_to("nowhere"),
        "{photos}/test_data/tulip is a link to nothing",
        id="class-linked-to-nothing",
    ),
    pytest.param(
        lambda p: [
            (p / split / "rose").rename(p / split / name)
            for split, name in (("train_data", "ros\u00e9"), ("test_data", "rose\u0301"))
        ],
        r"'ros\xe9' is only in train_data, 'rose\u0301' is only in test_data",
        id="classes-look-alike",
    ),
    pytest.param(_cut, "cannot decode {photos}/train_data/rose/1.jpg", id="truncated"),
]


def assert_refused(arguments: list[str], message: str, capsys) -> None:
    """Exit status 2, and one line on stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("edit", "message"), BAD_PHOTOS)
def test_bad_photographs(photos: Path, tmp_path: Path, capsys, edit: Edit, message: str) -> None:
    edit(photos)
    output = tmp_path / "out"
    arguments = [*CPU, "--data-dir", str(photos), "--output-dir", str(output)]
    assert_refused(arguments, message.format(photos=photos), capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["-b", "-3"], "--batch-size: must be at least 1, got -3"),
        (["--lr", "nan"], "--lr: must be above 0, got nan"),
        (["--epochs", "two"], "--epochs: must be an integer, got 'two'"),
        (["--pool", "median"], "--pool: invalid choice: 'median'"),
        (["--device", "tpu9"], "--device tpu9: PyTorch knows no such device"),
        (["--resume", "no/last.pt"], "checkpoint no/last.pt does not exist"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--ema", "1"], "--ema: must be at most 0.9999, got 1"),
        (["--seed", str(2**32)], "--seed: must be at most 4294967295"),
        (["--recipe", "best", "--momentum", "0"], "--nesterov needs --momentum above 0"),
        (["--warmup-epochs", "30.5"], "--warmup-epochs 30.5 must be at most --epochs 30"),
        (["--torchcompile", "reduce-overhead", "--accumulate", "2"], "know no --accumulate"),
        (["--lr", "1e300"], "--lr: must be at most 1000000000000000, got 1e300"),
        (["--epochs", "9" * 400], "--epochs: must be at most"),
        (["--device", "meta"], "--device meta: not available on this machine"),
        (["--device", "privateuseone"], "--device privateuseone: not available"),
        (["--data-dir", "x" * 300], "cannot use xxx"),
        (["--gpu-memory-gb", "6", "--device", "cpu"], "--gpu-memory-gb needs a GPU"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: this machine, or this PyTorch, has no CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
)
def test_bad_flags(photos: Path, tmp_path: Path, capsys, flags: list[str], message: str) -> None:
    output = tmp_path / "out"
    arguments = ["--data-dir", str(photos), "--output-dir", str(output), *flags]
    assert_refused(arguments, message, capsys)
    assert not output.exists()


def test_a_photograph_in_both_splits_is_named(photos: Path, tmp_path: Path, capsys) -> None:
    shutil.copy(photos / "train_data" / "rose" / "1.jpg", photos / "test_data" / "daisy" / "it.jpg")
    arguments = ["--data-dir", str(photos), "--output-dir", str(tmp_path / "out"), *CPU]
    assert main([*arguments, "--pool", "max", "-b", "2", "--max-steps", "1"]) == 0
    assert "1 of 3 test images are training images, too, such as it.jpg" in capsys.readouterr().err


def test_flags_that_do_nothing_are_named(capsys) -> None:
    """Those of a recipe or a checkpoint are nobody's mistake."""
    parse = load_script("train").parse
    for flags, words in (
        (["--repeats", "5"], "--repeats does nothing without --augment random"),
        (["--recipe", "best", "--lr-step", "3"], "--lr-step does nothing without --schedule step"),
        (["--opt", "adam", "--nesterov"], "--nesterov does nothing without --opt sgd"),
        (["--opt", "adam", "--no-nesterov"], ""),
        (["--no-amp", "--amp-dtype", "float16"], "--amp-dtype does nothing with --no-amp"),
        (["--recipe", "best", "--repeats", "5"], ""),
        (["--recipe", "best", "--augment", "paper", "--opt", "adam"], ""),
    ):
        parse(["--data-dir", "photos", *flags])
        assert capsys.readouterr().err == (words and f"warning: {words}\n")


def test_output_folder_that_cannot_be_used(
    photos: Path, trained: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").write_text("")
    arguments = [*CPU, "--data-dir", str(photos), "--output-dir"]
    inside = str(tmp_path / "file" / "run")
    assert_refused([*arguments, inside], f"{tmp_path}/file is not a folder", capsys)
    among = photos / "train_data" / "run"
    assert_refused([*arguments, str(among)], f"{among} lies among the photographs", capsys)
    assert not among.exists()
    before = (trained / "last.pt").read_bytes()
    assert_refused([*arguments, str(trained)], "holds another run", capsys)
    assert (trained / "last.pt").read_bytes() == before
    other = shutil.copytree(trained, tmp_path / "the other")
    assert_refused([*arguments, str(other)], f'go on with it: --resume "{other}/last.pt"', capsys)
    resume = [*CPU, "--resume", str(other / "last.pt"), "--output-dir", str(trained)]
    assert_refused(resume, "holds another run", capsys)
    best = [*CPU, "--resume", str(trained / "best.pt")]
    assert_refused(best, f"--resume {trained}/last.pt goes on from there; to go back", capsys)


def test_a_folder_belongs_to_one_run(photos: Path, trained: Path, tmp_path: Path, capsys) -> None:
    """Whichever way it is named: as an output, or as that of the checkpoint to go on from."""
    arguments = [*CPU, "--data-dir", str(photos), "--output-dir", str(tmp_path / "out")]
    with files.claimed(tmp_path / "out"):
        assert_refused(arguments, f"another run is writing to {tmp_path / 'out'}", capsys)
    assert not (tmp_path / "out").exists()
    shutil.copytree(trained, tmp_path / "run")
    with files.claimed(tmp_path / "run"):
        assert_refused([*CPU, "--resume", str(tmp_path / "run")], "another run is writing", capsys)
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_folder_is_made_where_a_root_cannot_be(tmp_path: Path, monkeypatch) -> None:
    """macOS and Windows do not say that it exists."""
    mkdir = Path.mkdir

    def make(path: Path) -> None:
        if path == path.parent:
            raise IsADirectoryError(21, "Is a directory", str(path))
        mkdir(path)

    monkeypatch.setattr(Path, "mkdir", make)
    with files.claimed(tmp_path / "runs" / "max") as folder:
        assert folder.is_dir()


def test_a_drive_that_is_not_there_is_named(monkeypatch) -> None:
    """On Windows, where not even the root of a path need exist."""
    for ask in ("exists", "is_dir"):
        monkeypatch.setattr(Path, ask, lambda self: False)
    run = Path.home() / "run"
    with pytest.raises(UserError, match="is not a folder"), files.claimed(run):
        pass


def test_starts_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    with ExitStack() as stack:
        claims = [
            stack.enter_context(files.claimed(tmp_path / "runs" / "max", rename=True))
            for _ in range(3)
        ]
        assert [path.name for path in claims] == ["max", "max-2", "max-3"]
        (claims[1] / "last.pt").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs", claims[1], claims[1] / "last.pt"]


def test_part_of_an_epoch_is_shown_as_a_part(trained: Path, tmp_path: Path, capsys) -> None:
    """One step of 61: four images, of which an epoch takes 61 times 4. And then another one."""
    (row,) = read_summary(trained)
    assert float(row["epoch"]) == pytest.approx(1 / 61, rel=1e-4)
    result = EpochResult(**{name: float(value) for name, value in row.items()})
    figure = pictures.curves([result], "title")
    assert figure._suptitle.get_text() == "title; the last point is within epoch 1"
    assert figure.axes[1].get_xlim()[0] < result.epoch
    shutil.copytree(trained, tmp_path / "run")
    again = ["--max-steps", "1", "--log-interval", "9"]
    assert main(["--device", "cpu", "--resume", str(tmp_path / "run"), *again]) == 0
    printed = capsys.readouterr().out
    assert "epoch 1/2  step 2/61  loss 0." in printed
    assert "Epoch 1/2, only its first 2 of 61 steps (--max-steps): train loss" in printed
    (later,) = read_summary(tmp_path / "run")
    assert float(later["epoch"]) == pytest.approx(2 / 61, rel=1e-4)
    for one in (row, later):  # the mean of the images until then, of two classes
        assert float(one["train_loss"]) == pytest.approx(math.log(2), abs=0.3)


def test_recorded_folders_are_whole_paths(
    trained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """So that another working folder does no harm; and a folder that is gone is explained."""
    photos, last = trained.parent / "photos", tmp_path / "last.pt"
    assert json.loads((trained / "args.json").read_text())["data_dir"] == str(photos)
    state = load(trained / "last.pt")
    state["options"]["data_dir"] = str(tmp_path / "gone")
    torch.save(state, last)
    resume = ["--device", "cpu", "--resume", str(last)]
    gone = f"{tmp_path / 'gone'} does not exist; {last} was trained on it, and --data-dir names"
    assert_refused(resume, gone, capsys)
    assert main([*resume, "--data-dir", str(photos), "--max-steps", "1"]) == 0
    monkeypatch.chdir(tmp_path)  # where no photographs are
    assert_refused([*CPU, "--resume", str(trained), "--validate", "0"], "too few for qu", capsys)


def test_another_quarter_held_out_is_warned_of(photos: Path, tmp_path: Path, capsys) -> None:
    for path in [*(photos / "train_data").glob("*/*.jpg")]:
        shutil.copy(path, path.with_name(f"other-{path.name}"))
    flags = ["--augment", "random", "--repeats", "1", "--pool", "max", "--epochs", "1", "-b", "8"]
    flags += ["--data-dir", str(photos), "--output-dir", str(tmp_path / "run")]
    assert main([*CPU, *flags, "--validate", "0"]) == 0
    assert "\nHeld-out images: average loss " in capsys.readouterr().out
    last = tmp_path / "run" / "last.pt"
    state = load(last)
    state["progress"]["best_accuracy"] = 101.0  # of other images, so that it does not count
    torch.save(state, last)
    resume = [*CPU, "--resume", str(tmp_path / "run"), "--epochs", "2", "--validate", "1"]
    assert main(resume) == 0
    assert "may have learned from these held-out images" in capsys.readouterr().err
    assert load(last)["progress"]["best_accuracy"] <= 100


def test_a_run_is_made_of_steps_and_evaluations(
    photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A step is told of its own images, or an epoch's last batch, which may be smaller, would make
    a smaller step; of the average of the weights, the first of the best evaluations is kept."""
    steps, pixels, step = [], [], Learner.step

    def note(self: Learner, images: torch.Tensor, labels: torch.Tensor, **others: Any) -> Any:
        loss = step(self, images, labels, **others)
        steps.append((labels.tolist(), *others.values(), float(loss)))
        pixels.append(images.mean((1, 2, 3)))
        return loss

    def evaluate(network: CNN_SP, bank: ImageBank, batch_size: int, *_: Any) -> Evaluation:
        assert batch_size == 2  # half of one of the training's, which comes in two parts
        evaluated.append(network.state_dict()["fc2.weight"].clone())
        scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[: len(evaluated)]
        return Evaluation(scores.repeat(2, 1)[:2], torch.tensor([0, 1]))

    def save(state: dict[str, Any], path: Path) -> None:
        write(state, path)
        saved.append((path.name, state["progress"]["total_steps"]))

    evaluated: list[torch.Tensor] = []
    saved, write = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    # Each step takes ten seconds.
    clock = SimpleNamespace(monotonic=lambda: 10.0 * len(steps), perf_counter=time.perf_counter)
    monkeypatch.setattr(run, "time", clock)
    monkeypatch.setattr(Learner, "step", note)
    monkeypatch.setattr(run, "evaluate", evaluate)
    flags = ["--augment", "random", "--repeats", "1", "--pool", "max", "--epochs", "3", "-b", "3"]
    flags += ["--lr-step", "1", "--warmup-epochs", "1", "--ema", "0.9", "--seed", "1"]
    flags += ["--accumulate", "2", "--log-interval", "5", "--checkpoint-interval", "15"]
    flags += ["--data-dir", str(photos), "--output-dir", str(tmp_path / "run")]
    assert main([*CPU, *flags]) == 0
    labels, sizes, numbers, rates, losses = zip(*steps, strict=True)
    classes = torch.tensor([0, 0, 1, 1])
    orders = [[*epoch_batches(4, 3, seed=1, epoch=epoch)] for epoch in range(3)]
    assert [*labels] == [classes[items].tolist() for order in orders for items in order]
    assert sizes == (3, 1) * 3
    assert numbers == (0, 1, 2, 3, 4, 5)
    assert rates == pytest.approx((0.005, 0.01, 0.001, 0.001, 0.0001, 0.0001))
    rows, printed = read_summary(tmp_path / "run"), capsys.readouterr().out
    for epoch, row in enumerate(rows):
        assert f"epoch {epoch + 1}/3  step 2/2  loss {losses[2 * epoch + 1]:.4f}" in printed
        mean = (3 * losses[2 * epoch] + losses[2 * epoch + 1]) / 4
        assert float(row["train_loss"]) == pytest.approx(mean, rel=1e-4)
        assert float(row["lr"]) == pytest.approx(rates[2 * epoch + 1])
    # Each epoch draws other augmentation.
    first, second = (torch.cat(pixels[start : start + 2]) for start in (0, 2))
    assert not torch.isclose(first[:, None], second, rtol=0, atol=1e-5).any()
    assert [row["test_accuracy"] for row in rows] == ["50", "100", "100"]
    assert [number for name, number in saved if name == "last.pt"] == [2, 2, 4, 4, 6, 6]
    best, last = load(tmp_path / "run" / "best.pt"), load(tmp_path / "run" / "last.pt")
    for state, weights in ((best, evaluated[1]), (last, evaluated[2])):
        assert torch.equal(state["average"]["fc2.weight"], weights)
    assert best["progress"]["best_epoch"] == last["progress"]["best_epoch"] == 2


@pytest.mark.slow
def test_a_schedule_that_jumps_says_so(photos: Path, tmp_path: Path, capsys) -> None:
    flags = ["--augment", "random", "--repeats", "1", "--pool", "max", "--schedule", "cosine"]
    flags += ["--epochs", "1", "--data-dir", str(photos), "--output-dir", str(tmp_path / "run")]
    assert main([*CPU, *flags, "-b", "2"]) == 0
    resume = ["--device", "cpu", "--resume", str(tmp_path / "run"), "--epochs", "2"]
    capsys.readouterr()
    assert main(resume) == 0
    printed = capsys.readouterr().out
    # A cosine: of one epoch in two steps, and of two epochs.
    assert "The learning rate goes on at 0.005; it would have been 0.005." not in printed
    assert "Other settings than before (in brackets): --epochs 2 (1)\n" in printed
    assert main([*resume[:-1], "4", "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "The learning rate goes on at 0.005; it would have been 0.00146." in printed
    shutil.copytree(photos / "train_data", photos / "more")
    for path in (photos / "more").glob("*/0.jpg"):
        path.rename(photos / "train_data" / path.parent.name / "more.jpg")
    other = tmp_path / "other"
    assert main([*resume[:-1], "5", "--output-dir", str(other)]) == 0
    printed = capsys.readouterr().out
    assert "(in brackets): --epochs 5 (4), 6 images an epoch (4)\n" in printed
    assert (other / "best.pt").exists()  # all of it is there
    state = load(other / "last.pt")
    state["progress"]["best_accuracy"] = 101.0
    torch.save(state, other / "last.pt")
    (photos / "test_data" / "rose" / "0.jpg").rename(photos / "test_data" / "rose" / "1.jpg")
    shutil.copytree(photos, tmp_path / "photos2")
    moved = ["--epochs", "6", "--data-dir", str(tmp_path / "photos2")]
    assert main(["--device", "cpu", "--resume", str(other), *moved]) == 0
    printed = capsys.readouterr().out
    assert f"--data-dir {tmp_path / 'photos2'} ({photos}), --epochs 6 (5)\n" in printed
    assert "Other test images than before, by their names: best.pt is chosen anew" in printed
    assert load(other / "best.pt")["progress"]["epoch"] == 6


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "predict", "export", "study", "prepare_flowers"]
)
def test_help_and_wrong_paths_need_no_pytorch(name: str, tmp_path: Path) -> None:
    """Which takes seconds to import."""
    missing = {
        "train": ["--data-dir", "none"],
        "study": ["--data-dir", "none"],
        "evaluate": ["none.pt"],
        "predict": ["none.pt", "none.jpg"],
        "export": ["none.pt"],
        "prepare_flowers": ["none"],
    }[name]
    code = (
        "import sys, runpy\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({'torch', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    script = str(ROOT / "scripts" / f"{name}.py")
    for arguments, status, text in ((["--help"], 0, "examples:"), (missing, 2, "does not exist")):
        run = f"import sys; sys.argv = {[script, *arguments]!r}\n{code}"
        # An output that lacks characters, as a code page of Windows does.
        ascii = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
        done = run_code(run, cwd=tmp_path, env=ascii)
        assert done.returncode == status, done.stderr
        assert text in done.stdout + done.stderr
        assert "default: [" not in done.stdout
        assert "default: (" not in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


def test_help_shows_the_defaults_of_the_recipe(photos: Path, capsys) -> None:
    def shown(*flags: str) -> str:
        assert main([*flags, "--help"]) == 0
        return " ".join(capsys.readouterr().out.split())

    epochs = "those before a resumed checkpoint included (default: {})"
    data = ["--data-dir", str(photos)]
    assert epochs.format(30) in shown(*data)
    assert epochs.format(30) in shown("--recipe", "best")
    assert epochs.format(SHORT_RECIPE["epochs"]) in shown("--data-dir", "synthetic")
    assert "with SGD (default: True)" in shown("--recipe", "best")
    assert "instead of --mixup (default: 0.5)" in shown("--recipe", "best")
    assert "instead of --mixup (default: 0.0)" in shown("--recipe", "best", "--pool", "avg")
    assert defaults("x", "best", "avg", {})["cutmix"] == 0
    resumed = {"max_steps": 1, "amp_dtype": "float16", "lr": 0.5}
    assert defaults("x", None, None, resumed) == {"lr": 0.5}


def test_every_setting_is_a_flag() -> None:
    flags = {action.dest: action.default for action in script.make_parser()._actions}
    for field in dataclasses.fields(TrainOptions):
        assert flags[field.name] == field.default


def test_a_set_on_disk_trains_as_one_in_memory(trained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "HOST_BUDGET", 0)
    monkeypatch.chdir(trained.parent)
    assert main([*ONE_STEP, "--output-dir", str(tmp_path / "disk")]) == 0
    memory, disk = (load(folder / "last.pt") for folder in (trained, tmp_path / "disk"))
    assert_equal(memory["model"], disk["model"])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_first_run_learns(seed: int, tmp_path: Path, monkeypatch) -> None:
    """What a newcomer sees within minutes."""
    monkeypatch.chdir(tmp_path)
    assert main(["--amp", "--seed", str(seed), "--output-dir", "run"]) == 0
    assert float(read_summary(tmp_path / "run")[-1]["test_accuracy"]) >= 90


def test_checkpoints_that_do_not_fit(photos: Path, trained: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    last, other = str(trained / "last.pt"), make_photographs(tmp_path / "three", tuple("abc"))
    names = make_photographs(tmp_path / "names", ("daisy", "tulip"))
    renamed = make_photographs(tmp_path / "renamed")
    (renamed / "train_data" / "rose" / "0.jpg").rename(renamed / "train_data" / "rose" / "7.jpg")
    resume = [*CPU, "--output-dir", str(output), "--resume"]
    refusals = [
        (["--pool", "stochastic"], f"{last} was trained with --pool max, not --pool stochastic"),
        (["--recipe", "paper"], f"{last} was trained without --recipe, not --recipe paper"),
        (["--data-dir", str(other)], f"{last}: without 'daisy', 'rose', with 'a', 'b', 'c'"),
        (["--data-dir", str(names)], "without 'rose', with 'tulip'"),
        (["--opt", "adam"], f"{last} was trained with --opt sgd"),
        (["--data-dir", str(renamed)], "within an epoch: it goes on only with the same images"),
    ]
    within = "the same images, --augment paper, --batch-size 4 and --seed 0"
    changes = ["-b", "2"], ["--seed", "1"], ["--augment", "random", "--repeats", "61"]
    refusals += [(flags, within) for flags in changes]
    for flags, message in refusals:
        assert_refused([*resume, last, *flags], message, capsys)
    torch.save({**load(trained / "last.pt"), "items": 4 * 60}, tmp_path / "fewer.pt")
    assert_refused([*resume, str(tmp_path / "fewer.pt")], within, capsys)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((trained / "last.pt").read_bytes()[:5000])
    assert_refused([*resume, str(damaged)], f"{damaged} is damaged", capsys)
    for state in ({"model": {}}, {"model": {}, "format": 2}):
        torch.save(state, tmp_path / "other.pt")
        assert_refused([*resume, str(tmp_path / "other.pt")], "no checkpoint that train.py", capsys)
    assert not output.exists()


def test_finished_run_is_not_resumed(trained: Path, tmp_path: Path, capsys) -> None:
    state = load(trained / "last.pt")
    state["progress"]["epoch"] = 2
    torch.save(state, tmp_path / "last.pt")
    arguments = ["--device", "cpu", "--resume", str(tmp_path / "last.pt")]
    assert_refused(arguments, "has finished 2 of 2 epochs", capsys)
