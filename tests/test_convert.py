"""`replace_pooling` and `fuse`, on networks that people use and on one block for each condition."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torchvision import models

from stochastic_pooling.convert import fuse, replace_pooling
from stochastic_pooling.modules import (
    AdaptiveStochasticPool2d,
    StochasticPool1d,
    StochasticPool2d,
    StochasticPool3d,
)


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels are not what is tested here, and they would compile for each window."""
    monkeypatch.setenv("STOCHASTIC_POOLING_BACKEND", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small work waits for busy cores otherwise
    yield
    torch.set_num_threads(threads)


POOLS = (StochasticPool1d, StochasticPool2d, StochasticPool3d, AdaptiveStochasticPool2d)


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, of draws that the seed fixes, and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(1)
    output = model(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weight).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compare outputs and gradients in fp64, where rounding moves no draw; return the output."""
    assert x.dtype == torch.float64
    output, gradients = run(copy.deepcopy(model), x)  # a norm's statistics move
    other_output, other_gradients = run(copy.deepcopy(other), x)
    torch.testing.assert_close(other_output, output, rtol=1e-9, atol=1e-12)
    assert other_gradients.keys() == gradients.keys()
    used = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    # A bias before a norm has no gradient but rounding: what is zero is seen beside the others.
    scale = max(gradient.abs().max().item() for gradient in used.values())
    assert scale > 0
    for name, gradient in gradients.items():
        if name not in used:
            assert other_gradients[name] is None, name
            continue
        torch.testing.assert_close(
            other_gradients[name],
            gradient,
            rtol=1e-9,
            atol=1e-10 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    return output


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """The memory that backward keeps alive, the model's own tensors aside."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # held, and so is all that it saved: no storage is counted twice
    assert output.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


# ---------------------------------------------------------------- networks


def timm_model(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=4)


# The network; its pools; the lines of `folded`.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "alexnet": (
        lambda: models.alexnet(num_classes=4).features,
        3,
        [
            "2: ReLU 1, bias of 0",
            "5: ReLU 4, bias of 3",
            "12: ReLU 11, bias of 10",
        ],
    ),
    "vgg11_bn": (
        lambda: models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True),
        5,
        ["3: ReLU 2", "7: ReLU 6", "14: ReLU 13", "21: ReLU 20", "28: ReLU 27"],
    ),
    "squeezenet1_1": (
        lambda: models.squeezenet1_1(num_classes=4),
        3,
        [
            "features.2: ReLU features.1, bias of features.0",
            "features.5: ReLU features.4.expand1x1_activation, "
            "ReLU features.4.expand3x3_activation",
            "features.8: ReLU features.7.expand1x1_activation, "
            "ReLU features.7.expand3x3_activation",
        ],
    ),
    "resnet18": (lambda: models.resnet18(num_classes=4), 1, ["maxpool: ReLU relu"]),
    # The other three pools read a block's output, which the block's own branch reads too.
    "resnet10t": (lambda: timm_model("resnet10t"), 4, ["maxpool: ReLU act1"]),
    # Its ReLUs are inside timm's norm layers, which read `self.training` and so stay whole.
    "ese_vovnet19b_slim": (lambda: timm_model("ese_vovnet19b_slim"), 3, []),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    make, pools, folded = NETWORKS[name]
    original = make().double()
    stochastic = replace_pooling(copy.deepcopy(original))
    assert sum(isinstance(module, POOLS) for module in stochastic.modules()) == pools
    fused = fuse(copy.deepcopy(stochastic))
    assert fused.meta["folded"] == folded

    keys = list(original.state_dict())
    assert list(stochastic.state_dict()) == keys
    assert list(fused.state_dict()) == keys
    assert [name for name, _ in fused.named_modules()] == [
        name for name, _ in original.named_modules()
    ]

    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    original.eval()
    with torch.no_grad():
        shape = original(x).shape
    for training in (True, False):
        stochastic.train(training)
        fused.train(training)
        output = assert_same(stochastic, fused, x)
        assert output.shape == shape
        torch.manual_seed(2)
        with torch.no_grad():
            other = copy.deepcopy(stochastic)(x)
        assert torch.equal(other, output) != training  # a draw, or the expectation


