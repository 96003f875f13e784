"""Base optimizers with a way of their own to save, load, train and evaluate keep it through the wrapper.

As bitsandbytes (states in 8 bits, which torch's ``load_state_dict`` would cast to the dtype of the weights, and which
are saved in a dict of their own), Ranger21 and SPAM of pytorch_optimizer (counts beside the state), and schedulefree
(``train()`` and ``eval()``).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastsam import SAM, EigenSAM, FriendlySAM

METHODS = {
    "SAM": SAM,
    "F-SAM": FriendlySAM,
    "Eigen-SAM": lambda params, base, **options: EigenSAM(params, base, freq=1, **options),
}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the eigenvector's estimate


class Quantized(torch.optim.Optimizer):
    """SGD with a momentum in 8 bits, one scale a tensor; its entry is called as F-SAM's average is."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                value = p.grad.clone()
                if state:
                    assert state["momentum"].dtype == torch.int8
                    value += group["momentum"] * state["momentum"].float() * state["scale"]
                state["scale"] = value.abs().max().float() / 127
                state["momentum"] = (value / state["scale"]).round().to(torch.int8)
                p.sub_(group["lr"] * value)

    def state_dict(self):
        saved = super().state_dict()
        saved["state"] = {i: {"packed": dict(entry)} for i, entry in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict):
        saved = copy.deepcopy(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        if len(params) != sum(len(group["params"]) for group in saved["param_groups"]):
            raise ValueError("another number of parameters")
        state = {params[i]: entry["packed"] for i, entry in saved["state"].items()}
        groups = [
            {**new, "params": old["params"]} for new, old in zip(saved["param_groups"], self.param_groups, strict=True)
        ]
        self.__setstate__({"state": state, "param_groups": groups})


class Counting(torch.optim.SGD):
    """Every second step is twice as long; the count lies beside the state."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.taken = 0

    def step(self, closure=None):
        self.taken += 1
        for _ in range(1 + self.taken % 2):
            super().step()

    def state_dict(self):
        return {**super().state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict):
        self.taken = state_dict["taken"]
        super().load_state_dict(state_dict)


class Averaging(torch.optim.Optimizer):
    """SGD whose weights are the average of its iterates in eval mode, as schedule-free optimizers have it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "train_mode": True, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("step() in eval mode")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)
                    self.state[p].setdefault("average", p.clone()).lerp_(p, 1 / group["k"])

    def _set_mode(self, train):
        for group in self.param_groups:
            if group["train_mode"] is not train:
                group["train_mode"] = train
                for p in group["params"]:
                    if "average" in self.state[p]:
                        value = p.detach().clone()
                        p.data.copy_(self.state[p]["average"])
                        self.state[p]["average"] = value

    def train(self):
        self._set_mode(True)

    def eval(self):
        self._set_mode(False)


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(model, optimizer, steps):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(5, 5, dtype=model[0].weight.dtype)).square().mean()
            loss.backward()
            return loss

        if isinstance(optimizer, EigenSAM):
            optimizer.step(closure, model=model)
        else:
            optimizer.step(closure)


def saved(state_dict):
    """As it comes back from a file."""
    return copy.deepcopy(state_dict)


