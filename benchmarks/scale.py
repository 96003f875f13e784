"""What a method costs on many GPUs: bytes of state, bytes of traffic and where the time of a step goes.

Print the tables, rewrite the block between the marks of docs/scale.md, or fail if that block is out of date:

    python -m benchmarks.scale
    python -m benchmarks.scale --document docs/scale.md
    python -m benchmarks.scale --document docs/scale.md --check

A model, not a measurement: it counts bytes and operations and divides them by the rates in ``MACHINE``. What it says of
state and of collectives is held against optimizers and process groups in tests/distributed/test_scale.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.marks import with_block

GPUS = (8, 64, 512, 4096, 16384)
WEIGHT = GRADIENT = 4  # bytes: float32, as FSDP2's mixed precision keeps its shards and reduces gradients
COMPUTE = 2  # bytes: what is gathered for the passes, and their activations, are bfloat16
GRAM = 24  # bytes: three float64 sums


@dataclass(frozen=True)
class Machine:
    """Peak rates of one GPU of a DGX H100 and of its links, each way; and the share of peak that training reaches."""

    memory: float = 80e9  # bytes
    memory_rate: float = 3.35e12  # bytes/s
    compute_rate: float = 989e12  # bfloat16 operations/s, dense
    utilisation: float = 0.4
    node: int = 8  # GPUs that NVLink joins
    inside: float = 450e9  # bytes/s, NVLink
    outside: float = 50e9  # bytes/s, one 400 Gb/s adapter a GPU
    latency: float = 10e-6  # seconds for one hop of a reduction tree


MACHINE = Machine()


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    layers: int
    width: int


MODELS = (
    Model("1 B", 1e9, 16, 2048),
    Model("7 B", 7e9, 32, 4096),
    Model("70 B", 70e9, 80, 8192),
    Model("400 B", 400e9, 126, 16384),
)


@dataclass(frozen=True)
class Method:
    """Around AdamW: weight-sized buffers beyond AdamW's two, passes a step, and bytes its kernels move a parameter.

    A vector in bfloat16 is half a buffer.
    """

    name: str
    buffers: float
    passes: float
    kernels: dict[str, int]


#: Hessian-vector products for Eigen-SAM's vector: 5 every 100 steps, each of two passes by finite differences.
ESTIMATE = 5 * 2 / 100
ADAMW = 7 * 4  # bytes: reads w (or its backup), g and both moments, writes w and both moments
METHODS = (
    Method("AdamW", 0, 1, {"update": ADAMW}),
    Method("SAM", 1, 2, {"gram": 4, "climb": 16, "second gram": 4, "descend": ADAMW}),
    Method("F-SAM", 3, 2, {"gram": 8, "climb": 24, "second gram": 4, "descend": ADAMW}),
    Method("Eigen-SAM", 2, 2 + ESTIMATE, {"gram": 8, "climb": 20, "second gram": 4, "descend": ADAMW}),
    Method("F-SAM, m in bfloat16", 2, 2, {"gram": 6, "climb": 20, "second gram": 4, "descend": ADAMW}),
    Method("Eigen-SAM, v in bfloat16", 1.5, 2 + ESTIMATE, {"gram": 6, "climb": 18, "second gram": 4, "descend": ADAMW}),
    Method("MomentumSAM", 1, 1, {"gram": 4, "climb": 16, "second gram": 4, "descend": ADAMW}),
)
#: Those that the tables of models have; the others send what these do.
TABLED = METHODS[:4]


def state_bytes(method: Method, parameters: float) -> float:
    """Bytes that the optimizer keeps for a process's parameters: AdamW's moments and the method's buffers."""
    return (2 + method.buffers) * WEIGHT * parameters


def held_bytes(method: Method, parameters: float) -> float:
    """State, weights and gradients."""
    return state_bytes(method, parameters) + (WEIGHT + GRADIENT) * parameters


@dataclass(frozen=True)
class Layout:
    """How G = replicas x shards x tensor processes share a model."""

    name: str
    replicas: int
    shards: int
    tensor: int = 1
    m_sharpness: bool = False

    @property
    def gpus(self) -> int:
        return self.replicas * self.shards * self.tensor

    def local(self, model: Model) -> float:
        return model.parameters / (self.shards * self.tensor)