@pytest.mark.parametrize("name", NETWORKS)
def test_network_keeps_less_for_backward(name):
    make, _, folded = NETWORKS[name]
    original = make()
    stochastic = replace_pooling(copy.deepcopy(original))
    fused = fuse(copy.deepcopy(stochastic))
    x = torch.randn(2, 3, 64, 64)
    relus = [
        part[5:] for line in folded for part in line.split(": ")[1].split(", ") if "ReLU" in part
    ]
    rectified = []
    for relu in relus:
        stochastic.get_submodule(relu).register_forward_hook(
            # `relu` and `act1` are called in later blocks under names of their own.
            lambda module, inputs, output: rectified.append(output.nbytes)
        )
    bytes_of = {
        "max or average": saved_bytes(original, x),
        "stochastic": saved_bytes(stochastic, x),
        "fused": saved_bytes(fused, x),
    }
    print(name, {kind: f"{count / 2**20:.2f} MiB" for kind, count in bytes_of.items()})
    assert len(rectified) == len(relus)
    # A pool's code of one byte takes the place of an int64 index.
    assert bytes_of["stochastic"] < bytes_of["max or average"]
    # What falls is the output of each folded ReLU, and nothing else.
    assert bytes_of["stochastic"] - bytes_of["fused"] == sum(rectified)
    assert (sum(rectified) > 0) == bool(folded)


# ---------------------------------------------------------------- fuse: what it folds


class Block(nn.Module):
    """Modules to choose from, and a forward that a test gives."""

    def __init__(self, function: Callable, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.relu_ = nn.ReLU(inplace=True)
        self.pool = StochasticPool2d(2)
        for name, module in modules.items():
            setattr(self, name, module)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 8, 8), dtype=torch.float64)


