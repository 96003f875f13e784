"""The first samples of a batch, for a first pass on a part of it.

    part = first_part((images, labels), 0.25)  # the first quarter of each, rounded up
    optimizer.step(closure, ascent_closure=lambda: closure(*part))

A batch is what a data loader gives: tensors whose first dimension is the batch, in dicts and other mappings (the
BatchEncoding of Transformers), lists, tuples, named tuples and dataclasses, nested as one likes. The shallowest tensor
says how many samples there are. A list with an item for each sample (targets of detection, file names) is cut as well.
Numbers, single strings, None and tensors without dimensions belong to the whole batch and stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def check_share(share: float, name: str = "ascent_share") -> None:
    """Raises ``ValueError`` unless ``share`` is a number in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"{name}={share!r} must be a number in (0, 1]: the share of the batch in the first pass")


def first_part(batch: Any, share: float, name: str = "batch") -> Any:
    """The first ``ceil(share * n)`` of the n samples of ``batch``, as views of its tensors.

    The containers are new and of the same types; ``batch`` does not change. A share of 1 returns it as it is. Raises
    ``ValueError`` for a share outside (0, 1], for a batch without a tensor that has a first dimension, and for tensors
    and lists of other lengths than the batch's, ``TypeError`` for an object of a type that it does not know; both
    name where it is, as in ``batch['labels']``.
    """
    check_share(share)
    if share == 1:
        return batch
    samples = _number_of_samples(batch)
    if samples is None:
        raise ValueError(f"{name} ({_described(batch)}) has no tensor with a first dimension to divide. {_REMEDY}")
    # Without the rounding 0.07 of 100 samples would be 8, as 0.07 * 100 > 7 in floating point.
    return _Division(samples, max(1, math.ceil(round(share * samples, 9)))).of(batch, name)


_REMEDY = (
    "ascent_share takes the first samples of tensors whose first dimension is the batch, and of lists with an item for "
    "each sample: have the collate function make such, leave ascent_share at 1, or give the part yourself in a loop of "
    "your own, optimizer.step(closure, ascent_closure=part)"
)


@dataclasses.dataclass(frozen=True)
class _Division:
    samples: int
    kept: int

    def of(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return self._of_tensor(value, place)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, (list, tuple)):
            return self._of_sequence(value, place)
        children = dict(_children(value))
        if not children and not isinstance(value, Mapping):
            raise TypeError(f"{place} is of type {type(value).__name__}, which cannot be divided. {_REMEDY}")
        parts = {key: self.of(child, _inside(place, value, key)) for key, child in children.items()}
        return _rebuilt(value, parts)

    def _of_tensor(self, tensor: Tensor, place: str) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        if len(tensor) != self.samples or tensor.layout != torch.strided or tensor.is_nested:
            raise ValueError(f"{place} is {_described(tensor)} in a batch of {self.samples} samples. {_REMEDY}")
        return tensor[: self.kept]

    def _of_sequence(self, value: Any, place: str) -> Any:
        """A container of several things of the batch, such as [x, y]; else a list with an item for each sample."""
        is_one_a_sample = len(value) == self.samples and not hasattr(value, "_fields")
        if not all(isinstance(leaf, _PLAIN) for leaf in _leaves(value)):
            try:
                return _rebuilt(value, {i: self.of(item, f"{place}[{i}]") for i, item in enumerate(value)})
            except (TypeError, ValueError):
                if not is_one_a_sample:
                    raise
        if not is_one_a_sample:
            raise ValueError(f"{place} is {_described(value)} in a batch of {self.samples} samples. {_REMEDY}")
        return value[: self.kept]


def _number_of_samples(batch: Any) -> int | None:
    """The length of the shallowest tensor that has one."""
    level = [batch]
    while level:
        for value in level:
            if isinstance(value, Tensor) and value.dim() > 0:
                return len(value)
        level = [child for value in level for _, child in _children(value)]
    return None


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of a container, by key, index or name; nothing of anything else."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _leaves(value: Any) -> Iterator[Any]:
    children = list(_children(value))
    if not children:
        yield value
    for _, child in children:
        yield from _leaves(child)


def _rebuilt(value: Any, parts: dict[Any, Any]) -> Any:
    """A container of the type of ``value`` with other contents."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts.values())
    if isinstance(value, (list, tuple)):
        return type(value)(parts.values())
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)(parts)  # type: ignore[call-arg]
    made = copy.copy(value)  # a mapping may hold more than its items
    if isinstance(value, Mapping):
        for key, part in parts.items():
            made[key] = part
    else:
        for name, part in parts.items():
            object.__setattr__(made, name, part)  # a frozen one, too
    return made


def _inside(place: str, value: Any, key: Any) -> str:
    return f"{place}[{key!r}]" if isinstance(value, Mapping) else f"{place}.{key}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.layout == torch.strided else f" and layout {value.layout}"
        return f"a {type(value).__name__} of shape {tuple(value.shape)}{kind}"
    length = f" of {len(value)}" if isinstance(value, (list, tuple, Mapping)) else ""
    return f"a {type(value).__name__}{length}"
