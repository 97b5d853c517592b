"""What a model must be to be tuned: its parameters, the images that it takes, and its logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.utils.checkpoint import CheckpointError

from fastntk.common.errors import InputError


def check_numbers(parameters: Mapping[str, Tensor]) -> None:
    """Raises ``InputError`` for a parameter that cannot be tuned: of half precision, or without a shape yet."""
    for name, each in parameters.items():
        if isinstance(each, UninitializedParameter):
            raise InputError(f"parameter {name!r} is Lazy, and has no shape before a first pass. Make one first.")
        if each.is_floating_point() and each.element_size() < 4:
            raise InputError(
                f"parameter {name!r} is of dtype {each.dtype}, in which a step is lost to rounding. Call model.float() "
                "first; precision='bf16' of prepare saves the time."
            )


@contextmanager
def taking(images: Tensor, remedy: str = "Transform them as it wants.") -> Iterator[None]:
    """A pass of images through a model.

    Raises:
        InputError: the model fails at them, for whatever reason; the message ends with the ``remedy``.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:  # whatever a model says of images that are not for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"the model cannot take images of shape {list(images.shape[1:])} ({reason}). {remedy}"
        ) from error


def check_logits(logits: object, batch: int, classes: int | None = None) -> None:
    """Raises ``InputError`` unless a model's output for a batch is ``[batch, classes]``."""
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == batch and classes in (None, logits.shape[1]):
        return
    got = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    wanted = "classes" if classes is None else str(classes)
    raise InputError(
        f"the model must return logits of shape [batch, {wanted}], not {got} for a batch of {batch}. Wrap it in a "
        "module that does."
    )
