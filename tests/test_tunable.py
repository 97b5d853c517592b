import pytest
from cases import Attention, Convolutional, fused
from torch import nn

import fastntk
from fastntk.tuning.selectors import select, tunables


def test_selectors_choose_what_they_say():
    model = Convolutional()
    assert select(model, "bn") == [f"{m}.{p}" for m in ("body.1", "body.4", "flat") for p in ("weight", "bias")]
    assert select(model, "head") == ["head.weight", "head.bias"]
    assert select(model, "bias") == ["body.1.bias", "body.3.bias", "body.4.bias", "flat.bias", "head.bias"]
    assert select(model, "all") == [name for name, _ in model.named_parameters()]
    assert (
        select(Attention(), "ln")
        == select(Attention(), "norm")
        == [f"{m}.{p}" for m in ("before", "after") for p in ("weight", "bias")]
    )


def test_fused_batch_norms_count():
    model = fused()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(select(model, "bn")) == 2 * len(norms) > 0


def test_selectors_add_up_each_name_once_in_model_order():
    model = Convolutional()
    assert select(model, "head", "bn", r"^head") == select(model, "bn", "head")
    assert select(model, ["head.bias", "body.0.weight"]) == ["body.0.weight", "head.bias"]


def test_tune_freezes_the_rest_and_returns_the_parameters_themselves():
    model = Convolutional()
    parameters = fastntk.tune(model, "head")
    assert parameters["head.weight"] is model.head.weight
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_offer_names_what_exists():
    assert tunables(Convolutional())["head"] == 15
    assert "ln" not in tunables(Convolutional())
    assert select(nn.Linear(2, 2), "head") == ["weight", "bias"]


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ((), "no parameter is selected.*bn"),
        (("ln",), r"'ln' matches no parameter.*bn \(24 parameters\)"),
        (("layer9",), "'layer9' matches no parameter"),
        (("(",), "neither a name nor a regular expression"),
        ((["head.scale"],), "no parameter 'head.scale'"),
    ],
)
def test_selecting_nothing_is_refused(selectors, message):
    with pytest.raises(fastntk.InputError, match=message):
        fastntk.tune(Convolutional(), *selectors)
    with pytest.raises(fastntk.InputError, match="no matrix of parameters"):
        fastntk.tune(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), "head")
