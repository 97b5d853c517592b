"""Run folders around other people's training: transformers' Trainer and Lightning's."""

import json
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import succeed
from torch import nn
from torch.utils.data import DataLoader

import fastntk
from fastntk.cli.run import Run
from fastntk.cli.settings import Settings
from fastntk.cli.training import _of_arguments
from fastntk.inputs.libraries import torchvision, transformers
from fastntk.inputs.sources import load_data

SIDE = 16
NETWORK = """
from torch import nn
from fastntk import Preprocessing

def small(classes):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, classes)), Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
"""


@pytest.fixture
def place(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (24, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(24) % 3)
    (tmp_path / "own.py").write_text(NETWORK)
    return tmp_path


def batch(samples):
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def trainer(place, inner, images, *callbacks, **more):
    library = transformers()
    settings = library.TrainingArguments(
        place / "checkpoints",
        **{"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0, **more},
        **{"label_smoothing_factor": 0.1, "report_to": [], "use_cpu": True, "disable_tqdm": True},
    )
    given = {"data_collator": batch, "train_dataset": images, "callbacks": list(callbacks)}
    return library.Trainer(inner, settings, **given)


def saved(place):
    """A small classifier of transformers, as it stands before training."""
    library = transformers()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = library.ViTConfig(image_size=SIDE, patch_size=8, num_labels=3, **sizes)
    library.ViTForImageClassification(config).save_pretrained(place / "start")
    library.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(place / "start")
    return f"transformers/{place / 'start'}"


@pytest.mark.parametrize("by_peft", [False, True])
def test_transformers_trainer(by_peft, place):
    name = saved(place)
    model, preprocessing = fastntk.load_model(name, 3)
    if by_peft:
        peft = import_module("peft")
        config = peft.LoraConfig(
            r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=["classifier"]
        )
        inner = peft.get_peft_model(model.model, config)
    else:
        fastntk.tune(model, "lora:2", "head")
        inner = model.model
    before = {name: each.detach().clone() for name, each in inner.state_dict().items()}
    images = load_data(str(place / "d.npz"), preprocessing)
    keep = fastntk.trainer_callback(place / "run", model=name, data=str(place / "d.npz"), select=["lora:2", "head"])
    trainer(place, inner, images, keep, save_strategy="no").train()
    assert not (place / "run" / "begun.safetensors").exists()
    settings = Settings.read(place / "run" / "run.json")
    recipe = settings.fitting()
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer) == (2, 8, "adamw")
    assert recipe.loss == fastntk.CrossEntropy(smoothing=0.1)
    memory, _ = Run(place / "run").memory()
    trained = {name.replace(".modules_to_save.default.", "."): each for name, each in inner.state_dict().items()}
    start = {name.replace(".modules_to_save.default.", "."): each for name, each in before.items()}
    prefix = "base_model.model." if by_peft else ""
    for own, each in memory.anchor.items():
        named = prefix + own.removeprefix("model.")
        torch.testing.assert_close(each, trained[named], rtol=0, atol=0)
        torch.testing.assert_close(memory.state.initial[own], start[named])
        assert not torch.equal(each, start[named])
    told = json.loads(succeed("forget", place / "run", "--ids", "3,5", "--json"))
    assert told["samples"] == 2


def test_a_training_that_goes_on_from_a_checkpoint(place):
    name = saved(place)
    starts = []
    for goes_on in (False, True):
        model, preprocessing = fastntk.load_model(name, 3)
        fastntk.tune(model, "head")
        starts.append(model.model.classifier.weight.detach().clone())
        images = load_data(str(place / "d.npz"), preprocessing)
        given = {"model": name, "data": str(place / "d.npz"), "select": ["head"], "prepare": False}
        keep = fastntk.trainer_callback(place / "run", **given)
        made = trainer(place, model.model, images, keep, save_strategy="epoch")
        if not goes_on:

            class Stop(transformers().TrainerCallback):
                def on_epoch_end(self, args, state, control, **_):
                    if state.epoch >= 2:
                        raise KeyboardInterrupt

            made.add_callback(Stop())
            with pytest.raises(KeyboardInterrupt):
                made.train()
            assert not (place / "run" / "run.json").exists()
            continue
        other = fastntk.trainer_callback(place / "other", **given)
        with pytest.raises(fastntk.InputError, match="what it began from, is not there"):
            trainer(place, model.model, images, other).train(resume_from_checkpoint=True)
        made.train(resume_from_checkpoint=True)
    succeed("prepare", place / "run")
    initial = Run(place / "run").memory()[0].state.initial
    torch.testing.assert_close(initial["model.classifier.weight"], starts[0])


def module_of(network, frozen=True):
    torchvision()
    lightning = import_module("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def on_train_epoch_start(self):
            self.train(not frozen)

        def training_step(self, batch, _):
            images, labels = batch
            return nn.functional.cross_entropy(self.network(images), labels)

        def configure_optimizers(self):
            return torch.optim.Adam((each for each in self.parameters() if each.requires_grad), lr=1e-2)

    return lightning, Classifier()


@pytest.mark.parametrize("frozen", [True, False])
def test_lightning(frozen, place, caplog):
    name = f"{place}/own.py:small"
    model, preprocessing = fastntk.load_model(name, 3)
    fastntk.tune(model, "bn", "head")
    before = {name: each.detach().clone() for name, each in model.state_dict().items()}
    lightning, classifier = module_of(model, frozen)
    images = load_data(str(place / "d.npz"), preprocessing)
    keep = fastntk.lightning_callback(place / "run", model=name, data=str(place / "d.npz"))
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made = lightning.Trainer(max_epochs=3, callbacks=[keep], enable_model_summary=False, **quiet)
    made.fit(classifier, DataLoader(images, batch_size=8))
    memory, _ = Run(place / "run").memory()
    for own, each in memory.anchor.items():
        assert torch.equal(each, model.state_dict()[own])
        torch.testing.assert_close(memory.state.initial[own], before[own])
    recipe = Settings.read(place / "run" / "run.json").fitting()
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size, recipe.optimizer) == (3, 0.01, 8, "adam")
    assert ("moved with the training" in caplog.text) is not frozen
    assert memory.forget([4]).certificate.samples == 1


def test_what_is_not_as_it_is_said_is_refused_before_a_step(place):
    name = f"{place}/own.py:small"
    model, preprocessing = fastntk.load_model(name, 3)
    fastntk.tune(model, "head")
    images = load_data(str(place / "d.npz"), preprocessing)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def fitted(message, **changes):
        lightning, classifier = module_of(model)
        given = {"model": name, "data": str(place / "d.npz"), "select": ["head"], **changes}
        keep = fastntk.lightning_callback(place / "run", **given)
        made = lightning.Trainer(max_epochs=1, callbacks=[keep], enable_model_summary=False, **quiet)
        with pytest.raises(fastntk.InputError, match=message):
            made.fit(classifier, DataLoader(images, batch_size=8))
        assert made.global_step == 0
        assert not (place / "run").exists()

    fitted("tunes other parameters than are selected: they differ in '1.bias' \\(2 such\\)", select=["bn", "head"])
    fitted("neither a folder", data="nothing")
    fitted("do not fit the model", model="mobilenetv3_small_050", size=32)


def test_what_a_trainer_did_is_read_off(caplog):
    """Epochs from how long it trained, the batch over all devices, and an optimizer that is another is said."""
    given = {
        "optim": "adamw_torch", "weight_decay": 0.0, "num_train_epochs": 3.0, "learning_rate": 0.1, "seed": 0,
        "train_batch_size": 8, "gradient_accumulation_steps": 2, "world_size": 2, "label_smoothing_factor": 0.0,
    }  # fmt: skip
    recipe = _of_arguments(SimpleNamespace(**given), SimpleNamespace(epoch=20.0))
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer) == (20, 32, "adamw")
    assert not caplog.text
    _of_arguments(SimpleNamespace(**{**given, "optim": "sgd"}), SimpleNamespace(epoch=None))
    assert "how sgd trains is not read off; audits retrain with AdamW" in caplog.text
