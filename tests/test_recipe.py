"""Learning rates, losses and averages of a run, and a step of it computed in parts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnsp.training.processes import Team
from cnnsp.training.recipe import TrainOptions, learning_rate
from cnnsp.training.step import (
    Learner,
    average_weights,
    make_optimizer,
    mixed,
    smoothed,
)


def test_steps_divide_the_learning_rate_by_ten() -> None:
    options = TrainOptions(lr=0.01, lr_step=10)
    rates = [learning_rate(options, epoch, 3, 72) for epoch in (0, 9, 10, 19, 20, 29)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_cosine_falls_from_the_learning_rate_to_nearly_nothing() -> None:
    options = TrainOptions(lr=0.2, schedule="cosine", epochs=4)
    rates = [learning_rate(options, epoch, step, 10) for epoch in range(4) for step in range(10)]
    assert rates[0] == 0.2
    assert rates[20] == pytest.approx(0.1)
    assert 0 < rates[39] < 0.001
    assert rates == sorted(rates, reverse=True)


def test_warmup_rises_step_by_step_and_then_leaves_the_schedule_alone() -> None:
    options = TrainOptions(lr=0.3, warmup_epochs=1.5, lr_step=2)
    rates = [learning_rate(options, epoch, step, 2) for epoch in range(3) for step in range(2)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.03, 0.03])
    # Where the rise ends within a step.
    assert learning_rate(replace(options, warmup_epochs=1.25), 1, 0, 2) == 0.3


def test_smoothed_loss_equals_cross_entropy_with_label_smoothing() -> None:
    scores, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    log_probabilities = scores.log_softmax(1)
    loss = F.nll_loss(log_probabilities, labels, reduction="sum")
    for smoothing in (0.0, 0.1, 0.7):
        expected = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(smoothed(loss, log_probabilities, smoothing), expected)


def test_weight_average_is_the_weighted_sum_of_all_weights() -> None:
    """Worked out on the host: the first decays are 1/10, 2/11, 3/12, then the given 0.26."""
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(average.weight, 5.0)
    expected = 5.0
    for update, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.26, 0.26)):
        nn.init.constant_(model.weight, float(update**2))
        average_weights(average, model, 0.26, update)
        expected = decay * expected + (1 - decay) * update**2
        assert float(average.weight.detach()) == pytest.approx(expected)


def test_draws_depend_on_seed_step_and_process() -> None:
    """Those of dropout, which the loss shows, and those after them; the weights on the seed. An
    evaluation that ended in an error may have left the network in another mode."""
    images, labels = torch.randn(1, 3, 256, 256), torch.tensor([0])

    def draw(seed: int, step: int, rank: int) -> tuple[float, float, float]:
        options = TrainOptions(pool="max", dropout=0.5, seed=seed)
        learner = Learner(options, 3, torch.device("cpu"), Team(rank))
        weight = float(learner.model.fc2.weight[0, 0].detach())
        learner.model.eval()
        loss = learner.step(images, labels, batch_size=1, number=step, lr=0.01)
        return weight, float(loss), float(torch.rand(()))

    drawn = [draw(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    assert [len({*numbers}) for numbers in zip(*drawn, strict=True)] == [2, 8, 8]
    assert draw(1, 0, 1) == drawn[5]


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_batch_in_parts_makes_the_same_step(opt: str) -> None:
    """Without draws, which differ, and in parts of unequal size: 3 + 2 images."""
    images, labels = torch.randn(5, 3, 256, 256), torch.tensor([0, 1, 2, 0, 1])
    options = TrainOptions(pool="max", dropout=0.0, opt=opt, label_smoothing=0.2, lr=1e-3)
    whole = Learner(options, 3, torch.device("cpu"), Team())
    parts = Learner(replace(options, accumulate=2), 3, torch.device("cpu"), Team())
    sizes = []
    parts.model.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    losses = [
        learner.step(images, labels, batch_size=5, number=0, lr=2e-3) for learner in (whole, parts)
    ]
    assert sizes == [3, 2]
    torch.testing.assert_close(losses[0], losses[1])
    fresh = Learner(options, 3, torch.device("cpu"), Team()).model
    output = fresh(images)
    torch.testing.assert_close(losses[0], F.nll_loss(output, labels).detach())
    F.cross_entropy(output, labels, label_smoothing=0.2).backward()
    for one, other, start in zip(
        whole.model.parameters(), parts.model.parameters(), fresh.parameters(), strict=True
    ):
        assert not torch.equal(one, start)
        for part in (other, start):
            torch.testing.assert_close(one.grad, part.grad, rtol=1e-4, atol=1e-6)
        if opt == "sgd":  # at the rate of the step, not that of the options
            torch.testing.assert_close(one, start - 2e-3 * one.grad)


@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw"])
def test_settings_reach_the_optimizer(opt: str) -> None:
    options = TrainOptions(opt=opt, weight_decay=0.01, momentum=0.5, nesterov=True)
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([weight], options, torch.device("cpu"))
    assert type(optimizer).__name__.lower() == opt
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.01
    if opt == "sgd":
        assert group["momentum"] == 0.5
        assert group["nesterov"]


def test_the_network_of_a_run_with_averaging_is_the_average() -> None:
    options = TrainOptions(ema=0.9)
    learner = Learner(options, 3, torch.device("cpu"), Team())
    images, labels = torch.randn(2, 3, 256, 256), torch.tensor([0, 1])
    expected = learner.model.fc2.weight.clone()
    for number, decay in enumerate((1 / 10, 2 / 11)):
        learner.step(images, labels, batch_size=2, number=number, lr=0.01)
        expected = decay * expected + (1 - decay) * learner.model.fc2.weight
    torch.testing.assert_close(learner.network.fc2.weight, expected)
    state = learner.state()
    assert learner.network is not learner.model
    assert not torch.equal(state["average"]["fc2.weight"], state["model"]["fc2.weight"])

    other = Learner(options, 3, torch.device("cpu"), Team())
    other.load(state)
    assert torch.equal(other.network.fc2.weight, learner.network.fc2.weight)
    # A run that begins to average where none was starts from the weights.
    other.load({**state, "average": None})
    assert torch.equal(other.network.fc2.weight, learner.model.fc2.weight)


def test_mixup_takes_the_loss_of_both_images_by_their_shares(monkeypatch) -> None:
    images, labels = torch.randn(4, 3, 256, 256), torch.tensor([0, 1, 2, 0])
    options = TrainOptions(pool="max", dropout=0.0, mixup=0.4)
    learner = Learner(options, 3, torch.device("cpu"), Team())
    start = deepcopy(learner.model)
    share, others = torch.tensor(0.3), torch.tensor([2, 0, 3, 1])

    def sample(self: torch.distributions.Beta) -> torch.Tensor:
        assert float(self.concentration1) == float(self.concentration0) == pytest.approx(0.4)
        return share

    monkeypatch.setattr(torch.distributions.Beta, "sample", sample)
    monkeypatch.setattr(torch, "randperm", lambda count, device: others)
    loss = learner.step(images, labels, batch_size=4, number=0, lr=0.01)
    with torch.no_grad():
        output = start(0.3 * images + 0.7 * images[others])
    expected = 0.3 * F.nll_loss(output, labels) + 0.7 * F.nll_loss(output, labels[others])
    torch.testing.assert_close(loss, expected)


def test_cutmix_pastes_a_rectangle_and_takes_labels_by_its_area() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 64, 64).clone()
    images = images.to(memory_format=torch.channels_last)
    shares, tops, lefts = [], set(), set()
    for seed in range(100):
        torch.manual_seed(seed)
        result, others, share = mixed(images, TrainOptions(cutmix=1.0, mixup=0.4))
        assert others is not None
        assert result.is_contiguous(memory_format=torch.channels_last)
        for own, other, image in zip(range(4), others, result, strict=True):
            strange = (image != own)[0]
            assert set(image[:, strange].unique().tolist()) <= {int(other)}
            if own != other:
                assert strange.float().mean() == pytest.approx(1 - share)
                height, width = (int(strange.any(side).sum()) for side in (1, 0))
                assert height * width == strange.sum()  # one rectangle
                if height:
                    top, left = strange.nonzero()[0].tolist()
                    tops.add(top)
                    lefts.add(left)
        shares.append(share)
    assert min(len({*shares}), len(tops), len(lefts)) > 20
    assert sum(shares) / 100 == pytest.approx(0.5, abs=0.1)  # they are uniform
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0))  # the bank's own stay
    empty, _, _ = mixed(images[:0], TrainOptions(cutmix=1.0))  # a process's part of a small batch
    assert len(empty) == 0


def test_cutmix_and_mixup_share_the_batches() -> None:
    images = torch.rand(2, 3, 256, 256)
    kinds = []
    for seed in range(60):
        torch.manual_seed(seed)
        result, others, _ = mixed(images, TrainOptions(cutmix=0.5, mixup=1.0))
        # CutMix leaves each number as it is in one image or the other.
        kinds.append(bool(((result == images) | (result == images[others])).all()))
    assert 15 < sum(kinds) < 45
    for mixup in (0, 1e-46, 1e-3):
        assert mixed(images, TrainOptions(mixup=mixup))[1] is None


def test_fp16_skips_steps_that_overflow_and_remembers_the_scale() -> None:
    images, labels = torch.randn(2, 3, 256, 256), torch.tensor([0, 1])
    single, half, other = (
        Learner(
            TrainOptions(pool="max", dropout=0.0, amp_dtype=dtype), 3, torch.device("cpu"), Team()
        )
        for dtype in (None, "float16", "float16")
    )
    dtypes = []
    half.model.fc2.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    half.step(images.new_full(images.shape, torch.nan), labels, batch_size=2, number=0, lr=0.01)
    assert dtypes == [torch.float16]
    for one, start in zip(half.model.parameters(), single.model.parameters(), strict=True):
        assert torch.equal(one, start)
    for learner in (single, half):
        learner.step(images, labels, batch_size=2, number=1, lr=0.01)
    for one, exact in zip(half.model.parameters(), single.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, exact.grad, rtol=0.05, atol=0.01)
    scale = half.state()["scaler"]["scale"]
    assert scale == other.state()["scaler"]["scale"] / 2
    other.load(half.state())
    assert other.state()["scaler"]["scale"] == scale
    # Runs may change their precision.
    other.load(single.state())
    single.load(half.state())
    assert other.state()["scaler"]["scale"] == scale


def test_fused_momentum_is_whole_when_the_scaler_skips_the_first_step(
    monkeypatch, poisoned: None
) -> None:
    """The first step of fp16 often overflows; what the optimiser then keeps must be written."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer([weight], TrainOptions(lr=1.0), torch.device("cpu"))
    optimizer.param_groups[0].update(fused=True, foreach=False)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
    weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.found_inf.zero_()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), -1.0))


