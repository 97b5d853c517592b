"""Products with the Jacobians of a linearised network, by forward-mode and backward passes: no Jacobian is formed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastntk.jacobians.linearised import Linearised
from fastntk.jacobians.numerics import arithmetic


def tangent(
    network: Linearised, positions: Sequence[int], vector: Float[Tensor, " p"]
) -> Float[Tensor, "samples classes"]:
    """``J_i v`` for the samples; the classes are not probed."""
    parts = [tangent_of(network, images, vector) for images, _ in network.one_pass(positions)]
    return torch.cat(parts)[: len(positions)]


def tangent_of(network: Linearised, images: Tensor, vector: Float[Tensor, " p"]) -> Float[Tensor, "batch classes"]:
    """``J v`` for a batch of images; never under autocast, whose casts have no forward-mode derivative on every
    device."""
    precision = "full" if network.numerics.precision == "bf16" else network.numerics.precision
    parameters = network.jacobian.parameters
    direction = network.layout.unflatten(vector, parameters)
    logits = partial(network.logits, images)
    try:
        with torch.no_grad(), _forward_mode(), arithmetic(precision, network.device):
            return jvp(logits, (parameters,), (direction,))[1].to(vector)
    except NotImplementedError:  # an operation has no derivative of that kind: J v is that of u -> J'u along v
        with arithmetic(precision, network.device):
            value, pullback = vjp(logits, parameters)[:2]
            return vjp(lambda u: pullback(u)[0], torch.zeros_like(value))[1](direction)[0].to(vector)


def pull(network: Linearised, pairs: Iterable[tuple[Tensor, Float[Tensor, "batch classes"]]]) -> Float[Tensor, " p"]:
    """``sum_i J_i'a_i`` over batches of images and cotangents: one backward pass each."""
    layout, parameters = network.layout, network.jacobian.parameters
    total = torch.zeros(layout.size, dtype=torch.float64, device=network.device)
    for images, cotangents in pairs:
        with arithmetic(network.numerics.precision, network.device):
            logits, pullback = vjp(partial(network.logits, images), parameters)[:2]
            total += layout.flatten(pullback(cotangents.to(logits))[0])
    return total


def gram(network: Linearised, positions: Sequence[int], vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """``G v = sum_i J_i'H_i(J_i v)`` over the samples: a forward-mode and a backward pass."""
    samples = network.one_pass(positions) if positions else ()
    return pull(network, ((x, curve(network, x, tangent_of(network, x, vector))) for x, _ in samples))


def curve(
    network: Linearised, images: Tensor, vectors: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    """``H_i z_i``, the loss's Hessian times vectors of logits."""
    root = _root(network, images)
    return vectors if root is None else torch.einsum("nck,ndk,nd->nc", root, root, vectors.to(root)).to(vectors)


def lift(
    network: Linearised, images: Tensor, vectors: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    """``L_i a_i``, with ``L_i L_i' = H_i``."""
    root = _root(network, images)
    return vectors if root is None else torch.einsum("nck,nk->nc", root, vectors.to(root)).to(vectors)


def _root(network: Linearised, images: Tensor) -> Tensor | None:
    if not network.loss.curved:
        return None
    with torch.no_grad():
        return network.loss.root(network.logits(images))


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention in its plain form while a block lasts: the fused ones have no forward-mode derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
