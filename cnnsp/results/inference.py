"""From a checkpoint alone to the classes of photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stochastic_pooling import average_draws

from ..data.batches import ImageBank
from ..data.decoding import decode
from ..data.images import ImageSet, ahead
from ..errors import UserError
from ..network import CNN_SP
from ..training import checkpoint


class Network(NamedTuple):
    """A trained network."""

    model: CNN_SP  # in evaluation mode, on the device asked for
    classes: tuple[str, ...]  # the names of its outputs
    pooling: str  # one of cnnsp.POOLINGS
    state: dict[str, Any]  # of the whole checkpoint


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The network of a checkpoint, with the averaged weights if it has them.

    Raises:
        UserError: when the weights fit no network or are not finite.
    """
    state = checkpoint.load(path)
    classes = tuple(state["classes"])
    try:
        model = CNN_SP(len(classes), state["pooling"])
        model.load_state_dict(state["average"] or state["model"])
    except (RuntimeError, ValueError) as error:
        # The last line of PyTorch's message names the weights at fault.
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {path} does not fit: {reason}") from None
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(f"checkpoint {path} has weights that are not finite: its training diverged")
    return Network(model.eval().to(device), classes, state["pooling"], state)


class Prediction(NamedTuple):
    """What the network says about one file."""

    probabilities: tuple[float, ...]  # of each class
    spread: tuple[float, ...]  # their standard deviation over the draws; empty without draws

    @property
    def position(self) -> int:
        """Of the most probable class."""
        return self.probabilities.index(max(self.probabilities))


def predict(
    network: Network, paths: Sequence[Path], batch_size: int, workers: int, draws: int | None = None
) -> Iterator[Prediction | UserError]:
    """Classify files, in their order; one result for each, an error for what is no whole image.

    Args:
        network: what :func:`load_network` gave.
        paths: of the files.
        batch_size: images in a forward pass.
        workers: threads that decode; they are a batch ahead.
        draws: how often the stochastic pools draw, at least 2; the probabilities are the means
            over the draws, which :func:`torch.manual_seed` repeats for the same files and
            ``batch_size``. None: the pools take the expectation.

    Raises:
        ValueError: when there are ``draws`` and the network has no stochastic pools.
        UserError: when what the network says is not finite.
    """
    parts = (paths[start : start + batch_size] for start in range(0, len(paths), batch_size))
    with ThreadPoolExecutor(workers) as pool:
        for decoded in ahead(pool.map(_try_to_decode, part) for part in parts):
            batch = list(decoded)
            images = [pixels for pixels in batch if isinstance(pixels, np.ndarray)]
            results = _classify(network, images, draws) if images else iter(())
            for pixels in batch:
                yield pixels if isinstance(pixels, UserError) else next(results)


def _classify(
    network: Network, images: list[np.ndarray], draws: int | None
) -> Iterator[Prediction]:
    """What the network says about each image, uint8 ``[H, W, 3]``."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    device = next(network.model.parameters()).device
    # The other format is the faster one on CPUs.
    last = device.type == "cpu"
    bank = ImageBank(ImageSet(pixels, labels, network.classes), device=device, channels_last=last)
    batch, _ = bank.batch(torch.arange(len(bank)))
    if draws is None:
        with torch.no_grad():
            means = network.model(batch).exp()
        spreads = means[:, :0]
    else:
        means, spreads = average_draws(network.model, batch, draws=draws, transform=torch.exp)
    if not means.isfinite().all():
        raise UserError("the network's outputs are not finite: its training diverged")
    return map(Prediction, map(tuple, means.tolist()), map(tuple, spreads.tolist()))


def _try_to_decode(path: Path) -> np.ndarray | UserError:
    try:
        return decode(path)
    except UserError as error:
        return error
