"""A plain loop as people have it: AdamW, label smoothing, augmentation. What fastntk needs is a copy from before it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastntk
from fastntk.inputs.libraries import torchvision

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
)
train = TensorDataset(torch.randn(80, 3, 16, 16), torch.arange(80) % 4)
parameters = fastntk.tune(network, "bn", "head")
initial = fastntk.snapshot(parameters)

network.eval()  # batch norm's running statistics stay: they would carry the data past any step over parameters
transforms = torchvision().transforms
augment = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomCrop(16, padding=2)])
optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=25)
rates = []
for _ in range(5):
    for images, labels in DataLoader(train, batch_size=16, shuffle=True):
        changed = torch.stack([augment(image) for image in images])
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(changed), labels, label_smoothing=0.1).backward()
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()

# The loss that was minimised; the images as they are; and where AdamW's decay toward zero alone would have led.
loss = fastntk.CrossEntropy(smoothing=0.1)
memory = fastntk.prepare(network, train, initial, loss=loss, shrinkage=fastntk.shrinkage(rates, 0.05))
answer = memory.forget([3, 40])
print(answer.certificate.explanation)

# A model whose start nobody kept: from the pretrained weights that it was made of, with what is assumed said.
rebuilt = fastntk.rebuilt_start(network, initial)
print("; ".join(rebuilt.assumed))
print(fastntk.prepare(network, train, rebuilt.initial, loss=loss).preview([3]).certificate.explanation)
