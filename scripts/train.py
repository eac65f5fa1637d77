#!/usr/bin/env python
"""Train CNN_SP on photographs, or on synthetic flowers where there are none."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from cnnsp import UserError
from cnnsp.cli import ArgumentParser, exit_status, number
from cnnsp.data import synthetic
from cnnsp.data.augment import AS_IS, PAPER_VARIANTS, RandomAugment, Variant
from cnnsp.data.batches import GPU_BUDGET, ImageBank
from cnnsp.data.decoding import Images, load_folder
from cnnsp.network import POOLINGS
from cnnsp.training import checkpoint, memory
from cnnsp.training import processes as distributed
from cnnsp.training.devices import choose_amp_dtype, choose_device, keep_freed_memory
from cnnsp.training.interruption import Interrupted
from cnnsp.training.recipe import AUGMENTATIONS, OPTIMIZERS, RECIPES, SCHEDULES, TrainOptions
from cnnsp.training.run import Trainer, check_output

PROG = "train.py"
SYNTHETIC = "synthetic"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "off")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


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
    add(
        "-j",
        "--workers",
        type=number(int, 1),
        default=4,
        help="threads that decode images, or processes, for sets that are larger than memory",
    )

    add(
        "--validate",
        type=int,
        choices=range(4),
        metavar="QUARTER",
        help="to choose settings without the test images: hold out this quarter (0 to 3) of each "
        "class's training images, and evaluate on it instead",
    )

    share = number(float, 0, most=1)
    group = parser.add_argument_group(
        "recipe",
        "Defaults are the paper's recipe. --recipe best sets what did best on held-out training "
        "photographs; synthetic flowers take a shorter recipe of their own.",
    )
    add = group.add_argument
    add("--recipe", choices=tuple(RECIPES), help="defaults for the settings below")
    add("--pool", choices=POOLINGS, default=default.pool, help="pooling")
    add(
        "--augment",
        choices=AUGMENTATIONS,
        default=default.augment,
        help="the paper's rotations and gamma corrections, each once an epoch, or random crops, "
        "rotations, flips and colours, always new",
    )
    add(
        "--repeats",
        type=number(int, 1),
        default=default.repeats,
        help="with --augment random, how often an epoch takes each image",
    )
    add("--epochs", type=number(int, 1), default=default.epochs, help="epochs in all")
    add(
        "-b",
        "--batch-size",
        type=number(int, 1),
        default=default.batch_size,
        help="images in a step of the optimiser, over all processes",
    )
    add("--opt", choices=OPTIMIZERS, default=default.opt, help="optimiser")
    add("--lr", type=number(float, 0, exclusive=True), default=default.lr, help="learning rate")
    add("--momentum", type=number(float, 0), default=default.momentum, help="momentum of SGD")
    add("--nesterov", action=flag, default=default.nesterov, help="Nesterov's momentum, with SGD")
    add(
        "--weight-decay",
        type=number(float, 0),
        default=default.weight_decay,
        help="L2 penalty; decoupled with adamw",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default=default.schedule,
        help="of the learning rate: steps down, or a cosine to 0",
    )
    add(
        "--lr-step",
        type=number(int, 1),
        default=default.lr_step,
        metavar="EPOCHS",
        help="epochs after which the learning rate is divided by 10, again and again",
    )
    add(
        "--warmup-epochs",
        type=number(float, 0),
        default=default.warmup_epochs,
        metavar="EPOCHS",
        help="epochs over which the learning rate rises at the start",
    )
    add(
        "--label-smoothing", type=share, default=default.label_smoothing, help="share of the target"
    )
    add(
        "--mixup",
        type=number(float, 0),
        default=default.mixup,
        metavar="ALPHA",
        help="mix each image with another, by a share from Beta(ALPHA, ALPHA)",
    )
    add(
        "--ema",
        type=share,
        default=default.ema,
        metavar="DECAY",
        help="evaluate a moving average of the weights, with this decay",
    )
    add("--dropout", type=share, default=default.dropout, help="probability, before the last layer")
    add(
        "--seed",
        type=number(int, 0, most=2**32 - 1),
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
    add(
        "--torchcompile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        metavar="MODE",
        help=f"compile the network: {', '.join(COMPILE_MODES)}; reduce-overhead uses CUDA graphs",
    )
    add(
        "--accumulate",
        type=number(int, 1),
        default=default.accumulate,
        metavar="PARTS",
        help="compute a batch in parts, one after the other: less memory for the same recipe",
    )
    add(
        "--gpu-memory-gb",
        type=number(float, 0, exclusive=True),
        metavar="GB",
        help="take no more of the GPU's memory than this, as on a smaller card; GB of 10^9 bytes",
    )

    add = parser.add_argument_group("run").add_argument
    add(
        "--resume",
        type=Path,
        metavar="CHECKPOINT",
        help="go on from a last.pt, in its folder and with its recipe; other flags override it",
    )
    add("--max-steps", type=number(int, 1), metavar="N", help="stop after N steps and evaluate")
    add(
        "--log-interval",
        type=number(int, 1),
        default=default.log_interval,
        metavar="STEPS",
        help="steps from one report of the loss to the next",
    )
    add(
        "--checkpoint-interval",
        type=number(float, 0),
        default=default.checkpoint_interval,
        metavar="SECONDS",
        help="time from one checkpoint to the next within an epoch",
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
    elif args.data_dir == SYNTHETIC and args.recipe is None:
        parser.set_defaults(**synthetic.RECIPE)
    if args.recipe is not None:
        parser.set_defaults(**RECIPES[args.recipe])
    args = parser.parse_args(arguments)
    if args.torchcompile == "off":
        args.torchcompile = None
    if args.torchcompile in CUDA_GRAPHS and args.accumulate > 1:
        raise UserError(
            f"--torchcompile {args.torchcompile} uses CUDA graphs, which know no --accumulate; "
            "--torchcompile without a mode does"
        )
    if args.opt == "sgd" and args.nesterov and args.momentum == 0:
        raise UserError("--nesterov needs --momentum above 0")
    return args, state


def load_images(args: argparse.Namespace) -> tuple[Images, Images, tuple[Variant, ...]]:
    """Training images, those to evaluate on, and the paper's variants of a training image."""
    if args.data_dir != SYNTHETIC:
        train, test = load_folder(args.data_dir, workers=args.workers, validate=args.validate)
        return train, test, PAPER_VARIANTS
    if args.validate is not None:
        raise UserError("--validate needs photographs: --data-dir FOLDER")
    print(
        "Training on synthetic flowers, which the program draws itself: the accuracy says nothing "
        "about photographs.\n"
        "For photographs: --data-dir FOLDER, with FOLDER/train_data/<class>/ and "
        "FOLDER/test_data/<class>/; scripts/prepare_flowers.py makes them.",
        flush=True,
    )
    train, test = synthetic.load(workers=args.workers)
    if args.recipe is not None:
        return train, test, PAPER_VARIANTS
    paper = TrainOptions()
    print(
        f"Shorter than the paper's recipe: {len(synthetic.VARIANTS)} variants of an image, not "
        f"{len(PAPER_VARIANTS)}; {args.epochs} epochs ({paper.epochs}), batches of "
        f"{args.batch_size} ({paper.batch_size}), {args.opt} with learning rate {args.lr:g} "
        f"({paper.opt}, {paper.lr:g}).",
        flush=True,
    )
    return train, test, synthetic.VARIANTS


