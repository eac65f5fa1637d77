"""What one does with a checkpoint: classify photographs, test it, export it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from cnnsp import CNN_SP, UserError
from cnnsp.data import synthetic
from cnnsp.data.augment import IMAGENET_MEAN, IMAGENET_STD
from cnnsp.data.batches import ImageBank
from cnnsp.data.decoding import decode
from cnnsp.data.images import ImageSet
from cnnsp.results.board import Board
from cnnsp.results.evaluation import Evaluation
from cnnsp.results.inference import load_network
from cnnsp.training import checkpoint
from stochastic_pooling import StochasticPool

from .scripts import load_script

CLASSES = ("daisy", "rose & co")
# Names of files may hold what tables and JSON must escape.
ODD = "\u00fc 'b'.png" if os.name == "nt" else 'a\n"\u00fc".png'
Make = Callable[..., Path]

predict, evaluate, export_script = (load_script(n) for n in ("predict", "evaluate", "export"))


def make_model(pooling: str, seed: int = 0) -> CNN_SP:
    """Random weights, with outputs that are far from equal."""
    torch.manual_seed(seed)
    model = CNN_SP(len(CLASSES), pooling).eval()
    with torch.no_grad():
        model.fc2.weight *= 30
    return model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(pooling: str, /, **other: Any) -> Path:
        path = tmp_path_factory.mktemp("run") / "best.pt"
        state = dict.fromkeys(checkpoint._KEYS) | {
            "format": checkpoint.FORMAT,
            "model": make_model(pooling).state_dict(),
            "pooling": pooling,
            "classes": list(CLASSES),
            "options": {"data_dir": "photographs"},
        }
        checkpoint.save(state | other, path)
        return path

    return make


@pytest.fixture(scope="session")
def stochastic(make_checkpoint: Make) -> Path:
    return make_checkpoint("stochastic")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two daisies and three roses to test on, of several sizes, with junk beside them.

    One of each is there to train on.
    """
    folder = tmp_path_factory.mktemp("photos")
    flowers = synthetic.synthetic_flowers(3).images
    for split in ("train_data", "test_data"):
        for name, numbers in zip(CLASSES, ((0, 1), (3, 4, 8)), strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in numbers if split == "test_data" else numbers[:1]:
                picture = tv.resize(tv.to_pil_image(flowers[number]), [200 + number, 300])
                file = ODD if number == 1 else f"{number}.png"
                picture.save(folder / split / name / file)
            (folder / split / name / ".DS_Store").write_bytes(b"junk")
    return folder


def seen_by_torchvision(path: Path) -> torch.Tensor:
    """One image ``[1, 3, 256, 256]`` as the replication prepares it."""
    picture = tv.resize(Image.open(path).convert("RGB"), [256, 256])
    return tv.normalize(tv.to_tensor(picture), IMAGENET_MEAN, IMAGENET_STD)[None]


def expected_probabilities(path: Path, model: CNN_SP) -> list[float]:
    with torch.no_grad():
        return model(seen_by_torchvision(path))[0].exp().tolist()


def run(script: ModuleType, *arguments: object) -> int:
    device = () if script is export_script else ("--device", "cpu")
    status = script.main([*map(str, arguments), *device])
    assert isinstance(status, int)
    return status


def test_predictions_are_those_of_the_network(stochastic: Path, photos: Path, capsys) -> None:
    """Folders at any depth, junk left out, in batches, names of any kind."""
    assert run(predict, stochastic, photos / "test_data", "--json", "-b", "2") == 0
    out, error = capsys.readouterr()
    entries = json.loads(out)
    assert error == ""
    files = sorted((photos / "test_data").glob("*/*.png"))
    assert [entry["file"] for entry in entries] == [str(path) for path in files]
    assert len(files) == 5
    model = make_model("stochastic")
    for path, entry in zip(files, entries, strict=True):
        expected = expected_probabilities(path, model)
        assert list(entry["probabilities"]) == list(CLASSES)
        assert list(entry["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
        assert entry["class"] == CLASSES[int(np.argmax(expected))]


def test_predictions_as_a_table(stochastic: Path, photos: Path, capsys) -> None:
    folder = photos / "test_data" / CLASSES[0]
    assert run(predict, stochastic, folder) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "file"
    model, start = make_model("stochastic"), header.index("class")
    assert len(lines) == 2
    for line, path in zip(lines, sorted(folder.glob("*.png")), strict=True):
        expected = expected_probabilities(path, model)
        assert line[:start].rstrip() == str(path).replace("\n", "\\n")
        assert line[start:].startswith(CLASSES[int(np.argmax(expected))])
        numbers = [float(cell) for cell in line.split()[-2:]]
        assert numbers == pytest.approx(expected, abs=2e-4)
        assert len(line) == len(header)


def test_files_that_are_no_images(stochastic: Path, photos: Path, tmp_path: Path, capsys) -> None:
    """In a folder they are skipped; named, they are an error once the others are printed."""
    good = tmp_path / "good.png"
    good.write_bytes((photos / "test_data" / CLASSES[0] / "0.png").read_bytes())
    notes, cut = tmp_path / "notes.txt", tmp_path / "cut.png"
    notes.write_text("by the gate")
    cut.write_bytes(good.read_bytes()[:3000])
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "good.png").write_bytes(b"junk")

    assert run(predict, stochastic, tmp_path, "--json") == 0
    out, error = capsys.readouterr()
    assert [entry["file"] for entry in json.loads(out)] == [str(good)]
    assert f"skipped: {notes} is not an image" in error
    assert f"skipped: cannot decode {cut}: " in error
    assert error.count("\n") == 2

    assert run(predict, stochastic, tmp_path / "*.*", "--json") == 0  # as it reaches us on Windows
    out, error = capsys.readouterr()
    assert [entry["file"] for entry in json.loads(out)] == [str(good)]
    assert f"skipped: {notes} is not an image" in error

    assert run(predict, stochastic, notes, tmp_path / "none.png", good, "--json") == 2
    out, error = capsys.readouterr()
    assert [entry["file"] for entry in json.loads(out)] == [str(good)]
    missing = f"{tmp_path / 'none.png'} does not exist"
    assert error == f"predict.py: error: {notes} is not an image; {missing}\n"

    assert run(predict, stochastic, "https://example.com/a.jpg") == 2
    assert "https://example.com/a.jpg is no file: download it" in capsys.readouterr().err

    (tmp_path / "loop").symlink_to(tmp_path)
    assert run(predict, stochastic, tmp_path, "--json") == 0
    assert f"skipped: {tmp_path / 'loop'} links to a folder" in capsys.readouterr().err

    assert run(predict, stochastic, tmp_path / "__MACOSX") == 2
    assert "no images in" in capsys.readouterr().err


def test_monte_carlo_is_mean_and_spread_over_draws(stochastic: Path, photos: Path, capsys) -> None:
    folder = photos / "test_data" / CLASSES[1]
    arguments = [stochastic, folder, "--json", "--mc", "3", "--seed"]
    assert run(predict, *arguments, "5") == 0
    printed = capsys.readouterr().out
    assert run(predict, *arguments, "5") == 0
    assert capsys.readouterr().out == printed
    assert run(predict, *arguments, "6") == 0
    assert capsys.readouterr().out != printed

    # The very same numbers in the same memory format: others could change a draw.
    pixels = [decode(path) for path in sorted(folder.glob("*.png"))]
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    bank = ImageBank(ImageSet(stacked, torch.zeros(3).long(), CLASSES), channels_last=True)
    images, _ = bank.batch(torch.arange(3))
    model = make_model("stochastic")
    for module in model.modules():
        if isinstance(module, StochasticPool):
            module.sample_in_eval = True
    torch.manual_seed(5)
    with torch.no_grad():
        draws = np.stack([model(images).exp().double().numpy() for _ in range(3)])
    entries = json.loads(printed)
    means = [list(entry["probabilities"].values()) for entry in entries]
    spreads = [list(entry["spread"].values()) for entry in entries]
    np.testing.assert_allclose(means, draws.mean(0), atol=1e-6)
    np.testing.assert_allclose(spreads, draws.std(0, ddof=1), atol=1e-6)
    assert np.min(spreads) > 1e-3

    assert run(predict, stochastic, folder, "--mc", "2") == 0
    assert capsys.readouterr().out.count(" ± ") == 6


def test_monte_carlo_takes_stochastic_pools(make_checkpoint: Make, photos: Path, capsys) -> None:
    path = make_checkpoint("max")
    assert run(predict, path, photos, "--mc", "5") == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"predict.py: error: --mc: checkpoint {path} has max pooling, which draws nothing\n"
    )


def test_averaged_weights_are_preferred(make_checkpoint: Make) -> None:
    averaged = make_model("max", seed=1).state_dict()
    for average, expected in ((averaged, averaged), (None, make_model("max").state_dict())):
        network = load_network(make_checkpoint("max", average=average))
        assert (network.classes, network.pooling) == (CLASSES, "max")
        assert not network.model.training
        for name, weights in network.model.state_dict().items():
            assert torch.equal(weights, expected[name])


def test_checkpoints_that_are_no_use(make_checkpoint: Make) -> None:
    weights = make_model("max").state_dict()
    weights["fc1.bias"] = torch.full_like(weights["fc1.bias"], torch.nan)
    refusals = [
        ({"model": weights}, "weights that are not finite"),
        ({"classes": ["a", "b", "c"]}, "does not fit: size mismatch for fc2.bias"),
        ({"pooling": "median"}, "does not fit: pooling must be one of"),
    ]
    for change, message in refusals:
        with pytest.raises(UserError, match=message) as caught:
            load_network(make_checkpoint("max", **change))
        assert "\n" not in str(caught.value)


def test_outputs_that_are_not_finite(make_checkpoint: Make, photos: Path, capsys) -> None:
    weights = make_model("max").state_dict()
    weights["fc1.bias"] = torch.full_like(weights["fc1.bias"], 3e38)
    assert run(predict, make_checkpoint("max", model=weights), photos, "--json") == 2
    assert "outputs are not finite: its training diverged" in capsys.readouterr().err


def test_evaluation_counts_what_a_loop_counts() -> None:
    """Against plain Python; class 2 has no images."""
    labels = [0, 1, 1, 3, 0, 3, 1, 0, 3, 3]
    log_probs = torch.randn(10, 4).log_softmax(1)
    result = Evaluation(log_probs, torch.tensor(labels))
    rows = log_probs.tolist()
    found = [row.index(max(row)) for row in rows]
    losses = [-row[label] for row, label in zip(rows, labels, strict=True)]
    pairs = Counter(zip(labels, found, strict=True))
    assert result.total == 10
    assert result.correct == sum(pairs[c, c] for c in range(4))
    assert result.accuracy == pytest.approx(10 * result.correct)
    assert result.loss == pytest.approx(sum(losses) / 10)
    assert result.confusion.tolist() == [[pairs[t, p] for p in range(4)] for t in range(4)]
    expected = [100 * pairs[c, c] / labels.count(c) if c != 2 else None for c in range(4)]
    assert result.sensitivities == pytest.approx(expected)
    wrong = [i for i in range(10) if found[i] != labels[i]]
    worst = sorted(wrong, key=lambda i: -losses[i])
    assert len(worst) > 3
    assert result.most_wrong(3).tolist() == worst[:3]
    assert result.most_wrong(99).tolist() == worst


def test_evaluate_script(make_checkpoint: Make, photos: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--data-dir", photos, "--output-dir", tmp_path / "new", "-b", "3", "--json"]
    assert run(evaluate, make_checkpoint("stochastic"), *arguments) == 0
    told = json.loads(capsys.readouterr().out)
    model, pairs, losses = make_model("stochastic"), Counter[tuple[int, int]](), []
    for label, name in enumerate(CLASSES):
        for path in (photos / "test_data" / name).glob("*.png"):
            probabilities = expected_probabilities(path, model)
            pairs[label, int(np.argmax(probabilities))] += 1
            losses.append(-np.log(probabilities[label]))
    assert told["confusion"] == [[pairs[t, p] for p in (0, 1)] for t in (0, 1)]
    assert told["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert (told["correct"], told["total"]) == (pairs[0, 0] + pairs[1, 1], 5)
    assert told["accuracy"] == pytest.approx(100 * told["correct"] / 5)
    sensitivities = [100 * pairs[0, 0] / 2, 100 * pairs[1, 1] / 3]
    assert told["sensitivities"] == pytest.approx(dict(zip(CLASSES, sensitivities, strict=True)))
    name = f"confusion-best-{photos.name}-test_data.png"  # not of what it was trained on
    with Image.open(tmp_path / "new" / name) as picture:
        assert picture.format == "PNG"

    # The folder that the checkpoint names, and the picture beside it.
    path = make_checkpoint("stochastic", options={"data_dir": str(photos)})
    assert run(evaluate, path) == 0
    printed = capsys.readouterr().out
    assert f"accuracy {told['correct']}/5 ({told['accuracy']:.2f} %)" in printed
    assert f"{sensitivities[1]:.2f} %" in printed
    assert (path.parent / "confusion-best-test_data.png").is_file()
    assert run(evaluate, path, "--split", "train_data", "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"] == 2
    # What cannot be written costs the picture alone.
    (tmp_path / "confusion-best-test_data.png").mkdir()
    assert run(evaluate, path, "--output-dir", tmp_path) == 2
    shown = capsys.readouterr()
    assert f"accuracy {told['correct']}/5" in shown.out
    assert f"cannot write {tmp_path / 'confusion-best-test_data.png'}" in shown.err


def test_evaluation_needs_no_other_photographs(
    make_checkpoint: Make, photos: Path, tmp_path: Path, capsys
) -> None:
    """Neither undamaged ones, nor all classes; and of a checkpoint, the run's folder is enough."""
    alone = tmp_path / "alone"
    shutil.copytree(photos / "test_data", alone / "test_data")
    path = make_checkpoint("max")
    assert run(evaluate, path.parent, "--data-dir", alone) == 2
    assert f"holds no last.pt, but {path}: name that" in capsys.readouterr().err
    path.rename(path.with_name("last.pt"))
    assert run(evaluate, path.parent, "--data-dir", alone) == 0
    picture = path.parent / "confusion-last-alone-test_data.png"
    assert f"Picture: {picture}" in capsys.readouterr().out
    (alone / "train_data" / CLASSES[0]).mkdir(parents=True)
    (alone / "train_data" / CLASSES[0] / "0.png").write_bytes(b"damaged")
    assert run(evaluate, path.parent, "--data-dir", alone) == 0
    assert run(evaluate, path.parent, "--data-dir", alone, "--split", "train_data") == 2
    assert run(evaluate, photos, "--data-dir", alone) == 2
    assert f"folder {photos} holds no last.pt" in capsys.readouterr().err
    shutil.rmtree(alone / "test_data" / CLASSES[0])
    assert run(evaluate, path.parent, "--data-dir", alone, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["confusion"][0], sum(told["confusion"][1])) == ([0, 0], 3)
    assert told["sensitivities"] == {CLASSES[0]: None, CLASSES[1]: told["accuracy"]}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_of_another_encoding(
    make_checkpoint: Make, photos: Path, tmp_path: Path, capsys
) -> None:
    """As old archives have them; and with a line break."""
    folder = tmp_path / os.fsdecode(b"h\xe9rbier")
    names = ["line\nbreak", os.fsdecode(b"\xe9glantine")]
    for old, new in zip(CLASSES, names, strict=True):
        shutil.copytree(photos / "test_data" / old, folder / "test_data" / new)
    options = {"data_dir": str(folder)}
    assert run(evaluate, make_checkpoint("max", classes=names, options=options)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert r"h\udce9rbier/test_data" in lines[0]
    assert [line.split()[0] for line in lines[4:6]] == [r"line\nbreak", r"\udce9glantine"]
    writer = Board(tmp_path / "board")
    writer.hyper_parameters(options, {"last_accuracy": 1.0})
    writer.close()


def test_evaluation_of_the_quarter_that_a_run_held_out(
    make_checkpoint: Make, photos: Path, tmp_path: Path, capsys
) -> None:
    """No other image is decoded: those here are empty."""
    for name in CLASSES:
        folder = tmp_path / "train_data" / name
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.png").touch()
        shutil.copy(next((photos / "train_data" / name).glob("?.png")), folder / "1.png")
    for held_out, warns in ((1, False), (None, True), (0, True)):
        options = {"data_dir": str(tmp_path), "validate": held_out}
        path = make_checkpoint("max", options=options)
        assert run(evaluate, path, "--validate", "1") == 0
        shown = capsys.readouterr()
        assert "/2 (" in shown.out
        assert ("was trained on these images" in shown.err) == warns
    assert (path.parent / "confusion-best-test_data-validate-1.png").is_file()
    assert run(evaluate, path, "--validate", "1", "--data-dir", "synthetic") == 2
    assert "--validate needs photographs" in capsys.readouterr().err


def test_evaluation_says_where_a_folder_comes_from(make_checkpoint: Make, capsys) -> None:
    path = make_checkpoint("max", options={"data_dir": "photographs/of/before"})
    assert run(evaluate, path) == 2
    assert capsys.readouterr().err == (
        "evaluate.py: error: data folder photographs/of/before does not exist; "
        f"{path} was trained on it, and --data-dir names another\n"
    )


def test_evaluate_refuses_other_classes(make_checkpoint: Make, photos: Path, capsys) -> None:
    path = make_checkpoint("max", classes=["daisy", "tulip"])
    assert run(evaluate, path, "--data-dir", photos) == 2
    assert f"checkpoint {path}: without 'tulip', with 'rose & co'" in capsys.readouterr().err
    assert not (path.parent / "confusion-best-test_data.png").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_networks_say_what_the_network_says(
    stochastic: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run(export_script, stochastic, "--output-dir", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("differ from the checkpoint's by") == 2
    program_file, onnx_file = tmp_path / "out" / "best.pt2", tmp_path / "out" / "best.onnx"
    assert set((tmp_path / "out").iterdir()) == {program_file, onnx_file}

    extra = dict.fromkeys(("classes", "mean", "std", "pooling"), "")
    program = torch.export.load(program_file, extra_files=extra).module()
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    for told in (extra, session.get_modelmeta().custom_metadata_map):
        assert json.loads(told["classes"]) == list(CLASSES)
        assert json.loads(told["mean"]) == list(IMAGENET_MEAN)
        assert json.loads(told["std"]) == list(IMAGENET_STD)
        assert json.loads(told["pooling"]) == "stochastic"
    assert {node.domain for node in onnx.load(onnx_file).graph.node} == {""}

    model = make_model("stochastic")
    images = torch.cat([seen_by_torchvision(path) for path in photos.rglob("*.png")])
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = model(batch)
            torch.testing.assert_close(program(batch), expected, rtol=1e-4, atol=1e-4)
        (output,) = session.run(["log_probabilities"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)


def test_export_that_differs_is_refused(
    stochastic: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A network with other pools got into the file; the file of before stays."""
    before = tmp_path / "best.pt2"
    before.write_bytes(b"of before")
    export = torch.export.export
    monkeypatch.setattr(
        torch.export,
        "export",
        lambda _, *args, **kwargs: export(make_model("max"), *args, **kwargs),
    )
    assert run(export_script, stochastic, "--format", "torch_export", "--output-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{before} was not written" in error
    assert error.count("\n") == 1
    assert before.read_bytes() == b"of before"
    assert list(tmp_path.iterdir()) == [before]


def test_a_table_without_its_package(stochastic: Path, photos: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tabulate", None)
    for script, *paths in ((evaluate, stochastic), (predict, stochastic, photos)):
        assert run(script, *paths) == 2
        shown = capsys.readouterr()
        assert shown.out == ""  # not at the end of the work
        assert "tabulate" in shown.err
        assert shown.err.endswith('pip install -e ".[train]"\n')
        assert shown.err.count("\n") == 1


def test_export_without_its_packages(stochastic: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(export_script, stochastic, "--format", "onnx") == 2
    error = capsys.readouterr().err
    assert "needs onnxruntime: pip install onnx onnxscript onnxruntime" in error
    assert error.count("\n") == 1