@pytest.mark.parametrize("base", [Quantized, Counting, Averaging])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_undisturbed_one(method, base):
    undisturbed, resumed = build(), build()
    optimizer = METHODS[method](undisturbed.parameters(), base, lr=0.1)
    train(undisturbed, optimizer, 3)
    resumed.load_state_dict(undisturbed.state_dict())
    again = METHODS[method](resumed.parameters(), base, lr=0.5)
    again.load_state_dict(saved(optimizer.state_dict()))
    for model, each in ((undisturbed, optimizer), (resumed, again)):
        train(model, each, 3)
    assert all(map(torch.equal, resumed.parameters(), undisturbed.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_state_has_the_dtypes_that_the_base_gives_it(method):
    """Also where the weights are in half precision: neither scale nor momentum has their dtype."""
    model = build(torch.bfloat16)
    optimizer = METHODS[method](model.parameters(), Quantized)
    train(model, optimizer, 2)
    again = METHODS[method](model.parameters(), Quantized)
    again.load_state_dict(saved(optimizer.state_dict()))
    for p in model.parameters():
        assert again.state[p].keys() == optimizer.state[p].keys()
        assert all(again.state[p][k].dtype == v.dtype for k, v in optimizer.state[p].items())
        assert all(torch.equal(again.state[p][k], v) for k, v in optimizer.state[p].items())


def test_a_checkpoint_has_the_form_that_the_base_gives_it():
    model = build()
    optimizer = FriendlySAM(model.parameters(), Quantized)
    train(model, optimizer, 1)
    entry = optimizer.state_dict()["state"][0]
    assert entry.keys() == {"packed", "momentum"}
    assert entry["packed"]["momentum"].dtype == torch.int8
    assert torch.equal(entry["momentum"], optimizer.state[model[0].weight]["momentum"])
    optimizer = SAM(model.parameters(), Counting, lr=0.1)
    train(model, optimizer, 2)
    assert optimizer.state_dict()["taken"] == 2


@pytest.mark.parametrize("base", [Quantized, Counting, Averaging])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_the_base_alone_is_loaded(method, base):
    model, twin = build(), build()
    alone = base(model.parameters(), lr=0.1)
    for _ in range(3):
        alone.zero_grad()
        model(torch.ones(5, 5)).square().mean().backward()
        alone.step()
    twin.load_state_dict(model.state_dict())
    optimizer = METHODS[method](twin.parameters(), base, lr=0.1)
    optimizer.load_state_dict(saved(alone.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        entry = optimizer.state[q]
        for name, value in alone.state[p].items():
            assert torch.equal(entry[f"base_{name}" if f"base_{name}" in entry else name], value)
    assert getattr(optimizer.base_optimizer, "taken", 3) == 3


def test_a_load_that_fails_changes_nothing_of_the_base():
    model = build()
    optimizer = SAM(model.parameters(), Counting, lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    before = saved(optimizer.state_dict())
    assert before["taken"] == 2
    other = SAM([nn.Parameter(torch.ones(2))], Counting, lr=0.2, momentum=0.9)
    with pytest.raises(ValueError):
        optimizer.load_state_dict({**other.state_dict(), "taken": 5})
    after = optimizer.state_dict()
    assert after["taken"] == 2
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i][k], v) for i, e in before["state"].items() for k, v in e.items())


# ---- train() and eval() ----------------------------------------------------------------------------------------------


def test_evaluation_sees_the_weights_that_the_base_gives_it():
    model, twin = build(), build()
    optimizer, alone = SAM(model.parameters(), Averaging, rho=0.0), Averaging(twin.parameters())
    for _ in range(3):
        train(model, optimizer, 1)
        alone.zero_grad()
        twin(torch.ones(5, 5)).square().mean().backward()
        alone.step()
    for mode in ("eval", "eval", "train", "eval"):
        getattr(optimizer, mode)()
        getattr(alone, mode)()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert optimizer.param_groups[0]["train_mode"] is False


def test_a_base_without_modes_is_left_alone():
    model = build()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.eval()
    optimizer.train()
    assert all(map(torch.equal, model.parameters(), before))


def test_evaluation_mode_is_refused_between_the_passes_and_the_weights_come_back():
    model = build()
    optimizer = SAM(model.parameters(), Averaging, rho=0.5)
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(5, 5)).square().mean().backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"eval\(\) within a step"):
        optimizer.eval()
    optimizer.train()  # which frameworks call before each pass
    optimizer.restore()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_step_in_eval_mode_is_the_bases_error_and_changes_nothing():
    model = build()
    optimizer = SAM(model.parameters(), Averaging, rho=0.5)
    train(model, optimizer, 2)
    optimizer.eval()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in eval mode"):
        train(model, optimizer, 1)
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.train()
    train(model, optimizer, 1)


def test_frameworks_reach_the_modes_through_their_wrappers():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from fastsam.integrations.accelerate import SAMOptimizer

    model = build()
    optimizer = SAM(model.parameters(), Averaging)
    try:
        wrapped = SAMOptimizer(optimizer, accelerate.Accelerator(cpu=True))
        wrapped.eval()
        assert optimizer.param_groups[0]["train_mode"] is False
        wrapped.train()
        assert optimizer.param_groups[0]["train_mode"] is True
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
