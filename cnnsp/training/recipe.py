"""What a run is made of: its options, which are train.py's flags, and its learning rates."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_type_hints

from .. import POOLINGS
from ..cli import ArgumentParser, number

SYNTHETIC = "synthetic"
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("step", "cosine")
AUGMENTATIONS = ("paper", "random")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "off")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")

# What `--recipe` names: settings of TrainOptions.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    # Chosen on held-out quarters of the 300 training photographs, see docs/study.md.
    "best": {
        "augment": "random",
        "repeats": 20,
        "epochs": 15,
        "batch_size": 64,
        "lr": 0.02,
        "nesterov": True,
        "weight_decay": 1e-3,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "label_smoothing": 0.1,
        "mixup": 0.4,
        "ema": 0.99,
        "dropout": 0.3,
    },
}
# That of synthetic flowers, without --recipe: it ends within minutes on two CPU cores.
SHORT_RECIPE: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 32,
    "opt": "adam",
    "lr": 1e-3,
    "lr_step": 3,
}


def option(
    default: Any,
    help: str,
    group: str = "recipe",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = math.inf,
    short: str | None = None,
    **argument: Any,
) -> Any:
    """A field of :class:`TrainOptions` that is a flag, too.

    Args:
        default: of the field and of the flag.
        help: of the flag; the field's documentation.
        group: in ``--help``.
        least, above, most: bounds of a number.
        short: another name of the flag.
        argument: what else ``add_argument`` takes.
    """
    bounds = {"least": least if above is None else above, "exclusive": above is not None}
    flag = {"help": help, "group": group, "short": short, "bounds": {**bounds, "most": most}}
    return field(default=default, metadata={**flag, "argument": argument})


@dataclass(frozen=True)
class TrainOptions:
    """What a run is made of. The defaults are the recipe of the flower replication."""

    data_dir: str = option(
        SYNTHETIC,
        "folder with train_data/<class>/ and test_data/<class>/, or 'synthetic'; when not given: "
        "datasets/, or synthetic flowers if that does not exist",
        "data and output",
    )
    validate: int | None = option(
        None,
        "to choose settings without the test images: hold out this quarter (0 to 3) of each "
        "class's training images, and evaluate on it instead",
        "data and output",
        choices=range(4),
        metavar="QUARTER",
    )
    recipe: str | None = option(None, "defaults for the settings below", choices=tuple(RECIPES))
    pool: str = option("stochastic", "pooling", choices=POOLINGS)
    augment: str = option(
        "paper",
        "the paper's rotations and gamma corrections, each once an epoch, or random crops, "
        "rotations, flips and colours, always new",
        choices=AUGMENTATIONS,
    )
    repeats: int = option(61, "with --augment random, how often an epoch takes each image", least=1)
    epochs: int = option(30, "epochs in all, those before a resumed checkpoint included", least=1)
    batch_size: int = option(
        256, "images in a step of the optimiser, over all parts and processes", least=1, short="-b"
    )
    opt: str = option("sgd", "optimiser", choices=OPTIMIZERS)
    lr: float = option(
        0.01, "learning rate, before --schedule and --warmup-epochs scale it", above=0
    )
    momentum: float = option(0.9, "momentum of SGD", least=0)
    nesterov: bool = option(False, "Nesterov's momentum, with SGD")
    weight_decay: float = option(0.0, "L2 penalty; decoupled with adamw", least=0)
    schedule: str = option(
        "step", "of the learning rate: steps down, or a cosine to 0", choices=SCHEDULES
    )
    lr_step: int = option(
        10,
        "epochs after which the learning rate is divided by 10, again and again",
        least=1,
        metavar="EPOCHS",
    )
    warmup_epochs: float = option(
        0.0,
        "epochs over which the learning rate rises at the start",
        least=0,
        metavar="EPOCHS",
    )
    label_smoothing: float = option(
        0.0, "share of the target that is spread over all classes", least=0, most=1
    )
    mixup: float = option(
        0.0,
        "mix each image with another, by a share from Beta(ALPHA, ALPHA)",
        least=0,
        metavar="ALPHA",
    )
    ema: float = option(
        0.0,
        "evaluate a moving average of the weights, with this decay",
        least=0,
        most=1,
        metavar="DECAY",
    )
    dropout: float = option(0.1, "probability, before the last layer", least=0, most=1)
    seed: int = option(
        0,
        "of the weights, the order and augmentation of the images, dropout and the pools",
        least=0,
        most=2**32 - 1,
    )
    amp_dtype: str | None = option(
        None, "type for mixed precision", "machine", choices=("float16", "bfloat16")
    )
    channels_last: bool | None = option(
        None,
        "memory format; when not given: on for CPUs, and for CUDA with mixed precision",
        "machine",
    )
    torchcompile: str | None = option(
        None,
        f"compile the network: {', '.join(COMPILE_MODES)}; reduce-overhead uses CUDA graphs",
        "machine",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        metavar="MODE",
    )
    accumulate: int = option(
        1,
        "compute a batch in parts, one after the other: less memory for the same recipe",
        "machine",
        least=1,
        metavar="PARTS",
    )
    max_steps: int | None = option(
        None, "stop after N steps and evaluate", "run", least=1, metavar="N"
    )
    log_interval: int = option(
        10, "steps from one report of the loss to the next", "run", least=1, metavar="STEPS"
    )
    checkpoint_interval: float = option(
        60.0,
        "time from one checkpoint to the next within an epoch",
        "run",
        least=0,
        metavar="SECONDS",
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainOptions:
        """From the settings among ``values``."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def add_options(
    parser: ArgumentParser | argparse._ArgumentGroup, names: Iterable[Field[Any] | str]
) -> None:
    """Make flags of fields of :class:`TrainOptions`."""
    known, types = {f.name: f for f in fields(TrainOptions)}, get_type_hints(TrainOptions)
    for name in names:
        f = known[name] if isinstance(name, str) else name
        about, flag = f.metadata, "--" + f.name.replace("_", "-")
        argument = {"default": f.default, "help": about["help"], **about["argument"]}
        kinds = str(types[f.name])
        if "bool" in kinds:
            argument["action"] = argparse.BooleanOptionalAction
        elif about["bounds"]["least"] is not None:
            argument["type"] = number(float if "float" in kinds else int, **about["bounds"])
        elif "int" in kinds:
            argument["type"] = int
        parser.add_argument(*filter(None, (about["short"], flag)), **argument)


def defaults(data_dir: str, recipe: str | None, resumed: Mapping[str, Any]) -> dict[str, Any]:
    """What a setting is that the command line does not give.

    Args:
        data_dir: as given, or chosen.
        recipe: as given.
        resumed: the options of the checkpoint that the run goes on from, or none.
    """
    if resumed:
        values = {k: v for k, v in resumed.items() if k != "max_steps"}
    else:
        values = SHORT_RECIPE if data_dir == SYNTHETIC and recipe is None else {}
    return {**values, **(RECIPES[recipe] if recipe is not None else {})}


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
