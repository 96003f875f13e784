"""``fastsam sharpness``: the curvature of a checkpoint on data."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastsam.commands.training.show import progress_bar
from fastsam.curvature.evaluations import batch_size
from fastsam.curvature.measure import Chunks, spectral_density, top_eigenpairs, trace
from fastsam.curvature.plot import draw_density

#: Where training scripts put the weights in their checkpoints; fastsam finetune has them under payload and model.
_STATE_KEYS = ("payload", "state_dict", "model_state_dict", "model", "net", "weights")

# What a checkpoint, data, or names that cannot be used lead to.
_UNUSABLE = (OSError, ValueError, TypeError, RuntimeError, FloatingPointError, ImportError, AttributeError)


def sharpness(
    checkpoint: Annotated[
        Path, typer.Argument(help="A state dict, or a dict with one in it: torch.save's or safetensors.")
    ],
    model: Annotated[str, typer.Option(help="module:name of a function or class that builds the model.")],
    data: Annotated[
        str,
        typer.Option(
            help="A .pt or .npz file with inputs and targets (a pair, or under these names), or module:name of a "
            "function that returns batches (inputs, targets)."
        ),
    ],
    loss: Annotated[
        str, typer.Option(help="A function of torch.nn.functional, or module:name; of (outputs, targets), a mean.")
    ] = "cross_entropy",
    top: Annotated[int, typer.Option(min=1, help="Eigenvalues.")] = 1,
    which: Annotated[str, typer.Option(help="largest, smallest, both or magnitude.")] = "largest",
    products: Annotated[int, typer.Option(min=1, help="Hessian-vector products for them, at most.")] = 100,
    tolerance: Annotated[float, typer.Option(help="Relative residual to stop at.")] = 1e-2,
    probes: Annotated[int, typer.Option("--trace", min=0, help="Probes for the trace; 0 for no trace.")] = 0,
    density: Annotated[Path | None, typer.Option(help="Draw the spectral density into this picture.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Samples at once, which bounds the memory.")] = 256,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:0.")] = "cpu",
    method: Annotated[str, typer.Option(help="auto, exact or finite-difference.")] = "auto",
    train_mode: Annotated[bool, typer.Option("--train-mode", help="Measure in training mode, not eval mode.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random start and probe vectors.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Write the numbers into this file as well.")] = None,
) -> None:
    """Measure how sharp the loss is at a checkpoint: top Hessian eigenvalues, trace, spectral density.

    Imports the module that builds the model, so it runs that module's code; the checkpoint and a .pt file are loaded as
    plain tensors.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        if probes == 1:
            raise ValueError("--trace 1 has no standard error: give 2 probes or more")
        network = _named(model)()
        if not isinstance(network, nn.Module):
            raise ValueError(f"--model {model} made a {type(network).__name__}, not a torch.nn.Module")
        _load_weights(network, checkpoint)
        _check_device(device)
        network.to(device).train(train_mode)
        batches = _batches(data, chunk, device)
        criterion = _named(loss) if ":" in loss else _functional(loss)
        shown = _Shown(batches)
        settings: dict[str, Any] = {"batches": shown, "method": method}

        def loss_fn(batch) -> Tensor:
            return criterion(network(batch[0]), batch[1])

        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(seed)

        with shown.counting("eigenvalues, at most", products) as made:
            pairs = top_eigenpairs(
                loss_fn, network, top, which=which, products=products, tolerance=tolerance, generator=generator(),
                progress=made, **settings,
            )  # fmt: skip
        result: dict[str, Any] = {
            "checkpoint": str(checkpoint),
            "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
            "samples": sum(batch_size(batch) for batch in batches),
            "eigenvalues": pairs.eigenvalues.tolist(),
            "residuals": pairs.residuals.tolist(),
            "products": pairs.products,
            "converged": pairs.converged,
        }
        if probes:
            with shown.counting("trace", probes) as made:
                estimate = trace(loss_fn, network, probes=probes, generator=generator(), progress=made, **settings)
            result["trace"] = {"value": estimate.value, "standard_error": estimate.standard_error, "probes": probes}
        _print(result)  # before what may fail to be written
        if density is not None:
            starts, steps = 5, min(50, result["parameters"])
            with shown.counting("spectral density", starts * steps) as made:
                found = spectral_density(
                    loss_fn, network, probes=starts, steps=steps, generator=generator(), progress=made, **settings
                )
            draw_density(found, density)
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")
    except _UNUSABLE as error:
        typer.echo(f"fastsam sharpness: {error}", err=True)
        raise typer.Exit(1) from None


