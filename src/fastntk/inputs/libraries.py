"""Importing timm and torchvision, also beside a torch whose build torchvision was not made for."""

import functools
import importlib
import sys
from types import ModuleType

import torch

from fastntk.common.errors import InputError

_registered: list[torch.library.Library] = []  # an operator schema lives as long as its Library object


@functools.cache
def torchvision() -> ModuleType:
    """torchvision, imported on first use.

    Its compiled operators are not loaded beside a torch of another build (the usual wheel beside CPU-only torch), and
    its import then fails on the schema of ``nms``. No classifier needs that operator: declaring it is enough.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _registered.append(library)
    return importlib.import_module("torchvision")


@functools.cache
def timm() -> ModuleType:
    """timm, imported on first use, after torchvision, which it imports."""
    torchvision()
    return importlib.import_module("timm")


@functools.cache
def transformers() -> ModuleType:
    """transformers, imported on first use, after torchvision, which it imports."""
    return _extra("transformers", "transformers")


@functools.cache
def peft() -> ModuleType:
    """peft, imported on first use, after torchvision, which transformers imports for it."""
    return _extra("peft", "lora")


@functools.cache
def datasets() -> ModuleType:
    """Hugging Face datasets, imported on first use."""
    return _extra("datasets", "datasets")


def _extra(module: str, extra: str) -> ModuleType:
    torchvision()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(f"this needs {module}, which is not installed. Run: pip install 'fastntk[{extra}]'") from error
