"""SAM-ON: only the parameters of normalisation layers are perturbed.

Any method takes it from its groups: those of normalisation layers are one, everything else is another that says
``perturb=False`` and follows the base optimizer with the gradient at w + e. Norms, backups and averages are then of the
first group alone, some 0.1 % of a network; both gradients are still computed. Source: Mueller, Vlaar, Rolnick, Hein,
"Normalization Layers Are All That Sharpness-Aware Minimization Needs", NeurIPS 2023.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

#: RMSNorm, LayerNorm2d, BatchNormAct2d; not NormalizedLinear.
_NAME = re.compile("Norm(?![a-z])")


def norm_only_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Returns parameter groups in which only the parameters of normalisation layers are perturbed.

    Args:
        model: normalisation layers are torch's own and every module whose class, or a class that it inherits from, has
            a name with ``Norm`` in it, as in ``LlamaRMSNorm``. Theirs are the parameters that such a module holds
            itself, scales and shifts alike; not those of modules inside it.
        options: of the group of these parameters, such as ``rho`` or ``weight_decay=0.0``.

    The radius is that of a vector with few elements: tune it anew. Raises ``TypeError`` for anything but a module,
    ``ValueError`` if no normalisation layer has parameters.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> optimizer = fastsam.SAM(norm_only_groups(model, weight_decay=0.0), torch.optim.SGD, rho=0.5, lr=0.1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module: its layers say which parameters are perturbed")
    layers = [m for m in model.modules() if any(_NAME.search(kind.__name__) for kind in type(m).__mro__)]
    chosen = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    if not chosen:
        found = f"its {len(layers)} normalisation layers have none" if layers else "it has no normalisation layer"
        raise ValueError(
            f"{type(model).__name__} has no parameters of normalisation layers to perturb, as {found}: perturb all, "
            "SAM(model.parameters(), ...), or make groups of your own with perturb=False"
        )
    perturbed = [p for p in model.parameters() if id(p) in chosen]
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups: list[dict[str, Any]] = [{"params": perturbed, **options}, {"params": others, "perturb": False}]
    return groups if others else groups[:1]
