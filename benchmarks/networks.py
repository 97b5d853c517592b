"""What several benchmarks do with a network: away from trivial values, and other ways to its Jacobians."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fastntk.tuning.parameters import snapshot, tuned


def randomise(model: nn.Module) -> None:
    """Norms with scales and statistics, and linear layers with weights, that are not trivial."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.get_buffer("running_mean").normal_(0, 0.1)
            module.get_buffer("running_var").uniform_(0.8, 1.2)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, nn.Linear):  # torchvision starts the ViT's head with zeros
            nn.init.normal_(module.weight, 0, module.in_features**-0.5)


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Tuned parameters a little away from where they were, as after a fit; returns those from before."""
    initial = snapshot(tuned(model))
    with torch.no_grad():
        for parameter in tuned(model).values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return initial


def by_vmap(model: nn.Module, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """torch.func: vmap over the samples of jacrev, ``[n, C, p]`` in the parameters' order."""
    frozen = {name: tensor.detach() for name, tensor in model.named_parameters() if name not in parameters}

    def logits(free: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, {**frozen, **free}, (image[None],))[0]

    with torch.no_grad():
        jacobians = vmap(jacrev(logits), (None, 0))(parameters, images)
    return torch.cat([jacobian.flatten(2) for jacobian in jacobians.values()], 2)


def by_loop(model: nn.Module, images: Tensor) -> Tensor:
    """Sample by sample, class by class, one backward pass each."""
    own, rows = list(tuned(model).values()), []
    for image in images:
        logits = model(image[None])[0]
        for c, logit in enumerate(logits):
            grads = torch.autograd.grad(logit, own, retain_graph=c + 1 < len(logits))
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).view(len(images), len(logits), -1)
