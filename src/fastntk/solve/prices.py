"""What is to be prepared, in numbers, and what a form takes for it: memory, arithmetic and time."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch

from fastntk.common import distributed
from fastntk.common.machine import peak_tensors
from fastntk.jacobians.linearised import FIRST, Linearised
from fastntk.jacobians.numerics import arithmetic
from fastntk.jacobians.outer import Layer
from fastntk.solve.speeds import Cost, Speeds

ONE_STEP = "answers by one step"
"""The drawback of the forms that do, where the loss needs more."""

_BATCH_BYTES = 2**30  # of one batch's Jacobians
_ALLOCATED = 1.25  # of what tensors hold, with what the allocator cannot use again: 1.28 was measured of ViT-B/32


@dataclass(frozen=True)
class Workload:
    """What is to be prepared, in numbers.

    Attributes:
        samples: n.
        outputs: of a sample: C, or the number of class probes.
        rest: tuned parameters but for the head's.
        features: the head's inputs, 0 if it is frozen or the classes are probed: ``p = rest + outputs features``.
        largest_batch: images a batch of Jacobians, at most.
        itemsize: bytes a number in the Jacobians.
        sums_itemsize: bytes a number in the sums.
        activations: bytes that the network keeps for its backward passes, per image.
        probed: whether the classes are.
        kept: how many classes of a sample the convex form has rows of; 0 for all.
        contrasted: whether it has one row fewer.
        curved: whether the loss has another Hessian than the identity.
        weighted: whether it weighs the classes.
        layers: the parameters but the head's, by the sizes of their outer products.
        passed: bytes an image that a pass holds at its peak where large weights are outer products.
    """

    samples: int
    outputs: int
    rest: int
    features: int
    largest_batch: int = 64
    itemsize: int = 4
    sums_itemsize: int = 8
    activations: int = 0
    probed: bool = False
    kept: int = 0
    contrasted: bool = False
    curved: bool = False
    weighted: bool = False
    layers: tuple[Layer, ...] = ()
    passed: int = 0

    @property
    def parameters(self) -> int:
        """p."""
        return self.rest + self.outputs * self.features

    @property
    def rows(self) -> int:
        """n times the outputs of a sample."""
        return self.samples * self.outputs

    @property
    def one_step(self) -> str:
        """Why the forms that take one step cannot be taken, or nothing."""
        return "class weights need the convex form: they change each sample's curvature." if self.weighted else ""

    @property
    def unprobed(self) -> str:
        """Why the convex forms cannot be taken, or nothing."""
        return "the convex form keeps the likeliest classes: leave class probes out." if self.probed else ""

    @property
    def written(self) -> "Workload":
        """The same in one step, where rows are all of them and a curved loss leaves the head no structure."""
        return replace(self, rest=self.parameters, features=0) if self.curved else self

    @property
    def kept_rows(self) -> int:
        """Rows a sample of the convex form."""
        return (self.kept or self.outputs) - self.contrasted

    @property
    def batch_size(self) -> int:
        """Images a batch of Jacobians of all outputs."""
        return self.batch(self.outputs)

    @property
    def batch_bytes(self) -> int:
        """Of one such batch and of its activations."""
        return self.bytes_of(self.batch_size, self.outputs)

    def batch(self, outputs: int) -> int:
        """Images a batch of Jacobians of so many outputs."""
        return max(1, min(self.largest_batch, _BATCH_BYTES // (outputs * max(self.rest, 1) * self.itemsize)))

    def bytes_of(self, batch: int, outputs: int) -> int:
        """Of a batch of Jacobians of so many outputs and of its activations."""
        return batch * (outputs * (self.rest + self.features) * self.itemsize + int(_ALLOCATED * self.activations))

    @classmethod
    def of(cls, network: Linearised) -> "Workload":
        """Of preparing the whole training set, by a trial run on one image."""
        layout, numerics = network.layout, network.numerics
        if numerics.probes:
            numerics.probes.check(network.classes)
        outputs = numerics.class_probes or network.classes
        head = sum(layout.shapes[name].numel() for name in layout.head) if numerics.probes is None else 0
        rest = layout.size - head
        itemsize, layers = network.dtype.itemsize, tuple(network.jacobian.layers(network.one))
        held, large = image_bytes(network), [each.name for each in layers if each.smaller(1)]
        return cls(
            samples=len(network.train),  # type: ignore[arg-type]
            outputs=outputs,
            rest=rest,
            features=head // outputs,
            largest_batch=numerics.batch_size,
            itemsize=itemsize,
            sums_itemsize=numerics.dtype.itemsize,
            activations=max(0, held - (rest + head // outputs) * itemsize),
            probed=numerics.probes is not None,
            contrasted=network.loss.contrasted,
            curved=network.loss.curved,
            weighted=network.loss.weighted,
            layers=layers,
            passed=int(_ALLOCATED * (image_bytes(network, large) if large else held)),
        )


@dataclass(frozen=True)
class Price:
    """What one form takes.

    Attributes:
        form: its name.
        bytes: at the peak, beside what the process holds already.
        operations: floating-point operations of the sums and the solve; the network's passes are not counted.
        refusal: why it cannot be taken at all, or nothing.
        drawback: what speaks against it, or nothing.
        rank: 0 for what answers best; a form of a higher one is taken only where none of a lower one fits: 1 where
            every request reads all rows from disk or takes a pass over the retained samples, 2 for one step of a loss
            that needs more, 3 where every request takes many passes.
        remedy: what would make it smaller, or nothing.
        batch: images a batch of Jacobians; 0 for as many as of all outputs.
        disk: bytes of rows on disk.
        reading: operations that take as long as reading the rows, to compare with forms that read none.
    """

    form: str
    bytes: int
    operations: float
    refusal: str = ""
    drawback: str = ""
    rank: int = 0
    remedy: str = ""
    batch: int = 0
    disk: int = 0
    reading: float = 0.0

    def __str__(self) -> str:
        return f"{self.bytes / 1e9:.1f} GB" + (f" and {self.disk / 1e9:.1f} GB of disk" if self.disk else "")


@dataclass(frozen=True)
class Timing:
    """What a form takes on this machine.

    Attributes:
        seconds: of preparing, by phase.
        operations: floating-point operations of the network's passes among them.
        first: seconds that the first request waits for beside its own, by phase.
    """

    seconds: dict[str, float]
    operations: float
    first: dict[str, float] = field(default_factory=dict)


def image_bytes(network: Linearised, outer: Collection[str] = ()) -> int:
    """What a batch of Jacobians of one row a sample holds at its peak for every image more: what the network keeps for
    its backward passes, what these pass on, and the row, some weights' part as outer products. From batches of one
    image and of two."""
    device, contrasted = network.device, network.loss.contrasted

    def held(count: int) -> int:
        images = torch.cat([network.one] * count)
        first = torch.arange(1 + contrasted, device=device).expand(count, -1)
        with arithmetic(network.numerics.precision, device):
            return peak_tensors(lambda: network.jacobian.parted(images, lambda _: first, contrasted, outer), device)

    return held(2) - held(1)


def passes(work: Workload, count: int | float, each: Cost, name: str) -> Timing:
    """Of so many passes over all samples."""
    share = count * work.samples
    return Timing({name: share * each.seconds / distributed.size()}, share * each.operations)


def forward(work: Workload, speeds: Speeds) -> Timing:
    """Of the forward passes beside the Jacobians' own, where classes are kept: the head's, and two over the first
    samples for what the others leave out."""
    count = 2 * min(FIRST, work.samples) / work.samples + bool(work.features)
    return passes(work, count, speeds.forward, "forward passes")
