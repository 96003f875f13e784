"""The two-pass protocol that every method shares.

    climb     d from the gradients at w;  w <- w + e
    descend   w restored;  the base optimizer's update with the gradients at w + e

A step is a transaction: it happens as a whole, or (an exception, a NaN, an infinity) weights and state are bit
for bit what they were before it. The methods in ``fastsam.methods`` add which vectors span e and with which
coefficients; the base optimizer stays a real ``torch.optim`` optimizer with the same groups and state.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.amp import GradScaler

from fastsam.amp import forget_pass
from fastsam.checkpoint import checked, in_this_layout
from fastsam.checks import check_real, flag
from fastsam.closures import ClosureSteps
from fastsam.distributed import Ranks
from fastsam.passes import Accumulated
from fastsam.spaces import Spaces, takes_part

#: Added to every norm before a division, as the authors of SAM do.
NORM_EPSILON = 1e-12


class SharpnessAware(ClosureSteps):
    """Base class of the methods: owns the flat spaces and runs the passes.

    A method subclasses it, names its hyper-parameters in ``defaults``, sets the class attributes below, and
    overrides :meth:`coefficients` and :meth:`check_group`.
    """

    #: d = g - sigma m with an exponential moving average m of the gradients
    uses_ema = False
    #: a second vector v, the top Hessian eigenvector
    uses_eigenvector = False
    #: whether an adaptive group's norm is of |w| d (ASAM) or of d
    weighted_norm = True

    def __init__(self, params, base_optimizer: Callable, defaults: dict, backend: str, base_kwargs: dict) -> None:
        if isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"base_optimizer={type(base_optimizer).__name__}(...) is an optimizer already; pass its class and the "
                "arguments: SAM(params, torch.optim.SGD, rho=0.05, lr=0.1)"
            )
        if not callable(base_optimizer):
            raise TypeError(f"base_optimizer={base_optimizer!r} must be an optimizer class, such as torch.optim.SGD")
        if _needs_closure(base_optimizer):
            raise TypeError(
                f"base_optimizer={base_optimizer.__name__} evaluates a closure in its own step() and cannot make the "
                "update of one second gradient: take one whose step() needs none, such as torch.optim.SGD"
            )
        self._ranks = Ranks(base_kwargs.pop("process_group", None), base_kwargs.pop("m_sharpness", False))
        self._spaces = Spaces(backend, self._ranks)
        self._perturbed = False
        self._state_is_empty = False
        self._sums: Tensor | None = None
        self._first_scaler: GradScaler | None = None
        self._accumulated: Accumulated | None = None
        # Where base optimizer and method use one name for two things (RMSprop's alpha, Adadelta's rho), the
        # method's is called sam_<name> in the groups.
        taken = _arguments(base_optimizer)
        self._aliases = {name: f"sam_{name}" for name in defaults if name in taken}
        defaults = {self._aliases.get(name, name): value for name, value in defaults.items()}
        super().__init__(params, {**defaults, "perturb": True, **base_kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults.update(self.base_optimizer.defaults)
        self._share_with_base()

    # ---- what a method says of itself ------------------------------------------------------------------

    def coefficients(self, dd: float, dv: float, vv: float, group: dict) -> tuple[float, float]:
        """(c_d, c_v) of the perturbation e = c_d d + c_v v, from the Gram sums <d,d>, <d,v> and <v,v>."""
        raise NotImplementedError

    def check_group(self, group: dict) -> None:
        """Raises ``ValueError`` for a hyper-parameter of ``group`` outside its range."""

    # ---- the two passes --------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Climbs: w <- w + e, from the gradients at w. ``zero_grad`` clears them afterwards.

        With a ``grad_scaler`` the gradients are those of ``grad_scaler.scale(loss)`` (see ``fastsam.amp``).

        Raises ``RuntimeError`` if the weights are perturbed already, ``ValueError`` or ``TypeError`` for
        gradients or hyper-parameters that cannot be used; nothing has changed then.
        """
        if self._perturbed:
            raise RuntimeError(
                "first_step() was called twice in a row: the weights are perturbed already; "
                "call second_step(), or restore() to abandon the step"
            )
        if self._accumulated is not None:
            raise RuntimeError(
                "first_step() after accumulate(closure): call descend() for the step's update, or zero_grad() before "
                "the backward pass to abandon it"
            )
        self._climb(grad_scaler)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(
        self,
        zero_grad: bool = False,
        *,
        grad_scaler: GradScaler | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        """Restores w and applies the base optimizer's update with the gradients at w + e.

        ``max_norm`` clips these to a global norm, ``clip_value`` each to a magnitude, as torch's ``clip_grad_norm_``
        and ``clip_grad_value_`` do, without a pass of its own. ``grad_scaler``: the one given to ``first_step``.

        After any exception the weights are restored and no state has changed. Raises ``RuntimeError`` without a
        ``first_step`` before it.
        """
        if not self._perturbed:
            raise RuntimeError("second_step() without first_step(): compute gradients, call first_step(), then again")
        self._update(None, dict(grad_scaler=grad_scaler, max_norm=max_norm, clip_value=clip_value))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back and abandons the step; does nothing if they are not perturbed.

        Wherever they lie by now: a model may have been moved or cast meanwhile. Raises ``RuntimeError``, when all
        others are back, for a parameter that was given another shape.
        """
        if not self._perturbed:
            return
        self._spaces.restore()
        self._weights_changed()
        self._spaces.release_gradients()
        self._perturbed = False
        forget_pass(self._first_scaler, self)

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """``with opt.perturbed(): ...``: climbs on entry, restores the weights on exit whatever happens.

        No update is made. The gradients at entry give the perturbation.
        """
        self.first_step()
        try:
            yield
        finally:
            self.restore()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears every gradient; those of :func:`fastsam.flatten_parameters` are zeroed where they are."""
        self._accumulated = None
        self._clear_gradients(set_to_none)

    @property
    def found_inf(self) -> Tensor:
        """1.0 where the last step met a NaN or an infinity and changed nothing, else 0.0; float32, 0-dimensional.

        A tensor on the device of the first parameter, so that reading the attribute does not wait for it.
        """
        if self._sums is None:
            return torch.zeros((), device=self.param_groups[0]["params"][0].device)
        return (~self._sums.isfinite().all()).float()

    @found_inf.setter
    def found_inf(self, _) -> None:  # what GradScaler.step does first
        raise RuntimeError(
            "grad_scaler.step(optimizer) cannot run two passes: write optimizer.first_step(grad_scaler=scaler), "
            "then optimizer.second_step(grad_scaler=scaler) and scaler.update()"
        )

    #: Has GradScaler.step call us even where it found an overflow: nobody else would restore the weights.
    _step_supports_amp_scaling = True

    # ---- groups, state and checkpoints -------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """``torch.optim.Optimizer.add_param_group``; a group may also say ``perturb=False``.

        Such a group is updated, but neither climbed nor backed up. Raises ``ValueError`` or ``TypeError`` for
        hyper-parameters out of range and for parameters that are not real floating-point tensors.
        """
        if self._perturbed or self._accumulated is not None:
            raise RuntimeError("add_param_group() within a step: call second_step(), or descend(), first")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(self._method_groups()[-1])
            flag("perturb", group["perturb"])
            self._ranks.check_parameters(group["params"])
            for p in group["params"]:
                if takes_part(p) or not isinstance(p, torch.nn.Parameter):  # a layer may keep frozen integers
                    check_real(p)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict:
        """As torch's own: the base optimizer's state and the method's, never the backup.

        Raises ``RuntimeError`` between the passes: a checkpoint written there would hold perturbed weights.
        """
        if self._perturbed:
            raise RuntimeError(
                "state_dict() between first_step() and second_step(): the weights are perturbed; "
                "take the checkpoint after second_step(), or call restore() first"
            )
        self._forget_marks()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads a checkpoint of this method, of the authors' code, or of the base optimizer alone.

        What the checkpoint's groups do not name keeps its present value; their ``old_p`` is left out. After any
        exception groups and state are as before.
        """
        if self._perturbed:
            raise RuntimeError("load_state_dict() between first_step() and second_step(): finish the step first")
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(checked(in_this_layout(state_dict, self), self))
            with self._own_state_hidden():
                self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        except BaseException:  # the base optimizer looks at a state that is in its place by then
            self.__dict__.update(before)
            self.base_optimizer.__dict__.update(before)
            raise
        self._accumulated = None
        self._share_with_base()
        self._state_is_empty = False
        if self.uses_ema:
            self._spaces.forget_never_started(self.state)  # of a checkpoint written before the first step

    def __getstate__(self) -> dict:
        if self._perturbed:
            raise RuntimeError("copying an optimizer between first_step() and second_step(): finish the step first")
        self._forget_marks()
        own = {k: v for k, v in self.__dict__.items() if k != "step"}  # a scheduler's wrapper is bound to this one
        # The base optimizer finds the state here again; of its own, it would take the method's for its own.
        base = object.__new__(type(self.base_optimizer))
        base.__dict__.update(self.base_optimizer.__dict__, state=defaultdict(dict))
        return {
            **own,
            "base_optimizer": base,
            "_spaces": Spaces(self._spaces.backend, self._ranks),
            "_sums": None,
            "_first_scaler": None,
            "_accumulated": None,
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:  # a copied or unpickled optimizer, not a loaded state dict
            self.base_optimizer.param_groups = self.param_groups
            self.base_optimizer.state = self.state

    # ---- underneath --------------------------------------------------------------------------------------

    def _share_with_base(self) -> None:
        """One list of groups and one state for both, so that either can be scheduled, saved or inspected."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _method_groups(self) -> list[dict]:
        """The groups as the method names its hyper-parameters."""
        if not self._aliases:
            return self.param_groups
        return [{**g, **{name: g[alias] for name, alias in self._aliases.items()}} for g in self.param_groups]


def _arguments(base_optimizer: Callable) -> set[str]:
    """Names of the hyper-parameters of a base optimizer, which a subclass may pass on as ``**kwargs``."""
    if not isinstance(base_optimizer, type):
        return set(inspect.signature(base_optimizer).parameters)
    return {name for cls in base_optimizer.__mro__ for name in inspect.signature(cls.__init__).parameters}


def _needs_closure(base_optimizer: Callable) -> bool:
    """Whether it is a class like ``torch.optim.LBFGS``."""
    step = getattr(base_optimizer, "step", None)
    closure = None if step is None else inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
