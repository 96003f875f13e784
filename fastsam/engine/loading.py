"""State dicts: what an optimizer saves, and what it loads: its own, those of the authors' code, of other packages, of a
plain base optimizer. Also what may be assigned to its groups and its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsam.engine.base_rules import fused_rule
from fastsam.engine.base_update import entries, own_state_hidden
from fastsam.engine.step import Step
from fastsam.support.checks import describe

#: Hyper-parameters that tell the methods apart.
_OF_ONE_METHOD = ("sigma", "lmbda", "freq", "alpha", "gamma", "theta", "k")


def packed(step: Step) -> dict[str, Any]:
    """The state dict of base optimizer and method, in which the base optimizer's part has its own form."""
    base, names = step.base, step.own_names
    with own_state_hidden(base, names):
        found = base.state_dict()
    numbers = {p: i for i, p in enumerate(step.parameters())}
    for p, entry in entries(step.state):
        saved = found["state"].get(numbers.get(p))
        if saved is not entry:  # torch's own packs the very entry, in which the method's part is visible again by now
            saved = {f"base_{name}" if name in names else name: value for name, value in (saved or {}).items()}
            found["state"][numbers[p]] = saved | {name: entry[name] for name in names if name in entry}
    return found


def load(step: Step, state_dict: dict[str, Any]) -> None:
    """Loads a state dict of any known layout; after an exception groups and state are as before."""
    base, names = step.base, step.own_names
    state_dict = checked(in_this_layout(state_dict, step), step)
    theirs: dict[Any, Any] = {}
    own: dict[Any, dict[str, Tensor]] = {}
    for i, entry in state_dict["state"].items():
        if not isinstance(entry, dict):
            theirs[i] = entry
            continue
        own[i] = {name: entry[name] for name in names if name in entry}
        rest = {
            name.removeprefix("base_") if name.removeprefix("base_") in names else name: value
            for name, value in entry.items()
            if name not in names
        }
        if rest:  # an optimizer takes an entry, even an empty one, for one of its own
            theirs[i] = rest
    before = dict(base.__dict__)  # some keep counts beside the state
    try:
        base.load_state_dict({**state_dict, "state": theirs})
        for _, entry in entries(base.state):
            for name in names:
                if name in entry:
                    entry[f"base_{name}"] = entry.pop(name)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, step.parameters(), strict=True):
            for name, value in own.get(i, {}).items():
                step.state[p][name] = value.to(device=p.device, dtype=step.precision.of_state(p))
    except BaseException:  # the base optimizer looks at a state that is in its place by then
        base.__dict__.clear()
        base.__dict__.update(before)
        raise
    step.accumulated = None
    step.state_is_blank = False
    if step.recipe.averages:
        step.spaces.forget_never_started(step.state)  # of a checkpoint written before the first step


