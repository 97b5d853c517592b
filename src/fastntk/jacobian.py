"""Per-sample Jacobians of the logits with respect to the tuned parameters.

The model runs unchanged, on a batch, while a function mode answers each functional call that uses a tuned parameter
(``batch_norm``, ``layer_norm``, ``linear``, ``expand``) with a version whose parameter has one copy a sample. The
copies take no memory (they are expanded views); their gradients are the per-sample Jacobians. One forward and C
ordinary backward passes give all of ``J``. It does not matter which library's module makes the call. A parameter that
is used in any other way is noticed by a trial run and differentiated by ``torch.func`` instead, slower and as exact.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, jacrev, vmap
from torch.overrides import TorchFunctionMode

from fastntk.errors import InputError


@dataclass(frozen=True)
class Jacobian:
    """``J_i = df(x_i)/d theta`` for a batch, with the head's structure kept.

    ``theta`` is flat: first the ``rest`` (all tuned parameters but the head's), then the head as a row-major
    ``[C, d]`` matrix (the weight, with the bias as its last column). The head's part of ``J_i`` is ``I_C (x) h_i``,
    so only ``h_i``, the head's input with a 1 appended for the bias, is stored; its width is 0 if the head is frozen.
    """

    rest: Float[Tensor, "batch classes rest"]
    features: Float[Tensor, "batch features"]
    logits: Float[Tensor, "batch classes"]

    @property
    def size(self) -> int:
        """``p``: the number of tuned parameters."""
        return self.rest.shape[2] + self.rest.shape[1] * self.features.shape[1]

    def split(self, vector: Float[Tensor, " p"]) -> tuple[Float[Tensor, " rest"], Float[Tensor, "classes features"]]:
        """``vector`` as its rest and its head matrix."""
        rest = self.rest.shape[2]
        return vector[:rest], vector[rest:].view(self.rest.shape[1], self.features.shape[1])

    def matvec(self, vector: Float[Tensor, " p"]) -> Float[Tensor, "batch classes"]:
        """``J v``: the change of the logits that a change ``v`` of the parameters causes, to first order."""
        rest, head = self.split(vector.to(self.rest))
        return (self.rest @ rest + self.features @ head.T).to(vector)

    def rmatvec(self, cotangent: Float[Tensor, "batch classes"]) -> Float[Tensor, " p"]:
        """``J' a``, summed over samples and classes."""
        a = cotangent.to(self.rest)
        rest = self.rest.flatten(0, 1).T @ a.flatten()
        return torch.cat([rest, (a.T @ self.features).flatten()]).to(cotangent)

    def dense(self) -> Float[Tensor, "batch classes p"]:
        """``J`` written out, zeros included."""
        eye = torch.eye(self.rest.shape[1]).to(self.rest)
        head = torch.einsum("cd,nf->ncdf", eye, self.features).flatten(2)
        return torch.cat([self.rest, head], 2)

    def __getitem__(self, samples: Any) -> "Jacobian":
        """The Jacobian of some of the samples (an index tensor, a mask or a slice)."""
        return Jacobian(self.rest[samples], self.features[samples], self.logits[samples])


def concatenate(parts: list[Jacobian]) -> Jacobian:
    """The Jacobian of several batches as one."""
    return Jacobian(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rest", "features", "logits")))


@dataclass(frozen=True)
class Layout:
    """Where each tuned parameter lies in the flat ``theta``: ``fast``, then ``slow``, then the ``head`` as a matrix.

    ``fast`` parameters have a per-sample rule, ``slow`` ones are left to ``torch.func``; ``head`` is the weight and the
    bias (whichever are tuned) of the linear layer whose output the logits are.
    """

    fast: tuple[str, ...]
    slow: tuple[str, ...]
    head: tuple[str, ...]
    shapes: Mapping[str, torch.Size]

    @property
    def size(self) -> int:
        """``p``: the number of tuned parameters."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """The parameters by name as one float64 vector."""
        rest = [parameters[name].detach().flatten() for name in (*self.fast, *self.slow)]
        head = [parameters[name].detach().reshape(self.shapes[name][0], -1) for name in self.head]
        return torch.cat([*rest, *([torch.cat(head, 1).flatten()] if head else [])]).double()

    def unflatten(self, vector: Float[Tensor, " p"], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The vector as parameters by name, in the dtypes and the order of ``like``."""
        names = (*self.fast, *self.slow)
        sizes = [self.shapes[name].numel() for name in names]
        *parts, head = vector.split([*sizes, self.size - sum(sizes)])
        result = {name: part.view(self.shapes[name]) for name, part in zip(names, parts, strict=True)}
        if self.head:
            classes = self.shapes[self.head[0]][0]
            widths = [self.shapes[name][1:].numel() for name in self.head]
            columns = head.view(classes, sum(widths)).split(widths, 1)
            result |= {name: part.reshape(self.shapes[name]) for name, part in zip(self.head, columns, strict=True)}
        return {name: result[name].to(like[name]) for name in like}


def _sum(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The sum over the axes inside a sample; over no axes, the tensor itself."""
    return tensor.sum(axes) if axes else tensor


class _BatchNorm(torch.autograd.Function):
    """Batch norm with running statistics, whose scale and shift have one copy a sample in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, scales, shifts):  # type: ignore[no-untyped-def]
        ctx.rstd = torch.rsqrt(var + eps)
        ctx.scale = ctx.rstd if weight is None else ctx.rstd * weight
        ctx.save_for_backward(x, mean)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, mean = ctx.saved_tensors
        of_x, *_, of_scales, of_shifts = ctx.needs_input_grad
        inner = tuple(range(2, x.ndim))
        shift, scale = _sum(g, inner), None
        if of_scales:
            scale = (_sum(g * x, inner) - mean * shift) * ctx.rstd
        broadcast = ctx.scale.view(1, -1, *(1 for _ in inner))
        return g * broadcast if of_x else None, *[None] * 5, scale, shift if of_shifts else None


class _LayerNorm(torch.autograd.Function):
    """Layer norm whose scale and shift have one copy a sample in the backward pass."""

    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps, scales, shifts):  # type: ignore[no-untyped-def]
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.weight, ctx.bias = shape, weight, bias
        ctx.save_for_backward(x, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, mean, rstd = ctx.saved_tensors
        *_, of_scales, of_shifts = ctx.needs_input_grad
        inner = tuple(range(1, x.ndim - len(ctx.shape)))
        scale = _sum(g * ((x - mean) * rstd), inner) if of_scales else None
        grad, _, _ = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, list(ctx.shape), mean, rstd, ctx.weight, ctx.bias, [True, False, False]
        )
        return grad, *[None] * 4, scale, _sum(g, inner) if of_shifts else None


class _Linear(torch.autograd.Function):
    """A linear layer whose weight and bias have one copy a sample in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, weights, biases):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_x, _, _, of_weights, of_biases = ctx.needs_input_grad
        weights = torch.einsum("b...o,b...i->boi", g, x) if of_weights else None
        biases = _sum(g, tuple(range(1, x.ndim - 1))) if of_biases else None
        return g @ weight if of_x else None, None, None, weights, biases


class _PerSample(TorchFunctionMode):
    """While active, calls that use a tuned parameter use its per-sample copies."""

    def __init__(self, tuned: Mapping[str, Tensor], batch: int, layout: Layout | None = None) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in tuned.items()}
        self.batch = batch
        self.layout = layout
        self.copies: dict[str, Tensor] = {}
        self.linear_calls: list[tuple[Tensor, Tensor, tuple[str, ...]]] = []

    def _name(self, tensor: Tensor | None) -> str | None:
        return self.names.get(id(tensor))

    def _copy(self, tensor: Tensor | None) -> Tensor | None:
        """The per-sample copies of a tuned parameter; None for a frozen one."""
        name = self._name(tensor)
        if name is None or tensor is None:
            return None
        if name not in self.copies:
            copy = tensor.detach().expand(self.batch, *tensor.shape)
            self.copies[name] = copy.requires_grad_()
        return self.copies[name]

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        rule = _RULES.get(func)
        return func(*args, **(kwargs or {})) if rule is None else rule(self, *args, **(kwargs or {}))

    def _fits(self, x: Tensor | None, *parameters: Tensor | None) -> bool:
        """Whether a rule applies: one of the parameters is tuned and samples lie along the first axis of ``x``.

        A module that regroups samples is noticed in the trial run, and its parameters are left to ``torch.func``.
        """
        names = [name for name in map(self._name, parameters) if name]
        fits = x is not None and x.ndim > 1 and x.shape[0] == self.batch
        if names and not fits and self.layout:
            raise InputError(f"parameter {names[0]!r} is used along another axis than the batch in some batches only.")
        return bool(names) and fits

    def batch_norm(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):  # type: ignore[no-untyped-def]
        if training:
            raise InputError(
                "a batch norm layer is in training mode: it couples the samples of a batch, so per-sample Jacobians do "
                "not exist. Call model.eval() first."
            )
        if not self._fits(x, weight, bias):
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        copies = self._copy(weight), self._copy(bias)
        return _BatchNorm.apply(x, _data(weight), _data(bias), running_mean, running_var, eps, *copies)

    def layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
        if not self._fits(x if x.ndim > len(normalized_shape) else None, weight, bias):
            return F.layer_norm(x, normalized_shape, weight, bias, eps)
        copies = self._copy(weight), self._copy(bias)
        return _LayerNorm.apply(x, tuple(normalized_shape), _data(weight), _data(bias), eps, *copies)

    def linear(self, x, weight, bias=None):  # type: ignore[no-untyped-def]
        if not self._fits(x, weight, bias):
            return F.linear(x, weight, bias)
        names = tuple(name for name in (self._name(weight), self._name(bias)) if name)
        if self.layout and names == self.layout.head:
            out = F.linear(x, weight.detach(), _data(bias))
        else:
            out = _Linear.apply(x, _data(weight), _data(bias), self._copy(weight), self._copy(bias))
        self.linear_calls.append((out, x, names))
        return out

    def expand(self, tensor, *sizes):  # type: ignore[no-untyped-def]
        """A parameter that is repeated for every sample: a class token or a visual prompt."""
        out = tensor.expand(*sizes)
        per_sample = out.ndim > tensor.ndim or (tensor.ndim > 1 and tensor.shape[0] == 1 and out.ndim == tensor.ndim)
        if not per_sample or not self._fits(out, tensor):
            return out
        return self._copy(tensor).reshape(out.shape)  # type: ignore[union-attr]

    def dropout(self, x, p=0.5, training=True, inplace=False):  # type: ignore[no-untyped-def]
        if training and p > 0:
            raise InputError("a dropout layer is in training mode: the logits are random. Call model.eval() first.")
        return x


_RULES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _PerSample.batch_norm,
    F.layer_norm: _PerSample.layer_norm,
    F.linear: _PerSample.linear,
    Tensor.expand: _PerSample.expand,
    F.dropout: _PerSample.dropout,
}


def _data(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


class PerSampleJacobian:
    """``x -> Jacobian`` at fixed parameters of a model.

    Args:
        model: maps a batch of images to logits ``[batch, C]``; it must treat samples independently (eval mode). It is
            not changed.
        parameters: where to linearise: the tuned parameters by name.
        layout: of an earlier one at the same model and selection; found by a trial run otherwise.

    Raises:
        InputError: on the first batch, when a batch norm or dropout layer is in training mode, or the output is not
            ``[batch, C]``.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], layout: Layout | None = None) -> None:
        self.model = model
        self.parameters = {name: tensor.detach() for name, tensor in parameters.items()}
        self._layout = layout

    def layout(self, x: Tensor) -> Layout:
        """How ``theta`` is laid out, found by a trial run on one image (as a batch of two, so that a leading axis of
        length 1 is not taken for the batch)."""
        if self._layout is None:
            self._layout = self._trial(torch.cat([x[:1], x[:1]]))
        return self._layout

    def _trial(self, x: Tensor) -> Layout:
        trial = {name: tensor.clone().requires_grad_() for name, tensor in self.parameters.items()}
        mode = _PerSample(trial, len(x))
        with torch.enable_grad():
            logits = self._forward(x, trial, mode)
            grads = torch.autograd.grad(logits.sum(), list(trial.values()), allow_unused=True, materialize_grads=False)
        # The rules detach: a gradient that reaches the parameter itself came through a use that no rule covers.
        slow = {name for name, grad in zip(trial, grads, strict=True) if grad is not None or name not in mode.copies}
        last = [names for out, inputs, names in mode.linear_calls if out is logits and inputs.ndim == 2]
        calls = [name for _, _, names in mode.linear_calls for name in names]
        head = last[0] if last and all(calls.count(name) == 1 and name not in slow for name in last[0]) else ()
        fast = tuple(name for name in trial if name not in slow and name not in head)
        return Layout(
            fast=fast,
            slow=tuple(name for name in trial if name in slow),
            head=head,
            shapes={name: tensor.shape for name, tensor in trial.items()},
        )

    def _forward(self, x: Tensor, parameters: Mapping[str, Tensor], mode: _PerSample) -> Tensor:
        with mode:
            logits = functional_call(self.model, dict(parameters), (x,))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            raise InputError("the model must return logits of shape [batch, classes]. Wrap it in a module that does.")
        return logits

    def __call__(self, x: Tensor) -> Jacobian:
        """The Jacobian and logits of a batch ``x`` of images, ``[batch, ...]``."""
        layout = self.layout(x)
        mapped = {name: self.parameters[name] for name in (*layout.fast, *layout.head)}
        mode = _PerSample(mapped, len(x), layout)
        with torch.enable_grad():
            logits = self._forward(x, self.parameters, mode)
            rest = self._backward(logits, [mode.copies[name] for name in layout.fast])
        if layout.slow:
            rest = torch.cat([rest, self._functional(x, layout.slow)], 2)
        return Jacobian(rest, self._features(logits, layout.head, mode), logits.detach())

    def _backward(self, logits: Tensor, copies: list[Tensor]) -> Tensor:
        """One backward pass a class."""
        batch, classes = logits.shape
        out = logits.new_empty(batch, classes, sum(copy[0].numel() for copy in copies))
        for c in range(classes if copies else 0):
            grads = torch.autograd.grad(logits[:, c].sum(), copies, retain_graph=c + 1 < classes)
            out[:, c] = torch.cat([grad.flatten(1) for grad in grads], 1)
        return out.detach()

    def _functional(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """``torch.func`` for the parameters that no rule covers."""
        fixed = {name: tensor for name, tensor in self.parameters.items() if name not in names}

        def logits(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(self.model, {**fixed, **parameters}, (sample[None],))[0]

        free = {name: self.parameters[name] for name in names}
        jacobians = vmap(jacrev(logits), (None, 0))(free, x)
        return torch.cat([jacobians[name].flatten(2).detach() for name in names], 2)

    def _features(self, logits: Tensor, head: tuple[str, ...], mode: _PerSample) -> Tensor:
        """The head's input, with a 1 appended for its bias: one column a tuned parameter and class."""
        if not head:
            return logits.new_empty(len(logits), 0)
        inputs = next(x for _, x, names in mode.linear_calls if names == head).detach()
        ones = inputs.new_ones(len(inputs), 1)
        return torch.cat([inputs if self.parameters[name].ndim == 2 else ones for name in head], 1)
