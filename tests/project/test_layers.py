"""The order of the packages: each imports those below it only, and no module imports itself over others."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: From the ground up. ``fastsam`` itself is the public face, which the commands use as anybody does.
LAYERS = (
    "support",
    "distributed",
    "flat",
    "kernels",
    "loop",
    "engine",
    "curvature",
    "closures",
    "optimizer",
    "schedules",
    "methods",
    "fastsam",
    "graphs",
    "integrations",
    "commands",
    "__main__",
)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in (ROOT / "fastsam").rglob("*.py")}


def imports(path):
    """The modules of fastsam that a file imports anywhere in it, functions and blocks for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names if alias.name not in ("_cpu", "_cuda")}
            found |= {name if name in MODULES else node.module for name in names} & MODULES.keys()
    return found


def layer(module):
    return LAYERS.index(module.split(".")[1] if "." in module else module)


IMPORTS = {module: imports(path) - {module} for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_what_is_below_it(module):
    above = [other for other in IMPORTS[module] if layer(other) > layer(module)]
    assert not above, f"{module} imports {above}, which stand on it"


def test_there_is_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_few_modules_lie_directly_in_the_package():
    assert len(list((ROOT / "fastsam").glob("*.py"))) <= 5


def test_modules_are_short():
    long = {m: n for m, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 350}
    assert not long
