"""The widened vision transformer of the benchmarks computes what the narrow one does."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from fastntk.inputs.libraries import timm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import widened


def test_a_widened_transformer_computes_the_same():
    torch.manual_seed(0)
    narrow = timm().create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28).eval()
    wide = timm().create_model("vit_base_patch32_224", num_classes=0, img_size=64).eval()
    for name, tensor in narrow.named_parameters():
        torch.nn.init.normal_(tensor, 1.0 if "gamma" in name or name.endswith("norm.weight") else 0.0, 0.05)
    missing = wide.load_state_dict(widened.widened(narrow.state_dict()), strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    images = torch.randn(2, 3, 64, 64)
    patches = images.unfold(2, 32, 32).unfold(3, 32, 32).reshape(-1, 1, 32, 32)
    small = F.interpolate(patches, size=14, mode="bilinear", antialias=True).view(2, 3, 2, 2, 14, 14)
    resized = small.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 28, 28)
    with torch.no_grad():
        expected, found = narrow(resized), wide(images)
    torch.testing.assert_close(found, torch.cat([expected, expected], 1), rtol=1e-3, atol=1e-4)
