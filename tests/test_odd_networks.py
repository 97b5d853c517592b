"""Networks that the rules could get wrong: differentiated rightly, or refused with the reason."""

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.inputs.called import called
from fastntk.inputs.libraries import peft, timm
from fastntk.jacobians import products
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.memory.prepare import linearised
from fastntk.tuning.parameters import snapshot

CLASSES = 3


def plain(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(192, CLASSES), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * self.fc(x.flatten(1))


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class TwoNames(nn.Module):
    """One module under two names, and one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8))
        self.norm, self.last = self.body[2], nn.Linear(8, CLASSES)
        self.head, self.tied = self.last, nn.Linear(8, 8)
        self.tied.weight = self.body[4].weight

    def forward(self, x):
        return self.head(self.tied(self.norm(self.body(x))))


class Keeping(nn.Module):
    """It keeps what it computed from its biases until it is trained, as LeViT's attention does; or for ever."""

    def __init__(self, drops: bool = True) -> None:
        super().__init__()
        self.drops, self.kept, self.biases = drops, {}, nn.Parameter(torch.randn(2, 3, 8, 8))

    def train(self, mode=True):
        self.kept = {} if mode and self.drops else self.kept
        return super().train(mode)

    def forward(self, x):
        if not self.training and "sum" in self.kept:
            return x * self.kept["sum"]
        self.kept["sum"] = self.biases.sum(0)
        return x * self.kept["sum"]


class Freezing(nn.Module):
    """Training it freezes some of it, as people do with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(192, 8), nn.Linear(8, CLASSES)

    def train(self, mode):
        if mode:
            self.body.requires_grad_(False)
        return super().train(mode)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).tanh())


class Mixed(nn.Module):
    """Of two dtypes, with a table that is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.tensor(2.0).double()), nn.Linear(192, CLASSES)
        self.register_buffer("table", torch.eye(CLASSES).to_sparse())

    def forward(self, x):
        return (torch.sparse.mm(self.table, self.head(x.flatten(1)).T).T * self.scale).float()


class Cut(nn.Module):
    """Its body gets no gradients, and its head does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(192, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            rows = self.body(x.flatten(1))
        return self.head(rows)


class Written(nn.Module):
    """A linear layer's output is written to in place; a norm's is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        rows = self.fc(x.flatten(1, 2))
        self.norm(rows)
        return self.head(rows.add_(1).tanh_().mean(1))


class Mixing(nn.Module):
    """Attention over the samples of a batch, which shows in a derivative alone: what it attends to is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(1), nn.Linear(192, CLASSES)

    def forward(self, x):
        same = self.norm(x.flatten(1)[..., None])[..., 0]
        return self.fc(x.flatten(1)) + 1e-7 * ((same @ same.T).softmax(1) @ same)[:, :CLASSES]


class Together(nn.Module):
    """Every sample is set against the mean of its batch."""

    def forward(self, x):
        return x - x.mean(0)


class Noisy(nn.Module):
    """Random, also in eval mode."""

    def forward(self, x):
        return x * (1 + 0.1 * torch.rand(len(x), 1, 1, 1))


class Attending(nn.Module):
    """With dropout of attention, whatever mode it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(8, CLASSES))

    def forward(self, x):
        tokens = x.flatten(1, 2)
        return self.get_submodule("0")(F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.1).mean(1))