FOLDED: dict[str, tuple[Callable, list[str]]] = {
    "nothing between": (lambda m, x: m.pool(m.conv(x)), ["pool: bias of conv"]),
    "nn.ReLU": (lambda m, x: m.pool(m.relu(m.conv(x))), ["pool: ReLU relu, bias of conv"]),
    "nn.ReLU in place": (
        lambda m, x: m.pool(m.relu_(m.conv(x))),
        ["pool: ReLU relu_, bias of conv"],
    ),
    "F.relu": (lambda m, x: m.pool(F.relu(m.conv(x))), ["pool: ReLU relu, bias of conv"]),
    "F.relu in place": (
        lambda m, x: m.pool(F.relu(m.conv(x), inplace=True)),
        ["pool: ReLU relu, bias of conv"],
    ),
    "F.relu by keyword": (
        lambda m, x: m.pool(F.relu(input=m.conv(input=x))),
        ["pool: ReLU relu, bias of conv"],
    ),
    "torch.relu": (lambda m, x: m.pool(torch.relu(m.conv(x))), ["pool: ReLU relu, bias of conv"]),
    "torch.relu_": (
        lambda m, x: m.pool(torch.relu_(m.conv(x))),
        ["pool: ReLU relu_, bias of conv"],
    ),
    "Tensor.relu": (lambda m, x: m.pool(m.conv(x).relu()), ["pool: ReLU relu, bias of conv"]),
    "Tensor.relu_": (lambda m, x: m.pool(m.conv(x).relu_()), ["pool: ReLU relu_, bias of conv"]),
    "norm": (lambda m, x: m.pool(m.relu_(m.norm(m.conv(x)))), ["pool: ReLU relu_"]),
    "norm, no ReLU": (lambda m, x: m.pool(m.norm(m.conv(x))), []),
    "sum": (lambda m, x: m.pool(F.relu(m.conv(x) + m.conv2(x))), ["pool: ReLU relu"]),
    "cat of ReLUs": (
        lambda m, x: m.pool(torch.cat([m.relu(m.conv(x)), m.relu_(m.conv2(x))], 1)),
        ["pool: ReLU relu, ReLU relu_"],
    ),
    "cat, one branch without ReLU": (
        lambda m, x: m.pool(torch.cat([m.conv(x), m.relu(m.conv2(x)), x], dim=1)),
        ["pool: ReLU relu"],
    ),
    "ReLU of a cat": (
        lambda m, x: m.pool(m.relu(torch.cat([m.relu_(m.conv(x)), m.conv2(x)], 1))),
        ["pool: ReLU relu, ReLU relu_"],
    ),
    "one block twice": (
        lambda m, x: m.pool(m.relu(m.again(m.pool(m.relu(m.again(m.conv(x))))))),
        ["pool: ReLU relu, bias of again", "pool: ReLU relu, bias of again"],
    ),
    "one convolution, before a pool and not": (
        lambda m, x: m.again(m.pool(m.relu(m.again(m.conv(x))))),
        ["pool: ReLU relu, bias of again"],
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FOLDED)
def test_fold(case, training):
    function, folded = FOLDED[case]
    model = Block(function).train(training)
    fused = fuse(model)
    assert fused.meta["folded"] == folded
    assert "relu" not in fused.code or not folded
    assert_same(model, fused, image())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_fold_every_convolution(dimensions, padding_mode, padding):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    pool = (StochasticPool1d, StochasticPool2d, StochasticPool3d)[dimensions - 1]
    stride = 2 if padding == 1 else 1
    model = nn.Sequential(
        conv(4, 6, 3, stride, padding, dilation=2, groups=2, padding_mode=padding_mode),
        nn.ReLU(),
        pool(2, 1),
    ).double()
    fused = fuse(model)
    assert fused.meta["folded"] == ["2: ReLU 1, bias of 0"]
    assert_same(model, fused, image(2, 4, *(9, 8, 7)[:dimensions]))
    assert_same(model, fused, image(4, *(9, 8, 7)[:dimensions]))  # unbatched


def test_fold_into_an_adaptive_pool():
    model = Block(lambda m, x: m.pool(m.relu(m.conv(x))), pool=AdaptiveStochasticPool2d(2))
    fused = fuse(model)
    assert fused.meta["folded"] == ["pool: ReLU relu, bias of conv"]
    assert_same(model, fused, image())


def test_fold_keeps_indices_and_nan():
    pool = StochasticPool2d(2, return_indices=True)
    dead, special = image(), image()
    special[0, 0, 0, 0] = float("nan")
    special[1, 0, 3, 3] = float("inf")

    def unpack(m: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, indices = m.pool(m.relu(m.conv(x)))
        return output, indices

    model = Block(unpack, pool=pool)
    with torch.no_grad():
        model.conv.bias[:2] = -100
    fused = fuse(model)
    assert fused.meta["folded"] == ["pool: ReLU relu, bias of conv"]
    for x in (dead, special):
        torch.manual_seed(1)
        output, indices = model(x)
        torch.manual_seed(1)
        fused_output, fused_indices = fused(x)
        torch.testing.assert_close(fused_output, output, equal_nan=True)
        assert torch.equal(fused_indices, indices)
    assert output.isnan().any()
    assert output.isinf().any()
    assert (model(dead)[0][:, :2] == 0).all()


# ---------------------------------------------------------------- fuse: what it leaves


class Doubled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def written_between(m: Block, x: torch.Tensor) -> torch.Tensor:
    convolved = m.conv(x)
    rectified = F.relu(convolved.view(-1, 4, 8, 8))
    convolved.add_(10)
    return m.pool(rectified)


def with_user(read: Callable, source: str) -> Callable:
    """A forward where the pool reads `read(conv(x))`, and something else reads one of the two."""

    def function(m: Block, x: torch.Tensor) -> torch.Tensor:
        convolved = m.conv(x)
        rectified = read(m, convolved)
        pooled = m.pool(rectified)
        return pooled + {"convolution": convolved, "ReLU": rectified}[source].mean()

    return function


KEPT: dict[str, tuple[Callable, dict[str, nn.Module], list[str]]] = {
    "the convolution has another user": (with_user(lambda m, c: c, "convolution"), {}, []),
    "what the ReLU reads has another user": (
        with_user(lambda m, c: m.relu(c), "convolution"),
        {},
        [],
    ),
    "what the ReLU writes to has another user": (
        with_user(lambda m, c: m.relu_(c), "convolution"),
        {},
        [],
    ),
    "the ReLU has another user": (with_user(lambda m, c: m.relu(c), "ReLU"), {}, []),
    "the ReLU writes to an alias": (
        with_user(lambda m, c: m.relu_(m.identity(c)), "convolution"),
        {"identity": nn.Identity()},
        [],
    ),
    "an alias is written to before the pool": (written_between, {}, []),
    "a branch of the cat has another user": (
        lambda m, x: (lambda r: m.pool(torch.cat([r, m.relu_(m.conv2(x))], 1)) + r.mean())(
            m.relu(m.conv(x))
        ),
        {},
        ["pool: ReLU relu_"],
    ),
    "the cat has another user": (
        lambda m, x: (lambda c: m.pool(c) + c.mean())(torch.cat([m.relu(m.conv(x)), x], 1)),
        {},
        [],
    ),
    "the pool has a bias": (lambda m, x: m.pool(m.conv(x), m.norm.bias), {}, []),
    "the pool has a bias by keyword": (lambda m, x: m.pool(m.conv(x), bias=m.norm.bias), {}, []),
    "no bias": (
        lambda m, x: m.pool(m.relu(m.conv(x))),
        {"conv": nn.Conv2d(3, 4, 3, bias=False)},
        ["pool: ReLU relu"],
    ),
    "ReLU6": (lambda m, x: m.pool(m.relu(m.conv(x))), {"relu": nn.ReLU6()}, []),
    "another module between": (
        lambda m, x: m.pool(m.mean(m.relu(m.conv(x)))),
        {"mean": nn.AvgPool2d(3, 1)},
        [],
    ),
    "a subclass of the convolution": (
        lambda m, x: m.pool(m.relu(m.conv(x))),
        {"conv": Doubled(3, 4, 3)},
        [],
    ),
    "a transposed convolution": (
        lambda m, x: m.pool(m.relu(m.conv(x))),
        {"conv": nn.ConvTranspose2d(3, 4, 3)},
        ["pool: ReLU relu"],
    ),
    "a parametrized weight": (
        lambda m, x: m.pool(m.relu(m.conv(x))),
        {"conv": parametrizations.weight_norm(nn.Conv2d(3, 4, 3))},
        [],
    ),
    "a max pool": (lambda m, x: m.pool(m.relu(m.conv(x))), {"pool": nn.MaxPool2d(2)}, []),
}


@pytest.mark.parametrize("case", KEPT)
def test_leave(case):
    function, modules, folded = KEPT[case]
    model = Block(function, **copy.deepcopy(modules))
    with torch.no_grad():
        model.norm.bias.fill_(0.5)
    fused = fuse(model)
    assert fused.meta["folded"] == folded
    assert_same(model, fused, image())


def test_leave_a_bias_of_other_dimensions():
    """A 1-d pool reads (C, H, W) as (N, C, L): H of 4 would take the bias of 4 channels."""
    model = Block(lambda m, x: m.pool(m.relu(m.conv(x))), pool=StochasticPool1d(2))
    fused = fuse(model)
    assert fused.meta["folded"] == ["pool: ReLU relu"]
    assert_same(model, fused, image(3, 4, 8))


@pytest.mark.parametrize("name", ["conv", "relu", "pool"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_leave_what_has_hooks(name, register):
    calls = []
    model = Block(lambda m, x: m.pool(m.relu(m.conv(x))))
    getattr(getattr(model, name), register)(lambda *_: calls.append(name))
    fused = fuse(model)
    # A ReLU with a hook leaves the convolution away from the pool; so do the other two the ReLU.
    assert fused.meta["folded"] == []
    fused(image().requires_grad_()).sum().backward()
    assert calls == [name]


def test_leave_what_has_a_forward_of_its_own():
    """As libraries have it that move weights in before a call."""
    model = Block(lambda m, x: m.pool(m.relu(m.conv(x))))
    conv = model.conv
    conv.forward = lambda x: conv._conv_forward(2 * x, conv.weight, conv.bias)
    fused = fuse(model)
    assert fused.meta["folded"] == []
    x = image()
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(fused(x), expected)


def test_hooks_of_containers_and_of_the_model_keep_firing():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), StochasticPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), StochasticPool2d(2)),
    ).double()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model[0].register_forward_hook(lambda *_: calls.append("block"))
    fused = fuse(model)
    assert fused.meta["folded"] == ["1.2: ReLU 1.1, bias of 1.0"]
    assert calls == []
    fused(image())
    assert calls == ["block", "model"]


