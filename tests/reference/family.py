"""The rest of SAM's family, each written out tensor by tensor from its formulas.

Every loop is stepped like those in `loops`: `first_step` between the passes, `second_step` after the last one. How
many passes the next step makes is `evaluations`; `take_step` makes a whole step of any of them.

Where some parameters are not perturbed (`perturb=False`, or no gradient in one of the passes), they follow the base
optimizer with the gradient of the last pass, and every sum is over the others.
"""

import torch

from .loops import TINY, ReferenceSAM, total_norm
from .table import Method


def take_step(optimizer, closure, ascent_closure=None):
    """One whole step with as many evaluations as the method makes; returns the loss of the first one.

    `ascent_closure`, the loss of a part of the batch, is what the first of two passes evaluates.
    """
    optimizer.zero_grad()
    loss = None
    if getattr(optimizer, "evaluations", 2) == 2:
        loss = (ascent_closure or closure)()
    optimizer.first_step()
    optimizer.zero_grad()
    last = closure()
    optimizer.second_step()
    return last if loss is None else loss


def dot(first, second):
    return sum(((a * b).sum() for a, b in zip(first, second, strict=True)), torch.zeros((), dtype=torch.float64))


class ReferenceMomentumSAM(ReferenceSAM):
    """e = -rho b / |b|, b the momentum of the base optimizer as its last step left it (Becker et al. 2024).

    No gradient is needed to climb, so a step is one evaluation. Before the base has a momentum e is 0: the first step
    is the base's. The radius is read when climbing, and the weights lie unperturbed between two steps.
    """

    evaluations = 1

    @torch.no_grad()
    def first_step(self):
        climbing = [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if self.momentum(p) is not None and self.setting(group, "perturb")
        ]
        for (_, p), e in zip(climbing, self.perturbations(climbing), strict=True):
            self.backup[p] = p.detach().clone()
            p.add_(e)

    def momentum(self, p):
        state = self.base_optimizer.state[p]
        return state.get("momentum_buffer", state.get("exp_avg"))

    def directions(self, climbing):
        return [-self.momentum(p) for _, p in climbing]


class ReferenceVaSSO(ReferenceSAM):
    """SAM along m, which is first the first gradient and later (1 - theta) m + theta g (Li and Giannakis 2023)."""

    def __init__(self, params, base_optimizer, rho=0.05, theta=0.4, adaptive=False, **base_kwargs):
        super().__init__(params, base_optimizer, rho, adaptive, **base_kwargs)
        self.hyper.update(theta=theta)
        self.average = {}

    def directions(self, climbing):
        for group, p in climbing:
            theta, m = self.setting(group, "theta"), self.average.get(p)
            self.average[p] = p.grad.clone() if m is None else (1 - theta) * m + theta * p.grad
        return [self.average[p] for _, p in climbing]


class _KeepsTheFirstGradient(ReferenceSAM):
    """SAM's climb; before the base steps, `combine` turns the second gradients into what it steps with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.first = {}

    def first_step(self):
        self.first = {p: p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        super().first_step()

    @torch.no_grad()
    def second_step(self):
        climbed = [(g, p) for g in self.param_groups for p in g["params"] if p in self.backup and p.grad is not None]
        first, second = [self.first[p] for _, p in climbed], [p.grad.clone() for _, p in climbed]
        for (_, p), h in zip(climbed, self.combine(climbed, first, second), strict=True):
            p.grad.copy_(h)
        super().second_step()

    def combine(self, climbed, first, second):
        raise NotImplementedError


class ReferenceGSAM(_KeepsTheFirstGradient):
    """h = g+ - alpha (g - <g, g+> / |g+|^2 g+): less of g's part orthogonal to g+ (Zhuang et al. 2022)."""

    def __init__(self, params, base_optimizer, rho=0.05, alpha=0.4, adaptive=False, **base_kwargs):
        super().__init__(params, base_optimizer, rho, adaptive, **base_kwargs)
        self.hyper.update(alpha=alpha)

    def combine(self, climbed, first, second):
        norm = total_norm(second) + TINY
        along = dot(first, second) / norm / norm
        return [
            g_plus - self.setting(group, "alpha") * (g - along * g_plus)
            for (group, _), g, g_plus in zip(climbed, first, second, strict=True)
        ]


class ReferenceStableSAM(_KeepsTheFirstGradient):
    """h = (|g| / |g+|) g+: the second gradient's direction at the first one's length (Tan et al. 2024)."""

    def combine(self, climbed, first, second):
        scale = total_norm(first) / (total_norm(second) + TINY)
        return [scale * g_plus for g_plus in second]


