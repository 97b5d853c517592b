"""Per-sample Jacobians of the logits with respect to the tuned parameters.

The model runs unchanged, on a batch, while ``fastntk.jacobians.rules`` gives every tuned parameter one copy a sample.
One forward and C ordinary backward passes then give all of ``J``. A parameter that is used in a way that no rule covers
is noticed by a trial run and differentiated by ``torch.func`` instead, slower and as exact.
"""

import logging
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils.checkpoint import CheckpointError

from fastntk.common.errors import InputError, reason
from fastntk.common.machine import out_of_memory
from fastntk.inputs.called import called, keeps
from fastntk.inputs.checks import check_logits, taking
from fastntk.jacobians.jacobian import Jacobian
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.rules.calls import PerSample
from fastntk.tuning.loss import contrasts

log = logging.getLogger(__name__)

# How far a rule may be off autograd, as a share of the derivative: rounding of float32 networks stays below a tenth. In
# float64 it is the second: some networks compute a layer in float32 all the same.
_LIMIT, _LIMIT_DOUBLE = 1e-3, 1e-5

# What a logit may change from pass to pass, as a share of the largest; ten times that beside another image, where other
# kernels may be at work.
_CHANGED = 1e-5

_KEPT = (
    "the model keeps what it computed from {!r} for the next pass, which would be wrong after a change of it. Tune "
    "other parameters, or have a train() of the module drop what is kept."
)

_CHECKPOINTED = (
    "the model recomputes activations (gradient checkpointing), which per-sample Jacobians cannot go through. Turn it "
    "off: model.set_grad_checkpointing(False) in timm, model.gradient_checkpointing_disable() in transformers."
)


