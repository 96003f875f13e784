"""Tries an installed fastsam: ``python -I installed.py BACKEND``, where that is what serves the CPU's tensors.

Run by the `build` session and by cibuildwheel, in an environment that holds the package and nothing of the checkout.
"""

import json
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

import fastsam

expected = sys.argv[1]
folder = Path(fastsam.__file__).parent
assert folder.is_relative_to(sysconfig.get_path("platlib")), f"{folder} is not the installed package"
assert fastsam.__version__ == version("fastsam-optim")
command = Path(sysconfig.get_path("scripts")) / "fastsam"
info = json.loads(subprocess.run([command, "info", "--json"], capture_output=True, text=True, check=True).stdout)
assert info["backends"][expected]["cpu"] == "picked by auto", info["backends"]
assert "conflict" not in info["versions"]

torch.manual_seed(0)
model, loss_fn = torch.nn.Linear(8, 3), torch.nn.CrossEntropyLoss()
x, y = torch.randn(32, 8), torch.randint(3, (32,))
optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.5, momentum=0.9)


def closure():
    loss = loss_fn(model(x), y)
    loss.backward()
    return loss


losses = [optimizer.step(closure).item() for _ in range(20)]
assert losses[-1] < 0.8 * losses[0], losses
print(f"fastsam {fastsam.__version__}, torch {torch.__version__}, {expected} kernels")
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
