#!/usr/bin/env python
"""Train CNN_SP on photographs, or on synthetic flowers where there are none."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnsp import UserError, files
from cnnsp.cli import COMMON, ArgumentParser, exit_status, expanded, importing, is_launched, number
from cnnsp.data import folder
from cnnsp.errors import lacks_memory, quoted
from cnnsp.interruption import Interrupted
from cnnsp.training import checkpoint
from cnnsp.training.recipe import CUDA_GRAPHS, SYNTHETIC, TrainOptions, add_options, defaults

if TYPE_CHECKING:
    from cnnsp.data.augment import Variant
    from cnnsp.data.images import Images

PROG = "train.py"
EXAMPLES = """\
  train.py --amp                               on datasets/, or on synthetic flowers
  train.py --amp --data-dir photos --recipe best --pool max
  train.py --resume runs/max-20260101-120000   go on where that run was stopped
  train.py --recipe best --help                the settings of that recipe
  torchrun --nproc-per-node 2 scripts/train.py --amp"""
RECIPE = """\
The defaults shown follow --recipe: without it the paper's for photographs, and a
shorter one for synthetic flowers; best is what did best on held-out training photographs."""
# Settings that need a value of another one.
NEEDS = {
    **dict.fromkeys(("repeats", "crop_scale"), ("augment", "random")),
    **dict.fromkeys(("momentum", "nesterov"), ("opt", "sgd")),
    "lr_step": ("schedule", "step"),
}
# Of the settings; the others are the recipe.
DATA = ["data_dir", "validate"]
MACHINE = ["amp_dtype", "channels_last", "torchcompile", "accumulate"]
RUN = ["max_steps", "log_interval", "checkpoint_interval"]


def make_parser(add_help: bool = True) -> ArgumentParser:
    parser = ArgumentParser(PROG, __doc__, EXAMPLES, add_help)
    others = {field.name for field in fields(TrainOptions)} - {*DATA, *MACHINE, *RUN}
    named = {"data and output": DATA, "recipe": others, "machine": MACHINE, "run": RUN}
    groups = {name: parser.add_argument_group(name) for name in named}
    groups["recipe"].description = RECIPE
    for name, settings in named.items():
        add_options(groups[name], settings)
    add = groups["data and output"].add_argument
    add(
        "--output-dir", type=expanded, help="folder to write to; when not given: a new one in runs/"
    )
    add("-j", "--workers", **COMMON["-j --workers"])
    add = groups["machine"].add_argument
    add("--device", **COMMON["--device"])
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision: float16 on CUDA, bfloat16 elsewhere",
    )
    add(
        "--gpu-memory-gb",
        type=number(float, 0, exclusive=True),
        metavar="GB",
        help="take no more of the GPU's memory than this, as on a smaller card; GB of 10^9 bytes",
    )
    groups["run"].add_argument(
        "--resume",
        type=expanded,
        metavar="CHECKPOINT",
        help="go on from a last.pt, or from that of a run's folder, in its folder and with its "
        "recipe; other flags override it",
    )
    return parser


def parse(
    arguments: Sequence[str] | None, resumed: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """The settings; those of the checkpoint to go on from stand in for what is not given.

    ``named_by`` is that checkpoint where it, and not the user, names the data folder.
    """
    peek = make_parser(add_help=False)
    peek.set_defaults(data_dir=None, pool=None, **dict.fromkeys(NEEDS))
    given, _ = peek.parse_known_args(arguments)
    data_dir = given.data_dir or ("datasets" if Path("datasets").is_dir() else SYNTHETIC)
    parser = make_parser()
    chosen = defaults(data_dir, given.recipe, given.pool, resumed or {})
    parser.set_defaults(
        named_by=given.resume if resumed and given.data_dir is None else None,
        **{"data_dir": data_dir, **chosen},
    )
    args = parser.parse_args(arguments)
    if args.resume and not resumed:  # what is not given is not known yet
        return args
    for name, (other, value) in NEEDS.items():
        if getattr(given, name) and getattr(args, other) != value:
            flag = name.replace("_", "-")
            print(f"warning: --{flag} does nothing without --{other} {value}", file=sys.stderr)
    if given.amp is False and given.amp_dtype:
        print("warning: --amp-dtype does nothing with --no-amp", file=sys.stderr)
    if args.torchcompile == "off":
        args.torchcompile = None
    if args.torchcompile in CUDA_GRAPHS and args.accumulate > 1:
        raise UserError(
            f"--torchcompile {args.torchcompile} uses CUDA graphs, which know no --accumulate; "
            "--torchcompile without a mode does"
        )
    if args.opt == "sgd" and args.nesterov and args.momentum == 0:
        raise UserError("--nesterov needs --momentum above 0")
    if args.warmup_epochs > args.epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs:g} must be at most --epochs {args.epochs}"
        )
    if args.data_dir == SYNTHETIC and args.validate is not None:
        raise UserError("--validate needs photographs: --data-dir FOLDER")
    return args


def check_output(output: Path, resumed: Path | None) -> None:
    """Check that no other run lies there; raises UserError."""
    last = output / "last.pt"
    if not last.exists() or (resumed and last.resolve() == resumed.resolve()):
        return
    resume = f"--resume {quoted(last)}"
    if resumed is not None and output.resolve() == resumed.parent.resolve():
        raise UserError(
            f"{output} went on after {resumed.name}: {resume} goes on from there; to go "
            f"back to {resumed.name}, add --output-dir with a new folder"
        )
    raise UserError(
        f"output folder {output} holds another run; choose another, or go on with it: {resume}"
    )


def load_images(
    args: argparse.Namespace, splits: Mapping[str, folder.Split]
) -> tuple[Images, Images, tuple[Variant, ...]]:
    """Training images, those to evaluate on, and the paper's variants of a training image."""
    from cnnsp.data import synthetic
    from cnnsp.data.augment import PAPER_VARIANTS
    from cnnsp.data.images import in_both, load_splits

    if args.data_dir != SYNTHETIC:
        train, test = load_splits(splits, args.workers)
        if twins := in_both(train, test):
            print(
                f"warning: {len(twins)} of {len(test)} test images are training images, too, such "
                f"as {quoted(Path(twins[0]))}: the accuracy is too high by them",
                file=sys.stderr,
            )
        return train, test, PAPER_VARIANTS
    print(
        "Training on synthetic flowers, which the program draws itself: the accuracy says nothing "
        "about photographs.\n"
        "For photographs: --data-dir FOLDER, with FOLDER/train_data/<class>/ and "
        "FOLDER/test_data/<class>/; scripts/prepare_flowers.py makes them.",
        flush=True,
    )
    paper, variants = TrainOptions(), PAPER_VARIANTS
    if args.recipe is None:
        variants, made = synthetic.VARIANTS, ""
        if args.augment == "paper":
            made = f"{len(variants)} variants of an image, not {len(PAPER_VARIANTS)}; "
        print(
            f"Shorter than the paper's recipe: {made}{args.epochs} epochs ({paper.epochs}), "
            f"batches of {args.batch_size} ({paper.batch_size}), {args.opt} with learning rate "
            f"{args.lr:g} ({paper.opt}, {paper.lr:g}).",
            flush=True,
        )
    train, test = (
        synthetic.synthetic_flowers(number, split=split)
        for split, number in synthetic.PER_CLASS.items()
    )
    return train, test, variants


