"""Training on with wrong labels for what is to be forgotten."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.evidence.methods.descent import descend, shuffled
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.inputs.batches import Labelled, labels_of
from fastntk.jacobians.products import pull


class Relabelled(Labelled):
    """A dataset with other labels."""

    def __init__(self, source: Dataset, labels: Tensor) -> None:
        self.source, self.labels = source, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.source[index][0], self.labels[index]


@dataclass(frozen=True)
class RandomLabel:
    """Minimise ``L_R + L_F'`` from ``theta*``, where F' are the forgotten samples with wrong labels, drawn at random
    for every epoch.

    With ``saliency`` this is SalUn: only the share of the tuned parameters may move for which the gradient of the
    forgotten samples' summed loss at ``theta*`` is largest in magnitude.

    Attributes:
        saliency: that share, or None for all. Fan et al. take a half.
        share: of the fit's epochs, over all samples.
        rate: of Adam, constant, as a factor of the fit's.
        seed: of the labels and the order.

    SalUn's official code draws the wrong labels from all classes, so that one in C is right, and goes, for CIFAR-10 and
    SVHN, through the forgotten samples first and then through the retained ones in every epoch; here labels are wrong,
    and batches are mixed, as a loss over both has it (and as that code has it for CIFAR-100).

    Source: Golatkar, Achille, Soatto 2020 (arXiv 1911.04933); Fan et al. 2024, "SalUn" (arXiv 2310.12508).
    """

    saliency: float | None = None
    share: float = 1 / 6
    rate: float = 1.0
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        mask = None if self.saliency is None else salient(problem, self.saliency)
        return descend(problem, self.losses, problem.rate(self.rate), mask)

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        for epoch in range(problem.epochs(self.share)):
            for images, labels in shuffled(problem, self.relabelled(problem, epoch), self.seed + epoch):
                yield problem.recipe.loss(model(images), labels)

    def relabelled(self, problem: Problem, epoch: int = 0) -> Relabelled:
        """The training samples, the forgotten ones with a label that is not their own, another in every epoch."""
        labels, classes, places = labels_of(problem.train).clone(), problem.state.network.classes, problem.places
        shift = torch.randint(1, classes, places.shape, generator=torch.Generator().manual_seed(self.seed + epoch))
        labels[places] = (labels[places] + shift) % classes
        return Relabelled(problem.train, labels)


def salient(problem: Problem, share: float) -> dict[str, Tensor]:
    """1 where the gradient of the forgotten samples' loss is among the ``share`` of largest ones, else 0."""
    network = problem.state.network
    gradient = pull(network, network.residual(problem.positions.tolist())).abs()
    mask = torch.zeros_like(gradient)
    mask[gradient.topk(round(share * len(gradient))).indices] = 1
    return network.layout.unflatten(mask, problem.state.anchor)
