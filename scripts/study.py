#!/usr/bin/env python
"""Compare pools and recipes: run train.py for several seeds of each, and tabulate the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cnnsp import POOLINGS
from cnnsp.cli import ArgumentParser, exit_status, expanded, importing, number
from cnnsp.data.folder import SPLITS, list_folder
from cnnsp.errors import quoted
from cnnsp.training.recipe import RECIPES

PROG = "study.py"
EXAMPLES = """\
  study.py --data-dir datasets --pools stochastic max --seeds 3 -- --amp
Flags after -- are given to every run of train.py."""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--data-dir",
        type=expanded,
        required=True,
        help="folder with train_data/<class>/ and test_data/<class>/",
    )
    add(
        "--output-dir",
        type=expanded,
        default=Path("runs", "study"),
        help="folder to write to; the same command goes on with what it holds",
    )
    recipes = tuple(RECIPES)
    add("--recipes", nargs="+", choices=recipes, default=recipes, help="recipes to run")
    add("--pools", nargs="+", choices=POOLINGS, default=POOLINGS, help="pools to run")
    add("--seeds", type=number(int, 1), default=5, help="runs of each, with the seeds 0, 1, ...")
    parser.add_common("--device")
    add("--name", help="of this machine, for the table; when not given: what PyTorch knows of it")
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    args, flags = make_parser().parse_args(given[:end]), given[end + 1 :]
    held_out = any(flag.startswith("--validate") for flag in flags)  # of train_data
    list_folder(args.data_dir, splits=SPLITS[: 1 if held_out else 2])
    with importing(PROG, "study"):
        from cnnsp.results.study import Study, cases, machine_name
        from cnnsp.training.devices import choose_device

    study = Study(
        script=Path(__file__).with_name("train.py"),
        folder=args.output_dir,
        data_dir=args.data_dir.resolve(),
        flags=flags,
        device=args.device,
        machine=args.name or machine_name(choose_device(args.device)),
        started_with=f"python scripts/study.py {quoted(*given)}",
    )
    planned = cases(args.recipes, args.pools, args.seeds)
    study.check(planned)
    if failures := study.run(planned):  # the others are finished
        print(
            f"{PROG}: failed: {', '.join(failures)}; the same command tries again", file=sys.stderr
        )
        sys.exit(1)


main = partial(exit_status, PROG, run)

if __name__ == "__main__":
    sys.exit(main())
