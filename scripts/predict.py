#!/usr/bin/env python
"""Classify photographs with a network that train.py trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnsp import UserError
from cnnsp.cli import ArgumentParser, align, exit_status, importing, number, printable
from cnnsp.data.folder import find_images
from cnnsp.training import checkpoint

if TYPE_CHECKING:
    from cnnsp.results.inference import Prediction

PROG = "predict.py"
EXAMPLES = """\
  predict.py runs/max-20260101-120000 rose.jpg photographs/
  predict.py runs/stochastic-20260101-120000/best.pt rose.jpg --mc 50 --json"""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__, EXAMPLES)
    add = parser.add_argument
    parser.add_common("checkpoint")
    add("images", nargs="+", help="photographs, or folders of them at any depth")
    add(
        "--mc",
        type=number(int, 2),
        metavar="N",
        help="average the probabilities over N draws of the stochastic pools, and show their "
        "standard deviation",
    )
    add("--seed", type=number(int, 0, most=2**63 - 1), default=0, help="of the draws of --mc")
    parser.add_common("--json", "-b --batch-size", "--device", "-j --workers")
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    path = checkpoint.find(args.checkpoint)
    sources, passed_over = find_images(args.images)
    with importing(PROG):
        import tabulate  # noqa: F401  for the table
        import torch
        from tqdm import tqdm

        from cnnsp.results.inference import load_network, predict
        from cnnsp.training.devices import choose_device

    network = load_network(path, choose_device(args.device))
    if args.mc is not None and network.pooling != "stochastic":
        raise UserError(
            f"--mc: checkpoint {path} has {network.pooling} pooling, which draws nothing"
        )
    for reason in passed_over:
        print(f"skipped: {printable(reason)}", file=sys.stderr)
    torch.manual_seed(args.seed)
    paths = [source.path for source in sources]
    results = predict(network, paths, args.batch_size, args.workers, args.mc)
    bar = tqdm(results, "images", len(sources), unit="", leave=False, disable=None)
    predictions, failures = [], []
    for source, result in zip(sources, bar, strict=True):
        if not isinstance(result, UserError):
            predictions.append((source.path, result))
        elif source.in_folder:
            tqdm.write(f"skipped: {printable(str(result))}", file=sys.stderr)
        else:
            failures.append(str(result))

    if args.json:
        entries = [as_entry(*prediction, network.classes) for prediction in predictions]
        print(json.dumps(entries, indent=2, allow_nan=False))
    elif predictions:
        print(*align(table(predictions, network.classes), left=2), sep="\n")
    if failures:
        raise UserError("; ".join(failures))
    if not predictions:
        raise UserError(f"no images in {', '.join(args.images)}")


def as_entry(path: Path, prediction: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    """What JSON has on one file."""
    entry: dict[str, Any] = {
        "file": str(path),
        "class": classes[prediction.position],
        "probabilities": dict(zip(classes, prediction.probabilities, strict=True)),
    }
    if prediction.spread:
        entry["spread"] = dict(zip(classes, prediction.spread, strict=True))
    return entry


def table(
    predictions: Sequence[tuple[Path, Prediction]], classes: Sequence[str]
) -> list[list[str]]:
    """The cells of the table: file, class, and the probability of each class."""
    names = [printable(name) for name in classes]
    rows = [["file", "class", *names]]
    for path, prediction in predictions:
        cells = [f"{p:.4f}" for p in prediction.probabilities]
        if prediction.spread:
            pairs = zip(cells, prediction.spread, strict=True)
            cells = [f"{cell} ± {spread:.4f}" for cell, spread in pairs]
        rows.append([printable(str(path)), names[prediction.position], *cells])
    return rows


main = partial(exit_status, PROG, run)

if __name__ == "__main__":
    sys.exit(main())
