#!/usr/bin/env python
"""Write a network that train.py trained as an ONNX file and as an exported PyTorch program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from cnnsp.cli import ArgumentParser, exit_status, expanded, importing
from cnnsp.training import checkpoint

PROG = "export.py"
FORMATS = {"torch_export": ("export_program", ".pt2"), "onnx": ("export_onnx", ".onnx")}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__, "  export.py runs/max-20260101-120000 --format onnx")
    add = parser.add_argument
    parser.add_common("checkpoint")
    add("--format", choices=FORMATS, help="when not given: both")
    add("--output-dir", type=expanded, help="when not given: the folder of the checkpoint")
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    source = checkpoint.find(args.checkpoint)
    with importing(PROG):
        from cnnsp.results import export
        from cnnsp.results.inference import load_network

    network = load_network(source)
    for name in [args.format] if args.format else FORMATS:
        function, suffix = FORMATS[name]
        path = (args.output_dir or source.parent) / (source.stem + suffix)
        difference = getattr(export, function)(network, path)
        print(f"{path}: log-probabilities differ from the checkpoint's by {difference:.1e} at most")


main = partial(exit_status, PROG, run)

if __name__ == "__main__":
    sys.exit(main())
