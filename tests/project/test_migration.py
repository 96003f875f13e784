"""The migration page: its loops run, and what it says of other code's checkpoints is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from digits import batches
from torch import nn

import fastsam
from fastsam.loop.foreign import any_foreign

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
LOOPS = {
    title: block
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    for block in re.findall(r"```python\n(.*?)```", body, re.S)
}


def setting() -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    return {"torch": torch, "model": model, "criterion": nn.CrossEntropyLoss(), "loader": batches(5)}


@pytest.mark.filterwarnings("ignore:power iteration found the negative eigenvalue")
@pytest.mark.parametrize("title", LOOPS)
def test_the_loop_of_the_page_trains(title):
    names = setting()
    x, y = names["loader"][0]
    before = names["criterion"](names["model"](x), y).item()
    exec(LOOPS[title], names)
    assert names["criterion"](names["model"](x), y).item() < before
    assert not any_foreign(names["model"].parameters())


def test_every_source_has_a_loop():
    assert len(LOOPS) == 5


def train(cls, steps: int):
    names = setting()
    model = names["model"].double()
    optimizer = cls(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model, optimizer, steps: int) -> None:
    for x, y in batches(steps):
        for finish in (optimizer.first_step, optimizer.second_step):
            nn.functional.cross_entropy(model(x.double()), y).backward()
            finish(zero_grad=True)


@pytest.mark.parametrize("name", ["SAM", "FriendlySAM"])
def test_pytorch_optimizers_trajectory_and_checkpoint_carry_over(name):
    theirs = getattr(pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed"), name)
    ours = getattr(fastsam, name)
    (model, optimizer), (other, other_optimizer) = train(ours, 4), train(theirs, 4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    resumed = ours(other.parameters(), torch.optim.SGD, lr=0.1)
    resumed.load_state_dict(other_optimizer.state_dict())
    go_on(model, optimizer, 3)
    go_on(other, resumed, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
