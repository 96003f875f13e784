"""Random problems: compiled backends follow the specification, and what is perturbed is restored."""

from dataclasses import dataclass

import pytest
import torch
from conftest import require_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import METHODS
from reference.loops import ReferenceSAM
from reference.scripted import assert_same_rounding, bits, noise, scripted_steps, set_gradients

import fastsam

pytestmark = pytest.mark.filterwarnings("ignore:no parameter has a gradient")


def reversed_axes(t):
    return t.permute(tuple(reversed(range(t.dim()))))


LAYOUTS = {
    "contiguous": lambda t: t,
    "reversed axes": lambda t: reversed_axes(reversed_axes(t).contiguous()),
    "inside a buffer": lambda t: torch.cat([noise((3,), 1, t.dtype), t.flatten()])[3:].view(t.shape),
    "wider rows": lambda t: torch.stack([t, -t], dim=-1)[..., 0],
}
DENSE = ["contiguous", "reversed axes", "inside a buffer"]
METHOD_CLASSES = {"SAM": "SAM", "F-SAM": "FriendlySAM", "Eigen-SAM": "EigenSAM"}


@dataclass
class Tensor:
    shape: tuple
    layout: str
    gradient_layout: str
    missing: list  # for every pass, whether the gradient is missing
    seed: int


@dataclass
class Scenario:
    method: str
    base: type
    dtype: torch.dtype
    groups: list  # (settings, tensors)
    method_settings: dict
    base_settings: dict

    def build(self, make):
        params, groups = [], []
        for settings_, tensors in self.groups:
            members = [torch.nn.Parameter(LAYOUTS[t.layout](noise(t.shape, t.seed, self.dtype))) for t in tensors]
            params += members
            groups.append({"params": members, **settings_})
        optimizer = make(groups)
        if self.method == "Eigen-SAM":
            optimizer.eigenvector = [noise(p.shape, 70 + i, p.dtype) * 0.1 for i, p in enumerate(params)]
        return optimizer, params

    def fastsam(self, backend):
        make = getattr(fastsam, METHOD_CLASSES[self.method])
        return self.build(
            lambda groups: make(groups, self.base, **self.method_settings, **self.base_settings, backend=backend)
        )

    def reference(self):
        name = {"SAM": "SAM", "F-SAM": "adaptive F-SAM", "Eigen-SAM": "Eigen-SAM given v"}[self.method]
        make = METHODS[name].reference
        return self.build(lambda groups: make(groups, self.base, **self.method_settings, **self.base_settings))

    def passes(self):
        tensors = [t for _, members in self.groups for t in members]
        return [
            [
                None if t.missing[k] else LAYOUTS[t.gradient_layout](noise(t.shape, t.seed + 99 * k + 1, self.dtype))
                for t in tensors
            ]
            for k in range(4)
        ]


small_shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
long_shapes = st.integers(1, 20_000).map(lambda n: (n,))
tensors = st.builds(
    Tensor,
    shape=small_shapes | long_shapes,
    layout=st.sampled_from(DENSE),
    gradient_layout=st.sampled_from(list(LAYOUTS)),
    missing=st.lists(st.sampled_from([False, False, False, True]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
unit = st.floats(0, 1, width=32)


@st.composite
def scenarios(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    method = draw(st.sampled_from(list(METHOD_CLASSES)))
    own = {"SAM": {}, "F-SAM": {"sigma": unit, "lmbda": st.floats(0, 0.99)}, "Eigen-SAM": {"alpha": unit}}[method]
    per_group = {"rho": st.floats(0, 2), "adaptive": st.booleans(), **own}
    if draw(st.booleans()):
        base = torch.optim.SGD
        momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
        base_settings = {
            "momentum": momentum,
            "dampening": draw(st.sampled_from([0.0, 0.3])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "maximize": draw(st.booleans()),
        }
        if momentum and not base_settings["dampening"]:
            base_settings["nesterov"] = draw(st.booleans())
    else:
        base = draw(st.sampled_from([torch.optim.Adam, torch.optim.AdamW]))
        base_settings = {
            "betas": (draw(st.floats(0.1, 0.95)), draw(st.floats(0.5, 0.999))),
            "eps": 1e-3,  # so that a division by next to nothing does not blow a last place up
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "maximize": draw(st.booleans()),
        }
    group_settings = st.fixed_dictionaries(
        {}, optional={**per_group, "lr": st.floats(0, 0.1), "perturb": st.booleans()}
    )
    group = st.tuples(group_settings, st.lists(tensors, min_size=1, max_size=4))
    groups = draw(st.lists(group, min_size=1, max_size=3))
    method_settings = {name: draw(strategy) for name, strategy in per_group.items()}
    base_settings["lr"] = 0.05
    return Scenario(method, base, draw(st.sampled_from(dtypes)), groups, method_settings, base_settings)


@pytest.mark.parametrize("fast", ["cpu"])
@given(scenario=scenarios())
@settings(max_examples=250)
def test_backend_equals_the_specification(fast, scenario):
    require_backend(fast)
    records = []
    for name in (fast, "torch"):
        optimizer, params = scenario.fastsam(name)
        records.append(scripted_steps(optimizer, params, scenario.passes()))
    assert_same_rounding(*records, scenario.dtype)


@given(scenario=scenarios(dtypes=(torch.float64,)))
@settings(max_examples=250)
def test_specification_equals_the_authors_loop(scenario):
    optimizer, params = scenario.fastsam("torch")
    reference, reference_params = scenario.reference()
    assert isinstance(reference, ReferenceSAM)
    actual = scripted_steps(optimizer, params, scenario.passes())
    expected = scripted_steps(reference, reference_params, scenario.passes())
    assert_same_rounding(actual, expected, torch.float64, slack=64)


@pytest.mark.parametrize("name", ["torch", "cpu"])
@given(scenario=scenarios())
@settings(max_examples=75)
def test_restore_is_exact(name, scenario):
    require_backend(name)
    optimizer, params = scenario.fastsam(name)
    passes = scenario.passes()
    scripted_steps(optimizer, params, passes)
    before = bits(params)
    set_gradients(params, passes[0])
    with optimizer.perturbed():
        set_gradients(params, passes[1])
    assert bits(params) == before
