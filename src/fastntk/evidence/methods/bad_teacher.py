"""As the fitted model on what is retained, as one that was never fitted on what is forgotten."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastntk.common.seeds import random_order
from fastntk.evidence.methods.descent import descend, shuffled
from fastntk.evidence.methods.problem import Problem, Unlearned
from fastntk.evidence.methods.random_label import Relabelled
from fastntk.evidence.metrics.predictions import divergence
from fastntk.tuning.outputs import model_at


@dataclass(frozen=True)
class BadTeacher:
    """Minimise ``mean_i (1 - l_i) KL(good || student) + l_i KL(bad || student)``, with ``l_i`` 1 on F and 0 on R.

    The good teacher is the fitted model, the bad one has the parameters from before fitting: pretrained features under
    a head that is not fitted, where the source has a network that was never trained.

    Attributes:
        retained_share: how much of the retained samples takes part, from 0 to 1.
        share: of the fit's epochs, over those and the forgotten ones.
        temperature: T of the softmax.
        rate: of Adam, constant, as a factor of the fit's.
        seed: of the order, and of which retained samples take part.

    The official code takes one epoch, after fits of five, with Adam at a tenth of the fit's rate, as the defaults do
    (of the body's: its head was fitted at ten times that); a share of 0.2 is as much of the fit as there.

    Source: Chundawat et al. 2023, "Can bad teaching induce forgetting?" (arXiv 2205.08096).
    """

    retained_share: float = 0.3
    share: float = 1 / 12
    temperature: float = 1.0
    rate: float = 0.1
    seed: int = 0

    def __call__(self, problem: Problem) -> Unlearned:
        """Answer the request by training on."""
        return descend(problem, self.losses, problem.rate(self.rate))

    def losses(self, problem: Problem, model: nn.Module) -> Iterator[Tensor]:
        """The loss of every step."""
        good, bad = (model_at(problem.model, parameters) for parameters in (problem.state.anchor, problem.initial))
        data = self.marked(problem)
        for epoch in range(problem.epochs(self.share)):
            for images, gone in shuffled(problem, data, self.seed + epoch):
                with torch.no_grad():
                    taught = torch.where(gone[:, None] == 1, bad(images), good(images))
                yield divergence(taught, model(images), self.temperature)

    def marked(self, problem: Problem) -> Dataset:
        """The samples that take part, with 1 for a label if they are to be forgotten, else 0."""
        gone = torch.zeros(len(problem.train), dtype=torch.long)  # type: ignore[arg-type]
        gone[problem.places] = 1
        kept = (gone == 0).nonzero()[:, 0]
        order = random_order(len(kept), self.seed)
        taking = torch.cat([problem.places, kept[order[: round(self.retained_share * len(kept))]]])
        return Subset(Relabelled(problem.train, gone), taking.tolist())
