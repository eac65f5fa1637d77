#!/usr/bin/env python
"""Turn an unpacked Kaggle folder of flowers into the folders that train.py reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cnnsp.cli import ArgumentParser, exit_status, importing, number

PROG = "prepare_flowers.py"
EXAMPLES = """\
  prepare_flowers.py flowers
  prepare_flowers.py flowers --classes tulip rose --train 200 --test 100 --output tulips"""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__, EXAMPLES)
    add = parser.add_argument
    add("source", help="the unpacked folder; it holds a folder for each class")
    add("--output", default="datasets", help="folder to make")
    add("--classes", nargs="+", default=["daisy", "dandelion", "rose"], help="folders to take")
    add("--train", type=number(int, 1), default=100, help="training images of each class")
    add("--test", type=number(int, 1), default=200, help="test images of each class")
    add("--seed", type=number(int, 0), default=0, help="of the choice")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with ``arguments`` (default: the command line); returns the exit status."""
    args = make_parser().parse_args(arguments)

    def work() -> None:
        with importing(PROG):
            from cnnsp.data.prepare import prepare_flowers
        for line in prepare_flowers(**vars(args)):
            print(line)

    return exit_status(PROG, work)


if __name__ == "__main__":
    sys.exit(main())
