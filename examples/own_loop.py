"""Your own module, your own training loop, your own ids: what fastntk needs is a copy of the parameters before it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastntk


class People(TensorDataset):
    """Any map-style dataset; with ``ids`` its samples keep their names whatever else leaves."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(images, labels)
        self.ids = [f"person-{number}" for number in range(len(labels))]


torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
)
train = People(torch.randn(80, 3, 16, 16), torch.arange(80) % 4)
parameters = fastntk.tune(network, "bn", "head")
initial = fastntk.snapshot(parameters)

network.eval()  # batch norm's running statistics stay: they would carry the data past any step over parameters


def fit(data: Dataset, seed: int) -> dict[str, nn.Parameter]:
    """The training loop, from the parameters before it."""
    network.load_state_dict(initial, strict=False)
    loss, pull = fastntk.SquaredLoss(), 1e-4
    optimiser = torch.optim.Adam(parameters.values(), lr=1e-2)
    order = torch.Generator().manual_seed(seed)
    for _ in range(5):
        for images, labels in DataLoader(data, batch_size=16, shuffle=True, generator=order):
            optimiser.zero_grad()
            away = sum((tensor - initial[name]).square().sum() for name, tensor in parameters.items())
            (loss(network(images), labels) + pull / 2 * away).backward()
            optimiser.step()
    return parameters


fit(train, seed=0)
memory = fastntk.prepare(network, train, initial, loss=fastntk.SquaredLoss())
print(fastntk.audit(memory, fit))  # two trainings more, once: how near retraining do its answers come?
answer = memory.forget(["person-3", "person-40"])
print(answer.certificate.explanation)