def test_optimizer_of_another_machine_takes_the_settings_of_this_one() -> None:
    """A checkpoint of a GPU in channels_last, read on a CPU in contiguous format."""
    theirs = Learner(TrainOptions(channels_last=True), 3, torch.device("cpu"), Team())
    images, labels = torch.randn(2, 3, 256, 256), torch.tensor([0, 1])
    theirs.step(images, labels, batch_size=2, number=0, lr=0.01)
    assert theirs.model.pooling == "stochastic"
    assert theirs.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    state = theirs.state()
    state["optimizer"]["param_groups"][0].update(fused=True, foreach=False)
    ours = Learner(TrainOptions(weight_decay=0.5), 3, torch.device("cpu"), Team())
    ours.load(state)
    (group,) = ours._optimizer.param_groups
    assert group["weight_decay"] == 0.5
    assert not group["fused"]
    for theirs_of, ours_of in zip(
        theirs._optimizer.state.values(), ours._optimizer.state.items(), strict=True
    ):
        weight, kept = ours_of
        assert kept["momentum_buffer"].stride() == weight.stride()
        assert torch.equal(kept["momentum_buffer"], theirs_of["momentum_buffer"])


def test_a_compiled_network_trains_as_an_eager_one(monkeypatch) -> None:
    """To the last bit, where the graph runs as it is, in parts of 3 and 2 images; and goes on."""
    compile, modes = torch.compile, []

    def compile_eagerly(model: nn.Module, mode: str | None) -> nn.Module:
        modes.append(mode)
        return compile(model, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    images, labels = torch.randn(5, 3, 256, 256), torch.tensor([0, 1, 2, 0, 1])
    options = TrainOptions(accumulate=2, ema=0.9)
    compiled_options = replace(options, torchcompile="default")
    eager, compiled = (
        Learner(chosen, 3, torch.device("cpu"), Team()) for chosen in (options, compiled_options)
    )
    assert modes == [None]
    for number in range(2):
        for learner in (eager, compiled):
            learner.step(images, labels, batch_size=5, number=number, lr=0.01)
    state = compiled.state()
    for kind in ("model", "average"):
        for name, weight in eager.state()[kind].items():
            assert torch.equal(state[kind][name], weight), name
    eager.load(state)
    assert not torch.equal(state["model"]["fc2.bias"], state["average"]["fc2.bias"])
