"""Imports point down: there is no circle in benchmarks/ and in fastsam/commands/, imports in functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(folder: Path, root: Path = ROOT) -> dict[str, set[str]]:
    """Each module below ``folder`` with the modules below it that it names in an import, wherever that stands.

    A package is its ``__init__.py``. ``from package import name`` is an import of the module of that name if there
    is one, else of the package.
    """
    files = {_name(path, root): path for path in sorted(folder.rglob("*.py"))}
    return {name: set(_imported(name, path, files)) for name, path in files.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in the order of its imports, or none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        found = next(filter(None, (walk(other, [*path, module]) for other in sorted(graph[module]))), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in graph)), [])


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, path: Path, known: dict[str, Path]):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                target = f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source
                if target in known:
                    yield target


@pytest.mark.parametrize("folder", ["benchmarks", "fastsam/commands"])
def test_no_circle_of_imports(folder):
    graph = imports(ROOT / folder)
    assert len(graph) > 20 and sum(map(len, graph.values())) > 20, "no imports were found"
    assert not circle(graph), " imports ".join(circle(graph))


@pytest.mark.parametrize(
    "line", ["import p.a", "from p import a", "from . import a", "from .a import x", "def f():\n  from p.a import x"]
)
def test_a_circle_is_found_however_it_is_written(tmp_path, line):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text("")
    (tmp_path / "p" / "a.py").write_text("from p import b, c\n")
    (tmp_path / "p" / "c.py").write_text("import os\n")
    (tmp_path / "p" / "b.py").write_text("from p import c\n")
    assert not circle(imports(tmp_path / "p", tmp_path))
    (tmp_path / "p" / "b.py").write_text(line + "\n")
    assert circle(imports(tmp_path / "p", tmp_path)) == ["p.a", "p.b", "p.a"]
