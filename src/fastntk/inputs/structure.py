"""The blocks that a network repeats, found in its structure alone, whichever library it comes from."""

from torch import nn

from fastntk.common.errors import InputError

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of ``model`` by name, in order: residual blocks of a CNN, the blocks of a transformer.

    A block is an outermost module with parts of its own that lies in an ``nn.Sequential`` or ``nn.ModuleList`` and is
    neither itself.
    """
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str, listed: bool) -> None:
        for name, child in module.named_children():
            if listed and not isinstance(child, _CONTAINERS) and any(True for _ in child.children()):
                found[prefix + name] = child
            else:
                walk(child, f"{prefix}{name}.", isinstance(child, _CONTAINERS))

    walk(model, "", isinstance(model, _CONTAINERS))
    return found


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the blocks that attend, by name; none in a CNN."""
    return {
        name: block
        for name, block in blocks(model).items()
        if any("attention" in type(part).__name__.lower() for part in block.modules())
    }


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a plain vision transformer: all alike, from tokens ``[batch, tokens, width]`` to such tokens.

    Raises:
        InputError: the model is not one.
    """
    found = attention_blocks(model)
    shapes = {tuple(tensor.shape for tensor in block.parameters()) for block in found.values()}
    if len(shapes) != 1:
        kind = "has no blocks that attend" if not found else "has blocks of different widths"
        raise InputError(
            f"prompts need a plain vision transformer, and this model {kind}. Tune something else: 'norm', 'bias', ..."
        )
    return found
