"""The mode in which an optimizer reads and writes tensors."""

from __future__ import annotations

import torch


class PlainMode:
    """``with PlainMode(): ...``: no gradients are recorded, and new tensors are ordinary ones in inference mode, too.

    An evaluation under ``torch.inference_mode()`` may perturb weights; the buffers made there must serve training.
    Equal to ``torch.no_grad()`` elsewhere, at a tenth of its cost: a step of a small model notices.
    """

    __slots__ = ("_grad", "_inference")

    def __enter__(self) -> None:
        self._inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        if self._inference is not None:
            self._inference.__enter__()
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *exception) -> None:
        torch._C._set_grad_enabled(self._grad)
        if self._inference is not None:
            self._inference.__exit__(*exception)
