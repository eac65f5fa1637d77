"""Networks for other programs: ONNX files and exported PyTorch programs."""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..data.augment import IMAGENET_MEAN, IMAGENET_STD
from ..data.batches import ImageBank
from ..data.synthetic import synthetic_flowers
from ..errors import UserError
from ..network import IMAGE_SIZE
from .inference import Network

# Two images to trace with: PyTorch would take a size of 1 for a constant.
_EXAMPLE = (torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE),)
_DYNAMIC_BATCH = ({0: torch.export.Dim("batch", min=1)},)
INPUT, OUTPUT = "images", "log_probabilities"
# How far a log-probability p may be from the network's: this times max(1, |p|). Other programs add
# in another order: 5e-7 at most in ten networks. Images 2 % too bright are 3e-2, another pool 2.
TOLERANCE = 1e-4


def export_onnx(network: Network, path: Path) -> float:
    """Write ``network`` as an ONNX file of standard operators.

    The file takes float32 ``[N, 3, 256, 256]``, normalised, for any N, and gives log-probabilities
    ``[N, C]``; stochastic pools take the expectation. Its metadata are those of :func:`metadata`.

    ``network`` is on the CPU. ``path`` is replaced when the new file has been loaded back and
    agrees with it; returns the largest difference found, see :data:`TOLERANCE`.

    Raises:
        UserError: when packages are missing, the file cannot be written, or it does not agree.
    """
    try:
        _, _, onnxruntime = map(importlib.import_module, ("onnx", "onnxscript", "onnxruntime"))
    except ImportError as error:
        raise UserError(
            f"ONNX export needs {error.name}: pip install onnx onnxscript onnxruntime"
        ) from None

    with warnings.catch_warnings():
        # PyTorch's exporter uses parts of PyTorch that it has itself deprecated.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.model,
            _EXAMPLE,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=_DYNAMIC_BATCH,
        )
    assert program is not None
    program.model.metadata_props.update(metadata(network))

    def load(file: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])

    return _write(network, path, program.save, load)


def export_program(network: Network, path: Path) -> float:
    """Write ``network`` as an exported program, a ``.pt2`` file; otherwise as :func:`export_onnx`.

    ``torch.export.load(path).module()`` runs it; a program with stochastic pools calls their
    operator, so ``import stochastic_pooling`` must come first. The entries of :func:`metadata`
    are ``extra_files`` of these names.
    """
    program = torch.export.export(network.model, _EXAMPLE, dynamic_shapes=_DYNAMIC_BATCH)

    def save(file: Path) -> None:
        content = io.BytesIO()  # for PyTorch has no word for a disk that is full
        torch.export.save(program, content, extra_files=metadata(network))
        file.write_bytes(content.getbuffer())

    return _write(network, path, save, lambda file: torch.export.load(file).module())


def metadata(network: Network) -> dict[str, str]:
    """What a program needs to use the network: values in JSON.

    ``classes``: the names of the outputs. ``mean`` and ``std``: of the normalisation of the three
    channels, whose values are from 0 to 1. ``pooling``: what the network was trained with.
    """
    values = {"classes": network.classes, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {k: json.dumps(v) for k, v in (values | {"pooling": network.pooling}).items()}


def _write(
    network: Network,
    path: Path,
    save: Callable[[Path], None],
    load: Callable[[Path], Callable[[Tensor], Tensor]],
) -> float:
    """Save beside ``path``, load that back and compare; only then replace ``path``."""
    files.make_folder(path.parent)
    with files.replacing(path) as temporary:
        save(temporary)
        difference = _largest_difference(network, load(temporary))
        if not difference <= TOLERANCE:  # NaN, too, is refused
            raise UserError(
                f"{path} was not written: its log-probabilities differ from the checkpoint's by "
                f"{difference:.2g}, more than {TOLERANCE:g}"
            )
    return difference


def _largest_difference(network: Network, other: Callable[[Tensor], Tensor]) -> float:
    """Between the log-probabilities of both, over random and flower-like images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    flowers, _ = ImageBank(synthetic_flowers(1)).batch(torch.arange(3))
    differences = []
    for batch in (noise, noise[:1], flowers, flowers[:1]):
        with torch.no_grad():
            expected = network.model(batch)
            difference = (other(batch) - expected).abs() / expected.abs().clamp(min=1)
        differences.append(difference.max())
    return float(torch.stack(differences).max())
