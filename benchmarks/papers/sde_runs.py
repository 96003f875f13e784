"""One path of a process of :mod:`benchmarks.papers.sde`: a row of its table with one seed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.papers.sde import PROBLEMS, PROCESSES, discrete, euler_maruyama
from benchmarks.papers.settings import SdeSettings
from fastsam.commands.training.data import in_memory, open_dataset
from fastsam.commands.training.run import RunFolder
from fastsam.curvature import top_eigenpairs

#: What the six panels show, and the columns of metrics.csv.
PANELS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy, %",
    "parameter_norm": "norm of the parameters",
    "gradient_norm": "norm of the gradient",
    "top_eigenvalue": "top eigenvalue of the Hessian",
}


def run(
    settings: SdeSettings, seed: int, folder: Path, device: str, data_dir: Path | None, save_seconds: float
) -> dict:
    """Follows the path to its end, or goes on from the last checkpoint. The seed draws start, batches and noise."""
    with RunFolder(folder, {**dataclasses.asdict(settings), "seed": seed}) as files:
        if files.result is not None:
            return files.result
        path = ProcessPath(settings, seed, device, data_dir)
        state = files.load()
        if state is None:
            files.log({"step": 0, **path.measure()})
        else:
            path.load_state_dict(state)
        last = begin = time.monotonic()
        seconds = path.seconds
        while path.step < settings.steps:
            path.advance()
            path.seconds = seconds + time.monotonic() - begin
            if path.step % settings.measure_every == 0 or path.step == settings.steps:
                files.log({"step": path.step, **path.measure()})
                if path.step == settings.steps or time.monotonic() - last >= save_seconds:
                    files.save(path.step, path.state_dict())
                    last = time.monotonic()
        about = {"seconds": round(path.seconds, 3), "parameters": len(path.x), "device": path.x.device.type}
        files.finish({"step": path.step, **path.measure(), **about})
        return files.result


class ProcessPath:
    """x, the random numbers to come, and the data, whose training set is cut into batches of one size."""

    def __init__(self, settings: SdeSettings, seed: int, device: str, data_dir: Path | None) -> None:
        self.settings = settings
        splits = open_dataset(settings.data, data_dir=data_dir)
        train, test = in_memory(splits.train), in_memory(splits.test)
        n = settings.train_size or len(train)
        classes, size = len(splits.classes), n // settings.batches
        if size == 0:
            raise ValueError(f"batches={settings.batches} for {n} images: a batch needs at least one")
        mean, std = (train.images.float().mean(), train.images.float().std())
        self.train, self.test = (
            ((s.images.flatten(1).float() - mean).to(device) / std, F.one_hot(s.labels, classes).float().to(device))
            for s in (train, test)
        )
        self.train = tuple(t[: size * settings.batches] for t in self.train)
        self.batches = tuple(t.view(settings.batches, size, -1) for t in self.train)
        features = self.train[0].shape[1]
        parameters, self.logits, self.loss = PROBLEMS[settings.problem](settings.hidden, features, classes)
        self.generator = torch.Generator().manual_seed(seed)
        self.x = (torch.randn(parameters, generator=self.generator) / features**0.5).to(device)
        self.step, self.seconds = 0, 0.0

    def advance(self) -> None:
        s, order = self.settings, PROCESSES[self.settings.process]
        with torch.no_grad():
            if order is None:
                rho = 0.0 if s.process == "SGD" else s.rho
                self.x = discrete(self.loss, self.batches, self.x, lr=s.lr, rho=rho, generator=self.generator)
            for _ in range(0 if order is None else s.substeps):
                self.x = euler_maruyama(
                    self.loss, self.batches, self.x,
                    lr=s.lr, rho=s.rho, order=order, dt=s.lr / s.substeps, generator=self.generator,
                )  # fmt: skip
        self.step += 1

    def measure(self) -> dict[str, float]:
        x = torch.nn.Parameter(self.x.clone())
        loss = self.loss(x, self.train)
        (gradient,) = torch.autograd.grad(loss, x)
        start = torch.ones_like(x)
        pairs = top_eigenpairs(lambda: self.loss(x, self.train), [x], start=[start], products=40)
        with torch.no_grad():
            right = self.logits(x, self.test[0]).argmax(dim=1) == self.test[1].argmax(dim=1)
            return {
                "train_loss": loss.item(),
                "test_loss": self.loss(x, self.test).item(),
                "test_accuracy": 100 * right.double().mean().item(),
                "parameter_norm": x.norm().item(),
                "gradient_norm": gradient.norm().item(),
                "top_eigenvalue": float(pairs.eigenvalues[0]),
            }

    def state_dict(self) -> dict:
        return {"x": self.x, "step": self.step, "seconds": self.seconds, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.x: Tensor = state["x"].to(self.x.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.generator.set_state(state["generator"])
