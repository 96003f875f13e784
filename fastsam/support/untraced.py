"""Optimizers inside a compiled training step.

``torch.compile`` traces what it is given. A pass of an optimizer is a call into compiled kernels with addresses and
a decision about what counts: nothing to trace. So every entry point breaks the graph before and after itself and runs
as it is; what is compiled, the model, stays compiled.
"""

from __future__ import annotations

import torch

_ENTRY_POINTS = (
    "first_step",
    "second_step",
    "restore",
    "step",
    "finish",
    "accumulate",
    "descend",
    "zero_grad",
    "perturbed",
    "update_eigenvector",
)


def leave_untraced(cls: type) -> None:
    """Has torch.compile leave the entry points that ``cls`` itself defines alone."""
    for name in _ENTRY_POINTS:
        if name in cls.__dict__:
            # What torch.optim's own entry points wear: unlike torch.compiler.disable it imports nothing until called.
            untraced = torch._disable_dynamo(cls.__dict__[name])
            untraced.hooked = name == "step"  # type: ignore[attr-defined]  # torch need not wrap it to run hooks: every form of a step runs them
            setattr(cls, name, untraced)
