"""The second side of a step alone: a climb that keeps the first gradient, and a descent that mixes it with the second.

:class:`SecondSide` drives a backend's kernels as an optimizer does, :class:`PlainSecondSide` is written from the
formulas in float64, with the update of torch's own optimizers. Both are followed by :func:`steps_of`.
"""

import torch

from fastsam import kernels
from fastsam.engine.base_rules import fused_rule
from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent, Descent, Mixture

from .scripted import assert_same_rounding, bits, copies, noise, random_gradients
from .table import BASES

RHO = 0.05
TINY = 1e-60  # where there are no gradients, or only zeros


def gsam(sums, group):
    return Mixture(1 + group["share"] * sums[1] / (sums[0] + TINY), -group["share"])


def wsam(sums, group):
    return Mixture(group["share"] / (1 - group["share"]), 1 - group["share"] / (1 - group["share"]))


def decoupled_wsam(sums, group):
    step = 0.05 * group["share"] / (1 - group["share"])
    return Mixture(0.0, 1.0, step, -step)


def stable_sam(sums, group):
    return Mixture((sums[2] / (sums[0] + TINY)) ** 0.5, 0.0)


def look_sam(sums, group):
    return Mixture(1.0, 0.0, keep_gradient=1.0, keep_stored=-sums[1] / (sums[2] + TINY))


def everything(sums, group):
    cosine = sums[1] / ((sums[0] * sums[2]) ** 0.5 + TINY)
    return Mixture(0.8 + cosine, group["share"], 0.01 * group["share"], 0.02 * cosine, 0.5 - cosine, group["share"])


def no_direct_part(sums, group):
    return Mixture(0.5, 0.5)


#: By name: the mixture, and whether it has a next s.
MIXTURES = {
    "GSAM": (gsam, False),
    "WSAM": (wsam, False),
    "decoupled WSAM": (decoupled_wsam, False),
    "Stable SAM": (stable_sam, False),
    "LookSAM": (look_sam, True),
    "everything": (everything, True),
    "no direct part": (no_direct_part, False),
}


def sam(dd, dv, vv, group):
    return RHO / (dd**0.5 + 1e-12), 0.0


sam.closed_form = True


def several_groups(kwargs):
    """What three groups have of their own: a share, no learning rate, the other sign and some decay."""
    return [{}, {"share": 0.3, "lr": 0.0}, {"share": 0.7, "maximize": not kwargs.get("maximize"), "weight_decay": 0.1}]


class _Side:
    """Parameters in the groups of a base optimizer, one after the other in turns."""

    def __init__(self, base, mixture, params, groups=None, grad_scale=1.0, clip_value=None):
        base_class, kwargs = BASES[base]
        own = [{}] if groups is None else groups(kwargs)
        self.params, self.group_of = params, [i % len(own) for i in range(len(params))]
        members = [[p for p, g in zip(params, self.group_of, strict=True) if g == k] for k in range(len(own))]
        common = {"share": 0.45, "rho": RHO, "adaptive": False}
        self.base = base_class([{"params": m, **common, **o} for m, o in zip(members, own, strict=True)], **kwargs)
        self.mixture, self.keeps = MIXTURES[mixture]
        self.grad_scale, self.clip_value = grad_scale, clip_value
        self.rule = fused_rule(self.base)
        self.state_names = [n for n in self.rule.state_names(self.base.param_groups) if n != "step"]


class SecondSide(_Side):
    """On a backend. ``stored`` says whether there is an s at all, ``flattened`` whether gradients are in one buffer.

    ``state_dtype`` is that of s and the next s.
    """

    def __init__(
        self, backend, base, mixture, params, stored=True, max_norm=None, flattened=False, state_dtype=None, **options
    ):
        super().__init__(base, mixture, params, **options)
        self.space = FlatSpace(params, self.group_of, perturbed=True, state_dtype=state_dtype)
        self.space.kernels = kernels.choose(backend, self.space.device, self.space.dtype)
        places = {id(p): i for i, p in enumerate(self.space.owners)}
        self.places = [places[id(p)] for p in params]  # the space's order is that of memory
        self.stored, self.max_norm, self.flattened = stored, max_norm, flattened
        self.started = [False] * len(params)
        self.names = [*(["stored"] if stored else []), *(["stored_next"] if self.keeps else []), *self.state_names]

    def first(self, gradients):
        """gram and climb with the first gradients, which become s."""
        self._take(gradients)
        space = self.space
        space.climbed = [False] * len(self.params)
        ascent = self.ascent()
        self.first_sums = space.kernels.gram(space, ascent)
        space.kernels.climb(space, ascent, self.first_sums)

    def ascent(self):
        ascent = Ascent(self.base.param_groups, sam, grad_scale=self.grad_scale)
        if self.stored:
            ascent.ema_next, ascent.ema_started = self.flat("stored"), [False] * len(self.params)
        return ascent

    def second(self, gradients):
        """gram and descend with the second gradients."""
        self._take(gradients)
        space, s = self.space, self.flat("stored") if self.stored else None
        guard = Ascent(self.base.param_groups, vector=s, grad_scale=self.grad_scale, met=self.first_sums)
        self.sums = space.kernels.gram(space, guard)
        getattr(space.kernels, self.rule.kernel)(space, self.descent(), self.sums)
        if not space.kernels.DECIDES_ON_HOST or self.sums.isfinite().all():
            had = zip(self.started, space.gradients, strict=True)
            self.started = [started or g is not None for started, g in had]

    def descent(self):
        names = self.rule.state_names(self.base.param_groups)
        state = {n: self.space.step_counts().flat if n == "step" else self.flat(n) for n in names}
        descent = Descent(self.rule.groups(self.base.param_groups), state, self.started, self.grad_scale, self.max_norm)
        descent.clip_value, descent.mixtures = self.clip_value, self.mixture
        descent.stored = self.flat("stored") if self.stored else None
        descent.stored_next = self.flat("stored_next") if self.keeps else None
        return descent

    def flat(self, name):
        return self._buffer(name).flat

    def _buffer(self, name):
        return (self.space.vector if name.startswith("stored") else self.space.buffer)(name)

    def all(self):
        """Weights, s, the next s and the base optimizer's state, in the order in which the parameters were given."""
        found = [self.space.params, *(self._buffer(n).views for n in self.names)]
        in_order = [tensors[place].detach() for tensors in found for place in self.places]
        return [torch.where(t.isnan(), 0, t) for t in in_order]  # a momentum that a device has not written yet

    def _take(self, gradients):
        if self.flattened:
            views = [self.space.buffer("gradients").views[place] for place in self.places]
            gradients = [None if g is None else v.copy_(g) for g, v in zip(gradients, views, strict=True)]
        for p, g in zip(self.params, gradients, strict=True):
            if g is not None and g.dtype != p.dtype:
                p.grad_dtype = None
            p.grad = g
        self.space.collect_gradients()


