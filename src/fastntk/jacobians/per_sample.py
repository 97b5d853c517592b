"""Per-sample Jacobians of the logits with respect to the tuned parameters.

The model runs unchanged, on a batch, while ``fastntk.jacobians.rules`` gives every tuned parameter one copy a sample.
One forward and C ordinary backward passes then give all of ``J``. A parameter that is used in a way that no rule covers
is noticed by a trial run and differentiated by ``torch.func`` instead, slower and as exact.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import jacrev, vmap

from fastntk.common.errors import InputError, reason
from fastntk.common.machine import out_of_memory
from fastntk.inputs.batches import finite
from fastntk.inputs.called import called
from fastntk.jacobians import trial
from fastntk.jacobians.jacobian import Jacobian
from fastntk.jacobians.layout import Layout
from fastntk.jacobians.numerics import arithmetic
from fastntk.jacobians.outer import Layer, Outer
from fastntk.jacobians.rules.calls import Applied, PerSample
from fastntk.tuning.loss import contrasts

log = logging.getLogger(__name__)

# How far a rule may be off autograd, as a share of the derivative: rounding of float32 networks stays below a tenth. In
# float64 it is the second: some networks compute a layer in float32 all the same.
_LIMIT, _LIMIT_DOUBLE = 1e-3, 1e-5


class PerSampleJacobian:
    """``x -> Jacobian`` at fixed parameters of a model.

    Args:
        model: maps a batch of images to logits ``[batch, C]``; it must treat samples independently (eval mode). It is
            not changed.
        parameters: where to linearise: the tuned parameters by name.
        layout: of an earlier one at the same model and selection; found by a trial run otherwise.
        fixed: other parameters by name, which the model is called with as well.

    Raises:
        InputError: on the first batch, when the logits of an image are random or depend on the others of its batch,
            when activations are checkpointed, or the output is not ``[batch, C]``.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        layout: Layout | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.parameters = {name: tensor.detach() for name, tensor in parameters.items()}
        self.known, self.fixed = layout, dict(fixed or {})

    def layout(self, x: Tensor) -> Layout:
        """How ``theta`` is laid out, found by a trial run on one image (as a batch of two, so that a leading axis of
        length 1 is not taken for the batch). Whoever's derivative by the rules is not autograd's is left to
        ``torch.func``.

        Raises:
            InputError: that is not autograd's either, or there are no per-sample Jacobians.
        """
        if self.known is None:
            self.known = self._found(x[:1])
        return self.known

    def _found(self, x: Tensor) -> Layout:
        """The layout, from one image, whatever precision is asked for: what less would change is no fault."""
        with arithmetic("full", x.device):
            found, probes, expected = trial.tried(self.model, self.parameters, x)
            pair = torch.cat([x, x])
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

    def _wrong(self, layout: Layout, x: Tensor, probes: Tensor, expected: Mapping[str, Tensor]) -> set[str]:
        """The parameters whose derivative of the first image's logits is more than ``_LIMIT`` of its size off."""
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

    def narrowed(self, names: Collection[str], layout: Layout) -> "PerSampleJacobian":
        """With respect to some of the parameters alone; ``layout`` is of all."""
        own = {name: tensor for name, tensor in self.parameters.items() if name in names}
        return PerSampleJacobian(self.model, own, layout.narrowed(names), {**self.fixed, **self.parameters})

    def _forward(self, x: Tensor, parameters: Mapping[str, Tensor], mode: AbstractContextManager) -> Tensor:
        return trial.forward(self.model, {**self.fixed, **parameters}, x, mode)

    def classes(self, x: Tensor) -> int:
        """C, from the logits of one image of the batch ``x``."""
        with torch.no_grad():
            return self._forward(x[:1], self.parameters, nullcontext()).shape[1]

    def __call__(self, x: Tensor) -> Jacobian:
        """The Jacobian of a batch ``x`` of images, ``[batch, ...]``."""
        return self.with_logits(x)[0]

    def parted(
        self,
        x: Tensor,
        keep: Callable[[Tensor], Int[Tensor, "batch kept"]],
        contrasted: bool,
        outer: Collection[str] = (),
    ) -> tuple[Jacobian, Float[Tensor, "batch classes"], dict[str, Outer]]:
        """The same with some of the weights (``layers``) as outer products, which are then not among the ``rest``."""
        layout = self.layout(x)
        mode = self._mode(x, layout, outer)
        with torch.enable_grad():
            logits = finite(self._forward(x, {**self.parameters, **mode.tuned}, mode))
            kept = keep(logits.detach().to(self.dtype))
            outputs = logits.gather(1, kept)
            outputs = outputs @ contrasts(kept.shape[1]).to(outputs) if contrasted else outputs
            names = (*(n for n in layout.fast if n not in outer), *(n for n in layout.fast if n in outer))
            found = self._backward(outputs, names, mode)
        sizes = [mode.slopes[name][0].numel() for name in names if name in outer]
        rest, *slopes = found.split([found.shape[2] - sum(sizes), *sizes], 2)
        features = self._features(logits, layout.head, mode).to(self.dtype)
        jacobian = Jacobian(rest, features, kept, logits.shape[1])
        if layout.slow:
            slow = self._functional(x, layout.slow, jacobian.combined())
            jacobian = replace(jacobian, rest=torch.cat([rest, slow], 2))
        parts = zip(names[len(names) - len(sizes) :], slopes, strict=True)
        return jacobian, logits.detach(), {name: mode.applied[name][0].outer(each) for name, each in parts}

    def layers(self, x: Tensor) -> list[Layer]:
        """The sizes of all parameters but the head's, in the network's order: of a weight that is used once, by a
        linear layer or a convolution of one group, those of its outer product."""
        layout = self.layout(x)
        mode = self._mode(x, layout, layout.fast)
        with torch.no_grad():
            self._forward(x, {**self.parameters, **mode.tuned}, mode)
        whole = {name: Layer(name, 1, 1, layout.shapes[name].numel()) for name in (*layout.fast, *layout.slow)}
        alone = {name: calls for name, calls in mode.applied.items() if name not in mode.copies and _is_outer(calls)}
        found = {name: calls[0].layer(name) for name, calls in alone.items()}
        return [{**whole, **found}[name] for name in self.parameters if name in whole]

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
            logits = finite(self._forward(x, {**self.parameters, **mode.tuned}, mode))
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
            logits = finite(self._forward(x, self.parameters, mode))
            return self._features(logits, head, mode).to(self.dtype), logits

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._one.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters', which the Jacobian has as well whatever the network computes in."""
        return self._one.dtype

    @property
    def _one(self) -> Tensor:
        return next(iter({**self.fixed, **self.parameters}.values()))

    def _mode(self, x: Tensor, layout: Layout, outer: Collection[str] = ()) -> PerSample:
        """What gives the parameters that rules cover one copy a sample of the batch ``x``."""
        names = (*layout.fast, *layout.head)
        tuned = {name: self.parameters[name].detach().requires_grad_() for name in names}
        return PerSample(tuned, len(x), layout.head, outer)

    def _backward(self, outputs: Tensor, names: tuple[str, ...], mode: PerSample) -> Tensor:
        """One backward pass an output.

        Raises:
            InputError: a gradient reaches a parameter itself, which was used by its copies alone in the trial run.
        """
        known = {**mode.copies, **mode.slopes}
        copies = [known[name] for name in names]
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
        fixed = {**self.fixed, **{name: each for name, each in self.parameters.items() if name not in names}}

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


def _is_outer(calls: list[Applied]) -> bool:
    return len(calls) == 1 and calls[0].groups == 1 and calls[0].unchanged
