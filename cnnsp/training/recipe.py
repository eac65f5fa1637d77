"""What a run is made of: its options, which are train.py's flags, and its learning rates."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

from .. import POOLINGS
from ..cli import number

SYNTHETIC = "synthetic"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "off")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")

# What `--recipe` names: settings of TrainOptions.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    # Chosen on held-out quarters of the 300 training photographs, see docs/study.md.
    "best": {
        "augment": "random",
        "repeats": 20,
        "crop_scale": 0.4,
        "epochs": 30,
        "batch_size": 64,
        "lr": 0.02,
        "nesterov": True,
        "weight_decay": 1e-3,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "label_smoothing": 0.1,
        "mixup": 0.4,
        "cutmix": 0.5,
        "ema": 0.99,
        "dropout": 0.3,
    },
}
# Where a pool does better with others.
POOL_RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("best", "avg"): {"crop_scale": 0.6, "cutmix": 0.0},
}
# That of synthetic flowers, without --recipe: it ends within minutes on two CPU cores.
SHORT_RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "opt": "adam",
    "lr": 1e-3,
    "lr_step": 2,
}


Count = Annotated[int, {"least": 1}]
Share = Annotated[float, {"least": 0, "most": 1}]
Below1 = Annotated[float, {"least": 0, "most": 0.9999}]  # of which 1 would learn nothing
Amount = Annotated[float, {"least": 0}]
_MODE = {"choices": COMPILE_MODES, "nargs": "?", "const": "default", "metavar": "MODE"}


@dataclass(frozen=True)
class TrainOptions:
    """What a run is made of. The defaults are the recipe of the flower replication.

    Every attribute is a flag of train.py, and its text here the help.

    Attributes:
        data_dir: folder with train_data/<class>/ and test_data/<class>/, or 'synthetic'; when not
            given: datasets/, or synthetic flowers if that does not exist
        validate: to choose settings without the test images: hold out this quarter (0 to 3) of each
            class's training images, and evaluate on it instead
        recipe: defaults for the settings below; best has its own for each pool
        pool: pooling
        augment: the paper's rotations and gamma corrections, each once an epoch, or random crops,
            rotations, flips and colours, always new
        repeats: with --augment random, how often an epoch takes each image
        crop_scale: with --augment random, the least area of a crop, as a share of the image's
        epochs: epochs in all, those before a resumed checkpoint included
        batch_size: images in a step of the optimiser, over all parts and processes
        opt: optimiser
        lr: learning rate, before --schedule and --warmup-epochs scale it
        momentum: of SGD
        nesterov: Nesterov's momentum, with SGD
        weight_decay: L2 penalty; decoupled with adamw
        schedule: of the learning rate: a tenth every --lr-step epochs, or a cosine to 0 at the end
        lr_step: epochs after which the learning rate is divided by 10, again and again
        warmup_epochs: epochs over which the learning rate rises at the start
        label_smoothing: share of the target that is spread over all classes
        mixup: mix each image with another, by a share from Beta(MIXUP, MIXUP);
            below 0.01 none are
        cutmix: with this probability paste a rectangle of another image into each of a batch,
            instead of --mixup
        ema: evaluate a moving average of the weights, with this decay
        dropout: probability, before the last layer
        seed: of the weights, the order and augmentation of the images, dropout and the pools
        amp_dtype: type for mixed precision
        channels_last: memory format; when not given: on for CPUs, and for CUDA with mixed precision
        torchcompile: compile the network: default, reduce-overhead, max-autotune or off;
            reduce-overhead and max-autotune use CUDA graphs
        accumulate: compute a batch in so many parts, one after the other: less memory for the same
            recipe
        max_steps: stop after so many steps, and evaluate
        log_interval: steps from one report of the loss to the next
        checkpoint_interval: seconds from one checkpoint to the next within an epoch
    """

    data_dir: Annotated[str, {"type": os.path.expanduser}] = SYNTHETIC
    validate: Annotated[int | None, {"least": 0, "most": 3}] = None
    recipe: Annotated[str | None, {"choices": tuple(RECIPES)}] = None
    pool: Annotated[str, {"choices": POOLINGS}] = "stochastic"
    augment: Annotated[str, {"choices": ("paper", "random")}] = "paper"
    repeats: Count = 61
    crop_scale: Annotated[float, {"least": 0, "most": 1, "exclusive": True}] = 0.6
    epochs: Count = 30
    batch_size: Annotated[int, {"least": 1, "most": 10**9, "short": "-b"}] = 256
    opt: Annotated[str, {"choices": ("sgd", "adam", "adamw")}] = "sgd"
    lr: Annotated[float, {"least": 0, "exclusive": True}] = 0.01
    momentum: Below1 = 0.9
    nesterov: bool = False
    weight_decay: Amount = 0.0
    schedule: Annotated[str, {"choices": ("step", "cosine")}] = "step"
    lr_step: Count = 10
    warmup_epochs: Amount = 0.0
    label_smoothing: Below1 = 0.0
    mixup: Amount = 0.0
    cutmix: Share = 0.0
    ema: Below1 = 0.0
    dropout: Below1 = 0.1
    seed: Annotated[int, {"least": 0, "most": 2**32 - 1}] = 0
    amp_dtype: Annotated[str | None, {"choices": ("float16", "bfloat16")}] = None
    channels_last: bool | None = None
    torchcompile: Annotated[str | None, _MODE] = None
    accumulate: Count = 1
    max_steps: Annotated[int | None, {"least": 1}] = None
    log_interval: Count = 10
    checkpoint_interval: Amount = 60.0


def add_options(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """Make flags of attributes of :class:`TrainOptions`."""
    types = get_type_hints(TrainOptions, include_extras=True)
    text = inspect.getdoc(TrainOptions) or ""  # there is none under python -OO
    help = dict(re.findall(r"^ {4}(\w+): ((?:.+\n {8})*.+)$", text, re.M))
    for name in (field.name for field in fields(TrainOptions) if field.name in names):
        about = dict(*getattr(types[name], "__metadata__", ()))
        flags = [*filter(None, [about.pop("short", None)]), "--" + name.replace("_", "-")]
        if "bool" in str(types[name]):
            about["action"] = argparse.BooleanOptionalAction
        elif "least" in about:
            kind = float if "float" in str(types[name]) else int
            bounds = {key: about.pop(key) for key in ("least", "most", "exclusive") if key in about}
            about["type"] = number(kind, **bounds)
        about["help"] = " ".join(help.get(name, "").split())
        parser.add_argument(*flags, default=getattr(TrainOptions, name), **about)


def defaults(
    data_dir: str, recipe: str | None, pool: str | None, resumed: Mapping[str, Any]
) -> dict[str, Any]:
    """What a setting is that the command line does not give.

    Args:
        data_dir: as given, or chosen.
        recipe, pool: as given.
        resumed: the options of the checkpoint that the run goes on from, or none.
    """
    if resumed:
        others = ("max_steps", "amp_dtype")  # of one run; of the device, see choose_amp_dtype
        return {name: value for name, value in resumed.items() if name not in others}
    if recipe is None:
        return dict(SHORT_RECIPE) if data_dir == SYNTHETIC else {}
    return RECIPES[recipe] | POOL_RECIPES.get((recipe, pool or TrainOptions.pool), {})


def learning_rate(options: TrainOptions, epoch: int, step: int, steps: int) -> float:
    """That of step ``step`` of ``steps`` in ``epoch``, both counted from 0."""
    done = epoch + step / steps
    if options.schedule == "step":
        lr = options.lr * 0.1 ** (epoch // options.lr_step)
    else:
        lr = options.lr * 0.5 * (1 + math.cos(math.pi * done / options.epochs))
    if done < options.warmup_epochs:
        # The first step is not lost: it takes the rate that the rise has at its end.
        lr *= min(1.0, (done + 1 / steps) / options.warmup_epochs)
    return lr