class PlainSecondSide(_Side):
    """In float64, whatever the dtype of the gradients. Lists stand for flat buffers."""

    @torch.no_grad()
    def first(self, gradients):
        if not hasattr(self, "s"):
            self.s, self.s_next = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.before = copies(self.params)
        gradients = [None if g is None else g.double() * self.grad_scale for g in gradients]
        norm = sum((g * g).sum() for g in gradients if g is not None) ** 0.5
        for i, g in enumerate(gradients):
            if g is not None:
                self.s[i] = g.clone()
                self.params[i] += RHO * g / (norm + 1e-12)

    @torch.no_grad()
    def second(self, gradients):
        gradients = [None if g is None else g.double() * self.grad_scale for g in gradients]
        pairs = [(g, s) for g, s in zip(gradients, self.s, strict=True) if g is not None]
        sums = [float(sum(((g, s)[i] * (g, s)[k]).sum() for g, s in pairs)) for i, k in ((0, 0), (0, 1), (1, 1))]
        direct = {}
        for i, (p, g) in enumerate(zip(self.params, gradients, strict=True)):
            p.copy_(self.before[i])
            p.grad = None
            if g is None:
                continue
            m, s = self.mixture(sums, self.base.param_groups[self.group_of[i]]), self.s[i]
            p.grad = m.gradient * g + m.stored * s
            if self.clip_value is not None:
                p.grad.clamp_(-self.clip_value, self.clip_value)
            direct[p] = m.direct_gradient * g + m.direct_stored * s
            if self.keeps:
                self.s_next[i] = m.keep_gradient * g + m.keep_stored * s
        self.base.step()
        for p, step in direct.items():
            p -= step

    def all(self):
        found = [self.params, self.s, *([self.s_next] if self.keeps else [])]
        for name in self.state_names:
            found.append([self.base.state.get(p, {}).get(name, torch.zeros_like(p)) for p in self.params])
        return [t for tensors in found for t in copies(tensors)]


def compare(backend, base, mixture, dtype, tensors, edit=lambda passes: passes, steps=2, **options):
    """Holds a backend's steps against the specification's, within the rounding of the weights' dtype."""
    records = []
    for name in (backend, "torch"):
        params = [torch.nn.Parameter(t) for t in tensors(dtype)]
        passes = edit([random_gradients(params, 1000 * k) for k in range(2 * steps)])
        records.append(steps_of(SecondSide(name, base, mixture, params, **options), passes))
    assert_same_rounding(*records, dtype)
    return records[0]


def spoiled(backend, base, where, bad, **options):
    """All bits before and after a step that meets ``bad`` in the gradient of pass ``where``, or in s."""
    params = [torch.nn.Parameter(noise((n,), n, torch.float32)) for n in (15, 3000, 40)]
    side = SecondSide(backend, base, "everything", params, groups=several_groups, **options)
    steps_of(side, [random_gradients(params, k) for k in range(2)])
    written = [*params, *map(side.flat, side.names[1:])]  # all but s
    before = bits(written)
    passes = [random_gradients(params, 10 + k) for k in range(2)]
    if where != "s":
        passes[where][1][1234] = bad
    with torch.no_grad():
        side.first(passes[0])
        if where == "s":
            side.space.vector("stored").views[1][1234] = bad
        side.second(passes[1])
    return before, bits(written)


def without_a_step(backend):
    """The weights' bits before and after a step with a learning rate of 0 and gradients of -0.0."""
    weights = noise((3000,), 1, torch.float32)
    weights[::3] = -0.0
    side = SecondSide(backend, "SGD", "no direct part", [torch.nn.Parameter(weights)], groups=lambda _: [{"lr": 0.0}])
    before = bits(side.params)
    steps_of(side, [[torch.full((3000,), -0.0)]] * 2)
    return before, bits(side.params)


def steps_of(side, passes):
    """What ``side`` has after each pass over the lists of gradients in ``passes``, of which every two make a step."""
    seen = []
    with torch.no_grad():
        for k, gradients in enumerate(passes):
            (side.second if k % 2 else side.first)([None if g is None else g.clone() for g in gradients])
            seen.append(side.all())
    return seen
