"""Per-sample Jacobians of the architectures that there are, each beside torch.func.

    python benchmarks/architectures.py [--only TEXT]

Random weights, float64, small members and images. Two selections each, at most 60,000 parameters, the small ones first:
norms, biases and head; and some of every kind of module. torch.func's jacrev goes sample by sample, on a copy that was
not called. ``tuned``: parameters of the latter; ``func``: those of them that fastntk leaves to torch.func as well.
``error``: |ours - theirs| / |theirs|, of the selection that is further off; ``one``: of the parameter that is furthest
off, among those with 1e-7 of the whole. The last line is JSON; exit status 1 if one is off by more than 1e-7 or
crashes.
"""

import argparse
import ast
import copy
import json
import operator
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import fastntk
from fastntk.common.machine import settle
from fastntk.inputs.libraries import timm, torchvision, transformers
from fastntk.inputs.makers import Logits
from fastntk.jacobians.per_sample import PerSampleJacobian
from fastntk.tuning.parameters import snapshot
from fastntk.tuning.selectors import SELECTORS

CLASSES, IMAGES, AT_MOST, EXACT = 3, 3, 60_000, 1e-7

# Name, side of the images, options. S is the side, and a letter of COMMON what several have in common.
COMMON = """
B embed_dim=32 depth=2 num_heads=2; D depths=[1,1,1,1]; N num_heads=[2,2,2,2]; Q num_attention_heads=[1,2,2,2]
E embed_dims=[16,16,32,32]; H hidden_sizes=[8,16,24,32] depths=[1,1,1,1]; P hidden_sizes=[8,16,16,32] depths=[1,1,1,1]
I img_size=S; V hidden_size=16 num_hidden_layers=2 num_attention_heads=2 intermediate_size=24 image_size=S patch_size=8
L layers=[1,1,1,1]
R embedding_size=8 hidden_sizes=[8,16] depths=[1,1]; X embed_dim=12 depths=(1,2,2,1) num_heads=(1,2,2,4)
T img_size=S embed_dim=32 depth=2 num_heads=2; W image_size=S embed_dim=16 depths=[2,1] num_heads=[2,2] window_size=4
"""
TIMM = """
aimv2_large_patch14_224 28 T; sequencer2d_s 56 I L E hidden_sizes=[4,8,8,8]; volo.VOLO 64 I L embed_dims=[16,32,32,32] N
bat_resnext26ts 256; cait_xxs24_224 32 T; ecaresnet26t 64 L; efficientvit_b0 64; gmlp_ti16_224 32 I; visformer_tiny 64 I
beit_base_patch16_224 32 T; eva02_tiny_patch14_224 28 T; vit_small_patch14_dinov2 28 T; vit_tiny_r_s16_p8_224 64 I
caformer_s18 32; ghostnet_050 64; levit_128s 64 I; nf_regnet_b0 64; pit_ti_224 32 I; regnety_002 64; skresnet18 64 L
coat_tiny 64 I embed_dims=[64,64,64,64] serial_depths=[1,1,1,1] parallel_depth=1; convmixer.ConvMixer 32 dim=32 depth=3
convit_tiny 32 I embed_dim=8 depth=12 num_heads=2; hiera_tiny_224 64 img_size=(64,64) embed_dim=16 num_heads=1
csatv2 64 dims=[32,40,48,64] depths=[1,1,2,2] transformer_depths=[0,0,1,1]; swinv2_tiny_window8_256 32 I X window_size=4
cspnext_tiny 64; efficientformerv2_s0 64 I; ese_vovnet19b_slim_dw 64; mobilenetv3_small_050 64; xcit_nano_12_p8_224 32 T
deepseek_vit_412m 56 B; inception_next_atto 64; lambda_resnet26t 64 I; res2net50_14w_8s 64 L; resnetv2_50d_evos 64 L
deit_tiny_distilled_patch16_224 32 T; gcvit.GlobalContextVit 64 I D embed_dim=16 num_heads=[1,2,2,4] layer_scale=0.5
dpn48b 64 k_sec=[1,1,2,1]; mobilenetv4_conv_small_035 64; naflexvit_base_patch16_gap 32 B; tresnet_m 64 layers=[1,1,2,1]
eca_halonext26ts 256; edgenext_xx_small 64; efficientvit_m0 64 I; test_efficientnet 64; test_vit_relpos 32 I
efficientvim_m1 64; resnetv2.ResNetV2 64 L channels=[128,128,128,128]; swin_tiny_patch4_window7_224 32 I X window_size=4
fasternet_t0 64; fastvit_t8 64; mobilevit_xxs 64; mvitv2_tiny 64 I; test_convnext 64; test_mambaout 64; test_maxvit 64 I
hgnetv2_b0 64; repvgg_a0 32; resnest14d 64; rexnet_100 64; test_nfnet 64; test_resnet 64; test_vit 32 I; xception41p 64
hrnet_w18_small 64; mixer_s32_224 64 I; mobilevitv2_050 64; swiftformer_xs 64; test_coatnet 64 I; tiny_vit_5m_224 64
mobilenetv5_base 64 channel_multiplier=0.1; twins_svt_small 64 I E depths=[2,2,2,2] N; vit_tiny_patch16_dinov3_qkvb 32 T
nasnet.NASNetALarge 64 stem_size=16 num_features=384; vit_tiny_patch16_224 32 T global_pool='map' class_token=False
pvt_v2_b0 64; vgg11_bn 32
repvit_m0_9 64 depth=[1,1,2,1]; tnt_s_patch16_224 32 img_size=S embed_dim=32 depth=2 num_heads_outer=2 num_heads_inner=2
"""
TORCHVISION = """
alexnet 64; convnext_tiny 32; mnasnet0_5 64; mobilenet_v2 64; regnet_y_400mf 64; resnet18 64; squeezenet1_1 64
DenseNet 64 growth_rate=8 block_config=[2,2,2,2] num_init_features=16; googlenet 64 aux_logits=False init_weights=False
efficientnet_b0 64; SwinTransformer 32 patch_size=[4,4] embed_dim=16 depths=[2,2] num_heads=[2,2] window_size=[4,4]
shufflenet_v2_x0_5 64; VisionTransformer 16 image_size=16 patch_size=8 num_layers=2 num_heads=2 hidden_dim=16 mlp_dim=24
"""
TRANSFORMERS = """
beit 32 V; focalnet 32 image_size=S embed_dim=16 depths=[1,1] hidden_sizes=[16,32]; mobilevitv2 64 width_multiplier=0.25
bit 64 embedding_size=32 hidden_sizes=[32,64] depths=[1,1] num_groups=8; cvt 64 embed_dim=[8,16,32] num_heads=[1,2,2]
clip 32 V; deit 32 V; swin 32 W; swinv2 32 W; textnet 64; vit 32 V
convnextv2 64 H; donut-swin 32 W; ijepa 32 V; levit 64 image_size=S; pvt 64 image_size=S P Q; regnet 64 R groups_width=4
dinov2 32 V; hgnet_v2 64; metaclip_2 32 V; poolformer 64 H; resnet 64 R; segformer 64 P; siglip 32 V; swiftformer 64
efficientnet 64 width_coefficient=0.25 depth_coefficient=0.5 hidden_dim=320; hiera 32 image_size=[32,32] embed_dim=16
mobilenet_v2 64 depth_multiplier=0.35; mobilevit 64 hidden_sizes=[16,24,32] neck_hidden_sizes=[8,8,16,16,24,32,64]
"""