class PerSampleJacobian:
    """``x -> Jacobian`` at fixed parameters of a model.

    Args:
        model: maps a batch of images to logits ``[batch, C]``; it must treat samples independently (eval mode). It is
            not changed.
        parameters: where to linearise: the tuned parameters by name.
        layout: of an earlier one at the same model and selection; found by a trial run otherwise.

    Raises:
        InputError: on the first batch, when the logits of an image are random or depend on the others of its batch,
            when activations are checkpointed, or the output is not ``[batch, C]``.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], layout: Layout | None = None) -> None:
        self.model = model
        self.parameters = {name: tensor.detach() for name, tensor in parameters.items()}
        self.known = layout

    def layout(self, x: Tensor) -> Layout:
        """How ``theta`` is laid out, found by a trial run on one image (as a batch of two, so that a leading axis of
        length 1 is not taken for the batch). Whoever's derivative by the rules is not autograd's is left to
        ``torch.func``.

        Raises:
            InputError: that is not autograd's either, or there are no per-sample Jacobians.
        """
        if self.known is None:
            try:
                self.known = self._found(x[:1])
            except CheckpointError as error:
                raise InputError(_CHECKPOINTED) from error
        return self.known

    def _found(self, x: Tensor) -> Layout:
        """The layout, from one image."""
        pair = torch.cat([x, x])
        found, used = self._trial(pair)
        self._check_independent(x)
        _check_unused(self.model, self.parameters.keys() - used)
        probes, expected = self._by_autograd(pair, used)
        wrong = self._wrong(found, pair, probes, expected)
        if wrong:
            log.info("no rule covers how %s are used: they are left to torch.func", ", ".join(sorted(wrong)))
            found = found.slower(wrong)
            wrong = self._wrong(found, pair, probes, expected)
        if wrong:
            raise InputError(
                f"the derivative with respect to {min(wrong)!r} is not what autograd says. Tune other parameters, or "
                "write the model's forward pass without operations in place."
            )
        return found

    def _check_independent(self, x: Tensor) -> None:
        """Raises ``InputError`` unless an image has the same logits again, and beside another image."""
        with torch.no_grad():
            copies, again = (self._forward(x.expand(8, *x.shape[1:]), self.parameters, nullcontext()) for _ in range(2))
            beside = self._forward(torch.cat([x, x.flip(-1) + 1]), self.parameters, nullcontext())[:1]
        once, all_of_it = copies[:1], torch.cat([copies, again])
        limit = _CHANGED * (float(once.abs().max()) + 1e-6)
        if not float((all_of_it - once).abs().max()) <= limit:
            raise InputError(
                "the logits are random: one image has other logits the second time. Call model.eval() first, and see "
                "that no layer (stochastic depth, attention dropout) draws at random even then."
            )
        if not float((beside - once).abs().max()) <= 10 * limit:
            raise InputError(
                "the logits of an image depend on the others of its batch, so per-sample Jacobians do not exist. Use "
                "layers that do not couple them: batch norm with running statistics, in eval mode."
            )

    def _by_autograd(self, x: Tensor, used: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """A random combination of logits for each image, ``[batch, C]``, and its gradient at the first image.

        Raises:
            InputError: a parameter of ``used``, which an earlier pass depended on, has no gradient.
        """
        trial = self._trial_parameters()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            logits = self._forward(x, trial, nullcontext())
            probes = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
            found = torch.autograd.grad((logits * probes)[0].sum(), list(trial.values()), allow_unused=True)
        grads = dict(zip(trial, found, strict=True))
        kept = sorted(name for name in used if grads[name] is None)
        if kept:
            raise InputError(_KEPT.format(kept[0]))
        return probes, {name: torch.zeros_like(trial[name]) if g is None else g for name, g in grads.items()}

    def _wrong(self, layout: Layout, x: Tensor, probes: Tensor, expected: Mapping[str, Tensor]) -> set[str]:
        """The parameters whose derivative of the first image's logits is more than ``_LIMIT`` of its size off."""
        with torch.autocast(x.device.type, enabled=False):
            same = PerSampleJacobian(self.model, self.parameters, layout)
            rows = same.with_logits(x, lambda _: probes[:, :, None].to(self.dtype))[0].rest[0, 0]
        found = layout.unflatten(rows, expected)
        whole = float(torch.cat([each.flatten() for each in expected.values()]).norm())
        limit = _LIMIT_DOUBLE if self.dtype == torch.float64 else max(_LIMIT, 30 * torch.finfo(self.dtype).eps)
        return {
            name
            for name, each in expected.items()
            if not float((found[name] - each).norm()) <= limit * (float(each.norm()) + 1e-3 * whole)
        }

    def _trial_parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters, to be differentiated."""
        return {name: tensor.clone().requires_grad_() for name, tensor in self.parameters.items()}

    def _trial(self, x: Tensor) -> tuple[Layout, set[str]]:
        """The layout by the rules alone, and the parameters that the logits depend on."""
        trial = self._trial_parameters()
        mode = PerSample(trial, len(x))
        with torch.enable_grad():
            with taking(x):
                logits = self._forward(x, trial, mode)
            if not logits.requires_grad:
                raise InputError("the logits depend on no tuned parameter. Tune others: 'head' is always among them.")
            _check_kept(logits)
            inputs = [*trial.values(), *mode.copies.values()]
            grads = torch.autograd.grad(logits.sum(), inputs, allow_unused=True, materialize_grads=False)
        grads, of_copies = grads[: len(trial)], grads[len(trial) :]
        # The rules detach: a gradient that reaches the parameter itself came through a use that no rule covers.
        slow = {name for name, grad in zip(trial, grads, strict=True) if grad is not None or name not in mode.copies}
        last = [c.names for c in mode.linear_calls if c.out is logits and c.input.ndim == 2 and c.unchanged]
        calls = [name for call in mode.linear_calls for name in call.names]
        head = last[0] if last and all(calls.count(name) == 1 and name not in slow for name in last[0]) else ()
        fast = tuple(name for name in trial if name not in slow and name not in head)
        shapes = {name: tensor.shape for name, tensor in trial.items()}
        reached = zip((*trial, *mode.copies), (*grads, *of_copies), strict=True)
        used = {name for name, grad in reached if grad is not None}
        return Layout(fast=fast, slow=tuple(name for name in trial if name in slow), head=head, shapes=shapes), used

    def _forward(self, x: Tensor, parameters: Mapping[str, Tensor], mode: AbstractContextManager) -> Tensor:
        with mode:
            logits = called(self.model, parameters, x)
        check_logits(logits, len(x))
        return logits

    def classes(self, x: Tensor) -> int:
        """C, from the logits of one image of the batch ``x``."""
        with torch.no_grad():
            return self._forward(x[:1], self.parameters, nullcontext()).shape[1]

    def __call__(self, x: Tensor) -> Jacobian:
        """The Jacobian of a batch ``x`` of images, ``[batch, ...]``."""
        return self.with_logits(x)[0]

    def of_kept(
        self, x: Tensor, keep: Callable[[Tensor], Int[Tensor, "batch kept"]], contrasted: bool
    ) -> tuple[Jacobian, Float[Tensor, "batch classes"]]:
        """The Jacobian of some logits of each image of a batch ``x``, whose classes ``keep`` finds from the logits, or
        of their contrasts, and the logits: one backward pass a row."""
        layout = self.layout(x)
        mode = self._mode(x, layout)
        with torch.enable_grad():
            logits = self._forward(x, {**self.parameters, **mode.tuned}, mode)
            kept = keep(logits.detach().to(self.dtype))
            outputs = logits.gather(1, kept)
            outputs = outputs @ contrasts(kept.shape[1]).to(outputs) if contrasted else outputs
            rest = self._backward(outputs, layout.fast, mode)
        features = self._features(logits, layout.head, mode).to(self.dtype)
        found = Jacobian(rest, features, kept, logits.shape[1])
        if layout.slow:
            found = replace(found, rest=torch.cat([rest, self._functional(x, layout.slow, found.combined())], 2))
        return found, logits.detach()

    def with_logits(
        self, x: Tensor, combined: Callable[[Tensor], Float[Tensor, "batch classes outputs"] | None] = lambda _: None
    ) -> tuple[Jacobian, Float[Tensor, "batch classes"]]:
        """The Jacobian and the logits of a batch ``x`` of images.

        With ``combined``, which finds V from the logits, the Jacobian is that of ``V_i' f(x_i)`` with V held fixed: one
        backward pass a column. The head's part then has no Kronecker structure left and is written out among the
        ``rest``.
        """
        layout = self.layout(x)
        mode = self._mode(x, layout)
        with torch.enable_grad():
            logits = self._forward(x, {**self.parameters, **mode.tuned}, mode)
            probes = combined(logits.detach().to(self.dtype))
            outputs = logits if probes is None else torch.einsum("nck,nc->nk", probes.to(logits), logits)
            rest = self._backward(outputs, layout.fast, mode)
        if layout.slow:
            rest = torch.cat([rest, self._functional(x, layout.slow, probes)], 2)
        features = self._features(logits, layout.head, mode).to(self.dtype)
        if probes is not None and layout.head:
            head = torch.einsum("nck,nf->nkcf", probes.to(features), features).flatten(2)
            rest, features = torch.cat([rest, head], 2), features[:, :0]
        return Jacobian(rest, features), logits.detach()

    def features(self, x: Tensor) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """The head's inputs, as a ``Jacobian`` has them, and the logits of a batch ``x`` of images: a forward pass."""
        head = self.layout(x).head
        mode = PerSample({name: self.parameters[name] for name in head}, len(x), head)
        with torch.no_grad():
            logits = self._forward(x, self.parameters, mode)
            return self._features(logits, head, mode).to(self.dtype), logits

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters', which the Jacobian has as well whatever the network computes in."""
        return next(iter(self.parameters.values())).dtype

    def _mode(self, x: Tensor, layout: Layout) -> PerSample:
        """What gives the parameters that rules cover one copy a sample of the batch ``x``."""
        names = (*layout.fast, *layout.head)
        return PerSample({name: self.parameters[name].detach().requires_grad_() for name in names}, len(x), layout.head)

    def _backward(self, outputs: Tensor, names: tuple[str, ...], mode: PerSample) -> Tensor:
        """One backward pass an output.

        Raises:
            InputError: a gradient reaches a parameter itself, which was used by its copies alone in the trial run.
        """
        copies = [mode.copies[name] for name in names]
        batch, count = outputs.shape
        result = outputs.new_empty(batch, count, sum(copy[0].numel() for copy in copies), dtype=self.dtype)
        wanted = [*copies, *(mode.tuned[name] for name in names)]
        if not outputs.requires_grad:  # a body that gradients do not reach
            return result.zero_()
        for k in range(count if copies else 0):
            grads = torch.autograd.grad(outputs[:, k].sum(), wanted, retain_graph=k + 1 < count, allow_unused=True)
            odd = [name for name, grad in zip(names, grads[len(copies) :], strict=True) if grad is not None]
            if odd:
                raise InputError(
                    f"parameter {odd[0]!r} is used along another axis than the batch in some batches only."
                )
            parts = [copy.new_zeros(copy.shape) if g is None else g for g, copy in zip(grads, copies, strict=False)]
            torch.cat([part.reshape(batch, -1) for part in parts], 1, out=result[:, k])
        return result.detach()

    def _functional(self, x: Tensor, names: tuple[str, ...], probes: Tensor | None) -> Tensor:
        """``torch.func`` for the parameters that no rule covers, in the parameters' own precision."""
        fixed = {name: tensor for name, tensor in self.parameters.items() if name not in names}

        def outputs(parameters: dict[str, Tensor], sample: Tensor, probe: Tensor | None) -> Tensor:
            logits = called(self.model, {**fixed, **parameters}, sample[None])[0]
            return logits if probe is None else logits @ probe.to(logits)

        free = {name: self.parameters[name] for name in names}
        try:
            with torch.autocast(x.device.type, enabled=False):  # whose casts torch.func does not differentiate
                jacobians = vmap(jacrev(outputs), (None, 0, None if probes is None else 0))(free, x, probes)
        except RuntimeError as error:  # of a recurrent network, say
            if out_of_memory(error):
                raise
            raise InputError(
                f"no rule covers how {', '.join(names[:3])} are used, and torch.func does not either "
                f"({reason(error)}). Tune other parameters."
            ) from error
        return torch.cat([each.reshape(*each.shape[:2], -1).detach() for each in map(jacobians.get, names)], 2)

    def _features(self, logits: Tensor, head: tuple[str, ...], mode: PerSample) -> Tensor:
        """The head's input, with a 1 appended for its bias: one column a tuned parameter and class."""
        if not head:
            return logits.new_empty(len(logits), 0)
        inputs = next(call.input for call in mode.linear_calls if call.names == head).detach()
        ones = inputs.new_ones(len(inputs), 1)
        return torch.cat([inputs if self.parameters[name].ndim == 2 else ones for name in head], 1)


def _check_unused(model: nn.Module, names: Set[str]) -> None:
    """Says which parameters the logits do not depend on; raises ``InputError`` for one of a module that keeps tensors,
    which may be of an earlier pass."""
    if names:
        log.info("the logits do not depend on %s", ", ".join(sorted(names)))
    for name in sorted(names):
        if keeps(model.get_submodule(name.rpartition(".")[0])):
            raise InputError(_KEPT.format(name))


def _check_kept(logits: Tensor) -> None:
    """Raises ``InputError`` if what led to the logits was not kept, for a backward pass of its own to compute anew."""
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise InputError(_CHECKPOINTED)
        seen.add(node)
        waiting += [each for each, _ in node.next_functions]
