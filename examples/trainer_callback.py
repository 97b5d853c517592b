"""A run folder from transformers' Trainer, by one callback; from then on the command line answers requests."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

import fastntk
from fastntk.cli.main import app
from fastntk.inputs.libraries import transformers  # beside a CPU-only torch, "import transformers" finds no torchvision
from fastntk.inputs.packaged import mnist
from fastntk.inputs.sources import load_data

place = Path(tempfile.mkdtemp())
pixels, labels = mnist()
np.savez(place / "digits.npz", x=pixels[::100], y=labels[::100])  # your folder of images in practice
model, preprocessing = fastntk.load_model("mobilenetv3_small_050", 10, size=32)
train = load_data(str(place / "digits.npz"), preprocessing)
fastntk.tune(model, "bn", "head")


class Network(torch.nn.Module):
    """What the Trainer wants of a model: a loss. Norms stay in eval mode."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss and the logits of a batch."""
        logits = self.network.eval()(images)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch(samples: list) -> dict[str, torch.Tensor]:
    """What the Trainer feeds to the model."""
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.tensor(labels)}


arguments = transformers().TrainingArguments(
    place / "checkpoints", num_train_epochs=2, learning_rate=1e-3, weight_decay=0.0, save_strategy="no", report_to=[],
    use_cpu=True, disable_tqdm=True,
)  # fmt: skip
keep = fastntk.trainer_callback(
    place / "run", model="mobilenetv3_small_050", size=32, data=str(place / "digits.npz"), select=["bn", "head"]
)
transformers().Trainer(Network(model), arguments, data_collator=batch, train_dataset=train, callbacks=[keep]).train()

print(CliRunner().invoke(app, ["forget", str(place / "run"), "--ids", "7"]).stdout)  # fastntk forget RUN --ids 7
