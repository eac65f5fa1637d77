#!/usr/bin/env python
"""Train CNN_SP on photographs, or on synthetic flowers where there are none."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from cnnsp import UserError, checkpoint, synthetic
from cnnsp.augment import PAPER_VARIANTS, ImageBank, Variant
from cnnsp.cli import ArgumentParser, exit_status, number
from cnnsp.data import ImageSet, load_folder
from cnnsp.network import POOLINGS
from cnnsp.training import Trainer, TrainOptions, check_output

PROG = "train.py"
SYNTHETIC = "synthetic"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__)
    default = TrainOptions()
    flag = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data and output").add_argument
    add(
        "--data-dir",
        default="datasets" if Path("datasets").is_dir() else SYNTHETIC,
        help="folder with train_data/<class>/ and test_data/<class>/, or 'synthetic'; "
        "when not given: datasets/, or synthetic flowers if that does not exist",
    )
    add(
        "--output-dir", type=Path, help="folder to write to; runs/<pool>-<date>-<time> if not given"
    )
    add("-j", "--workers", type=number(int, 1), default=4, help="threads that decode images")

    group = parser.add_argument_group(
        "recipe", "Defaults are the paper's recipe; synthetic flowers take a shorter one."
    )
    add = group.add_argument
    add("--pool", choices=POOLINGS, default=default.pool, help="pooling")
    add("--epochs", type=number(int, 1), default=default.epochs, help="epochs in all")
    add(
        "-b",
        "--batch-size",
        type=number(int, 1),
        default=default.batch_size,
        help="images in a step of the optimiser",
    )
    add("--opt", choices=("sgd", "adam"), default=default.opt, help="optimiser")
    add("--lr", type=number(float, 0, exclusive=True), default=default.lr, help="learning rate")
    add("--momentum", type=number(float, 0), default=default.momentum, help="momentum of SGD")
    add("--weight-decay", type=number(float, 0), default=default.weight_decay, help="L2 penalty")
    add(
        "--lr-step",
        type=number(int, 1),
        default=default.lr_step,
        metavar="EPOCHS",
        help="epochs after which the learning rate is divided by 10, again and again",
    )
    add(
        "--seed",
        type=number(int, 0),
        default=default.seed,
        help="of the weights, the order of the images, dropout and the stochastic pools",
    )

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:1, cpu …; when not given: cuda if there is one")
    add("--amp", action=flag, help="mixed precision: float16 on CUDA, bfloat16 elsewhere")
    add("--amp-dtype", choices=("float16", "bfloat16"), help="type for mixed precision")
    add(
        "--channels-last",
        action=flag,
        help="memory format; when not given: on for CPUs, and for CUDA with mixed precision",
    )
    add("--torchcompile", action=flag, help="compile the network with torch.compile")

    add = parser.add_argument_group("run").add_argument
    add(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="go on from a last.pt, in its folder and with its settings; other flags override them",
    )
    add("--max-steps", type=number(int, 1), metavar="N", help="stop after N steps and evaluate")
    add(
        "--log-interval",
        type=number(int, 1),
        default=default.log_interval,
        metavar="STEPS",
        help="steps from one report of the loss to the next",
    )
    return parser


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The settings, and the checkpoint to go on from."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    state = None
    if args.resume is not None:
        state = checkpoint.load(args.resume)
        inherited = {k: v for k, v in state["options"].items() if k != "max_steps"}
        parser.set_defaults(output_dir=args.resume.parent, **inherited)
    elif args.data_dir == SYNTHETIC:
        parser.set_defaults(**synthetic.RECIPE)
    return parser.parse_args(arguments), state


def choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: PyTorch knows no such device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine, or this PyTorch, has no CUDA")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available on this machine") from None
    return device


def choose_amp_dtype(amp: bool | None, name: str | None, device: torch.device) -> str | None:
    """The type for autocast, or None for fp32 throughout."""
    if amp is False:
        return None
    if name is not None or amp is None:
        return name
    if device.type == "cpu" and not _has_bfloat16_instructions():
        print(
            "--amp: this CPU has no bf16 instructions, so training stays in fp32, which is faster "
            "here; --amp-dtype bfloat16 forces bf16."
        )
        return None
    return "float16" if device.type == "cuda" else "bfloat16"


def _has_bfloat16_instructions() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN, or a later one
        return False


def load_images(args: argparse.Namespace) -> tuple[ImageSet, ImageSet, tuple[Variant, ...]]:
    """Training images, test images, and the variants of a training image."""
    if args.data_dir != SYNTHETIC:
        return *load_folder(args.data_dir, workers=args.workers), PAPER_VARIANTS
    print(
        "Training on synthetic flowers, which the program draws itself: the accuracy says nothing "
        "about photographs.\n"
        "For photographs: --data-dir FOLDER, with FOLDER/train_data/<class>/ and "
        "FOLDER/test_data/<class>/; scripts/prepare_flowers.py makes them.",
        flush=True,
    )
    train, test = synthetic.load(workers=args.workers)
    paper = TrainOptions()
    print(
        f"Shorter than the paper's recipe: {len(synthetic.VARIANTS)} variants of an image, not "
        f"{len(PAPER_VARIANTS)}; {args.epochs} epochs ({paper.epochs}), batches of "
        f"{args.batch_size} ({paper.batch_size}), {args.opt} with learning rate {args.lr:g} "
        f"({paper.opt}, {paper.lr:g}).",
        flush=True,
    )
    return train, test, synthetic.VARIANTS


def run(arguments: Sequence[str] | None) -> None:
    # Lets PyTorch use huge pages on Linux. A step allocates gigabytes; with small pages much of
    # its time goes into page faults. PyTorch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    args, state = parse(arguments)
    if state is not None:
        checkpoint.check_pooling(state, args.resume, args.pool)
    device = choose_device(args.device)
    args.amp_dtype = choose_amp_dtype(args.amp, args.amp_dtype, device)
    if args.channels_last is None:
        args.channels_last = device.type == "cpu" or args.amp_dtype is not None
    if args.output_dir is None:
        args.output_dir = Path("runs", f"{args.pool}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_output(args.output_dir, resuming=state is not None)

    train, test, variants = load_images(args)
    if state is not None:
        checkpoint.check_classes(state, args.resume, train.classes)
    names = {field.name for field in fields(TrainOptions)}
    options = TrainOptions(**{k: v for k, v in vars(args).items() if k in names and v is not None})
    trainer = Trainer(
        options,
        ImageBank(train, variants, device=device, channels_last=args.channels_last),
        ImageBank(test, device=device, channels_last=args.channels_last),
        train.classes,
        args.output_dir,
    )
    if state is not None:
        trainer.restore(state, args.resume)
    print(
        f"CNN_SP with {args.pool} pooling on {device}, {args.amp_dtype or 'float32'}, "
        f"{'channels_last' if args.channels_last else 'contiguous'}\n"
        f"{len(train)} training images in {len(variants)} variants, {len(test)} test images\n"
        f"Output: {args.output_dir}",
        flush=True,
    )
    trainer.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with ``arguments`` (default: the command line); returns the exit status."""
    return exit_status(PROG, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
