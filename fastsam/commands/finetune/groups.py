"""Parameter groups of a fine-tuning run: layer-wise learning rates, and no weight decay where it does harm.

With L blocks the learning rate of block k = 1 ... L is lr * decay^(L + 1 - k), that of what comes before the blocks
(embeddings) lr * decay^(L + 1), that of what comes after them (last norm, head) lr. Source: Clark et al., "ELECTRA",
ICLR 2020; Bao et al., "BEiT", ICLR 2022, for images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastsam
from fastsam.commands.finetune import timm_models
from fastsam.commands.finetune.settings import METHODS, Settings, optimizers

#: Parts of the names of parameters that are no matrices of a layer, whatever their shape.
_NO_MATRIX = ("token", "position_embedding", "pos_embed", "relative_position", "bias")


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """The method of ``settings`` around the base optimizer, or the base optimizer alone for ``method="none"``.

    Raises ``ValueError`` for arguments that the base optimizer does not take.
    """
    assert settings.lr is not None  # it has the optimizer's default by now
    arguments, base = settings.optimizer_arguments(), optimizers()[settings.optimizer.lower()]
    groups = parameter_groups(model, settings.lr, arguments.get("weight_decay"), settings.layer_decay)
    try:
        plain = base([dict(group) for group in groups], **arguments)  # it writes its defaults into them
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"torch.optim.{base.__name__} does not take {given}: {error}") from None
    if settings.method == "none":
        return plain
    name, own = METHODS[settings.method]
    adaptive = {"adaptive": True} if settings.method == "asam" else {}
    values = {key: getattr(settings, key) for key in ("rho", *own)}
    return getattr(fastsam, name)(groups, base, **values, **adaptive, **arguments)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float | None, layer_decay: float = 1.0) -> list[dict]:
    """The trainable parameters in groups of one lr and one weight decay each.

    Biases, scales (whatever has one dimension longer than 1), tokens and position embeddings are not decayed. With
    ``weight_decay=None`` the groups say nothing of it, for optimizers that have none.
    """
    depths = layer_depths(model) if layer_decay != 1 else {name: 0 for name, _ in model.named_parameters()}
    top = max(depths.values())
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        group = {"lr": lr * layer_decay ** (top - depths[name])}
        if weight_decay is not None:
            group["weight_decay"] = weight_decay if decays(name, p) else 0.0
        groups.setdefault(tuple(group.values()), {**group, "params": []})["params"].append(p)
    return list(groups.values())


def decays(name: str, p: Tensor) -> bool:
    """Whether weight decay is for this parameter."""
    # The norm of ConvNeXt V2 has the shape (1, 1, 1, C), the attention scale of Swin V2 (heads, 1, 1).
    return p.squeeze().ndim > 1 and not any(part in name for part in _NO_MATRIX)


def layer_depths(model: nn.Module) -> dict[str, int]:
    """The depth of every parameter: 0 before the first block, 1 ... L in the blocks, L + 1 after the last.

    A block is a member of a ``ModuleList`` of modules of one class, the innermost such list; blocks are counted as they
    are registered, which is the order of the forward pass in every classifier of Transformers. timm's models have
    layers of their own: see :func:`fastsam.commands.finetune.timm_models.layer_depths`.
    """
    if timm_models.is_timm(getattr(model, "config", None)):
        return timm_models.layer_depths(model)
    lists = {
        f"{name}.{i}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(member) for member in module}) == 1
        for i in range(len(module))
    }
    blocks: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        block = next((prefix for prefix in prefixes if prefix in lists), None)
        if block is not None:
            depths[name] = blocks.setdefault(block, len(blocks) + 1)
        else:
            depths[name] = 0 if not blocks else -1
    return {name: len(blocks) + 1 if depth < 0 else depth for name, depth in depths.items()}
