#!/usr/bin/env python
"""Classify photographs with a network that train.py trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cnnsp import UserError
from cnnsp.cli import ArgumentParser, align, exit_status, number, printable
from cnnsp.results.inference import Prediction, find_images, load_network, predict
from cnnsp.training.devices import choose_device

PROG = "predict.py"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a best.pt or last.pt")
    add("images", nargs="+", help="photographs, or folders of them at any depth")
    add("--json", action="store_true", help="print one JSON list instead of a table")
    add(
        "--mc",
        type=number(int, 2),
        metavar="N",
        help="average the probabilities over N draws of the stochastic pools, and show their "
        "standard deviation",
    )
    add("--seed", type=number(int, 0, most=2**63 - 1), default=0, help="of the draws")
    add("-b", "--batch-size", type=number(int, 1), default=64, help="images at once")
    add("--device", help="cuda, cuda:1, cpu …; when not given: cuda if there is one")
    add("-j", "--workers", type=number(int, 1), default=4, help="threads that decode images")
    return parser


def run(arguments: Sequence[str] | None) -> None:
    args = make_parser().parse_args(arguments)
    network = load_network(args.checkpoint, choose_device(args.device))
    if args.mc is not None and network.pooling != "stochastic":
        raise UserError(
            f"--mc: checkpoint {args.checkpoint} has {network.pooling} pooling, which draws nothing"
        )
    sources = find_images(args.images)
    torch.manual_seed(args.seed)
    results = predict(
        network, sources, batch_size=args.batch_size, workers=args.workers, draws=args.mc
    )
    predictions, failures = [], []
    for result in tqdm(results, "images", len(sources), unit="", leave=False, disable=None):
        if isinstance(result, Prediction):
            predictions.append(result)
        elif result.source.in_folder:
            tqdm.write(f"skipped: {printable(result.reason)}", file=sys.stderr)
        else:
            failures.append(result)

    if args.json:
        entries = [as_entry(prediction, network.classes) for prediction in predictions]
        print(json.dumps(entries, indent=2, allow_nan=False))
    elif predictions:
        print(*align(table(predictions, network.classes), left=2), sep="\n")
    if failures:
        raise UserError("; ".join(printable(failure.reason) for failure in failures))
    if not predictions:
        raise UserError(f"no images in {', '.join(map(printable, args.images))}")


def as_entry(prediction: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    """What JSON has on one file."""
    entry: dict[str, Any] = {
        "file": str(prediction.source.path),
        "class": classes[prediction.position],
        "probabilities": dict(zip(classes, prediction.probabilities, strict=True)),
    }
    if prediction.spread:
        entry["spread"] = dict(zip(classes, prediction.spread, strict=True))
    return entry


def table(predictions: Sequence[Prediction], classes: Sequence[str]) -> list[list[str]]:
    """The cells of the table: file, class, and the probability of each class."""
    names = [printable(name) for name in classes]
    rows = [["file", "class", *names]]
    for prediction in predictions:
        cells = [f"{p:.4f}" for p in prediction.probabilities]
        if prediction.spread:
            pairs = zip(cells, prediction.spread, strict=True)
            cells = [f"{cell} ± {spread:.4f}" for cell, spread in pairs]
        name = printable(str(prediction.source.path))
        rows.append([name, names[prediction.position], *cells])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with ``arguments`` (default: the command line); returns the exit status."""
    return exit_status(PROG, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