app = typer.Typer()
app.command()(sharpness)


class _Shown:
    """``batches``, and on a terminal a bar that counts products and says which of the batches is at work."""

    def __init__(self, batches: list) -> None:
        self._batches = batches

    @contextlib.contextmanager
    def counting(self, what: str, products: int) -> Iterator[Callable[[], None]]:
        """Shows so many products for ``what``; gives what is to be called after each."""
        with progress_bar(Console()) as self._bar:
            self._task = self._bar.add_task(what, total=products, state="")
            yield lambda: self._bar.advance(self._task)

    def __iter__(self) -> Iterator:
        for i, batch in enumerate(self._batches, 1):
            self._bar.update(self._task, state=f"batch {i} of {len(self._batches)}")
            yield batch


def _print(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("eigenvalue", "relative residual", title=f"Sharpness of {result['checkpoint']}", title_justify="left")
    for value, residual in zip(result["eigenvalues"], result["residuals"], strict=True):
        table.add_row(f"{value:.4g}", f"{residual:.1e}")
    console.print(table)
    if "trace" in result:
        console.print(
            f"trace {result['trace']['value']:.4g} ± {result['trace']['standard_error']:.2g} (standard error)"
        )
    state = "converged" if result["converged"] else "not converged: try more --products"
    console.print(
        f"{result['parameters']:,} parameters, {result['samples']:,} samples, {result['products']} products, {state}",
        highlight=False,
    )


def _named(name: str) -> Callable:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} must be module:name, such as my_project.models:build")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be used: {error}") from None


def _functional(name: str) -> Callable:
    function = getattr(nn.functional, name, None)
    if function is None:
        raise ValueError(f"--loss {name!r} is no function of torch.nn.functional; for your own say module:name")
    return function


def _load_weights(network: nn.Module, path: Path) -> None:
    state = _opened(path)
    for key in _STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict, neither itself nor under {', '.join(_STATE_KEYS)}")
    # DistributedDataParallel and torch.compile prefix every name.
    network.load_state_dict({k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items()})


def _batches(data: str, chunk: int, device: str) -> list:
    """Batches (inputs, targets) of at most ``chunk`` samples, on the device."""
    if ":" in data and not Path(data).exists():
        pairs = list(_named(data)())
    else:
        pairs = [_pair(_opened(Path(data)), data)]
    chunks = [part for pair in pairs for part in Chunks(tuple(pair), chunk)]
    return [tuple(x.to(device) for x in part) for part in chunks]


def _opened(path: Path) -> Any:
    """The tensors of what torch.save wrote (plain containers only), of a .npz or of a .safetensors file."""
    try:
        if path.suffix == ".npz":
            import numpy

            with numpy.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # the libraries raise a dozen kinds for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} is damaged, or holds more than plain tensors and containers ({type(error).__name__}: {reason})"
        ) from None


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _pair(content, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(content, dict) and {"inputs", "targets"} <= set(content):
        return content["inputs"], content["targets"]
    if isinstance(content, (tuple, list)) and len(content) == 2 and all(isinstance(x, Tensor) for x in content):
        return content[0], content[1]
    raise ValueError(f"{name} must hold a pair of tensors, or tensors named inputs and targets")