def train(
    args: argparse.Namespace,
    state: dict[str, Any] | None,
    device: torch.device,
    team: distributed.Team,
) -> None:
    card_bytes = memory.limit(device, args.gpu_memory_gb)
    args.amp_dtype = choose_amp_dtype(args.amp, args.amp_dtype, device)
    if args.channels_last is None:
        args.channels_last = device.type == "cpu" or args.amp_dtype is not None
    if args.output_dir is None:
        args.output_dir = Path("runs", f"{args.pool}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_output(args.output_dir, args.resume)

    train_images, test_images, variants = load_images(args)
    if state is not None:
        checkpoint.check_classes(state, args.resume, train_images.classes)
    names = {field.name for field in fields(TrainOptions)}
    options = TrainOptions(**{k: v for k, v in vars(args).items() if k in names and v is not None})
    random = args.augment == "random"
    bank = ImageBank(
        train_images,
        AS_IS if random else variants,
        augment=RandomAugment(repeats=args.repeats, seed=args.seed) if random else None,
        device=device,
        channels_last=args.channels_last,
        dtype=getattr(torch, args.amp_dtype or "float32"),
        workers=args.workers,
    )
    test_bank = ImageBank(
        test_images,
        device=device,
        channels_last=args.channels_last,
        budget_bytes=GPU_BUDGET - bank.device_bytes,
        workers=args.workers,
    )
    trainer = Trainer(options, bank, test_bank, train_images.classes, args.output_dir, team)
    if state is not None:
        trainer.restore(state, args.resume)
    processes = f", {team.size} processes" if team.size > 1 else ""
    made = f"drawn {args.repeats} times an epoch" if random else f"in {len(variants)} variants"
    print(
        f"CNN_SP with {args.pool} pooling on {device}, {args.amp_dtype or 'float32'}, "
        f"{'channels_last' if args.channels_last else 'contiguous'}{processes}\n"
        f"{len(train_images)} training images {made}, {bank.placement}; "
        f"{len(test_images)} test images\n"
        f"Output: {args.output_dir}",
        flush=True,
    )
    try:
        trainer.run()
    except torch.OutOfMemoryError:
        raise UserError(
            memory.advice(
                card_bytes,
                options,
                processes=team.size,
                num_classes=len(train_images.classes),
                image_bank_bytes=bank.device_bytes + test_bank.device_bytes,
            )
        ) from None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        print(f"Peak GPU memory: {peak:.0f} MiB allocated", flush=True)


def run(arguments: Sequence[str] | None) -> None:
    keep_freed_memory()
    args, state = parse(arguments)
    if state is not None:
        checkpoint.check_pooling(state, args.resume, args.pool)
    device = distributed.own_device(choose_device(args.device))
    team = distributed.start(device)
    try:
        # Without a standard output, print does nothing: one process speaks for all.
        with nullcontext() if team.leads else redirect_stdout(None):
            train(args, state, device, team)
    except Interrupted as interruption:
        if team.leads:
            raise
        raise SystemExit(128 + interruption.signal) from None
    finally:
        distributed.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with ``arguments`` (default: the command line); returns the exit status."""
    return exit_status(PROG, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