def run(arguments: Sequence[str] | None = None) -> None:
    args, state = parse(arguments), None
    if args.resume is not None:
        last = checkpoint.find(args.resume)
        with importing(PROG):
            import torch  # noqa: F401
        state = checkpoint.load(last)
        args = parse(arguments, state["options"])
        args.resume, args.named_by = last, args.named_by and last
        for name in ("recipe", "pool", "opt"):
            ours, theirs = getattr(args, name), state["options"].get(name)
            if ours != theirs:
                was = f"with --{name} {theirs}" if theirs else f"without --{name}"
                raise UserError(f"checkpoint {last} was trained {was}, not --{name} {ours}")
    splits = {}
    if args.data_dir != SYNTHETIC:
        splits = folder.list_folder(args.data_dir, validate=args.validate, named_by=args.named_by)
        args.data_dir = str(Path(args.data_dir).resolve())
    output = args.output_dir or (args.resume and args.resume.parent)
    for split in folder.SPLITS:
        photos = Path(args.data_dir, split).resolve()
        if output is not None and output.resolve().is_relative_to(photos):
            raise UserError(f"output folder {output} lies among the photographs; choose another")
    new = Path("runs", f"{args.pool}-{time.strftime('%Y%m%d-%H%M%S')}")
    # Of the processes that torchrun starts, the first one writes.
    leads = not is_launched() or os.environ["RANK"] == "0"
    with importing(PROG):  # Ctrl-C within ends at once, which would leave an empty folder
        import cnnsp.training.run  # noqa: F401
    claim = files.claimed(output or new, rename=output is None) if leads else nullcontext(new)
    with claim as args.output_dir:
        if leads:
            check_output(args.output_dir, args.resume)
        train(args, splits, state)


