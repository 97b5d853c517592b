"""A run folder around somebody else's training: what it started from is kept before, the memory is prepared after.

The folder is then a run like any other, for every command. Beside its own files there is

begun.safetensors      the whole model before training, until that ends: one that goes on from a checkpoint needs it
"""

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastntk.cli.run import Run
from fastntk.cli.settings import Given, Settings
from fastntk.common.errors import InputError
from fastntk.common.files import discard, read_tensors, writable, write_tensors
from fastntk.inputs.libraries import torchvision, transformers
from fastntk.inputs.weights import load_weights, named_as
from fastntk.jacobians.numerics import Numerics
from fastntk.tuning.frozen import check_frozen
from fastntk.tuning.lora import adapters
from fastntk.tuning.loss import Loss
from fastntk.tuning.losses import CrossEntropy
from fastntk.tuning.parameters import snapshot, tuned
from fastntk.tuning.recipe import MOMENTUM, Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recorder:
    """What a callback does at the two ends of a training.

    Attributes:
        folder: of the run.
        given: what the run is opened from, as ``fastntk fit`` takes it.
        recipe: how the training goes, or None to read it off.
        prepare: whether the memory is prepared.
    """

    folder: Path
    given: Given
    recipe: Recipe | None
    prepare: bool

    @property
    def _begun(self) -> Path:
        return self.folder / "begun.safetensors"

    def begin(self, model: nn.Module, goes_on: bool) -> None:
        """Before the first step, or, if training ``goes_on`` from a checkpoint, before the next one.

        Raises:
            InputError: the run's model and data cannot be opened, the model that is trained is another or trains other
                parameters, or what it began from is not known.
        """
        run = Run(self.folder, _device(model))
        run.check_free()
        if goes_on and not self._begun.is_file():
            raise InputError(
                f"training goes on from a checkpoint, and {self._begun}, what it began from, is not there. Begin it "
                "anew, or take the run over afterwards: fastntk fit RUN --fitted WEIGHTS --weights START."
            )
        module, _ = self.given.open(run.device)
        state = _state(model)
        load_weights(module, state, with_head=True)
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        odd = set(named_as(module.state_dict(), _plain(trained))) ^ set(tuned(module))
        if odd:
            tune = f"fastntk.tune(model, {', '.join(map(repr, self.given.select))})"
            raise InputError(
                f"the training tunes other parameters than are selected: they differ in {min(odd)!r} ({len(odd)} "
                f"such). Tune the model with {tune}, or say select=."
            )
        if not goes_on:
            write_tensors(writable(self.folder) / self._begun.name, state)

    def end(self, model: nn.Module, read_off: Recipe) -> None:
        """After the last step; ``read_off`` is how the training went, as far as it is known.

        Raises:
            InputError: frozen parameters have moved, or the memory cannot be prepared.
        """
        run, recipe = Run(self.folder, _device(model)), self.recipe or read_off
        module, images = self.given.open(run.device, recipe.seed)
        load_weights(module, read_tensors(self._begun)[0], with_head=True)
        initial, before = snapshot(tuned(module)), {name: each.clone() for name, each in module.state_dict().items()}
        load_weights(module, _state(model), with_head=True)
        check_frozen(module, before, "Tune the model as it is selected, or say select=.")
        log.info("the run's recipe: %s", recipe)
        run.write(Settings.of(self.given, images, recipe), initial, module)
        if self.prepare:
            run.prepare("auto", "auto", "auto", 0, Numerics())
        discard(self._begun)


