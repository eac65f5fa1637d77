#!/usr/bin/env python
"""Test a network that train.py trained: accuracy, loss, sensitivities and confusion matrix."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cnnsp import UserError, files
from cnnsp.cli import ArgumentParser, align, exit_status, expanded, importing, printable
from cnnsp.data import folder
from cnnsp.training import checkpoint
from cnnsp.training.recipe import SYNTHETIC, add_options

PROG = "evaluate.py"
EXAMPLES = """\
  evaluate.py runs/max-20260101-120000
  evaluate.py runs/max-20260101-120000/best.pt --data-dir photos --json"""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__, EXAMPLES)
    add = parser.add_argument
    parser.add_common("checkpoint")
    add(
        "--data-dir",
        type=os.path.expanduser,
        help="folder with train_data/<class>/ and test_data/<class>/, of which one is enough, or "
        "'synthetic'; when not given: what the network was trained on",
    )
    add("--split", choices=folder.SPLITS, default="test_data", help="images to take, as they are")
    add_options(parser, ["validate"])
    add(
        "--output-dir",
        type=expanded,
        help="folder for the picture; when not given: that of the checkpoint",
    )
    parser.add_common("--json", "-b --batch-size", "--device", "-j --workers")
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    path = checkpoint.find(args.checkpoint)
    split: folder.Split = {}
    find = partial(folder.list_folder, validate=args.validate, splits=[args.split])
    if args.data_dir not in (None, SYNTHETIC):
        split = find(args.data_dir)[args.split]
    with importing(PROG):
        import tabulate  # noqa: F401  for the table

        from cnnsp.data import synthetic
        from cnnsp.data.batches import ImageBank
        from cnnsp.data.images import load_splits
        from cnnsp.results import pictures
        from cnnsp.results.evaluation import confusion_rows, evaluate
        from cnnsp.results.inference import load_network
        from cnnsp.training.devices import choose_device

    device = choose_device(args.device)
    network = load_network(path, device)
    state = network.state
    trained = state["options"]
    data_dir = args.data_dir or trained["data_dir"]
    own = Path(data_dir).resolve() == Path(trained["data_dir"]).resolve()
    if data_dir == SYNTHETIC and args.validate is not None:
        raise UserError("--validate needs photographs: --data-dir FOLDER")
    if data_dir != SYNTHETIC and not split:
        split = find(data_dir, named_by=path)[args.split]
    if split and split.keys() <= {*state["classes"]}:  # of the others there are no photographs
        split = {name: split.get(name, []) for name in state["classes"]}
    checkpoint.check_classes(state, path, tuple(split) or synthetic.CLASSES)
    if split:
        (images,) = load_splits({args.split: split}, args.workers)
    else:
        name = args.split.removesuffix("_data")
        images = synthetic.synthetic_flowers(synthetic.PER_CLASS[name], split=name)

    if own and args.split == "test_data" and args.validate not in (None, trained.get("validate")):
        print(f"warning: {path} was trained on these images", file=sys.stderr)
    bank = ImageBank(
        images, device=device, channels_last=device.type == "cpu", workers=args.workers
    )
    result = evaluate(network.model, bank, args.batch_size)
    images_of = args.split if args.validate is None else f"{args.split}-validate-{args.validate}"
    title = printable(f"CNN_SP, {network.pooling} pooling, {path.name}, {data_dir}/{images_of}")
    if args.json:
        summary = {
            "checkpoint": str(path),
            "data_dir": str(data_dir),
            "split": images_of,
            "pooling": network.pooling,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "correct": result.correct,
            "total": result.total,
            "classes": list(images.classes),
            "sensitivities": dict(zip(images.classes, result.sensitivities, strict=True)),
            "confusion": result.confusion.tolist(),
        }
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print(
            title,
            f"average loss {result.loss:.4f}, "
            f"accuracy {result.correct}/{result.total} ({result.accuracy:.2f} %)",
            "",
            *align(confusion_rows(result, images.classes)),
            sep="\n",
        )
    # At the end, for the folder of another's run may be read-only.
    others = "" if own else f"{Path(data_dir).resolve().name}-"
    picture = (args.output_dir or path.parent) / f"confusion-{path.stem}-{others}{images_of}.png"
    files.make_folder(picture.parent)
    pictures.write(pictures.confusion(result, images.classes, title), picture)
    if not args.json:
        print(f"\nPicture: {picture}")


main = partial(exit_status, PROG, run)

if __name__ == "__main__":
    sys.exit(main())
