"""The reference: its random numbers, sums too small for them, and its indices.

`test_properties.py` holds it against an oracle, `test_statistics.py` has its statistics,
`test_extremes.py` its definition at the edges.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stochastic_pooling import philox, reference
from stochastic_pooling.window import Window

# counter and key, words after 7 and after 10 rounds: the known answers of Random123's philox4x32.
KNOWN_ANSWERS = [
    ([0] * 6, "5f6fb709 0d893f64 4f121f81 4f730a48", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        [0xFFFFFFFF] * 6,
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
        "4dfccaba 190a87f0 c47362ba b6b5242a",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("inputs", "seven", "ten"), KNOWN_ANSWERS)
def test_philox_known_answers(inputs, seven, ten):
    c0, c1, c2, c3, k0, k1 = (torch.tensor(word) for word in inputs)
    for rounds, answer in ((7, seven), (10, ten)):
        words = philox.philox4x32((k0, k1), (c0, c1, c2, c3), rounds)
        assert " ".join(f"{int(word):08x}" for word in words) == answer


@pytest.mark.parametrize("last", [1e-45, -1.0])
def test_sums_too_small_for_a_draw(last):
    """S of one or two units of the smallest subnormal: u * S rounds to S for the larger u."""
    window = Window(1, 3, 1, 3, 0, 0, 1, 1, False)
    x = torch.tensor([1e-45, -1.0, last]).repeat(500).reshape(1, 1, 1, -1)
    seed = torch.tensor(6)
    output, code = reference.sample(x, None, seed, window)
    units = 2 if last > 0 else 1
    total = torch.tensor(1e-45) * units
    threshold = philox.uniforms(seed, output.shape) * total
    dead = threshold >= total
    assert 100 < dead.sum() < 400
    assert torch.equal(code == window.dead_code, dead)
    assert torch.equal(output[dead], torch.full_like(output[dead], max(last, 0)))
    # The draw is that of t in units: 0 is before the first live cell's sum, 1 before the second's.
    drawn = torch.where(threshold >= 1e-45, 2, 0)
    assert torch.equal(code[~dead].long(), drawn[~dead])
    assert (output[~dead] == 1e-45).all()
    grad_input, _ = reference.sample_backward(
        torch.ones_like(output), code, (1, x.shape[-1]), window, False
    )
    assert grad_input.sum() == (~dead).sum()


def test_codes_have_room_for_every_cell_and_for_dead_windows():
    for cells, dtype in (
        (255, torch.uint8),
        (256, torch.int16),
        (32_767, torch.int16),
        (32_768, torch.int32),
    ):
        window = Window(1, cells, 1, 1, 0, 0, 1, 1, False)
        assert window.code_dtype == dtype
        assert window.dead_code == torch.tensor(-1).to(dtype)


def test_indices_are_those_of_max_unpool():
    window = Window(2, 2, 2, 2, 0, 0, 1, 1, False)
    x = torch.rand(2, 3, 8, 6) + 0.1
    output, code = reference.sample(x, None, torch.tensor(5), window)
    restored = F.max_unpool2d(output, window.flat_indices(code, 8, 6), 2)
    assert torch.equal(restored[restored > 0], x[restored > 0])
    assert (restored > 0).sum() == output.numel()
