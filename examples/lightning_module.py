"""A Lightning module and its Trainer. What fastntk needs is a copy of the parameters before trainer.fit."""

from importlib import import_module

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastntk
from fastntk.inputs.libraries import torchvision

torchvision()  # beside a CPU-only torch, "import pytorch_lightning" finds none
lightning = import_module("pytorch_lightning")


class Classifier(lightning.LightningModule):
    """Any module that maps images to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.body(images))

    def on_train_epoch_start(self) -> None:
        """Batch norm's running statistics stay: they would carry the data past any step over parameters."""
        self.eval()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels, label_smoothing=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Over what is tuned."""
        return torch.optim.Adam((each for each in self.parameters() if each.requires_grad), lr=1e-2)


lightning.seed_everything(0, verbose=False)
train = TensorDataset(torch.randn(80, 3, 16, 16), torch.arange(80) % 4)
classifier = Classifier()
initial = fastntk.snapshot(fastntk.tune(classifier, "bn", "head"))

trainer = lightning.Trainer(
    max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(classifier, DataLoader(train, batch_size=16, shuffle=True))

memory = fastntk.prepare(classifier.eval(), train, initial, loss=fastntk.CrossEntropy(smoothing=0.1))
answer = memory.forget([3, 40])
print(answer.certificate.explanation)
classifier.load_state_dict(answer.parameters, strict=False)