# ---------------------------------------------------------------- fuse: the graph module


def block() -> Block:
    return Block(lambda m, x: m.pool(m.relu(m.norm(m.again(m.pool(m.relu(m.conv(x))))))))


def test_fused_shares_parameters_and_checkpoints():
    model, other = block(), block()
    before = copy.deepcopy(model)
    fused = fuse(model)
    assert dict(fused.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for one, another in zip(fused.parameters(), model.parameters(), strict=True):
        assert one is another
    assert_same(before, model, image())  # the model is as it was

    fused.load_state_dict(other.state_dict())
    assert_same(other, fused, image())
    before.load_state_dict(fused.state_dict())
    assert_same(other, before, image())


def test_fused_can_be_copied_and_pickled():
    fused = fuse(block())
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    for other in (copy.deepcopy(fused), torch.load(stream, weights_only=False)):
        assert list(other.state_dict()) == list(fused.state_dict())
        assert_same(fused, other, image())
        assert next(other.parameters()) is not next(fused.parameters())
    assert copy.deepcopy(fused).meta["folded"] == fused.meta["folded"] != []


def test_fused_keeps_modes_and_follows_them():
    model = block()
    model.norm.eval()
    fused = fuse(model)
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    assert not fused.norm.training
    assert fused.training
    x = image()
    for training in (False, True):
        fused.train(training)
        assert_same(model.train(training), fused, x)
        assert torch.equal(fused(x), fused(x)) != training


def test_fuse_twice_and_fuse_what_holds_nothing():
    fused = fuse(block())
    again = fuse(fused)
    assert len(fused.meta["folded"]) == 2
    assert again.meta["folded"] == []
    assert_same(fused, again, image())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    assert fuse(plain).meta["folded"] == []
    assert_same(plain, fuse(plain), image())


def test_fused_under_autocast():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), StochasticPool2d(2))
    fused = fuse(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = fused(x)
        expectation = fused.eval()(x)
    expected = model.eval()(x)
    assert output.dtype == expectation.dtype == torch.bfloat16
    torch.testing.assert_close(expectation.float(), expected, rtol=2e-2, atol=2e-2)
    output.float().sum().backward()
    assert model[0].bias.grad.dtype == torch.float32
    assert model[0].bias.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fused_compiles_into_one_graph():
    model = block()
    fused = fuse(model)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = image()
    for training in (True, False):
        fused.train(training)
        compiled.train(training)
        output, gradients = run(fused, x)
        compiled_output, compiled_gradients = run(compiled, x)
        torch.testing.assert_close(compiled_output, output)
        for one, another in zip(compiled_gradients.values(), gradients.values(), strict=True):
            torch.testing.assert_close(one, another)


def test_folds_are_logged(caplog):
    with caplog.at_level(logging.INFO, "stochastic_pooling"):
        fused = fuse(block())
    assert [r.getMessage().removeprefix("folded into ") for r in caplog.records] == fused.meta[
        "folded"
    ]


def test_constants_of_a_forward_stay_out_of_the_checkpoint():
    model = Block(lambda m, x: m.pool(m.conv(x * torch.tensor(2.0, dtype=torch.float64))))
    attributes = set(vars(model))
    fused = fuse(model)
    assert set(vars(model)) == attributes
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_same(model, fused, image())


def test_what_cannot_be_traced_is_said():
    model = nn.Sequential(Block(lambda m, x: m.pool(m.conv(x)) if x.sum() > 0 else x))
    with pytest.raises(RuntimeError, match=r"cannot trace Sequential .*fuse the submodules"):
        fuse(model)


def test_concrete_args():
    class Masked(Block):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.function(self, x if mask is None else x * mask)

    model = Masked(lambda m, x: m.pool(m.conv(x)))
    fused = fuse(model, concrete_args={"mask": None})
    assert fused.meta["folded"] == ["pool: bias of conv"]
    assert_same(model, fused, image())


def test_a_mode_that_tracing_freezes_is_warned_of():
    def dropout(m: Block, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(m.pool(m.conv(x)), training=m.training)

    model = Block(dropout)
    with pytest.warns(UserWarning, match=r"keeps what it does in training mode.*nn\.Dropout"):
        fused = fuse(model)
    assert all(module.training for module in model.modules())
    assert_same(model, fused, image())
    with pytest.warns(UserWarning, match="in evaluation mode"):
        assert_same(model.eval(), fuse(model), image())


@pytest.mark.filterwarnings("error")
def test_submodules_that_read_the_mode_stay_right():
    class Dropout(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, training=self.training)

    model = Block(lambda m, x: m.drop(m.pool(m.conv(x))), drop=Dropout())
    fused = fuse(model)
    assert fused.meta["folded"] == ["pool: bias of conv"]
    for training in (True, False):
        assert_same(model.train(training), fused.train(training), image())


# ---------------------------------------------------------------- replace_pooling


class Padded(nn.MaxPool2d):
    """As timm's MaxPool2dSame: it pads on its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def pools() -> nn.Sequential:
    return nn.Sequential(
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
        nn.Sequential(nn.MaxPool2d(2), Padded(2)),
        nn.AdaptiveAvgPool2d(1),
    )


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, POOLS)]


@pytest.mark.parametrize(
    ("pool", "twin"),
    [
        (nn.MaxPool1d(3, 2, 1, 2, True, True), StochasticPool1d),
        (nn.MaxPool2d((3, 2), (2, 1), (1, 0), 1, False, True), StochasticPool2d),
        (nn.MaxPool3d(3, 2, 1, (1, 2, 1), False, True), StochasticPool3d),
        (nn.AvgPool1d(3, 2, 1, True, False), StochasticPool1d),
        (nn.AvgPool2d((3, 2), None, (1, 0), True, False), StochasticPool2d),
        (nn.AvgPool3d(3, 2, 1, True, False), StochasticPool3d),
        (nn.AdaptiveMaxPool2d((2, 3), True), AdaptiveStochasticPool2d),
        (nn.AdaptiveAvgPool2d(2), AdaptiveStochasticPool2d),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("error")
def test_arguments_move_to_the_twin(pool, twin):
    model = nn.Sequential(pool)
    assert replace_pooling(model, types=[type(pool)], sample_in_eval=True) is model
    assert type(model[0]) is twin
    assert model[0].sample_in_eval
    moved = set(vars(pool)) & set(vars(model[0])) - set(vars(nn.Module()))
    assert moved >= ({"output_size"} if hasattr(pool, "output_size") else {"kernel_size", "stride"})
    for name in moved:
        assert getattr(model[0], name) == getattr(pool, name), name
    dimensions = {"1d": 1, "2d": 2, "3d": 3}[type(pool).__name__[-2:]]
    x = torch.randn(2, 3, *(9, 8, 7)[:dimensions])
    outputs, expected = model(x), pool(x)
    for output, other in zip(
        outputs if isinstance(outputs, tuple) else [outputs],
        expected if isinstance(expected, tuple) else [expected],
        strict=True,
    ):
        assert output.shape == other.shape
        assert output.dtype == other.dtype


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["0", "1", "2.0"]),
        ({"select": "2.*"}, ["2.0"]),
        ({"select": ["0", "2.?"]}, ["0", "2.0"]),
        ({"select": lambda name, pool: pool.kernel_size == 2}, ["1", "2.0"]),
        ({"types": [nn.AvgPool2d]}, ["1"]),
        ({"types": [nn.AdaptiveAvgPool2d]}, ["3"]),
        ({"types": [nn.MaxPool2d, nn.AdaptiveAvgPool2d], "select": ["3", "0"]}, ["0", "3"]),
    ],
    ids=str,
)
def test_selection(arguments, names):
    model = pools()
    assert replace_pooling(model, **arguments) is model
    assert replaced(model) == names
    assert type(model[2][1]) is Padded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select": ["0", "typo.*"]}, r"no pool fits 'typo\.\*'.* 0: MaxPool2d;"),
        ({"select": "3"}, r"3: AdaptiveAvgPool2d \(not in types: add nn.AdaptiveAvgPool2d\)"),
        ({"select": "2.1"}, r"2\.1: Padded \(a subclass"),
        ({"select": lambda name, pool: False}, "no pool to replace"),
        ({"types": [nn.MaxPool1d]}, r"no pool to replace.*F\.max_pool2d .*cannot be seen"),
        ({"types": [nn.LPPool2d]}, r"LPPool2d has no stochastic twin; choose from nn\.MaxPool1d"),
    ],
    ids=str,
)
def test_nothing_chosen_is_an_error(arguments, message):
    model = pools()
    with pytest.raises(ValueError, match=message):
        replace_pooling(model, **arguments)
    assert replaced(model) == []


def test_a_second_call_names_the_stochastic_pools():
    model = replace_pooling(nn.Sequential(nn.MaxPool2d(2)))
    with pytest.raises(ValueError, match=r"0: StochasticPool2d \(no twin\)"):
        replace_pooling(model)
    with pytest.raises(ValueError, match="Its pools: none"):
        replace_pooling(nn.Sequential(nn.ReLU()))


def test_a_pool_itself_is_returned_as_its_twin():
    pool = nn.MaxPool2d(2).eval()
    twin = replace_pooling(pool)
    assert type(twin) is StochasticPool2d
    assert not twin.training


def test_shared_instances_modes_and_hooks():
    pool = nn.MaxPool2d(2).eval()
    calls = []
    handle = pool.register_forward_hook(lambda module, *_: calls.append(module))
    inner = nn.Sequential(pool)
    model = nn.ModuleDict({"a": pool, "b": inner, "c": inner, "d": pool, "e": nn.MaxPool2d(2)})
    replace_pooling(model, "c.0")  # one of its names is enough
    twin = model["a"]
    assert type(twin) is StochasticPool2d
    assert model["d"] is model["b"][0] is twin
    assert type(model["e"]) is nn.MaxPool2d
    assert not twin.training
    assert model.training
    x = torch.rand(1, 1, 4, 4)
    twin(x)
    assert calls == [twin]
    handle.remove()
    twin(x)
    assert calls == [twin]


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (nn.AvgPool2d(3, 1, 1), "0: count_include_pad"),
        (nn.AvgPool1d(3, 1, 1), "0: count_include_pad"),
        (nn.AvgPool2d(3, divisor_override=2), "0: divisor_override=2"),
    ],
)
def test_a_changed_meaning_is_warned_of(pool, message):
    with pytest.warns(UserWarning, match=message) as record:
        replace_pooling(nn.Sequential(pool))
    assert [warning.filename for warning in record] == [__file__]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("padding", [0, (0, 0), [0, 0]])
def test_an_unpadded_average_is_no_reason_to_warn(padding):
    assert replaced(replace_pooling(nn.Sequential(nn.AvgPool2d(3, padding=padding)))) == ["0"]