def adapted() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    net = peft().inject_adapter_in_model(peft().LoraConfig(r=2, target_modules=["1"], use_dora=True), net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize(
    ("make", "select"),
    [
        (Scaled, "all"),
        (lambda: plain(nn.PReLU()), "all"),
        (lambda: plain(nn.PReLU(8)), "all"),
        (lambda: nn.Sequential(Standardised(3, 8, 3), *plain()[1:]), "all"),
        (TwoNames, "all"),
        (adapted, r"lora_|^3\."),
        (Written, "all"),
        (Mixing, "all"),
    ],
    ids=[
        *("scalar", "PReLU", "PReLU a channel", "standardised weights", "two names", "DoRA"),
        *("written in place", "mixed in the derivative alone"),
    ],
)
@pytest.mark.parametrize("batch", [1, CLASSES, 4])
def test_is_what_torch_func_says(make, select, batch):
    torch.manual_seed(0)
    model = make().double().eval()
    free = fastntk.tune(model, select)
    jacobian, x = PerSampleJacobian(model, snapshot(free)), torch.randn(batch, 3, 8, 8).double()
    expected = oracles.jacobian(model, jacobian.parameters, jacobian.layout(x), x)
    torch.testing.assert_close(jacobian(x).dense(), expected, rtol=1e-9, atol=1e-11)
    assert all(model.get_parameter(name) is parameter for name, parameter in free.items())


def keeping(drops: bool) -> nn.Module:
    return nn.Sequential(Keeping(drops), nn.Flatten(), nn.Linear(192, CLASSES)).double().eval()


def test_what_a_module_keeps_from_pass_to_pass_is_dropped():
    torch.manual_seed(0)
    model, fresh, x = keeping(True), keeping(True), torch.randn(24, 3, 8, 8).double()
    free = fastntk.tune(model, "all")
    with torch.no_grad():
        model(x)  # what it keeps is there before anything else
    moved = {name: torch.randn_like(parameter) for name, parameter in free.items()}
    fresh.load_state_dict(moved)
    torch.testing.assert_close(called(model, moved, x), fresh(x))
    jacobian = PerSampleJacobian(model, moved)
    expected = oracles.jacobian(model, moved, jacobian.layout(x), x)
    torch.testing.assert_close(jacobian(x).dense(), expected, rtol=1e-9, atol=1e-11)
    of_biases = jacobian.layout(x).unflatten(expected[0, 0], moved)["0.biases"]
    torch.testing.assert_close(of_biases, (x[0] * moved["2.weight"][0].view(3, 8, 8)).expand(2, -1, -1, -1))


@pytest.mark.parametrize("before", [False, True])
def test_what_is_kept_for_good_is_refused(before):
    torch.manual_seed(0)
    model = keeping(False)
    if before:
        model(torch.randn(4, 3, 8, 8).double())
    with pytest.raises(fastntk.InputError, match="keeps what it computed from '0.biases'"):
        PerSampleJacobian(model, snapshot(fastntk.tune(model, "all")))(torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("make", [Freezing, Mixed, Cut])
def test_what_is_odd_and_harmless_is_fitted_and_forgets(make):
    torch.manual_seed(0)
    model, data = make(), TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % CLASSES)
    model.train(False)
    fastntk.tune(model, "all")
    initial = fastntk.fit(model, data, epochs=2, batch_size=8).initial
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, initial[name])}
    answer = fastntk.prepare(model, data, initial).forget([1, 2])
    assert {name for name, each in model.named_parameters() if not torch.equal(each, answer.parameters[name])} == moved
    assert moved == set(initial) - ({"body.weight", "body.bias"} if make is Cut else set())


def test_products_where_an_operation_has_no_forward_derivative():
    torch.manual_seed(0)
    model, data = Mixed(), TensorDataset(torch.randn(5, 3, 8, 8), torch.arange(5) % CLASSES)
    fastntk.tune(model, "all")
    network = linearised(model, data, fastntk.SquaredLoss(), fastntk.Numerics())
    vector = torch.randn(network.layout.size).double()
    expected = network.rows(range(5)).jacobian.matvec(vector)
    torch.testing.assert_close(products.tangent(network, range(5), vector), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_keeps_its_biases_is_fitted_and_forgets():
    answers = []
    for forward in (Keeping.forward, lambda self, x: x * self.biases.sum(0)):
        torch.manual_seed(0)
        model, data = keeping(True), TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % CLASSES)
        model[0].forward = partial(forward, model[0])
        fastntk.tune(model, "all")
        initial = fastntk.fit(model, data, epochs=2, batch_size=8).initial
        answers.append({**model.state_dict(), **fastntk.prepare(model, data, initial).forget([1, 2]).parameters})
    torch.testing.assert_close(*answers)


def test_a_module_under_two_names_stays_tuned_and_forgets():
    torch.manual_seed(0)
    model, data = TwoNames(), TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % CLASSES)
    fastntk.tune(model, "ln", r"^body\.4", "head")
    initial = fastntk.fit(model, data, epochs=2).initial
    fitted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    memory = fastntk.prepare(model, data, initial, form="dual")
    answer = memory.forget([1, 2])
    assert all(torch.equal(parameter, fitted[name]) for name, parameter in model.named_parameters())
    assert {name for name, each in model.named_parameters() if each.requires_grad} == set(answer.parameters)
    ours = called(model, answer.parameters, data.tensors[0])
    model.load_state_dict(answer.parameters, strict=False)
    torch.testing.assert_close(model(data.tensors[0]), ours)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plain(nn.BatchNorm2d(8, track_running_stats=False)), "depend on the others of its batch"),
        (lambda: plain(Together()), "depend on the others of its batch"),
        (lambda: plain(Noisy()), "are random"),
        (lambda: plain(nn.Dropout2d(0.5).train()), "are random"),
        (Attending, "are random"),
        (lambda: plain(timm().layers.DropPath(0.5).train()), "are random"),
        (lambda: nn.DataParallel(plain()), "model.module"),
    ],
)
def test_what_has_no_per_sample_jacobian_is_refused(make, says):
    torch.manual_seed(0)
    model = make()
    fastntk.tune(model, r"\d\.(weight|bias)")
    with pytest.raises(fastntk.InputError, match=says):
        PerSampleJacobian(model, snapshot(fastntk.tune(model, r"\d\.(weight|bias)")))(torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_refused(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.body, x * 1.0, use_reentrant=reentrant))

    model = Checkpointed().eval()
    jacobian = PerSampleJacobian(model, snapshot(fastntk.tune(model, "all")))
    with pytest.raises(fastntk.InputError, match="checkpointing"):
        jacobian(torch.randn(4, 3, 8, 8, requires_grad=True))
