"""Importing timm and torchvision, also beside a torch whose build torchvision was not made for."""

import functools
import importlib
import sys
from types import ModuleType

import torch

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
