"""The processes of a run, which torchrun or ``accelerate launch`` started: one is the ordinary case."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def on_each(act: Callable[[], Value]) -> Value:
    """Returns ``act()``; collective. What it raises on any process is raised on all, so that none waits for another.

    A process on which it did not fail raises ``ValueError`` with the other's rank and message.
    """
    if count() == 1:
        return act()
    value, own = None, None
    try:
        value = act()
    except Exception as error:
        own = error
    for other, message in enumerate(gathered(None if own is None else str(own) or type(own).__name__)):
        if message is not None:
            raise own if own is not None else ValueError(f"process {other} of {count()}: {message}")
    return value  # type: ignore[return-value]  # act() did not raise


def on_first(act: Callable[[], Value]) -> Value:
    """What ``act()`` returns on the first process, on all of them; collective, and raises as :func:`on_each`."""
    return gathered(on_each(lambda: act() if rank() == 0 else None))[0]  # type: ignore[return-value]


def gathered(value: Value) -> list[Value]:
    """The value of each process; collective."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def highest(value: int, device: torch.device) -> int:
    """The highest value of all processes; collective, and waits for the device."""
    if count() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def check_same(facts: dict[str, Any]) -> None:
    """Raises ``ValueError``, on every process, unless all have the same facts of their data and settings."""
    every = gathered({name: _short(value) for name, value in facts.items()})
    for other, found in enumerate(every):
        for name, value in found.items():
            if value != every[0][name]:
                raise ValueError(
                    f"process {other} of {count()} has {name}={value}, and process 0 has {name}={every[0][name]}: "
                    "start all of them with the same options, on the same data and the same checkpoint"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
