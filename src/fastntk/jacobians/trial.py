"""What a trial run on one image finds of a model: which rule covers which parameter, and what stands in the way."""

import logging
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fastntk.common.errors import InputError
from fastntk.inputs.called import called, keeps
from fastntk.inputs.checks import check_logits, taking
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.rules.calls import PerSample

log = logging.getLogger(__name__)

# What a logit may change from pass to pass, as a share of the largest; ten times that beside another image, where other
# kernels may be at work.
_CHANGED = 1e-5

_KEPT = (
    "the model keeps what it computed from {!r} for the next pass, which would be wrong after a change of it. Tune "
    "other parameters, or have a train() of the module drop what is kept."
)

_CHECKPOINTED = (
    "the model recomputes activations (gradient checkpointing), which per-sample Jacobians cannot go through. Turn it "
    "off: model.set_grad_checkpointing(False) in timm, model.gradient_checkpointing_disable() in transformers."
)


def forward(
    model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, mode: AbstractContextManager | None = None
) -> Tensor:
    """The logits of a batch ``x``, under a mode. Raises ``InputError`` unless they are ``[batch, C]``."""
    with mode or nullcontext():
        logits = called(model, parameters, x)
    check_logits(logits, len(x))
    return logits


def tried(
    model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor
) -> tuple[Layout, Float[Tensor, "batch classes"], dict[str, Tensor]]:
    """The layout by the rules alone, from one image (as a batch of two, so that a leading axis of length 1 is not taken
    for the batch); and what its derivatives are compared with: a random combination of logits for each of the two, and
    autograd's gradient of the first's.

    Raises:
        InputError: there are no per-sample Jacobians.
    """
    pair = torch.cat([x, x])
    try:
        layout, used = _layout_of(model, parameters, pair)
        _check_independent(model, parameters, x)
        _check_unused(model, parameters.keys() - used)
        return layout, *_by_autograd(model, parameters, pair, used)
    except CheckpointError as error:
        raise InputError(_CHECKPOINTED) from error


def _check_independent(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> None:
    """Raises ``InputError`` unless an image has the same finite logits again, and beside another image."""
    with torch.no_grad():
        copies, again = (forward(model, parameters, x.expand(8, *x.shape[1:])) for _ in range(2))
        beside = forward(model, parameters, torch.cat([x, x.flip(-1) + 1]))[:1]
    once, all_of_it = copies[:1], torch.cat([copies, again])
    if not torch.isfinite(once).all():
        raise InputError("an image's logits are NaN or infinite: see the model's weights, and the images.")
    limit = _CHANGED * (float(once.abs().max()) + 1e-6)
    if not float((all_of_it - once).abs().max()) <= limit:
        raise InputError(
            "the logits are random: one image has other logits the second time. Call model.eval() first, and see "
            "that no layer (stochastic depth, attention dropout) draws at random even then."
        )
    if not float((beside - once).abs().max()) <= 10 * limit:
        raise InputError(
            "the logits of an image depend on the others of its batch, so per-sample Jacobians do not exist. Use "
            "layers that do not couple them: batch norm with running statistics, in eval mode."
        )


def _by_autograd(
    model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, used: set[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A random combination of logits for each image, ``[batch, C]``, and its gradient at the first image.

    Raises:
        InputError: a parameter of ``used``, which an earlier pass depended on, has no gradient.
    """
    free = _copies(parameters)
    with torch.enable_grad():
        logits = forward(model, free, x)
        probes = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        found = torch.autograd.grad((logits * probes)[0].sum(), list(free.values()), allow_unused=True)
    grads = dict(zip(free, found, strict=True))
    kept = sorted(name for name in used if grads[name] is None)
    if kept:
        raise InputError(_KEPT.format(kept[0]))
    return probes, {name: torch.zeros_like(free[name]) if g is None else g for name, g in grads.items()}


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the parameters, to be differentiated."""
    return {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}


def _layout_of(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> tuple[Layout, set[str]]:
    """The layout by the rules alone, and the parameters that the logits depend on."""
    free = _copies(parameters)
    mode = PerSample(free, len(x))
    with torch.enable_grad():
        with taking(x):
            logits = forward(model, free, x, mode)
        if not logits.requires_grad:
            raise InputError("the logits depend on no tuned parameter. Tune others: 'head' is always among them.")
        _check_kept(logits)
        inputs = [*free.values(), *mode.copies.values()]
        grads = torch.autograd.grad(logits.sum(), inputs, allow_unused=True, materialize_grads=False)
    grads, of_copies = grads[: len(free)], grads[len(free) :]
    # The rules detach: a gradient that reaches the parameter itself came through a use that no rule covers.
    slow = {name for name, grad in zip(free, grads, strict=True) if grad is not None or name not in mode.copies}
    last = [c.names for c in mode.linear_calls if c.out is logits and c.input.ndim == 2 and c.unchanged]
    calls = [name for call in mode.linear_calls for name in call.names]
    head = last[0] if last and all(calls.count(name) == 1 and name not in slow for name in last[0]) else ()
    fast = tuple(name for name in free if name not in slow and name not in head)
    shapes = {name: tensor.shape for name, tensor in free.items()}
    reached = zip((*free, *mode.copies), (*grads, *of_copies), strict=True)
    used = {name for name, grad in reached if grad is not None}
    return Layout(fast=fast, slow=tuple(name for name in free if name in slow), head=head, shapes=shapes), used


def _check_unused(model: nn.Module, names: Set[str]) -> None:
    """Says which parameters the logits do not depend on; raises ``InputError`` for one of a module that keeps tensors,
    which may be of an earlier pass."""
    if names:
        log.info("the logits do not depend on %s", ", ".join(sorted(names)))
    for name in sorted(names):
        if keeps(model.get_submodule(name.rpartition(".")[0])):
            raise InputError(_KEPT.format(name))


def _check_kept(logits: Tensor) -> None:
    """Raises ``InputError`` if what led to the logits was not kept, for a backward pass of its own to compute anew."""
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise InputError(_CHECKPOINTED)
        seen.add(node)
        waiting += [each for each, _ in node.next_functions]
