"""What writes to activations that a rule has noted, and rules that are wrong: noticed, and answered right."""

import pytest
import torch
from torch import nn

import fastntk
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.jacobians.rules import calls
from fastntk.tuning.parameters import snapshot, tuned


class Residual(nn.Module):
    """A pre-activation block, with operations in place or without."""

    def __init__(self, in_place):
        super().__init__()
        self.norm, self.conv, self.in_place = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), in_place

    def forward(self, x):
        out = self.conv(torch.relu(self.norm(x)))
        if not self.in_place:
            return torch.sigmoid(out + x)
        out += x
        return out.sigmoid_()


class Scaled(nn.Module):
    """Logits that are scaled after the head."""

    def __init__(self, in_place):
        super().__init__()
        self.head, self.in_place = nn.Linear(6, 3), in_place

    def forward(self, x):
        logits = self.head(x)
        if not self.in_place:
            return logits * 4
        logits *= 4
        return logits


def network(in_place):
    torch.manual_seed(0)
    blocks = [Residual(in_place) for _ in range(3)]
    layers = [nn.Conv2d(3, 6, 3), *blocks, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, Scaled(in_place)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
    return model


def images():
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1)).double()


def dense(model):
    fastntk.tune(model, "bn", "head")
    parameters = snapshot(tuned(model))
    jacobian = PerSampleJacobian(model, parameters)
    found = jacobian(images())
    layout = jacobian.layout(images())
    rows = found.dense()
    return {
        name: torch.stack([layout.unflatten(rows[i, c], parameters)[name] for i in range(4) for c in range(3)])
        for name in parameters
    }


def test_operations_in_place_change_nothing():
    right, found = (dense(network(in_place)) for in_place in (False, True))
    for name, expected in right.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_a_rule_that_is_wrong_is_not_taken(monkeypatch, caplog):
    """Its parameters are left to torch.func, and the log says so."""
    right, model = dense(network(False)), network(False)
    real = calls.BatchNorm.apply

    def wrong(input, weight, bias, mean, var, eps, weights, biases, *origin):
        return real(
            input, weight, bias, mean, var, eps, weights if weights is None else 1.05 * weights, biases, *origin
        )

    monkeypatch.setattr(calls.BatchNorm, "apply", wrong)
    with caplog.at_level("INFO"):
        found = dense(model)
    assert "left to torch.func" in caplog.text
    for name, expected in right.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_a_derivative_that_autograd_does_not_confirm_is_refused(monkeypatch):
    model = network(False)
    monkeypatch.setattr(PerSampleJacobian, "_functional", lambda self, x, names, probes: torch.zeros(
        len(x), probes.shape[2], sum(self.parameters[name].numel() for name in names)).double())  # fmt: skip
    monkeypatch.setattr(calls, "_RULES", {})
    with pytest.raises(fastntk.InputError, match="is not what autograd says"):
        dense(model)