def trainer_callback(
    folder: Path | str,
    *,
    model: str,
    data: str,
    select: Sequence[str] = ("bn", "head"),
    size: int | None = None,
    id_column: str | None = None,
    owners: str | None = None,
    recipe: Recipe | None = None,
    prepare: bool = True,
) -> Any:
    """A callback for transformers' ``Trainer``: ``trainer.add_callback(fastntk.trainer_callback(...))``.

    Args:
        folder: of the run.
        model: what makes the model that is trained, as ``fastntk fit --model`` takes it.
        data: the images that it is trained on, as ``--data`` takes them.
        select: what is tuned, as ``--select`` says it: what the training does not freeze.
        size: the side of the images, by default the model's own.
        id_column: as ``--id-column``.
        owners: as ``--owners``.
        recipe: for audits and other retraining; read off the trainer's arguments if it is not given.
        prepare: whether to prepare the memory when training ends; later: ``fastntk prepare``.

    Raises:
        InputError: transformers is not installed; and when training begins, see ``fastntk.cli.training``.
    """
    given = Given(model, data, None, tuple(select), size, id_column=id_column, owners=owners)
    recorder = _Recorder(Path(folder), given, recipe, prepare)

    class Callback(transformers().TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.is_world_process_zero:
                recorder.begin(model, goes_on=state.global_step > 0)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.is_world_process_zero:
                recorder.end(model, _of_arguments(args, state))

    return Callback()


def lightning_callback(
    folder: Path | str,
    *,
    model: str,
    data: str,
    loss: Loss = CrossEntropy(),
    select: Sequence[str] = ("bn", "head"),
    size: int | None = None,
    id_column: str | None = None,
    owners: str | None = None,
    recipe: Recipe | None = None,
    prepare: bool = True,
) -> Any:
    """A callback for Lightning's ``Trainer(callbacks=[...])``; arguments as of ``trainer_callback``, and

    Args:
        loss: the one that the module minimises.

    Raises:
        InputError: Lightning is not installed; and when training begins.
    """
    given = Given(model, data, None, tuple(select), size, id_column=id_column, owners=owners)
    recorder = _Recorder(Path(folder), given, recipe, prepare)

    class Callback(_lightning().Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                recorder.begin(pl_module, goes_on=trainer.global_step > 0)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                recorder.end(pl_module, _of_lightning(trainer, loss))

    return Callback()


def _device(model: nn.Module) -> str:
    return str(next(model.parameters()).device)


def _plain(named: Mapping[str, Any]) -> dict[str, Any]:
    """Without the copies that peft makes of a head that it trains."""
    return {
        name.replace(".modules_to_save.default.", "."): each
        for name, each in named.items()
        if ".original_module." not in name
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's, on the CPU.

    Raises:
        InputError: adapters are scaled, which fastntk's own are not.
    """
    for name in adapters(model):
        scales = set(getattr(model.get_submodule(name), "scaling", {}).values())
        if scales - {1}:
            raise InputError(f"LoRA's product is scaled by {min(scales)} in {name}. Make lora_alpha the rank.")
    return {name: each.detach().cpu().contiguous() for name, each in _plain(model.state_dict()).items()}


def _of_arguments(arguments: Any, state: Any) -> Recipe:
    """What a trainer's arguments say of how it trains, and its state of how long it did."""
    optimizer = getattr(arguments.optim, "value", arguments.optim)
    if not optimizer.startswith("adamw"):
        log.warning("how %s trains is not read off; audits retrain with AdamW. Say recipe=.", optimizer)
    if arguments.weight_decay:
        log.warning("the trainer's weight decay leaves out biases and norms; the run takes it as of all. Say recipe=.")
    return Recipe(
        epochs=max(1, round(state.epoch or arguments.num_train_epochs)),
        learning_rate=arguments.learning_rate,
        batch_size=arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        loss=CrossEntropy(arguments.label_smoothing_factor),
        optimizer="adamw",
        decay_toward="zero",
    )


def _of_lightning(trainer: Any, loss: Loss) -> Recipe:
    """What a Lightning trainer knows of how it trains."""
    optimizer, batch = trainer.optimizers[0], getattr(trainer.train_dataloader, "batch_size", None)
    kind, group = type(optimizer).__name__.lower(), optimizer.param_groups[0]
    decay = float(group.get("weight_decay", 0.0))
    ours = kind in ("adam", "adamw") or (kind == "sgd" and group.get("momentum") == MOMENTUM)
    if not ours or (decay and kind != "adamw"):
        log.warning("how %s trains is not read off; audits retrain with Adam. Say recipe=.", type(optimizer).__name__)
        kind, decay = "adam", 0.0
    return Recipe(
        epochs=max(1, trainer.current_epoch),
        learning_rate=float(group.get("initial_lr", group["lr"])),
        batch_size=(batch or Recipe.batch_size) * trainer.accumulate_grad_batches * trainer.world_size,
        weight_decay=decay,
        loss=loss,
        optimizer=kind,
        decay_toward="zero" if kind == "adamw" else "start",
    )


def _lightning() -> ModuleType:
    """The one that is in use, under either of its names."""
    torchvision()  # beside a CPU-only torch, it finds none
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda each: each not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise InputError("this needs Lightning, which is not installed. Run: pip install pytorch-lightning")
