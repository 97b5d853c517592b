"""Jacobians of some architectures of timm, torchvision and transformers (of all: ``benchmarks/architectures.py``)."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "architectures.py"))
KNOWN = {name: (name, side, make) for name, side, make in SCRIPT["architectures"]()}


@pytest.mark.parametrize(
    "name",
    [
        *("timm/test_vit", "timm/levit_128s", "timm/deit_tiny_distilled_patch16_224", "timm/test_convnext"),
        *("timm/naflexvit_base_patch16_gap", "timm/csatv2", "timm/swin_tiny_patch4_window7_224", "timm/test_nfnet"),
        *("torchvision/SwinTransformer", "torchvision/shufflenet_v2_x0_5"),
        *("transformers/swin", "transformers/clip", "transformers/levit", "transformers/regnet"),
    ],
)
def test_jacobians_are_those_of_torch_func(name):
    row = SCRIPT["measured"](*KNOWN[name])
    assert row.keys().isdisjoint({"failed", "refused"}), row
    assert row["error"] <= 1e-11
    assert row["one"] <= 1e-8


def test_what_no_rule_and_no_torch_func_differentiates_is_refused():
    assert "torch.func does not either" in SCRIPT["measured"](*KNOWN["timm/sequencer2d_s"])["refused"]


def test_many_architectures_are_measured():
    assert len(KNOWN) >= 60
    assert {name.partition("/")[0] for name in KNOWN} == {"timm", "torchvision", "transformers"}
