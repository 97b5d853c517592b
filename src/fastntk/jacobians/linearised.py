"""The network linearised at ``theta*``, over a training set: the source of all its Jacobians."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fastntk.common.progress import track
from fastntk.inputs.batches import batches, checked, finite, item
from fastntk.inputs.called import called
from fastntk.jacobians.combinations import ClassProbes
from fastntk.jacobians.jacobian import Jacobian
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.numerics import Numerics, arithmetic
from fastntk.jacobians.outer import Outer
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.jacobians.rows import Point, Rows
from fastntk.tuning.loss import Labels, Loss, check_labels, contrasts, kept_of
from fastntk.tuning.losses import SquaredLoss

_NOISE = {"full": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""What a logit may change between machines and batches, relative to the targets and residuals, by the arithmetic."""


LIMIT_TAIL = 0.05
"""``sum |t - p|`` of a sample, over the classes which are not kept: at most so much."""

FIRST = 256
"""Samples that this is measured on, at most."""


@dataclass(frozen=True)
class Linearised:
    """``f(x_i; theta* + d) = f(x_i; theta*) + J_i d`` for the samples of a training set, addressed by their positions.

    ``fastntk.jacobians.products`` multiplies with it where no Jacobian is formed.

    Attributes:
        jacobian: of the model at ``theta*``.
        train: the map-style dataset; a sample's position is its index.
        loss: the one the model was fitted with.
        numerics: how to compute.
        keep: how many classes of each sample rows are of, its label and its likeliest at ``theta*``; None for all, and
            for combinations of all.
    """

    jacobian: PerSampleJacobian
    train: Dataset
    loss: Loss = SquaredLoss()  # noqa: RUF009 (frozen)
    numerics: Numerics = Numerics()  # noqa: RUF009 (frozen)
    keep: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.jacobian.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.jacobian.dtype

    @property
    def of_logits(self) -> bool:
        """Whether rows are of the logits themselves, and not of combinations of them."""
        return not self.loss.curved and self.numerics.probes is None and self.keep is None

    @cached_property
    def layout(self) -> Layout:
        """Where each tuned parameter lies in a vector of all."""
        return self.jacobian.known or self.jacobian.layout(self.one)

    @cached_property
    def classes(self) -> int:
        """C."""
        return self.jacobian.classes(self.one)

    @property
    def one(self) -> Tensor:
        """A batch of one image that can be read: of a memory's members, not all can."""
        return checked(item(self.train, self._first)[0][None]).to(self.device)

    @property
    def _first(self) -> int:
        return getattr(self.train, "first", 0)

    def images(self, positions: Sequence[int]) -> DataLoader:
        """Batches of images and labels of the samples at ``positions``, in that order."""
        return batches(Subset(self.train, positions), self.numerics.batch_size, workers=self.numerics.workers)

    def one_pass(self, positions: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """``images``, checked and on the device, with progress; at least one batch, for no sample too."""
        for images, labels in track(self.images(positions or [self._first]), "one pass"):
            yield checked(images).to(self.device), labels.to(self.device)

    def logits(self, images: Tensor, parameters: dict[str, Tensor] | None = None) -> Float[Tensor, "batch classes"]:
        """``f(x; theta*)``, or at other ``parameters``."""
        return called(self.jacobian.model, {**self.jacobian.fixed, **(parameters or self.jacobian.parameters)}, images)

    def stream(self, positions: Sequence[int], description: str = "Jacobians") -> Iterator[tuple[Jacobian, Tensor]]:
        """The Jacobians and residuals of the samples, batch by batch; see ``jacobians``."""
        samples = track(self.images(positions), description)
        numerics = self.numerics
        return jacobians(self.jacobian, samples, self.loss, numerics.precision, numerics.probes, positions)

    def rows(self, positions: Sequence[int], description: str = "Jacobians") -> Rows:
        """The Jacobians and residuals of the samples; of no sample, too."""
        if self.keep is not None:
            return self._kept(positions, description)
        asked = positions or [self._first]
        batches = (Rows(jacobian, residual) for jacobian, residual in self.stream(asked, description))
        return Rows.gathered(batches, len(asked))[: len(positions)]

    def residual(self, positions: Sequence[int]) -> Iterator[tuple[Tensor, Float[Tensor, "batch classes"]]]:
        """Batches of images with ``r_i``, the loss's negative gradient with respect to the logits: for squared loss
        ``t_i - f(x_i; theta*)``."""
        for images, logits, labels in self._forward(positions) if positions else ():
            yield images, self.loss.residual(logits, labels)

    def residuals(self, positions: Sequence[int]) -> Float[Tensor, "samples outputs"]:
        """What ``rows`` have for residuals, by a forward pass: ``L_i^+ r_i``, and ``V_i'`` times it where the classes
        are probed."""
        passed, probes = self._forward(positions), self.numerics.probes
        if self.keep is not None:
            return torch.cat([self._residual_of(*batch) for _, *batch in passed])[: len(positions)]
        parts = [self.loss.whitened(self.loss.residual(logits, labels), logits) for _, logits, labels in passed]
        rows = torch.cat(parts)[: len(positions)]
        return (
            rows if probes is None else torch.einsum("nck,nc->nk", probes.draw(positions, rows.shape[1]).to(rows), rows)
        )

    def _kept(self, positions: Sequence[int], description: str) -> Rows:
        """The rows of the likeliest classes."""
        asked = positions or [self._first]

        def batches() -> Iterator[Rows]:
            for images, labels in track(self.images(asked), description):
                x, y = checked(images).to(self.device), labels.to(self.device)
                with arithmetic(self.numerics.precision, self.device):
                    chosen = partial(likeliest, labels=y, count=cast(int, self.keep))
                    jacobian, logits, _ = self.jacobian.parted(x, chosen, self.loss.contrasted)
                yield _rows_of(self.loss, jacobian, logits.to(self.dtype), y)

        return Rows.gathered(batches(), len(asked))[: len(positions)]

    def narrowed(self, names: Collection[str]) -> "Linearised":
        """With respect to some of the parameters alone."""
        return replace(self, jacobian=self.jacobian.narrowed(names, self.layout))

    def parted(
        self, positions: Sequence[int], kept: Int[Tensor, "samples kept"], outer: Collection[str], description: str
    ) -> Iterator[tuple[Float[Tensor, "batch outputs rest"], dict[str, Outer]]]:
        """Batches of the rows of given classes, some weights' as outer products; the head's part is left out."""
        start = 0
        for images, _ in track(self.images(positions), description):
            x = checked(images).to(self.device)
            own = kept[start : start + len(x)].to(self.device)
            start += len(x)
            with arithmetic(self.numerics.precision, self.device):
                jacobian, _, parts = self.jacobian.parted(x, partial(_given, own), self.loss.contrasted, outer)
            yield jacobian.rest, parts

    def _residual_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The residuals of the likeliest classes of a batch."""
        logits = logits.to(self.dtype)
        point = _point(self.loss, logits, labels, likeliest(logits, labels, cast(int, self.keep)))
        return -self.loss.gradient_of(point.z, point.kept).to(self.dtype)

    def changed(
        self,
        positions: Sequence[int],
        before: Float[Tensor, "samples outputs"],
        now: Float[Tensor, "samples outputs"] | None = None,
    ) -> list[int]:
        """The samples whose residuals ``now`` (None: computed) are not what they were ``before``, up to the noise of
        the arithmetic."""
        size = self.loss.scale + before.square().mean(1).sqrt()
        now = self.residuals(positions) if now is None else now
        differ = (now - before).abs().amax(1) > _NOISE[self.numerics.precision] * size
        return [i for i, other in zip(positions, differ.tolist(), strict=True) if other]

    def _forward(self, positions: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of images, logits and labels."""
        for images, labels in self.one_pass(positions):
            with torch.no_grad(), arithmetic(self.numerics.precision, self.device):
                logits = finite(self.logits(images))
            yield images, logits, labels


def _given(kept: Tensor, logits: Tensor) -> Tensor:
    return kept


def _rows_of(loss: Loss, jacobian: Jacobian, logits: Tensor, labels: Tensor) -> Rows:
    """The rows of the classes that a Jacobian keeps."""
    point = _point(loss, logits, labels, cast(Tensor, jacobian.kept))
    return Rows(jacobian, -loss.gradient_of(point.z, point.kept).to(logits.dtype), point)


def _point(loss: Loss, logits: Tensor, labels: Labels, classes: Tensor) -> Point:
    """The loss as a function of the logits of some classes, and these."""
    kept, z = kept_of(loss, logits.double(), labels, classes), logits.gather(1, classes).double()
    return Point(z @ contrasts(z.shape[1]).to(z) if loss.contrasted else z, kept)


def likeliest(logits: Float[Tensor, "batch classes"], labels: Labels, count: int) -> Int[Tensor, "batch outputs"]:
    """The label of each sample, then its likeliest other classes, ``count`` in all; of soft labels, the classes with
    the largest share in label and prediction together. Raises like ``check_labels``."""
    most = min(count, logits.shape[1])
    if labels.ndim == 2:
        return (labels + logits.softmax(1)).topk(most, 1).indices
    check_labels(labels, logits.shape[1])
    return logits.scatter(1, labels[:, None].long(), torch.inf).topk(most, 1).indices


def tails(network: Linearised, positions: Sequence[int]) -> Float[Tensor, "samples classes"]:
    """What keeping so many classes, from 1 on, leaves out of each sample: the sum of ``|t - p|``, the loss's gradient,
    over its other classes. It is no share: a class that is taken for another has 2 in sum over all."""
    parts = []
    for _, logits, labels in network._forward(positions):
        slope = network.loss.residual(logits.double(), labels).abs()
        ordered = slope.gather(1, likeliest(logits, labels, logits.shape[1]))
        parts.append(ordered.flip(1).cumsum(1).flip(1) - ordered)
    return torch.cat(parts)


def tail(network: Linearised) -> float:
    """``sum |t - p|`` over the classes that rows are not kept of, a mean over the first samples; 0 where all are
    kept."""
    if network.keep is None or network.keep == network.classes:
        return 0.0
    few = range(min(FIRST, len(network.train)))  # type: ignore[arg-type]
    return float(tails(network, few).mean(0)[network.keep - 1])


def enough(network: Linearised, first: int = FIRST, between: tuple[int, int] = (3, 4)) -> int:
    """How many classes a sample: 3, or 4 where 3 leave out more than ``LIMIT_TAIL``, a mean over the ``first`` samples
    (``tails``)."""
    fewest, at_most = between
    left = tails(network, range(min(first, len(network.train)))).mean(0)  # type: ignore[arg-type]
    return min(max(fewest, 1 + int((left > LIMIT_TAIL).sum())), at_most, network.classes)


def jacobians(
    jacobian: PerSampleJacobian,
    samples: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    precision: str = "full",
    probes: ClassProbes | None = None,
    positions: Iterable[int] = (),
) -> Iterator[tuple[Jacobian, Tensor]]:
    """The Jacobian and residual of every sample, batch by batch: ``J_i`` and ``r_i``, or, for a loss with another
    Hessian than the identity, ``L_i'J_i`` and ``L_i^+ r_i`` (see ``fastntk.tuning.loss``).

    Args:
        jacobian: of the model.
        samples: any iterable of ``(images, labels)``; a DataLoader with workers reads ahead.
        loss: gives the residuals.
        precision: of the network's arithmetic.
        probes: replace the C logits of sample i by ``V_i'`` times them; ``positions`` are then theirs, in order.

    Raises:
        InputError: a pixel is not finite, or a label is outside the classes.
    """
    device = jacobian.device
    places, classes = iter(positions), 0
    for images, labels in samples:
        images, draws = checked(images).to(device), None
        if probes:
            classes = classes or jacobian.classes(images)
            draws = probes.draw([next(places) for _ in images], classes).to(images)
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