def made(library: str, name: str, **options: Any) -> nn.Module:
    if library != "transformers":
        models = (timm if library == "timm" else torchvision)().models
        return operator.attrgetter(name)(models)(num_classes=CLASSES, **options)
    options = {"vision_config": options} if name in ("clip", "metaclip_2", "siglip") else options
    config = transformers().AutoConfig.for_model(name, num_labels=CLASSES, **options)
    config.architectures = config.architectures or []
    return Logits(transformers().AutoModelForImageClassification.from_config(config))


def architectures() -> Iterator[tuple[str, int, partial[nn.Module]]]:
    """Name, side of the images and maker of every model above."""
    texts = (text.strip().replace("\n", ";").split(";") for text in (COMMON, TIMM, TORCHVISION, TRANSFORMERS))
    common, *libraries = ([entry.split() for entry in entries] for entries in texts)
    short = {letter: " ".join(words) for letter, *words in common}
    for library, entries in zip(("timm", "torchvision", "transformers"), libraries, strict=True):
        for name, side, *words in entries:
            given = " ".join(short.get(word, word) for word in words).replace("S", side).split()
            options = {key: ast.literal_eval(value) for key, value in (pair.split("=") for pair in given)}
            yield f"{library}/{name}", int(side), partial(made, library, name, **options)


