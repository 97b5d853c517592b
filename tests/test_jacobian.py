import oracles
import pytest
import torch
from cases import CASES, Convolutional
from torch import nn
from torch.utils.data import TensorDataset

import fastntk
from fastntk.jacobians.jacobian import concatenate
from fastntk.jacobians.linearised import jacobians
from fastntk.jacobians.numerics import arithmetic
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.tuning.parameters import snapshot, tuned

FAST = ["everything", "grouped", "bn+head", "fused bn+head", "ln+head", "prompts+head"]


def setup(name, count=5):
    case = CASES[name]
    model = case.model()
    parameters = snapshot(tuned(model))
    return model, parameters, PerSampleJacobian(model, parameters), case.images(count)


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_func(name):
    model, parameters, jacobian, images = setup(name)
    expected = oracles.jacobian(model, parameters, jacobian.layout(images), images)
    torch.testing.assert_close(jacobian(images).dense(), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(jacobian.with_logits(images)[1], model(images).detach())


@pytest.mark.parametrize("name", ["bn+head", "ln+head", "shared"])
def test_equals_finite_differences(name):
    model, parameters, jacobian, images = setup(name, 3)
    expected = oracles.finite_differences(model, parameters, jacobian.layout(images), images)
    torch.testing.assert_close(jacobian(images).dense(), expected, rtol=1e-6, atol=1e-7)


def test_fast_rules_cover_norms_linear_layers_and_the_head():
    layout = {name: setup(name)[2].layout(setup(name)[3]) for name in [*FAST, "shared"]}
    for name in FAST:
        assert not layout[name].slow
        assert len(layout[name].head) == 2
    assert layout["shared"].slow == ("linear.weight",)
    assert layout["shared"].head == ()


@pytest.mark.parametrize("name", ["bn+head", "bias", "head"])
def test_products_are_those_of_the_dense_jacobian(name):
    _, _, jacobian, images = setup(name)
    j, dense = jacobian(images), jacobian(images).dense()
    vector, cotangent = torch.randn(j.size, dtype=torch.float64), torch.randn(dense.shape[:2], dtype=torch.float64)
    torch.testing.assert_close(j.matvec(vector), dense @ vector)
    torch.testing.assert_close(j.rmatvec(cotangent), torch.einsum("ncp,nc->p", dense, cotangent))
    torch.testing.assert_close(concatenate([j[:2], j[2:]]).dense(), dense)


def test_a_batch_is_its_samples():
    _, _, jacobian, images = setup("bn+head")
    torch.testing.assert_close(torch.cat([jacobian(image[None]).dense() for image in images]), jacobian(images).dense())


def test_layout_goes_back_and_forth():
    _, parameters, jacobian, images = setup("bn+head")
    layout = jacobian.layout(images)
    again = layout.unflatten(layout.flatten(parameters), parameters)
    assert list(again) == list(parameters)
    for name, tensor in parameters.items():
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize("dropout", [False, True])
def test_training_mode_is_refused(dropout):
    model = nn.Sequential(Convolutional(), nn.Dropout(0.5)).double().eval()
    fastntk.tune(model, "head")
    (model[1] if dropout else model[0].body[1]).train()
    with pytest.raises(fastntk.InputError, match=r"training mode.*model.eval\(\)"):
        PerSampleJacobian(model, snapshot(tuned(model)))(torch.randn(4, 3, 8, 8, dtype=torch.float64))


def test_output_must_be_logits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Unflatten(1, (2, 2)))
    with pytest.raises(fastntk.InputError, match=r"\[batch, classes\]"):
        PerSampleJacobian(model, dict(model.named_parameters()))(torch.randn(3, 3, 2, 2))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_arithmetic_leaves_the_jacobian_in_the_models_dtype(name):
    case = CASES[name]
    model, images = case.model().float(), case.images(5).float()
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))
    samples = [(images, torch.zeros(5, dtype=torch.long))]
    [(full, _)] = jacobians(jacobian, samples, fastntk.SquaredLoss())
    [(half, residual)] = jacobians(jacobian, samples, fastntk.SquaredLoss(), "bf16")
    assert half.rest.dtype == half.features.dtype == residual.dtype == torch.float32
    error = (half.dense() - full.dense()).norm() / full.dense().norm()
    assert 0 < error < 0.05


class Rounded(Convolutional):
    """With less precision, other logits in another batch: other kernels are at work there, as on a GPU."""

    def forward(self, x):
        return super().forward(x) * (1 + 1e-3 * len(x) * torch.is_autocast_enabled("cpu"))


@pytest.mark.parametrize("outer", [False, True])
def test_what_less_precision_changes_is_taken_for_no_fault(outer):
    """Asked of the memory, or in force around it."""
    model = Rounded().eval()
    fastntk.tune(model, "bn", "head")
    model.float()
    jacobian = PerSampleJacobian(model, snapshot(tuned(model)))
    samples = [(torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.long))]
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        [(found, _)] = jacobians(jacobian, samples, fastntk.SquaredLoss(), "bf16")
    assert found.rest.isfinite().all()
    assert not jacobian.known.slow


PRODUCTS = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul


@pytest.fixture
def rounding():
    """Puts torch's settings of how float32 is multiplied back."""
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for each in PRODUCTS:
        each.fp32_precision = "ieee"


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    ],
    ids=["matmul precision", "all", "matmul"],
)
def test_float32_is_taken_as_it_is_whatever_was_set_before(rounding, ask):
    """By either of the two ways that torch has; an error of torch's otherwise, or TF32 in the solves."""
    ask()
    with arithmetic("tf32", torch.device("cpu")):
        assert [each.fp32_precision for each in PRODUCTS] == ["tf32", "tf32", "ieee"]
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        with arithmetic("full", torch.device("cpu")):
            assert [each.fp32_precision for each in PRODUCTS] == ["ieee"] * 3
        assert PRODUCTS[0].fp32_precision == "tf32"
    model = Convolutional().eval()
    fastntk.tune(model, "bn", "head")
    data = TensorDataset(torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3)
    start = snapshot(tuned(model.double()))
    memory = fastntk.prepare(model, data, start, ridge=1.0)
    assert [each.fp32_precision for each in PRODUCTS] == ["ieee"] * 3
    ask()
    memory.forget([2])
    assert [each.fp32_precision for each in PRODUCTS] == ["ieee"] * 3
