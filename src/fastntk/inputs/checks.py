"""What a model must be to be tuned: its parameters, the images that it takes, and its logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from fastntk.common.errors import InputError, reason
from fastntk.common.machine import out_of_memory


def check_numbers(parameters: Mapping[str, Tensor]) -> None:
    """Raises ``InputError`` for a parameter that cannot be tuned: of half precision."""
    for name, each in parameters.items():
        if each.is_floating_point() and each.element_size() < 4:
            raise InputError(
                f"parameter {name!r} is of dtype {each.dtype}, in which a step is lost to rounding. Call model.float() "
                "first; precision='bf16' of prepare saves the time."
            )


@contextmanager
def taking(images: Tensor, remedy: str = "Transform them as it wants.") -> Iterator[None]:
    """A pass of images through a model.

    Raises:
        InputError: the model fails at them, and not because its code or the device does; the message ends with the
            ``remedy``.
    """
    try:
        yield
    except Exception as error:  # whatever a model says of images that are not for it
        if isinstance(error, _OTHERS) or any(name in str(error) for name in ("CUDA error", "CUBLAS", "CUDNN", "cuDNN")):
            raise
        shape = list(images.shape[1:])
        if out_of_memory(error):
            raise InputError(
                f"memory does not suffice for a pass of images of shape {shape} ({reason(error)}). Take smaller ones, "
                "or fewer a batch."
            ) from error
        raise InputError(f"the model cannot take images of shape {shape} ({reason(error)}). {remedy}") from error


_OTHERS = InputError, CheckpointError, NameError, ImportError  # that say nothing of images


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