class ReferenceWSAM(_KeepsTheFirstGradient):
    """h = g + c (g+ - g), c = gamma / (1 - gamma) (Yue et al. 2023).

    Decoupled, the base steps with g, and then w <- w - lr c (g+ - g), with a plus sign if the base maximizes.
    """

    def __init__(self, params, base_optimizer, rho=0.05, gamma=0.9, adaptive=False, decouple=True, **base_kwargs):
        super().__init__(params, base_optimizer, rho, adaptive, **base_kwargs)
        self.hyper.update(gamma=gamma)
        self.decouple = decouple
        self.sharpness = []

    def weight(self, group):
        gamma = self.setting(group, "gamma")
        return gamma / (1 - gamma)

    def combine(self, climbed, first, second):
        parts = [g_plus - g for g, g_plus in zip(first, second, strict=True)]
        if self.decouple:
            self.sharpness = [(group, p, part) for (group, p), part in zip(climbed, parts, strict=True)]
            return first
        return [g + self.weight(group) * part for (group, _), g, part in zip(climbed, first, parts, strict=True)]

    @torch.no_grad()
    def second_step(self):
        super().second_step()
        for group, p, part in self.sharpness:
            sign = 1 if group.get("maximize") else -1
            p.add_(part, alpha=sign * group["lr"] * self.weight(group))
        self.sharpness = []


class ReferenceLookSAM(_KeepsTheFirstGradient):
    """SAM at every k-th step, from the first on; in between its sharpness is added again (Liu et al. 2022).

    A SAM step keeps g_v = g+ - <g, g+> / |g|^2 g. Until the next one h = g + alpha |g| / |g_v| g_v, from one
    evaluation at w. All norms are of the whole vectors.
    """

    def __init__(self, params, base_optimizer, rho=0.05, k=5, alpha=0.7, adaptive=False, **base_kwargs):
        super().__init__(params, base_optimizer, rho, adaptive, **base_kwargs)
        self.hyper.update(alpha=alpha)
        self.k, self.steps, self.kept = k, 0, {}

    @property
    def evaluations(self):
        return 2 if self.steps % self.k == 0 else 1

    def first_step(self):
        if self.evaluations == 2:
            super().first_step()

    @torch.no_grad()
    def second_step(self):
        if self.evaluations == 1:
            reused = [(group, p) for group in self.param_groups for p in group["params"] if p in self.kept]
            reused = [(group, p) for group, p in reused if p.grad is not None]
            scale = total_norm([p.grad for _, p in reused]) / (total_norm([self.kept[p] for _, p in reused]) + TINY)
            for group, p in reused:
                p.grad.add_(self.setting(group, "alpha") * scale * self.kept[p])
        super().second_step()
        self.steps += 1

    def combine(self, climbed, first, second):
        if self.evaluations == 2:
            norm = total_norm(first) + TINY
            along = dot(first, second) / norm / norm
            self.kept = {p: b - along * a for (_, p), a, b in zip(climbed, first, second, strict=True)}
        return second


#: Rows for `table.METHODS`, under the names that the classes have in fastsam.
FAMILY = {
    "Momentum-SAM": Method("MomentumSAM", ReferenceMomentumSAM, {"rho": 0.3}),
    "adaptive Momentum-SAM": Method("MomentumSAM", ReferenceMomentumSAM, {"rho": 1.0, "adaptive": True}),
    "VaSSO": Method("VaSSO", ReferenceVaSSO, {"rho": 0.05, "theta": 0.4}),
    "adaptive VaSSO": Method("VaSSO", ReferenceVaSSO, {"rho": 0.5, "theta": 0.2, "adaptive": True}),
    "GSAM": Method("GSAM", ReferenceGSAM, {"rho": 0.05, "alpha": 0.4}),
    "adaptive GSAM": Method("GSAM", ReferenceGSAM, {"rho": 0.5, "alpha": 0.2, "adaptive": True}),
    "Stable SAM": Method("StableSAM", ReferenceStableSAM, {"rho": 0.05}),
    "WSAM": Method("WSAM", ReferenceWSAM, {"rho": 0.05, "gamma": 0.9}),
    "WSAM coupled": Method("WSAM", ReferenceWSAM, {"rho": 0.05, "gamma": 0.8, "decouple": False}),
    "LookSAM": Method("LookSAM", ReferenceLookSAM, {"rho": 0.05, "k": 5, "alpha": 0.7}),
    "LookSAM k=3": Method("LookSAM", ReferenceLookSAM, {"rho": 0.1, "k": 3, "alpha": 0.3}),
}
