"""The head solved exactly at the features that the step leads to.

The step is linear in the head ``W`` and in what comes before it, and so leaves out the product of their changes. With
what comes before the head where the step took it, the head's part of the anchored objective is a small convex problem
again, over all classes, which has a closed form for squared loss.
With ``h_i(theta)`` the head's inputs, and a 1 for the bias,

    W(S; theta) = argmin_W  sum_S l(W h_i(theta), t_i) + ridge/2 |W - W_0|^2

    W_new = W(R; theta_1) - (W(D; theta*) - W*),    theta_1 = theta* + s(R) - s(D).

The bracket is what the fitted head falls short of, as ``s(D)`` is for all parameters; a memory keeps it from when it
was prepared. Where the head alone is tuned, ``W_new`` is the step's.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.solve.linalg import below, conjugated, ridge_inverse, shifted
from fastntk.tuning.loss import Labels, Loss

log = logging.getLogger(__name__)

_NEWTON, _STEPS = 40, 200  # at most: of the method, of conjugate gradients

_TOLERANCE, _LEAST = 1e-9, 1e-9  # of the relative gradient at the end, of a step's length

_LIMIT = 1e-6  # of that gradient, above which it is told

Head = Float[Tensor, "classes features"]
"""A head as a matrix, the bias its last column."""


def head_shortfall(gram: Float[Tensor, "features features"], moment: Head, displacement: Head, ridge: float) -> Head:
    """``W(S; theta*) - W*`` for squared loss, from ``sum h h'`` and ``sum r h'`` over S and ``W* - W_0``."""
    return ridge_step(gram, moment + displacement @ gram, ridge) - displacement


def convex_shortfall(network: Linearised, positions: Sequence[int], center: Head, ridge: float) -> Head:
    """``W(S; theta*) - W*`` from a forward pass over the samples at ``positions``, for any loss."""
    here = network.layout.head_of(network.layout.flatten(network.jacobian.parameters))
    return _Inputs.of(network, network.jacobian.parameters, positions).optimum(here, center, ridge) - here


def new_head(
    network: Linearised,
    parameters: Mapping[str, Tensor],
    center: Mapping[str, Tensor],
    retain: Sequence[int],
    ridge: float,
    shortfall: Head,
) -> dict[str, Tensor]:
    """``theta_1`` with ``W_new`` for its head: a forward pass over the retained samples, and a small solve.

    Args:
        network: linearised at ``theta*``.
        parameters: ``theta_1``.
        center: where the ridge pulls to, ``theta_0`` as a rule.
        retain: the positions of R.
        ridge: a total.
        shortfall: ``W(D; theta*) - W*``.
    """
    layout = network.layout
    start, vector = layout.head_of(layout.flatten(center)), layout.flatten(parameters)
    if network.loss.curved:
        wanted = _Inputs.of(network, parameters, retain).optimum(layout.head_of(vector), start, ridge)
    else:
        gram, moment = _moments(network, parameters, retain, start)
        wanted = start + ridge_step(gram, moment, ridge)
    vector[-start.numel() :] = (wanted - shortfall).flatten()
    return layout.unflatten(vector, parameters)


@dataclass(frozen=True)
class _Inputs:
    """What the head alone depends on, of samples at some parameters.

    Attributes:
        loss: l.
        features: ``h_i``.
        logits: with the head that they have.
        labels: of the samples.
    """

    loss: Loss
    features: Float[Tensor, "samples features"]
    logits: Float[Tensor, "samples classes"]
    labels: Labels

    @classmethod
    def of(cls, network: Linearised, parameters: Mapping[str, Tensor], positions: Sequence[int]) -> "_Inputs":
        """By a forward pass."""
        jacobian = PerSampleJacobian(network.jacobian.model, parameters, network.layout)
        parts = []
        for images, labels in network.one_pass(positions):
            features, logits = jacobian.features(images)
            parts.append((features.double(), logits.double(), labels))
        return cls(network.loss, *(torch.cat(each)[: len(positions)] for each in zip(*parts, strict=True)))

    def optimum(self, here: Head, center: Head, ridge: float) -> Head:
        """``argmin_W sum l(f_i + (W - W_here) h_i, t_i) + ridge/2 |W - W_center|^2``, over all classes.

        By Newton's method in W. Its systems are solved by conjugate gradients in float32, as well as the step is worth,
        preconditioned as if the Hessians of all classes were the same.
        """
        w, system, reached = here.double(), None, math.inf
        for _ in range(_NEWTON):
            z = self._at(w - here)
            slope = ridge * (w - center) - self.loss.residual(z, self.labels).T @ self.features
            reached = float(slope.norm() / (ridge * (w - center).norm()).clamp_min(1e-300))
            if reached <= _TOLERANCE:
                break
            system = system or _System.of(self, z, ridge)
            step = system.solved(self, z, slope, max(min(0.1, reached), _TOLERANCE / reached / 2, 1e-5))
            t, value = 1.0, self._value(w, here, center, ridge)
            while self._value(w - t * step, here, center, ridge) > value * (1 + 1e-12) and t > _LEAST:
                t /= 2
            w = w - t * step
        if reached > _LIMIT:
            log.warning(
                "the exact head is exact to %.0e of its gradient alone; a larger ridge makes it more so", reached
            )
        return w

    def _at(self, change: Head) -> Float[Tensor, "samples classes"]:
        return self.logits + self.features @ change.T

    def _value(self, w: Head, here: Head, center: Head, ridge: float) -> float:
        total = len(self.logits) * float(self.loss(self._at(w - here), self.labels))
        return total + ridge / 2 * float((w - center).square().sum())


@dataclass(frozen=True)
class _System:
    """The Hessian of the head's problem, in float32: ``v -> sum H_i v h_i h_i' + ridge v``.

    Attributes:
        features: ``h_i``.
        inverse: of ``sum w_i h_i h_i' + ridge I`` with the mean w of the Hessian's eigenvalues, at some W.
        ridge: a total.
    """

    features: Float[Tensor, "samples features"]
    inverse: Float[Tensor, "features features"]
    ridge: float

    @classmethod
    def of(cls, inputs: _Inputs, z: Float[Tensor, "samples classes"], ridge: float) -> "_System":
        """At the logits z."""
        p, features, weights = z.softmax(1), inputs.features, z.new_ones(len(z))
        if inputs.loss.curved:
            total = inputs.loss.targets(inputs.labels, p.shape[1]).to(p).sum(1)
            weights = total * (1 - p.square().sum(1)).clamp_min(0) / (p.shape[1] - 1)
        return cls(features.float(), ridge_inverse(features.T @ (weights[:, None] * features), ridge).float(), ridge)

    def solved(self, inputs: _Inputs, z: Float[Tensor, "samples classes"], slope: Head, tolerance: float) -> Head:
        """The inverse times the slope, at the logits z."""
        logits, rhs = z.float(), slope.float().flatten()

        def apply(v: Tensor) -> Tensor:
            head = v.view(slope.shape)
            curved = inputs.loss.curve(self.features @ head.T, logits, inputs.labels)
            return (curved.T @ self.features + self.ridge * head).flatten()

        def precondition(v: Tensor) -> Tensor:
            return (v.view(slope.shape) @ self.inverse).flatten()

        step, _ = conjugated(apply, rhs, precondition, below(tolerance * float(rhs.norm())), _STEPS)
        return step.view(slope.shape).double()


def ridge_step(gram: Float[Tensor, "features features"], moment: Head, ridge: float) -> Head:
    """``moment (gram + ridge I)^-1``: with ``moment = sum (t - W_0 h) h'``, ``W(S; theta) - W_0``."""
    return torch.linalg.solve(shifted(gram, ridge), moment.T).T


def _moments(
    network: Linearised, parameters: Mapping[str, Tensor], positions: Sequence[int], start: Head
) -> tuple[Float[Tensor, "features features"], Head]:
    """``sum h h'`` and ``sum (t - W_0 h) h'`` at ``parameters``, over the samples at ``positions``."""
    layout = network.layout
    jacobian = PerSampleJacobian(network.jacobian.model, parameters, layout)
    moved = layout.head_of(layout.flatten(parameters)) - start
    gram, moment = start.new_zeros(start.shape[1], start.shape[1]), torch.zeros_like(start)
    for images, labels in network.images(positions):
        features, logits = jacobian.features(images.to(network.device))
        residual = network.loss.residual(logits, labels.to(logits.device))
        h = features.to(start)
        gram += h.T @ h
        moment += (residual.to(start) + h @ moved.T).T @ h
    return gram, moment
