"""A vision transformer widened to twice its width without a change of its function (Net2Net, arXiv 1511.05641).

No pretrained ViT-B/32 is on PyPI; a ViT-S/14 is. With every channel twice, every head twice, and each weight that
reads a doubled channel split in two shares, 22 million parameters become 87 that compute the same features. The shares
are drawn at random, so that what is tuned later does not move both copies alike.

A patch of 32 px that is first resized to 14 px is a linear map of the 32: composed with the embedding of 14 px it is
one of 32, so that a ViT-B/32 on images of ``32 k`` px computes what the ViT-S/14 does on these with every patch resized
to 14 px. Layer scales go into the products before them.
"""

import torch
import torch.nn.functional as F
from pretrained import vit_s14
from torch import Tensor, nn

from fastntk.inputs.images import Preprocessing
from fastntk.inputs.models import load_model
from fastntk.inputs.weights import load_weights

PATCH, BEFORE = 32, 14


def resizing(before: int = PATCH, after: int = BEFORE) -> Tensor:
    """The matrix ``[after, before]`` that resizes one axis of a patch, with antialiasing."""
    eye = torch.eye(before)[:, None, None]
    return F.interpolate(eye, size=(1, after), mode="bilinear", antialias=True)[:, 0, 0].T


def shares(weight: Tensor, generator: torch.Generator) -> Tensor:
    """``[out, in]`` as ``[out, 2 in]``: of each weight from 0.3 to 0.7 for the one copy, the rest for the other."""
    share = 0.3 + 0.4 * torch.rand(weight.shape, generator=generator)
    return torch.cat([weight * share, weight * (1 - share)], 1)


def twice(tensor: Tensor, axis: int = 0) -> Tensor:
    """Two copies along an axis."""
    return torch.cat([tensor, tensor], axis)


def widened(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The tensors of timm's ViT of width 384 as those of one of width 768 with patches of 32 px; without a head."""
    generator, down = torch.Generator().manual_seed(seed), resizing()
    patch = torch.einsum("ocij,ia,jb->ocab", state["patch_embed.proj.weight"], down, down)
    found = {"patch_embed.proj.weight": twice(patch), "patch_embed.proj.bias": twice(state["patch_embed.proj.bias"])}
    found |= {name: twice(state[name], 2) for name in ("cls_token", "pos_embed")}
    found |= {name: twice(state[name]) for name in ("norm.weight", "norm.bias")}
    for i in range(12):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            found |= {f"{block}{norm}.{part}": twice(state[f"{block}{norm}.{part}"]) for part in ("weight", "bias")}
        for name, scale in (("attn.qkv", None), ("attn.proj", "ls1"), ("mlp.fc1", None), ("mlp.fc2", "ls2")):
            weight, bias = state[f"{block}{name}.weight"], state[f"{block}{name}.bias"]
            if scale:
                gamma = state[f"{block}{scale}.gamma"]
                weight, bias = gamma[:, None] * weight, gamma * bias
            rows = (3, -1) if name == "attn.qkv" else (1, -1)  # the heads of queries, keys and values stay together
            weight, bias = (twice(each.unflatten(0, rows), 1).flatten(0, 1) for each in (weight, bias))
            found |= {f"{block}{name}.weight": shares(weight, generator), f"{block}{name}.bias": bias}
    return found


def vit_b32(size: int, seed: int = 0) -> tuple[nn.Module, Preprocessing]:
    """timm's ViT-B/32 with the widened weights, for images of a side that is a multiple of 32, and a new head."""
    narrow, given = vit_s14(size // PATCH * BEFORE, seed)
    model, _ = load_model("vit_base_patch32_224", 10, size=size, seed=seed)
    load_weights(model, widened(narrow.state_dict()))
    return model, Preprocessing(size, given.mean, given.std)
