"""The network linearised at ``theta*``, over a training set: the source of all its Jacobians and products with them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Subset

from fastntk.common.progress import track
from fastntk.inputs.images import batches, checked
from fastntk.jacobians.combinations import ClassProbes
from fastntk.jacobians.jacobian import Jacobian, Layout, PerSampleJacobian
from fastntk.jacobians.numerics import arithmetic
from fastntk.solve.sums import Rows
from fastntk.tuning.loss import Loss, SquaredLoss

_NOISE = {"full": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""What a logit may change between machines and batches, relative to the targets and residuals, by the arithmetic."""


@dataclass(frozen=True)
class Linearised:
    """``f(x_i; theta* + d) = f(x_i; theta*) + J_i d`` for the samples of a training set, addressed by their ids.

    Attributes:
        jacobian: of the model at ``theta*``.
        train: the map-style dataset; a sample's id is its index.
        loss: the one the model was fitted with.
        batch_size: images a batch.
        workers: processes that read images ahead.
        precision: of the network's arithmetic, see ``fastntk.jacobians.numerics``.
        probes: of the classes, if they are probed.
    """

    jacobian: PerSampleJacobian
    train: Dataset
    loss: Loss = SquaredLoss()  # noqa: RUF009 (frozen)
    batch_size: int = 64
    workers: int = 0
    precision: str = "full"
    probes: ClassProbes | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.jacobian.device

    def images(self, ids: Sequence[int]) -> DataLoader:
        """Batches of images and labels of the samples with the given ids, in that order."""
        return batches(Subset(self.train, ids), self.batch_size, workers=self.workers)

    def stream(self, ids: Sequence[int], description: str = "Jacobians") -> Iterator[tuple[Jacobian, Tensor]]:
        """The Jacobians and residuals of the samples, batch by batch; see ``jacobians``."""
        samples = track(self.images(ids), description)
        return jacobians(self.jacobian, samples, self.loss, self.precision, self.probes, ids)

    def rows(self, ids: Sequence[int], description: str = "Jacobians") -> Rows:
        """The Jacobians and residuals of the samples; of no sample, too."""
        return Rows.of(self.stream(ids or [self._first], description))[: len(ids)]

    def tangent(self, ids: Sequence[int], vector: Float[Tensor, " p"]) -> Float[Tensor, "samples classes"]:
        """``J_i v`` for the samples, in forward mode: no Jacobian is formed, and the classes are not probed."""
        parts = [self.tangent_of(images, vector) for images, _ in self._prepared(ids or [self._first])]
        return torch.cat(parts)[: len(ids)]

    def residual(self, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images with ``r_i``, the loss's negative gradient with respect to the logits: for squared loss
        ``t_i - f(x_i; theta*)``."""
        for images, logits, labels in self._forward(ids):
            yield images, self.loss.residual(logits, labels)

    def residuals(self, ids: Sequence[int]) -> Float[Tensor, "samples outputs"]:
        """What ``rows`` have for residuals, by a forward pass: ``L_i^+ r_i``, and ``V_i'`` times it where the classes
        are probed."""
        passed = self._forward(ids or [self._first])
        parts = [self.loss.whitened(self.loss.residual(logits, labels), logits) for _, logits, labels in passed]
        rows = torch.cat(parts)[: len(ids)]
        if self.probes is None:
            return rows
        return torch.einsum("nck,nc->nk", self.probes.draw(ids, rows.shape[1]).to(rows), rows)

    def changed(
        self,
        ids: Sequence[int],
        before: Float[Tensor, "samples outputs"],
        now: Float[Tensor, "samples outputs"] | None = None,
    ) -> list[int]:
        """The samples whose residuals ``now`` (None: computed) are not what they were ``before``, up to the noise of
        the arithmetic."""
        size = self.loss.scale + before.square().mean(1).sqrt()
        now = self.residuals(ids) if now is None else now
        differ = (now - before).abs().amax(1) > _NOISE[self.precision] * size
        return [i for i, other in zip(ids, differ.tolist(), strict=True) if other]

    def pull(self, pairs: Iterable[tuple[Tensor, Float[Tensor, "batch classes"]]]) -> Float[Tensor, " p"]:
        """``sum_i J_i'a_i`` over batches of images and cotangents: one backward pass each."""
        layout, parameters = self.layout, self.jacobian.parameters
        total = torch.zeros(layout.size, dtype=torch.float64, device=self.device)
        for images, cotangents in pairs:
            with arithmetic(self.precision, self.device):
                logits, pullback = vjp(partial(self._logits, images), parameters)[:2]
                total += layout.flatten(pullback(cotangents.to(logits))[0])
        return total

    def gram(self, ids: Sequence[int], vector: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``G v = sum_i J_i'H_i(J_i v)`` over the samples: a forward-mode and a backward pass, no Jacobian."""
        return self.pull((x, self.curve(x, self.tangent_of(x, vector))) for x, _ in self._prepared(ids))

    def curve(self, images: Tensor, vectors: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """``H_i z_i``, the loss's Hessian times vectors of logits."""
        root = self._root(images)
        return vectors if root is None else torch.einsum("nck,ndk,nd->nc", root, root, vectors.to(root)).to(vectors)

    def lift(self, images: Tensor, vectors: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """``L_i a_i``, with ``L_i L_i' = H_i``."""
        root = self._root(images)
        return vectors if root is None else torch.einsum("nck,nk->nc", root, vectors.to(root)).to(vectors)

    def _root(self, images: Tensor) -> Tensor | None:
        if not self.curved:
            return None
        with torch.no_grad():
            return self.loss.root(self._logits(images))

    @property
    def of_logits(self) -> bool:
        """Whether rows are of the logits themselves, and not of combinations of them."""
        return not (self.curved or self.probes)

    @property
    def curved(self) -> bool:
        """Whether the loss's Hessian is another than the identity: rows are then ``L_i'J_i``."""
        return not isinstance(self.loss, SquaredLoss)

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.jacobian.dtype

    @cached_property
    def layout(self) -> Layout:
        """Where each tuned parameter lies in a vector of all."""
        return self.jacobian.known or self.jacobian.layout(self._one)

    @cached_property
    def classes(self) -> int:
        """C."""
        return self.jacobian.classes(self._one)

    def activation_bytes(self) -> int:
        """Bytes that the network keeps for its backward passes, per image."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in self.jacobian.model.parameters()}
        free = {name: tensor.clone().requires_grad_() for name, tensor in self.jacobian.parameters.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = self._logits(self._one, free)
        del held  # until here, so that no two tensors had the same address
        return sum(size for pointer, size in kept.items() if pointer not in parameters)

    @property
    def _one(self) -> Tensor:
        return checked(torch.as_tensor(self.train[self._first][0]))[None].to(self.device)

    @property
    def _first(self) -> int:
        """A sample that can be read: of a memory's members, not all can."""
        return getattr(self.train, "first", 0)

    def _prepared(self, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in track(self.images(ids), "one pass"):
            yield checked(images).to(self.device), labels.to(self.device)

    def _forward(self, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of images, logits and labels."""
        for images, labels in self._prepared(ids):
            with torch.no_grad(), arithmetic(self.precision, self.device):
                logits = self._logits(images)
            yield images, logits, labels

    def _logits(self, images: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        return functional_call(self.jacobian.model, parameters or self.jacobian.parameters, (images,))

    def tangent_of(self, images: Tensor, vector: Float[Tensor, " p"]) -> Float[Tensor, "batch classes"]:
        """``J v`` for a batch of images."""
        parameters = self.jacobian.parameters
        direction = self.layout.unflatten(vector, parameters)
        with torch.no_grad(), _forward_mode(), arithmetic(self.precision, self.device):
            return jvp(lambda free: self._logits(images, free), (parameters,), (direction,))[1].to(vector)


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


def jacobians(
    jacobian: PerSampleJacobian,
    samples: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    precision: str = "full",
    probes: ClassProbes | None = None,
    ids: Iterable[int] = (),
) -> Iterator[tuple[Jacobian, Tensor]]:
    """The Jacobian and residual of every sample, batch by batch: ``J_i`` and ``r_i``, or, for a loss with another
    Hessian than the identity, ``L_i'J_i`` and ``L_i^+ r_i`` (see ``fastntk.tuning.loss``).

    Args:
        jacobian: of the model.
        samples: any iterable of ``(images, labels)``; a DataLoader with workers reads ahead.
        loss: gives the residuals.
        precision: of the network's arithmetic.
        probes: replace the C logits of sample i by ``V_i'`` times them (see ``fastntk.jacobians.combinations``); ``ids`` are then the
            samples' ids, in order.

    Raises:
        InputError: a pixel is not finite, or a label is outside the classes.
    """
    device = jacobian.device
    names, classes = iter(ids), 0
    for images, labels in samples:
        images, draws = checked(images).to(device), None
        if probes:
            classes = classes or jacobian.classes(images)
            draws = probes.draw([next(names) for _ in images], classes).to(images)
        with arithmetic(precision, device):
            batch, logits = jacobian.with_logits(images, partial(_combined, loss, draws))
        logits = logits.to(images.dtype)
        residual = loss.whitened(loss.residual(logits, labels.to(device)), logits)
        yield batch, residual if draws is None else torch.einsum("nck,nc->nk", draws.to(residual), residual)


def _combined(loss: Loss, draws: Tensor | None, logits: Tensor) -> Tensor | None:
    """The combinations of the logits whose Jacobian is taken: the loss's ``L_i``, probed if the classes are."""
    root = loss.root(logits)
    if root is None or draws is None:
        return draws if root is None else root
    return root @ draws.to(root)
