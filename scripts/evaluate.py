#!/usr/bin/env python
"""Test a network that train.py trained: accuracy, loss, sensitivities and confusion matrix."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cnnsp import files
from cnnsp.cli import ArgumentParser, align, exit_status, number
from cnnsp.data import synthetic
from cnnsp.data.batches import ImageBank
from cnnsp.data.decoding import Images, load_folder
from cnnsp.results import pictures as figures
from cnnsp.results.evaluation import confusion_rows, evaluate
from cnnsp.results.inference import load_network
from cnnsp.training import checkpoint
from cnnsp.training.devices import choose_device

PROG = "evaluate.py"
SPLITS = ("train_data", "test_data")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a best.pt or last.pt")
    add(
        "--data-dir",
        help="folder with train_data/<class>/ and test_data/<class>/, or 'synthetic'; when not "
        "given: what the network was trained on",
    )
    add("--split", choices=SPLITS, default="test_data", help="the images to take, each as it is")
    add(
        "--output-dir",
        type=Path,
        help="folder for the picture; when not given: that of the checkpoint",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("-b", "--batch-size", type=number(int, 1), default=64, help="images at once")
    add("--device", help="cuda, cuda:1, cpu …; when not given: cuda if there is one")
    add("-j", "--workers", type=number(int, 1), default=4, help="threads that decode images")
    return parser


def load_images(data_dir: str, split: str, workers: int) -> Images:
    load = synthetic.load if data_dir == "synthetic" else lambda **kw: load_folder(data_dir, **kw)
    return load(workers=workers)[SPLITS.index(split)]


def run(arguments: Sequence[str] | None) -> None:
    args = make_parser().parse_args(arguments)
    device = choose_device(args.device)
    state = checkpoint.load(args.checkpoint)
    network = load_network(args.checkpoint, device)
    data_dir = args.data_dir or state["options"]["data_dir"]
    images = load_images(data_dir, args.split, args.workers)
    checkpoint.check_classes(state, args.checkpoint, images.classes)

    bank = ImageBank(
        images, device=device, channels_last=device.type == "cpu", workers=args.workers
    )
    result = evaluate(network.model, bank, args.batch_size)
    picture = (args.output_dir or args.checkpoint.parent) / f"confusion-{args.split}.png"
    files.make_folder(picture.parent)
    title = f"CNN_SP, {network.pooling} pooling, {data_dir}/{args.split}"
    heading = f"{title}\naccuracy {result.accuracy:.2f} %"
    figures.write(figures.confusion(result, images.classes, heading), picture)

    if args.json:
        sensitivities = dict(zip(images.classes, result.sensitivities, strict=True))
        summary = {
            "checkpoint": str(args.checkpoint),
            "data_dir": str(data_dir),
            "split": args.split,
            "pooling": network.pooling,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "correct": result.correct,
            "total": result.total,
            "classes": list(images.classes),
            "sensitivities": sensitivities,
            "confusion": result.confusion.tolist(),
        }
        print(json.dumps(summary, indent=2, allow_nan=False))
        return
    print(
        title,
        f"average loss {result.loss:.4f}, "
        f"accuracy {result.correct}/{result.total} ({result.accuracy:.2f} %)",
        "",
        *align(confusion_rows(result, images.classes)),
        "",
        f"Picture: {picture}",
        sep="\n",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with ``arguments`` (default: the command line); returns the exit status."""
    return exit_status(PROG, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