def keep_present_values(base: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook before ``base.load_state_dict``: what the loaded groups do not name keeps its present value."""
    loaded = state_dict["param_groups"]
    present = [{k: v for k, v in group.items() if k != "params"} for group in base.param_groups]
    if len(loaded) != len(present):
        return state_dict  # torch says so itself
    return {**state_dict, "param_groups": [{**a, **b} for a, b in zip(present, loaded, strict=True)]}


def check_groups(groups: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what cannot be an optimizer's groups."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise TypeError(f"param_groups={type(groups).__name__} must be a list of dicts, as optimizer.param_groups is")
    for i, group in enumerate(groups):
        if not isinstance(group.get("params"), list) or not all(isinstance(p, Tensor) for p in group["params"]):
            raise TypeError(f"group {i} of param_groups must have a list of parameters under 'params'")
    params = [p for group in groups for p in group["params"]]
    if len(set(params)) < len(params):
        raise ValueError("a parameter is twice in param_groups: leave it in one group")


def check_state(state: Any, groups: list[dict]) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what cannot be the state of an optimizer of these groups."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state={type(state).__name__} must be a dict by parameter, as optimizer.state is")
    known = {p for group in groups for p in group["params"]}
    for p in state:
        if isinstance(p, Tensor) and p not in known:
            raise ValueError(
                f"the state has an entry for {describe(p)} that is in no group: it is another optimizer's; "
                "load one with optimizer.load_state_dict(other.state_dict())"
            )


def in_this_layout(state_dict: dict[str, Any], step: Step) -> dict[str, Any]:
    """A checkpoint of this method, of the authors' code, of davda54's SAM, of pytorch_optimizer or of a plain base.

    What the groups do not name keeps its present value. ``old_p``, the backup that other implementations leave in
    their state, is left out. pytorch_optimizer's F-SAM keeps the base optimizer's state in a dict of its own.
    """
    _check_method(state_dict["param_groups"], step)
    groups = [
        {**{k: v for k, v in mine.items() if k != "params"}, **theirs}
        for mine, theirs in zip(step.base.param_groups, state_dict["param_groups"], strict=False)
    ] + state_dict["param_groups"][len(step.base.param_groups) :]
    base = state_dict.get("base_optimizer", {}).get("state", {})
    state = {
        i: {k: v for k, v in {**base.get(i, {}), **s}.items() if k != "old_p"} if isinstance(s, dict) else s
        for i, s in {**base, **state_dict["state"]}.items()
    }
    others = {k: v for k, v in state_dict.items() if k != "base_optimizer"}  # some base optimizers save more than torch
    return {**others, "state": state, "param_groups": groups}


def checked(state_dict: dict[str, Any], step: Step) -> dict[str, Any]:
    """``state_dict`` itself; raises ``ValueError`` if its state is another optimizer's or has other shapes."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in step.base.param_groups for p in group["params"]]
    if len(saved) != len(params):
        return state_dict  # torch says so itself
    own = {"momentum": step.recipe.averages, "eigenvector": step.recipe.eigenvector}
    if step.recipe.stored is not None:
        own[step.recipe.stored] = True
    shaped = {name for name, used in own.items() if used}
    rule = fused_rule(step.base)
    if rule is not None:
        shaped |= {"momentum_buffer", "exp_avg", "exp_avg_sq"}
        for name, used in own.items():
            if not used and any(name in state_dict["state"].get(i, ()) for i in saved):
                raise ValueError(
                    f"the checkpoint is another method's: its state has {name!r}, which {step.method} "
                    "does not keep; build the optimizer that wrote it, or take that entry out of its state"
                )
        keeps = set(rule.state_names(step.base.param_groups))
        for i in saved:
            found = state_dict["state"].get(i, {}).keys() - own.keys()
            # SGD counts no steps; the others do, and keep all of theirs.
            if found and (not keeps <= found if "step" in keeps else "step" in found):
                raise ValueError(
                    f"the checkpoint is another base optimizer's: its state has {', '.join(sorted(found))}, where "
                    f"{type(step.base).__name__} keeps {', '.join(sorted(keeps)) or 'none'}; build the "
                    "optimizer that wrote it"
                )
    for i, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            if name in shaped and isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"the checkpoint is another model's: its {name!r} has shape {tuple(value.shape)} for {describe(p)}"
                )
    return state_dict


def _check_method(saved_groups: list[dict], step: Step) -> None:
    """The groups of a fastsam checkpoint, which ``perturb`` marks, name the hyper-parameters of their method."""
    for saved, mine in zip(saved_groups, step.base.param_groups, strict=False):
        if "perturb" not in saved:
            continue
        rmsprops = {"alpha"} if "centered" in saved or "centered" in mine else set()  # which has one of its own
        other = [k for k in _OF_ONE_METHOD if (k in saved) != (k in mine) and k not in rmsprops]
        if other:
            raise ValueError(
                f"the checkpoint is another method's: its groups {'have' if other[0] in saved else 'lack'} "
                f"{other[0]!r}, unlike those of {step.method}; build the optimizer that wrote it"
            )
