"""What defines a fine-tuning run: one table of fields, which are the options of ``fastsam finetune`` as well."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

#: The class of each method, and the settings that are arguments of it besides ``rho``.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "none": ("", ()),
    "sam": ("SAM", ()),
    "asam": ("SAM", ()),
    "fsam": ("FriendlySAM", ("sigma", "lmbda")),
    "eigen-sam": ("EigenSAM", ("alpha", "freq")),
    "momentum-sam": ("MomentumSAM", ()),
    "gsam": ("GSAM", ("alpha",)),
    "wsam": ("WSAM", ("gamma",)),
    "looksam": ("LookSAM", ("alpha", "k")),
    "stable-sam": ("StableSAM", ()),
    "vasso": ("VaSSO", ("theta",)),
}
RHO = {"momentum-sam": 0.3}  # of the others 0.05
ALPHA = {"gsam": 0.4, "looksam": 0.7}  # of the others 0.2
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOGS = ("tensorboard", "wandb")
SMALL_VIT, EFFICIENTNET = "small-vit", "efficientnet-lite0"
OWN_NETWORK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

#: Settings that say where and how fast a run happens, not what it computes: they may change when it goes on.
MAY_CHANGE = (
    "output", "data_dir", "workers", "log", "save_every", "device", "deterministic", "compile", "cuda_graph",
    "gradient_checkpointing", "accumulate",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of a run. Raises ``ValueError``, naming the option, for any that cannot be used."""

    model: Annotated[
        str,
        typer.Option(
            help="A checkpoint's name on the hub, a folder, small-vit (a new one that fits the data), "
            "efficientnet-lite0 (with ImageNet's weights), or module:function of your own, which returns an nn.Module "
            "from the number of classes."
        ),
    ] = SMALL_VIT
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels, if not the model's own.")
    ] = None
    data: Annotated[
        str, typer.Option(help="digits, elpv, a data set's name on the hub, a folder of images by class, or parquet.")
    ] = "digits"
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local copies of hub data sets.")] = None
    output: Annotated[
        Path, typer.Option(help="Folder of the run. If it holds a part of this run, the run goes on.")
    ] = Path("fastsam-finetune")

    method: Annotated[str, typer.Option(help=f"none (the optimizer alone), {', '.join(list(METHODS)[1:])}.")] = "fsam"
    optimizer: Annotated[str, typer.Option(help="Any optimizer of torch.optim, such as adamw or sgd.")] = "adamw"
    optimizer_arg: Annotated[
        list[str], typer.Option(help="NAME=VALUE for the optimizer; may be repeated. SGD has momentum=0.9 unless told.")
    ] = field(default_factory=list)
    rho: Annotated[
        float | None,
        typer.Option(
            min=0, help="Radius of the perturbation: 0.05, for MomentumSAM 0.3. ASAM's is some ten times SAM's."
        ),
    ] = None
    sigma: Annotated[float, typer.Option(min=0, help="F-SAM: how much of the average gradient is subtracted.")] = 1.0
    lmbda: Annotated[float, typer.Option(min=0, help="F-SAM: decay of the average, below 1.")] = 0.9
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0, help="Eigen-SAM: weight of the eigenvector, 0.2. GSAM, LookSAM: of the second part, 0.4 and 0.7."
        ),
    ] = None
    gamma: Annotated[float, typer.Option(min=0, help="WSAM: weight of the sharpness, below 1.")] = 0.9
    theta: Annotated[float, typer.Option(min=0, max=1, help="VaSSO: weight of the new gradient in the average.")] = 0.4
    k: Annotated[int, typer.Option(min=1, help="LookSAM: steps from one perturbation to the next.")] = 5
    freq: Annotated[int, typer.Option(min=1, help="Eigen-SAM: steps to the first estimate, and to the next.")] = 100

    ascent_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the batch that the perturbation is computed from.")
    ] = 1.0

    lr: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Learning rate after the warm-up; a cosine follows. 1e-4, which suits pretrained weights and AdamW; "
            "for small-vit 2e-3.",
        ),
    ] = None
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps in which lr rises from 0.")] = 0.1
    weight_decay: Annotated[float, typer.Option(min=0, help="Of weight matrices; biases and norms have none.")] = 0.05
    layer_decay: Annotated[float, typer.Option(help="Factor on lr from each block to the one before; 0 to 1.")] = 1.0
    max_norm: Annotated[float | None, typer.Option(min=0, help="Clip the gradient of the update to this norm.")] = None
    label_smoothing: Annotated[float, typer.Option(min=0, max=1, help="Of the training loss.")] = 0.0

    epochs: Annotated[int, typer.Option(min=1, help="Times through the training images.")] = 20
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 50
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts the batch is computed in: less memory, the same step to rounding.")
    ] = 1
    perturb_parts: Annotated[
        bool, typer.Option("--perturb-parts", help="Each part of the batch has its own perturbation (m-sharpness).")
    ] = False
    random_crop: Annotated[int, typer.Option(min=0, help="Shift training images by up to so many pixels.")] = 0
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the training images.")] = False
    cutout: Annotated[int, typer.Option(min=0, help="Side of a square cut out of half of the training images.")] = 0
    label_noise: Annotated[float, typer.Option(min=0, max=1, help="Share of the training labels drawn anew.")] = 0.0

    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, the latter two by autocast.")] = "fp32"
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = False
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them.")
    ] = False
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay whole steps from a CUDA graph.")] = False
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:0; auto takes a GPU if there is one.")] = "auto"
    deterministic: Annotated[
        bool, typer.Option(help="The same bits from run to run on a GPU as well, where torch has such algorithms.")
    ] = True
    seed: Annotated[int, typer.Option(min=0, help="Of new weights, the order of the images, augmentation.")] = 0

    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode images, where they do not fit into memory.")
    ] = None
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints, besides one an epoch and every 10 minutes.")
    ] = None
    log: Annotated[list[str], typer.Option(help="tensorboard or wandb; may be repeated.")] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", 2e-3 if self.model == SMALL_VIT else 1e-4)
        if self.rho is None:
            object.__setattr__(self, "rho", RHO.get(self.method, 0.05))
        if self.alpha is None:
            object.__setattr__(self, "alpha", ALPHA.get(self.method, 0.2))
        for name, hint in get_type_hints(Settings, include_extras=True).items():
            low, high, value = hint.__metadata__[0].min, hint.__metadata__[0].max, getattr(self, name)
            if value is not None and (
                (low is not None and not value >= low) or (high is not None and not value <= high)
            ):
                raise ValueError(f"--{name.replace('_', '-')} {value} must be from {low} to {high or 'any number'}")
        one_of("--method", self.method, METHODS)
        one_of("--optimizer", self.optimizer.lower(), optimizers())
        one_of("--precision", self.precision, PRECISIONS)
        for name in self.log:
            one_of("--log", name, LOGS)
        if not 0 <= self.lmbda < 1:
            raise ValueError(f"--lmbda {self.lmbda} must be at least 0 and below 1")
        if self.theta == 0:
            raise ValueError("--theta 0 would never take a new gradient: it must be above 0, and 1 at most")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"--gamma {self.gamma} must be at least 0 and below 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay {self.layer_decay} must be above 0, and 1 at most")
        if self.max_norm == 0:
            raise ValueError("--max-norm 0 would leave nothing of the gradient: it must be above 0")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} must divide --batch-size {self.batch_size}: a batch is computed in "
                "parts of one size"
            )
        if self.perturb_parts and self.method == "none":
            raise ValueError("--perturb-parts needs a method that perturbs: --method none does not")
        if self.ascent_share == 0:
            raise ValueError("--ascent-share 0 leaves no image for the perturbation: it must be above 0, and 1 at most")
        if self.ascent_share < 1:
            for option, given in {"--perturb-parts": self.perturb_parts, "--cuda-graph": self.cuda_graph}.items():
                if given or self.method == "none":
                    option = option if given else "--method none"
                    raise ValueError(f"--ascent-share does not go with {option}: leave one of them out")
        if self.cuda_graph:
            without = {"--method none": self.method == "none", "--precision fp16": self.precision == "fp16"}
            without |= {"--perturb-parts": self.perturb_parts}
            for option, given in without.items():
                if given:
                    raise ValueError(f"--cuda-graph does not go with {option}: leave one of them out")
        self.optimizer_arguments()

    def own_network(self) -> bool:
        """Whether ``model`` is module:function."""
        return bool(OWN_NETWORK.fullmatch(self.model))

    def may_change(self) -> tuple[str, ...]:
        """Names of settings that may change when the run goes on."""
        return tuple(name for name in MAY_CHANGE if name != "accumulate" or not self.perturb_parts)

    def optimizer_arguments(self) -> dict[str, Any]:
        """The arguments of the base optimizer, with weight decay only if it has one. Raises ``ValueError``."""
        cls = optimizers()[self.optimizer.lower()]
        known = [name for name in inspect.signature(cls).parameters if name != "params"]
        arguments = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        for text in self.optimizer_arg:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--optimizer-arg {text!r} must be NAME=VALUE")
            one_of(f"--optimizer-arg of {cls.__name__}:", name, known)
            arguments[name] = _literal(value)
        for name in ("lr", "weight_decay"):
            if name in arguments:
                raise ValueError(f"--optimizer-arg {name}=...: say --{name.replace('_', '-')}")
            if name in known:
                arguments[name] = getattr(self, name)
            elif getattr(self, name):
                raise ValueError(f"torch.optim.{cls.__name__} has no {name}: say --{name.replace('_', '-')} 0")
        return arguments

    def as_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers of ``torch.optim`` by their names in lower case, but those that not every classifier can have.

    These are for closures (LBFGS), for sparse tensors, and for matrices alone (Muon, where torch has it).
    """
    found = {name.lower(): value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    unfit = (torch.optim.LBFGS, torch.optim.SparseAdam, getattr(torch.optim, "Muon", None))
    return {
        name: cls
        for name, cls in sorted(found.items())
        if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer and cls not in unfit
    }


def one_of(option: str, name: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` for a name that is not known, with the nearest ones."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{option} {name!r} is unknown{nearest(name, known)}")


def nearest(name: str, known: list[str]) -> str:
    """``, the nearest is ...``, if something is near, and what there is."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"{', the nearest is ' + ' or '.join(near) if near else ''}; there are {', '.join(known)}"


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file, by the names of the fields (``batch-size`` is ``batch_size``).

    Raises ``ValueError`` for what is no such file and for an unknown key, with the nearest names.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:
        raise ValueError(f"--config {path} is no {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold keys and values, not a {type(content).__name__}")
    known = {f.name: f for f in dataclasses.fields(Settings)}
    settings = {key.replace("-", "_"): value for key, value in content.items() if value is not None}
    for key, value in settings.items():
        one_of(f"--config {path}: the key", key, known)
        if isinstance(value, dict):
            raise ValueError(f"--config {path}: {key} must be a value, not a table")
        if known[key].default_factory is list and not isinstance(value, list):
            raise ValueError(f"--config {path}: {key} must be a list, as in [{json.dumps(value)}]")
    return settings


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise ValueError("reading TOML needs Python 3.11; write the file as .json") from None
    return tomllib.loads(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text
