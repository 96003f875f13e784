"""What an estimate of the top eigenvector costs and how good it is, on the demo's networks.

    python -m benchmarks.eigen_solvers                        # writes benchmarks/results/eigen_solvers.json
    python -m benchmarks.eigen_solvers --part products        # one part: products, differences or cost

products      Hessian-vector products to a relative residual of 1e-2, by power iteration and by Lanczos
differences   cosine of finite differences with the exact product, in float32 and under bfloat16 autocast
cost          training time of Eigen-SAM over SAM's, freq=100, in alternating steps
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from fastsam import SAM, EigenSAM
from fastsam.commands.demo import settings
from fastsam.commands.demo.train import digits
from fastsam.commands.machine import machine
from fastsam.curvature import Hessian, hessian_vector_product, top_eigenpairs

RESULT = Path(__file__).parent / "results" / "eigen_solvers.json"
TOLERANCE = 1e-2
MOST = 400  # products after which a solver is given up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="networks this small gain nothing from more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = json.loads(options.output.read_text()) if options.part and options.output.exists() else {}
    result["machine"] = machine(options.threads)
    console = Console()
    for name in [options.part] if options.part else PARTS:
        result[name] = PARTS[name](options.seeds)
        print_part(console, name, result[name])
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {options.output}")


def products(seeds: int) -> list[dict]:
    """To the eigenvalue of largest magnitude, in eval mode on one batch, after 0, 50 and 250 steps of SAM.

    Each solver from its own start, noise for power iteration and noise with some gradient for Lanczos, and from the
    other's, which tells how much is due to the start.
    """
    rows = []
    for model_name in settings.MODELS:
        for seed in range(seeds):
            for steps, model, loss in stages(model_name, seed):
                row = {"model": model_name, "seed": seed, "steps": steps}
                with Hessian(loss, model, method="exact") as hessian:
                    noise, gradient = (
                        hessian.tensors(draw(torch.Generator().manual_seed(seed)))
                        for draw in (hessian.random, hessian.start)
                    )
                for name, solver, start in (
                    ("power", "power", noise),
                    ("lanczos", "lanczos", gradient),
                    ("power_from_gradient", "power", gradient),
                    ("lanczos_from_noise", "lanczos", noise),
                ):
                    pairs = top_eigenpairs(
                        loss, model, which="magnitude", solver=solver, products=MOST, tolerance=TOLERANCE,
                        start=start, method="exact",
                    )  # fmt: skip
                    row[name] = pairs.products
                    row[f"{name}_converged"] = pairs.converged
                    row[f"{name}_eigenvalue"] = float(pairs.eigenvalues[0])
                rows.append(row)
    return rows


def differences(seeds: int) -> list[dict]:
    """Against the exact product in float64, for noise, the gradient and the top eigenvector; smooth: ReLU as SiLU."""
    rows = []
    for model_name in (*settings.MODELS, "ResNet, smooth"):
        for seed in range(seeds):
            for steps, model, _ in stages(model_name, seed):
                rows += [{"model": model_name, "seed": seed, "steps": steps, **row} for row in _cosines(model)]
    return rows


def _cosines(model: nn.Module) -> list[dict]:
    x, y = digits(settings.DATA)[0][:64].pair()
    exact = copy.deepcopy(model).double()

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    def autocast_loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    def exact_loss() -> torch.Tensor:
        return F.cross_entropy(exact(x.double()), y)

    params = list(exact.parameters())
    generator = torch.Generator().manual_seed(0)
    directions = {
        "noise": [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params],
        "gradient": torch.autograd.grad(exact_loss(), params),
        "eigenvector": top_eigenpairs(exact_loss, exact, method="exact", generator=generator).vectors[0],
    }
    rows = []
    for name, v in directions.items():
        truth = hessian_vector_product(exact_loss, exact, v, method="exact")
        row = {"direction": name}
        for dtype, fn in (("float32", loss), ("bfloat16", autocast_loss)):
            product = hessian_vector_product(fn, model, [t.float() for t in v], method="finite-difference")
            row[dtype] = _cosine(product, truth)
        rows.append(row)
    return rows


def cost(seeds: int) -> list[dict]:
    """The demo's ViT: blocks of 100 steps, with one estimate each, SAM and both ways to use Eigen-SAM.

    They take turns step by step, so that a machine that changes speed does so for all of them; ratios are medians
    of each block's. Wall time, and the processor's time of this process, which other work disturbs less.
    """
    model_settings = settings.MODELS["ViT"]
    runs = {name: _Training(name, model_settings) for name in ("SAM", "Eigen-SAM, manual", "Eigen-SAM, step")}
    blocks = {name: [] for name in runs}
    for _ in range(1 + max(seeds, 5)):
        for run in blocks.values():
            run.append([0.0, 0.0])
        for _ in range(100):
            for name, run in runs.items():
                for i, seconds in enumerate(run.step()):
                    blocks[name][-1][i] += seconds

    def ratio(name: str, i: int) -> float:
        return round(statistics.median(a[i] / b[i] for a, b in zip(blocks[name], blocks["SAM"], strict=True)), 4)

    for run in blocks.values():
        del run[0]  # without an estimate, and to warm up caches and allocators
    return [
        {
            "run": name,
            "seconds": [round(wall, 4) for wall, _ in blocks[name]],
            "cpu_seconds": [round(cpu, 4) for _, cpu in blocks[name]],
            "ratio": ratio(name, 0),
            "cpu_ratio": ratio(name, 1),
        }
        for name in runs
    ]


class _Training:
    def __init__(self, name: str, model_settings) -> None:
        torch.manual_seed(0)
        self.name, self.train, self.model = name, digits(settings.DATA)[0], model_settings.build()
        method = SAM if name == "SAM" else EigenSAM
        options = {} if name == "SAM" else {"freq": 100}
        self.optimizer = method(
            self.model.parameters(), torch.optim.SGD, rho=model_settings.rho, lr=0.2 * model_settings.lr, momentum=0.9,
            **options,
        )  # fmt: skip
        self.batch = model_settings.batch_size
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> tuple[float, float]:
        """Seconds that a step takes, and an estimate where one is due: wall time and processor time."""
        x, y = self.train[torch.randint(0, len(self.train), (self.batch,), generator=self.generator)].pair()
        begin = time.perf_counter(), time.process_time()
        self._step(x, y)
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        def loss_fn() -> torch.Tensor:
            return F.cross_entropy(self.model(x), y)

        def closure() -> torch.Tensor:
            loss = loss_fn()
            loss.backward()
            return loss

        if self.name == "Eigen-SAM, step":
            self.optimizer.step(closure)
            return
        if self.name == "Eigen-SAM, manual" and self.optimizer.eigenvector_due():
            self.optimizer.update_eigenvector(loss_fn, self.model)
        closure()
        self.optimizer.first_step(zero_grad=True)
        closure()
        self.optimizer.second_step(zero_grad=True)


PARTS = {"products": products, "differences": differences, "cost": cost}


def stages(name: str, seed: int):
    """(steps, model in eval mode, its loss on one batch) at three times of a training with SAM."""
    model_settings = settings.MODELS[name.split(",")[0]]
    train, _ = digits(settings.DATA)
    torch.manual_seed(seed)
    model = model_settings.build()
    if name.endswith("smooth"):
        _without_kinks(model)
    # A constant, moderate rate: the demo's peak without its warm-up would throw the networks about.
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, rho=model_settings.rho, lr=0.2 * model_settings.lr, momentum=0.9
    )
    done = 0
    for steps in (0, 50, 250):
        model.train()
        while done < steps:
            x, y = train[torch.randint(0, len(train), (model_settings.batch_size,))].pair()
            for half in (optimizer.first_step, optimizer.second_step):
                F.cross_entropy(model(x), y).backward()
                half(zero_grad=True)
            done += 1
        model.eval()
        x, y = train[: model_settings.batch_size].pair()
        yield steps, model, lambda model=model, x=x, y=y: F.cross_entropy(model(x), y)


def _without_kinks(model: nn.Module) -> None:
    """SiLU in the place of ReLU: in the stem and in the residual blocks, which end with the function."""
    model.stem[2] = nn.SiLU()
    for block in model.blocks:
        block.residual[2] = nn.SiLU()
        block.forward = lambda x, block=block: F.silu(block.residual(x) + block.shortcut(x))


def _cosine(a, b) -> float:
    a, b = (torch.cat([t.double().reshape(-1) for t in v]) for v in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


def print_part(console: Console, name: str, rows: list[dict]) -> None:
    if name == "products":
        columns = ("power", "lanczos", "power_from_gradient", "lanczos_from_noise")
        table = Table(
            "model", "steps", *columns, "lanczos / power",
            title="Products to a residual of 1e-2: median over seeds, and sum over stages and seeds",
        )  # fmt: skip
        for model in dict.fromkeys(r["model"] for r in rows):
            of_model = [r for r in rows if r["model"] == model]
            for steps in dict.fromkeys(r["steps"] for r in of_model):
                medians = [statistics.median(r[c] for r in of_model if r["steps"] == steps) for c in columns]
                table.add_row(model, str(steps), *(f"{m:g}" for m in medians), f"{medians[1] / medians[0]:.2f}")
            sums = [sum(r[c] for r in of_model) for c in columns]
            table.add_row(model, "all", *map(str, sums), f"{sums[1] / sums[0]:.2f}", end_section=True)
    elif name == "differences":
        table = Table(
            "model",
            "direction",
            "float32, worst",
            "bfloat16, worst",
            "bfloat16, median",
            title="Cosine with the exact product",
        )
        for model in dict.fromkeys(r["model"] for r in rows):
            for direction in dict.fromkeys(r["direction"] for r in rows):
                chosen = [r for r in rows if (r["model"], r["direction"]) == (model, direction)]
                single, half = ([r[d] for r in chosen] for d in ("float32", "bfloat16"))
                table.add_row(
                    model, direction, f"{min(single):.6f}", f"{min(half):.4f}", f"{statistics.median(half):.4f}"
                )
    else:
        table = Table("run", "s a block of 100 steps", "to SAM", "processor time to SAM", title="Training time, ViT")
        for row in rows:
            seconds = f"{statistics.median(row['seconds']):.3f}"
            table.add_row(row["run"], seconds, f"{row['ratio']:.3f}", f"{row['cpu_ratio']:.3f}")
    console.print(table)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    main()