def prepared(make: partial[nn.Module], side: int) -> tuple[nn.Module, Tensor]:
    """The model, not yet called, and images: no parameter is constant or tiny, batch norms are as if trained."""
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(2 * IMAGES, 3, side, side).double()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim < 2 else min(0.1, parameter[:1].numel() ** -0.5)
            if parameter.ndim < 2 or float(parameter.std(correction=0)) < 0.2 * scale:
                parameter.add_(torch.randn_like(parameter) * scale)
        called = copy.deepcopy(model)
        norms: list[Any] = [module for module in called.modules() if hasattr(module, "running_var")]
        for norm in norms:
            norm.train().momentum = 1.0
        called(x)
        for norm in norms:
            norm.running_var.mul_(1 + 0.2 * torch.rand_like(norm.running_var)).add_(0.1 * norm.running_var.mean())
    model.load_state_dict(called.state_dict())
    return model, x[:IMAGES]


def ranked(model: nn.Module, light: bool) -> dict[str, int]:
    """Norms, biases and head; or all: first one of every kind of module, then one of every role and geometry."""
    if light:
        return {name: 0 for key in ("norm", "bias", "head") for name in SELECTORS[key].names(model, "")}
    modules, seen, ranks = dict(model.named_modules()), set[tuple](), dict[str, int]()
    for name, _ in sorted(model.named_parameters(), key=lambda item: item[1].numel()):
        *path, leaf = name.split(".")
        module = modules[".".join(path)]
        kind = (type(module), leaf)
        role = (*kind, *path[-1:], *(str(getattr(module, each, "")) for each in ("kernel_size", "stride", "groups")))
        ranks[name] = 0 if kind not in seen else 1 if role not in seen else 2
        seen |= {kind, role}
    return ranks


def compared(model: nn.Module, ranks: dict[str, int], images: Tensor) -> dict[str, Any]:
    """The figures of the parameters of the first ranks."""
    names, left, rows = list[str](), AT_MOST, list[Tensor]()
    for _, size, name in sorted((rank, model.get_parameter(name).numel(), name) for name, rank in ranks.items()):
        if size <= left:
            names, left = [*names, name], left - size
    parameters = snapshot(fastntk.tune(model, names))
    jacobian = PerSampleJacobian(copy.deepcopy(model), parameters)
    found, layout = jacobian(images).dense(), jacobian.layout(images)
    for image in images:
        logits = partial(functional_call, copy.deepcopy(model), args=(image[None],))
        of_image = jacrev(lambda free, logits=logits: logits(free)[0])(parameters)
        rows += [layout.flatten({name: each[c] for name, each in of_image.items()}) for c in range(CLASSES)]
    expected = torch.stack(rows).view_as(found)
    squares = [(each**2).sum((0, 1)) for each in (found - expected, expected)]
    off, whole = ([float(each.sum()) for each in layout.unflatten(of, parameters).values()] for of in squares)
    one = max((a / b) ** 0.5 for a, b in zip(off, whole, strict=True) if b > 1e-14 * sum(whole))
    func = sum(parameters[name].numel() for name in layout.slow)
    return {"tuned": layout.size, "func": func, "error": (sum(off) / sum(whole)) ** 0.5, "one": one}


def measured(name: str, side: int, make: partial[nn.Module]) -> dict[str, Any]:
    """The row of an architecture."""
    model, images = prepared(make, side)
    row = {"name": name, "side": side, "parameters": sum(each.numel() for each in model.parameters())}
    for light in (True, False):
        try:
            found = compared(copy.deepcopy(model), ranked(copy.deepcopy(model), light), images)
            row |= found | {key: max(found[key], row.get(key, 0.0)) for key in ("error", "one")}
        except fastntk.InputError as error:
            row["refused"] = str(error)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose library/name contains this")
    only, rows = parser.parse_args().only, list[dict[str, Any]]()
    settle()
    warnings.simplefilter("ignore")
    table = Table(*(columns := ("name", "side", "parameters", "tuned", "func", "error", "one")), "says")
    for architecture in architectures():
        if only in architecture[0]:
            rows.append(row := measured(*architecture))
            figures = [f"{each:.0e}" if isinstance(each := row.get(key, ""), float) else str(each) for key in columns]
            table.add_row(*figures, says := row.get("failed", row.get("refused", "")))
            print(*figures, says, flush=True)
    Console(width=160).print(table)
    refused, failed = ({row["name"]: row[key] for row in rows if key in row} for key in ("refused", "failed"))
    exact = sum(row.get("error", 1) <= EXACT and row.keys().isdisjoint({"failed", "refused"}) for row in rows)
    worst = max(row.get("error", 0.0) for row in rows)
    counts = {"architectures": len(rows), "exact": exact, "refused": refused, "failed": failed, "worst": worst}
    print(json.dumps({**counts, "rows": rows}))
    sys.exit(bool(failed) or worst > EXACT)


if __name__ == "__main__":
    main()
