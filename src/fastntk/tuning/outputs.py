"""The logits of a model, also at other values of its tuned parameters."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastntk.inputs.batches import batches
from fastntk.inputs.called import called, evaluating
from fastntk.inputs.checks import taking

Model = nn.Module | Callable[[Tensor], Tensor]


def model_at(model: nn.Module, parameters: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """``model`` as a function of images, with some of its parameters replaced; the model itself is not changed."""
    return lambda images: called(model, parameters, images)


def logits_of(model: Model, samples: Dataset, device: torch.device | str, batch_size: int = 64) -> Float[Tensor, "n c"]:
    """The logits of all samples, on ``device``, where the model is, in eval mode; of no sample ``[0, 0]``."""
    of, mode = (model_at(model, {}), evaluating(model)) if isinstance(model, nn.Module) else (model, nullcontext())
    found = []
    with torch.no_grad(), mode:
        for images, _ in batches(samples, batch_size):
            with taking(images):
                found.append(of(images.to(device)))
    return torch.cat(found) if found else torch.empty(0, 0, device=device)


def accuracy(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> float:
    """The share of samples whose largest logit is their label's, in percent; NaN for no samples."""
    return 100 * float((logits.argmax(1) == labels).double().mean())


def margins(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> Float[Tensor, " samples"]:
    """Per sample: the label's logit less the largest other one; positive where the sample is classified rightly."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -float("inf"))
    return own[:, 0] - others.amax(1)


def log_odds(logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]) -> Float[Tensor, " samples"]:
    """Per sample: the label's logit less the logsumexp of all others, ``log p / (1 - p)`` of its probability p."""
    own = logits.gather(1, labels[:, None])
    return own[:, 0] - logits.scatter(1, labels[:, None], -float("inf")).logsumexp(1)