def train(
    args: argparse.Namespace, splits: Mapping[str, folder.Split], state: dict[str, Any] | None
) -> None:
    import torch

    from cnnsp.data.augment import AS_IS, RandomAugment
    from cnnsp.data.batches import ImageBank
    from cnnsp.data.images import GPU_BUDGET
    from cnnsp.training import devices, memory, processes
    from cnnsp.training.run import Trainer

    devices.keep_freed_memory()
    device = processes.own_device(devices.choose_device(args.device))
    team = processes.start(device)

    try:
        # Without a standard output, print does nothing: one process speaks for all.
        with nullcontext() if team.leads else redirect_stdout(None):
            card_bytes = memory.limit(device, args.gpu_memory_gb)
            before = state and state["options"].get("amp_dtype")
            args.amp_dtype = devices.choose_amp_dtype(args.amp, args.amp_dtype, device, before)
            if args.channels_last is None:
                args.channels_last = device.type == "cpu" or args.amp_dtype is not None
            options = TrainOptions(**{f.name: getattr(args, f.name) for f in fields(TrainOptions)})
            train_images, test_images, variants = load_images(args, splits)
            last = args.channels_last
            common: Any = {"device": device, "channels_last": last, "workers": args.workers}
            random, made = None, f"in {len(variants)} variants"
            if args.augment == "random":
                scale = (args.crop_scale, 1.0)
                random = RandomAugment(repeats=args.repeats, scale=scale, seed=args.seed)
                variants, made = AS_IS, f"drawn {args.repeats} times an epoch"
            dtype = getattr(torch, args.amp_dtype or "float32")
            bank = ImageBank(train_images, variants, augment=random, dtype=dtype, **common)
            budget = GPU_BUDGET - bank.images.device_bytes
            test_bank = ImageBank(test_images, budget_bytes=budget, **common)
            trainer = Trainer(options, bank, test_bank, args.output_dir, team)
            if state is not None:
                checkpoint.check_classes(state, args.resume, bank.images.classes)
                trainer.restore(state, args.resume)
            print(
                f"CNN_SP with {args.pool} pooling on {device}, {args.amp_dtype or 'float32'}, "
                f"{'channels_last' if args.channels_last else 'contiguous'}"
                f"{f', {team.size} processes' if team.size > 1 else ''}\n"
                f"{len(bank.images)} training images {made}, {bank.images.placement}; "
                f"{len(test_bank)} {'test' if args.validate is None else 'held-out'} images\n"
                f"Output: {args.output_dir}",
                flush=True,
            )
            if team.leads:
                others = {n: getattr(args, n) for n in ("workers", "gpu_memory_gb")}
                settings = {**asdict(options), "device": str(device), **others}
                files.write_json(args.output_dir / "args.json", settings)
            try:
                trainer.run()
            except (MemoryError, RuntimeError) as error:
                lacking = r"C\+\+ compiler|Compiler: .* is not found|working triton"
                if args.torchcompile and re.search(lacking, str(error)):
                    raise UserError(
                        "--torchcompile needs a C++ compiler, and for a GPU Triton, which PyTorch "
                        "does not find; train without it"
                    ) from None
                if not lacks_memory(error):
                    raise
                on_card = isinstance(error, torch.OutOfMemoryError)
                held = bank.images.device_bytes + test_bank.images.device_bytes
                others = {"num_classes": len(bank.images.classes), "image_bank_bytes": held}
                advice = memory.advice(
                    card_bytes if on_card else None, options, processes=team.size, **others
                )
                raise UserError(advice) from None
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) / 2**20
                print(f"Peak GPU memory: {peak:.0f} MiB allocated")
            print(trainer.verdict(), flush=True)
            del trainer  # or what it holds of the processes ends after them: PyTorch 2.9 may hang
    except Interrupted as interruption:
        if team.leads:
            raise
        raise SystemExit(128 + interruption.signal) from None
    finally:
        processes.stop()


main = partial(exit_status, PROG, run)

if __name__ == "__main__":
    sys.exit(main())
