"""Slow and obvious versions of what the package does fast."""

import torch
from torch import Tensor, nn
from torch.func import jacrev

from fastntk.inputs.called import called
from fastntk.jacobians.layout import Layout


def flat_parameters(layout: Layout, tensors: dict[str, Tensor]) -> Tensor:
    """Per-sample arrays by name, ``[C, *shape]`` each, as ``[C, p]`` in the layout's order."""
    classes = next(iter(tensors.values())).shape[0]
    return torch.stack([layout.flatten({name: tensor[c] for name, tensor in tensors.items()}) for c in range(classes)])


def jacobian(model: nn.Module, parameters: dict[str, Tensor], layout: Layout, images: Tensor) -> Tensor:
    """``[n, C, p]``, one sample at a time, by reverse-mode torch.func."""

    def logits(free: dict[str, Tensor], image: Tensor) -> Tensor:
        return called(model, free, image[None])[0]

    return torch.stack([flat_parameters(layout, jacrev(logits)(parameters, image)) for image in images])


def finite_differences(
    model: nn.Module, parameters: dict[str, Tensor], layout: Layout, images: Tensor, size: float = 1e-6
) -> Tensor:
    """``[n, C, p]`` by central differences."""
    vector = layout.flatten(parameters)
    columns = []
    with torch.no_grad():
        for i in range(len(vector)):
            ends = []
            for sign in (1, -1):
                moved = vector.clone()
                moved[i] += sign * size
                ends.append(called(model, layout.unflatten(moved, parameters), images))
            columns.append((ends[0] - ends[1]) / (2 * size))
    return torch.stack(columns, -1)


def anchored_step(jacobian: Tensor, residual: Tensor, displacement: Tensor, ridge: float) -> Tensor:
    """``argmin_d sum |J d - r|^2 + ridge |d + u|^2`` as one tall least squares problem, by QR."""
    rows = jacobian.flatten(0, -2)
    size = rows.shape[1]
    tall = torch.cat([rows, ridge**0.5 * torch.eye(size).to(rows)])
    right = torch.cat([residual.flatten(), -(ridge**0.5) * displacement])
    return torch.linalg.lstsq(tall, right[:, None], driver="gels").solution[:, 0]


def projected_step(jacobian: Tensor, residual: Tensor, forget: Tensor, ridge: float) -> Tensor:
    """Golatkar et al.'s closed form ``P G_f M V`` of the unanchored step, written from the paper with one ridge."""
    keep = torch.ones(len(jacobian), dtype=torch.bool)
    keep[forget] = False
    g_r, g_f = jacobian[keep].flatten(0, 1).T, jacobian[~keep].flatten(0, 1).T
    r_r, r_f = residual[keep].flatten(), residual[~keep].flatten()
    k_rr = g_r.T @ g_r + ridge * torch.eye(g_r.shape[1]).to(g_r)
    k_ff = g_f.T @ g_f + ridge * torch.eye(g_f.shape[1]).to(g_f)
    k_rf = g_r.T @ g_f
    solve = torch.linalg.inv(k_rr)
    p = torch.eye(len(g_r)).to(g_r) - g_r @ solve @ g_r.T
    m = torch.linalg.inv(k_ff - k_rf.T @ solve @ k_rf)
    v = r_f - k_rf.T @ solve @ r_r
    return -p @ g_f @ m @ v


def retrained_head(features: Tensor, targets: Tensor, initial: Tensor, ridge: float) -> Tensor:
    """The head matrix ``[C, d]`` that minimises ``sum |W h_i - t_i|^2 + ridge |W - W_0|^2``."""
    size = features.shape[1]
    gram = features.T @ features + ridge * torch.eye(size).to(features)
    return torch.linalg.solve(gram, features.T @ targets + ridge * initial.T).T
