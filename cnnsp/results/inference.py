"""From a checkpoint alone to the classes of photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stochastic_pooling import average_draws

from ..data.batches import ImageBank
from ..data.decoding import decode
from ..data.folder import Source
from ..data.images import ImageSet, ahead
from ..errors import UserError
from ..network import CNN_SP
from ..training import checkpoint


class Network(NamedTuple):
    """A trained network.

    Attributes:
        model: in evaluation mode, on the device asked for.
        classes: the names of its outputs.
        pooling: one of :data:`cnnsp.network.POOLINGS`.
    """

    model: CNN_SP
    classes: tuple[str, ...]
    pooling: str


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The network of a checkpoint; see :func:`network_of`."""
    return network_of(checkpoint.load(path), path, device)


def network_of(
    state: dict[str, Any], path: str | Path, device: torch.device | str = "cpu"
) -> Network:
    """The network of a checkpoint's state, with the averaged weights if it has them.

    Raises:
        UserError: when the weights fit no network or are not finite.
    """
    weights = state.get("average") or state["model"]
    classes = tuple(state["classes"])
    try:
        model = CNN_SP(len(classes), state["pooling"])
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        # The last line of PyTorch's message names the weights at fault.
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {path} does not fit: {reason}") from None
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(f"checkpoint {path} has weights that are not finite: its training diverged")
    return Network(model.eval().to(device), classes, state["pooling"])


@dataclass(frozen=True)
class Prediction:
    """What the network says about one file.

    Attributes:
        source: the file.
        probabilities: of each class.
        spread: standard deviation of each probability over the draws; empty without draws.
    """

    source: Source
    probabilities: tuple[float, ...]
    spread: tuple[float, ...] = ()

    @property
    def position(self) -> int:
        """Of the most probable class."""
        return self.probabilities.index(max(self.probabilities))


@dataclass(frozen=True)
class Unreadable:
    """A file that is no image, or a damaged one, and why, in one line."""

    source: Source
    reason: str


def predict(
    network: Network,
    sources: Sequence[Source],
    *,
    batch_size: int = 64,
    workers: int = 2,
    draws: int | None = None,
) -> Iterator[Prediction | Unreadable]:
    """Classify files, in their order.

    Args:
        network: what :func:`load_network` gave.
        sources: what :func:`find_images` found.
        batch_size: images in a forward pass.
        workers: threads that decode; they are a batch ahead.
        draws: how often the stochastic pools draw, at least 2; the probabilities are the means
            over the draws, which :func:`torch.manual_seed` repeats for the same files and
            ``batch_size``. None: the pools take the expectation.

    Yields:
        one result for each file.

    Raises:
        ValueError: when there are ``draws`` and the network has no stochastic pools.
    """
    parts = (sources[start : start + batch_size] for start in range(0, len(sources), batch_size))
    with ThreadPoolExecutor(workers) as pool:
        for part, decoded in ahead((part, pool.map(_try_to_decode, part)) for part in parts):
            batch = list(decoded)
            images = [pixels for pixels in batch if not isinstance(pixels, UserError)]
            results = iter(_classify(network, images, draws) if images else ())
            for source, pixels in zip(part, batch, strict=True):
                if isinstance(pixels, UserError):
                    yield Unreadable(source, str(pixels))
                else:
                    yield Prediction(source, *next(results))


def _classify(
    network: Network, images: list[np.ndarray], draws: int | None
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Probabilities and spread of each image, uint8 ``[H, W, 3]``."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    device = next(network.model.parameters()).device
    bank = ImageBank(
        ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.int64), network.classes),
        device=device,
        channels_last=device.type == "cpu",  # the faster format there
    )
    batch, _ = bank.batch(torch.arange(len(bank)))
    if draws is None:
        with torch.no_grad():
            means = network.model(batch).exp().tolist()
        return [(tuple(mean), ()) for mean in means]
    average = average_draws(network.model, batch, draws=draws, transform=torch.exp)
    pairs = zip(average.mean.tolist(), average.std.tolist(), strict=True)
    return [(tuple(mean), tuple(spread)) for mean, spread in pairs]


def _try_to_decode(source: Source) -> np.ndarray | UserError:
    try:
        return decode(source.path)
    except UserError as error:
        return error