def layouts(model: Model, gpus: int) -> Iterator[Layout]:
    yield Layout("DDP", gpus, 1)
    yield Layout("DDP, m-sharpness", gpus, 1, m_sharpness=True)
    yield Layout("FSDP2", 1, gpus)
    shards = MACHINE.node  # HSDP: as few as leave half of the memory to activations
    while shards < gpus and held_bytes(METHODS[2], model.parameters / shards) > MACHINE.memory / 2:
        shards *= 2
    if shards < gpus:
        yield Layout("HSDP", gpus // shards, shards)
    if gpus > MACHINE.node:
        yield Layout("FSDP2 × TP", 1, gpus // MACHINE.node, MACHINE.node)


# ---- traffic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """One of a pass, or a group of equal ones: ``size`` is the bytes of the whole tensor.

    ``when``: under which part of the pass it can hide: ``forward``, ``backward``, or ``never``.
    """

    kind: str
    size: float
    ranks: int
    when: str
    crosses_nodes: bool = True
    count: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each process sends, by a ring."""
        return self.count * (2 if self.kind == "all-reduce" else 1) * self.size * (self.ranks - 1) / self.ranks

    @property
    def seconds(self) -> float:
        return self.sent / (MACHINE.outside if self.crosses_nodes else MACHINE.inside)


def collectives(layout: Layout, model: Model, tokens: float, reduced: bool = True) -> list[Collective]:
    """Those of one forward and backward pass over ``tokens`` for each GPU, on one of them.

    ``reduced=False``: m-sharpness's first pass.
    """
    found = []
    part = model.parameters / layout.tensor
    apart = layout.shards * layout.tensor > MACHINE.node
    if layout.shards > 1:
        for when in ("forward", "backward"):
            found.append(Collective("all-gather", COMPUTE * part, layout.shards, when, apart))
        found.append(Collective("reduce-scatter", GRADIENT * part, layout.shards, "backward", apart))
    if layout.replicas > 1 and reduced:
        apart = layout.gpus > MACHINE.node
        found.append(Collective("all-reduce", GRADIENT * layout.local(model), layout.replicas, "backward", apart))
    if layout.tensor > 1:
        # Two in a layer's forward pass and two in its backward pass; the next product waits for each.
        size = COMPUTE * tokens * layout.tensor * model.width
        found.append(Collective("all-reduce", size, layout.tensor, "never", False, 4 * model.layers))
    return found


def agreements(layout: Layout, method: Method) -> int:
    """All-reduces of ``GRAM`` bytes that a step adds: one in the climb and one in the descent for each mesh dimension
    that shards, and one in the descent under m-sharpness."""
    if method.buffers == 0:
        return 0
    return 2 * ((layout.shards > 1) + (layout.tensor > 1)) + layout.m_sharpness


def passes(layout: Layout, method: Method) -> list[tuple[float, bool]]:
    """(how many, whether their gradients are reduced)."""
    if layout.m_sharpness and method.passes >= 2:
        return [(1, False), (method.passes - 1, True)]
    return [(method.passes, True)]


def traffic(layout: Layout, model: Model, method: Method, tokens: float) -> float:
    """Bytes that a GPU sends in a step."""
    bulk = sum(n * c.sent for n, reduced in passes(layout, method) for c in collectives(layout, model, tokens, reduced))
    return bulk + 2 * GRAM * agreements(layout, method)


# ---- time ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Seconds of one step: arithmetic, communication that nothing hides, kernels of the optimizer, agreements."""

    compute: float
    exposed: float
    kernels: float
    agreements: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.kernels + self.agreements


def tokens_per_gpu(gpus: int) -> float:
    """8192, and less where the batch would be larger than 4 Mi tokens."""
    return min(8192, 2**22 / gpus)


def step_time(layout: Layout, model: Model, method: Method, tokens: float) -> Step:
    compute = 6 * model.parameters * tokens / (MACHINE.utilisation * MACHINE.compute_rate)
    exposed = 0.0
    for n, reduced in passes(layout, method):
        found = collectives(layout, model, tokens, reduced)
        for when, share in (("forward", 1 / 3), ("backward", 2 / 3), ("never", 0)):
            exposed += n * max(0, sum(c.seconds for c in found if c.when == when) - share * compute)
    kernels = sum(method.kernels.values()) * layout.local(model) / MACHINE.memory_rate
    hops = 2 * math.ceil(math.log2(layout.gpus))
    return Step(method.passes * compute, exposed, kernels, agreements(layout, method) * hops * MACHINE.latency)


# ---- the document ------------------------------------------------------------------------------------------------


def markdown() -> str:
    return "\n\n".join([_methods_table(), *map(_model_table, MODELS), _time_table()])


def _methods_table() -> str:
    lines = [
        "| method | state, bytes a parameter | with weights and gradients | passes a step | "
        "kernels, bytes a parameter |",
        "|---|---|---|---|---|",
    ]
    for m in METHODS:
        kernels = " + ".join(f"{name} {size}" for name, size in m.kernels.items())
        total = f" = {sum(m.kernels.values())}" if len(m.kernels) > 1 else ""
        lines.append(
            f"| {m.name} | {state_bytes(m, 1):.0f} | {held_bytes(m, 1):.0f} | {m.passes:g} | {kernels}{total} |"
        )
    return "\n".join(lines)


def _model_table(model: Model) -> str:
    names = " | ".join(m.name for m in TABLED)
    lines = [
        f"**{model.name} parameters.** GB that a GPU holds, and GB that it sends in a step.",
        "",
        f"| layout | GPUs | {names} | {' | '.join(f'{m.name} sends' for m in TABLED)} |",
        "|---|---|" + "---|" * (2 * len(TABLED)),
    ]
    too_large: dict[str, list[str]] = {}
    for gpus in GPUS:
        for layout in layouts(model, gpus):
            held = [held_bytes(m, layout.local(model)) for m in TABLED]
            if held[0] > MACHINE.memory:
                too_large.setdefault(layout.name, []).append(str(gpus))
                continue
            holds = [_gb(h) + ("" if h <= MACHINE.memory else " ✗") for h in held]
            sends = [_gb(traffic(layout, model, m, tokens_per_gpu(gpus))) for m in TABLED]
            name = f"HSDP, {layout.shards} shards" if layout.name == "HSDP" else layout.name
            lines.append(f"| {name} | {gpus} | {' | '.join(holds)} | {' | '.join(sends)} |")
    if too_large:
        sizes = [
            f"{name} on any number" if len(gpus) == len(GPUS) else f"{name} on {', '.join(gpus)}"
            for name, gpus in too_large.items()
        ]
        lines += ["", f"Too large for {MACHINE.memory / 1e9:.0f} GB even with AdamW alone: {'; '.join(sizes)}."]
    return "\n".join(lines)


def _time_table() -> str:
    lines = [
        "Milliseconds of a step of F-SAM, and the ratio to one of AdamW in the same layout, of F-SAM's and of a step "
        "with one gradient.",
        "",
        "| parameters | GPUs | layout | arithmetic | exposed communication | optimizer's kernels | "
        "24-byte all-reduces | optimizer's share | ratio to AdamW | MomentumSAM's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    adamw, fsam, momentum = METHODS[0], METHODS[2], METHODS[-1]
    for model in MODELS:
        for gpus in GPUS:
            for layout in layouts(model, gpus):
                if held_bytes(fsam, layout.local(model)) > MACHINE.memory:
                    continue
                tokens = tokens_per_gpu(gpus)
                step, plain, one = (step_time(layout, model, m, tokens) for m in (fsam, adamw, momentum))
                parts = [step.compute, step.exposed, step.kernels, step.agreements]
                share = (step.kernels + step.agreements) / step.total
                lines.append(
                    f"| {model.name} | {gpus} | {layout.name} | {' | '.join(map(_ms, parts))} | {share:.2%} | "
                    f"{step.total / plain.total:.2f} | {one.total / plain.total:.2f} |"
                )
    return "\n".join(lines)


def _gb(size: float) -> str:
    return _rounded(size / 1e9)


def _ms(seconds: float) -> str:
    return _rounded(seconds * 1e3)


def _rounded(x: float) -> str:
    """Three digits."""
    if x == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(x)))
    return f"{x:.{digits}f}" if digits else str(round(x, 2 - math.floor(math.log10(x)))).removesuffix(".0")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--document", type=Path, help="file whose block is to be rewritten")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the block is out of date")
    options = parser.parse_args(arguments)
    if options.document is None:
        print(markdown())
        return 0
    current = options.document.read_text(encoding="utf-8")
    updated = with_block(current, "scale", f"\n{markdown()}\n")
    if not options.check:
        options.document.write_text(updated, encoding="utf-8")
    elif updated != current:
        print(f"{options.document}: the tables are not what benchmarks/scale.py computes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
