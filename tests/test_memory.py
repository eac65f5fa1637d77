"""The account of a training step's memory, against counts by hand, real tensors and a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cnnsp import CNN_SP
from cnnsp.network import POOLINGS
from cnnsp.training import memory
from cnnsp.training.memory import account, advice, largest_batch, measure
from cnnsp.training.recipe import TrainOptions

GB = 10**9
AMP = TrainOptions(amp_dtype="float16", channels_last=True)
# Values of an image: itself, and the planes of each convolution, which its pool keeps as large.
IMAGE = 3 * 256 * 256
PLANES = [40 * 86 * 86, 80 * 28 * 28, 120 * 10 * 10, 120 * 10 * 10, 120 * 10 * 10]
WEIGHTS = [40 * 3 * 9, 80 * 40 * 25, 120 * 80 * 9, 120 * 120 * 9, 120 * 120 * 9, 100 * 12000, 300]
BIASES = 40 + 80 + 3 * 120 + 100 + 3


def test_batch_of_256_takes_less_than_a_gigabyte_and_a_half() -> None:
    assert account(256, AMP).peak <= 1.5 * GB
    assert account(256, replace(AMP, opt="adamw", ema=0.99)).peak <= 1.5 * GB


def test_six_gigabytes_take_a_batch_of_1024() -> None:
    assert largest_batch(6 * GB, AMP) >= 1024


@pytest.mark.parametrize("pool", POOLINGS)
@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16", None])
def test_forward_leaves_what_a_count_by_hand_says(pool: str, amp_dtype: str | None) -> None:
    size = 2 if amp_dtype else 4
    # The drawn cell's number; rectified values and 64-bit indices; rectified values.
    kept_by_pool = {"stochastic": 1, "max": size + 8, "avg": size}[pool]
    per_image = 0
    for planes in PLANES:
        per_image += planes * kept_by_pool
        per_image += planes * size  # the pool's output, for the next convolution or fc1
    per_image += 100 * size  # the output of fc1, rectified
    per_image += 100 * size + 100  # what dropout left of it, and its mask, a byte each
    per_image += 3 * 4  # log-probabilities, fp32
    counted = account(2, replace(AMP, pool=pool, amp_dtype=amp_dtype))
    # On a CPU the mask of dropout has the type of the values.
    assert counted.saved_for_backward == pytest.approx(2 * per_image, abs=2 * 400)
    assert counted.weight_copies == (2 * sum(WEIGHTS) if amp_dtype else 0)
    assert counted.input_batch == 2 * (IMAGE * size + 8)


def test_peak_is_that_of_the_second_convolution_going_backward() -> None:
    batch = 256
    per_image = IMAGE * 2 + 8  # images, which the first convolution waits for, and labels
    per_image += PLANES[0] * (1 + 2)  # the first pool's drawn cells and output
    per_image += PLANES[1] * 2 + PLANES[0] * 2  # gradients of what came out and what went in
    weights = 4 * (sum(WEIGHTS) + BIASES)
    halves = 2 * (WEIGHTS[0] + WEIGHTS[1] + WEIGHTS[1])  # copies, and the gradient of one
    by_hand = batch * per_image + 3 * weights + halves  # momentum and gradients beside weights
    counted = account(batch, AMP)
    assert counted.peak - counted.workspace == pytest.approx(by_hand, abs=100)
    # In its first layer cuDNN holds three channels as eight, in fewer bytes beside it.
    first = batch * (IMAGE * 2 + 8 + PLANES[0] * 2 + 256 * 256 * 8 * 2) + 3 * weights
    workspace = first - by_hand + memory.LIBRARY_WORKSPACE
    assert counted.workspace == pytest.approx(workspace, abs=20_000)


@pytest.mark.parametrize("pool", POOLINGS)
def test_real_tensors_leave_as_much_as_fake_ones(pool: str) -> None:
    model = CNN_SP(3, pool).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([0, 2])
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.nll_loss(model(images), labels)
    for tensor in (images, labels, *model.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    saved = sum(storage.nbytes() for storage in kept.values())
    counted = account(2, replace(AMP, pool=pool, amp_dtype=None)).saved_for_backward
    assert counted == pytest.approx(saved, abs=16)


@pytest.mark.parametrize("pool", POOLINGS)
def test_account_is_linear_in_the_batch_size(pool: str) -> None:
    options = replace(AMP, pool=pool)
    one, two, three = (account(batch, options) for batch in (256, 384, 512))
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((one, two), (two, three))]
    assert steps[0] == steps[1]
    assert steps[0][-1] > 0


def test_optimisers_and_averages_take_what_they_keep() -> None:
    weights = 4 * (sum(WEIGHTS) + BIASES)
    recipes = (AMP, replace(AMP, momentum=0.0), replace(AMP, opt="adam"))
    sgd, plain, adam = (account(8, options) for options in recipes)
    assert sgd.parameters == sgd.gradients == sgd.optimizer_state == weights
    assert plain.optimizer_state == 0
    steps = 4 * 14  # Adam counts the steps of each of the 14 parameters, in fp32
    assert adam.optimizer_state == 2 * weights + steps
    more = account(8, replace(AMP, ema=0.99), image_bank_bytes=10**8)
    assert (more.weight_average, more.image_bank) == (weights, 10**8)
    assert more.peak == sgd.peak + weights + 10**8
    assert sum(sgd[:-1]) == sgd.peak


@pytest.mark.parametrize("gigabytes", [0.8, 6])
def test_one_image_more_than_the_largest_batch_does_not_fit(gigabytes: float) -> None:
    batch = largest_batch(gigabytes * GB, AMP)
    usable = 0.9 * (gigabytes * GB - 600e6)  # less the context and what the allocator loses
    assert account(batch, AMP).peak <= usable < account(batch + 1, AMP).peak


def test_advice_is_one_line_with_a_batch_that_fits() -> None:
    fits = largest_batch(6 * GB, AMP)

    def said(gigabytes: float, batch_size: int, accumulate: int = 1, processes: int = 1) -> str:
        options = replace(AMP, batch_size=batch_size, accumulate=accumulate)
        return advice(gigabytes * GB, options, processes=processes)

    assert (
        said(6, 4 * fits)
        == said(6, 8 * fits, processes=2)
        == (
            f"out of GPU memory at --batch-size {4 * fits}: about {fits:,} images fit in 6.0 GB; "
            "--accumulate 4 computes the same batch in parts that fit"
        )
    )
    assert "--accumulate 5 computes" in said(6, 4 * fits + 1, accumulate=2)
    assert "should fit in 6.0 GB" in said(6, 4 * fits, accumulate=4)
    assert "close what else uses the GPU" in said(6, 256)
    assert "not one image fits in 0.6 GB" in said(0.6, 256)


def test_command_compares_the_pools(capsys) -> None:
    assert memory.main(["-b", "16", "--gpu-memory-gb", "6"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["MB", "at", "batch", "16", *POOLINGS]
    assert rows[-1].split()[-3:] == [
        f"{largest_batch(6 * GB, replace(AMP, pool=pool)):,}" for pool in POOLINGS
    ]
    peaks = next(row for row in rows if row.startswith("peak"))
    assert float(peaks.split()[1]) == pytest.approx(account(16, AMP).peak / 1e6, abs=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pool", POOLINGS)
def test_account_agrees_with_a_gpu(pool: str) -> None:
    options = replace(AMP, pool=pool)
    assert account(512, options).peak == pytest.approx(measure(512, options), rel=0.25)
