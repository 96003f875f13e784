"""The site's pages without the site: examples run, every public name has a page, and links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import fastsam
from fastsam.optimizer import SharpnessAware

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EVERYWHERE = [*PAGES, *sorted(ROOT.glob("*.md"))]
API = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))

#: The modules that users import from, with what is public in them where they have no ``__all__``.
PUBLIC = {
    "fastsam": None,
    "fastsam.curvature": None,
    "fastsam.graphs": None,
    "fastsam.schedules": None,
    "fastsam.methods.eigen": ("Estimate",),
    "fastsam.optimizer": ("SharpnessAware",),
    "fastsam.loop.model_state": ("TwoPasses", "guard"),
    "fastsam.loop.checkpoint": ("save", "load"),
    "fastsam.integrations.lightning": ("SAMCallback",),
    "fastsam.integrations.transformers": ("SAMTrainer",),
    "fastsam.integrations.accelerate": ("SAMOptimizer",),
    "fastsam.integrations.rank_state": ("average_momentum", "RankMomentum"),
}


def names_of(module: str) -> tuple[str, ...]:
    """What is public in a module, read from its text: a framework that one of them needs may be missing."""
    if PUBLIC[module]:
        return PUBLIC[module]
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return tuple(ast.literal_eval(node.value))
    return tuple(n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name[0] != "_")


# ---- examples --------------------------------------------------------------------------------------------------


def examples() -> dict[str, doctest.DocTest]:
    """Every docstring with examples, of modules that are there whatever is installed."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), {}
    for path in sorted((ROOT / "fastsam").rglob("*.py")):
        if ">>> " in (text := path.read_text()) and "import lightning" not in text:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            module = importlib.import_module(name)
            # One that cannot run here, such as a CUDA graph's, says so itself.
            runs = [t for t in finder.find(module, name) if not all(doctest.SKIP in e.options for e in t.examples)]
            found.update({test.name: test for test in runs})
    return found


EXAMPLES = examples()


@pytest.mark.filterwarnings("ignore:power iteration found the negative eigenvalue")
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_example_of_a_docstring_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    test = EXAMPLES[name]
    model, loss_fn = torch.nn.Linear(6, 3), torch.nn.CrossEntropyLoss()
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    documented = getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], None)
    method = documented if isinstance(documented, type) and issubclass(documented, SharpnessAware) else fastsam.SAM
    optimizer = method(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

    def closure():
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    test.globs.update(
        torch=torch, fastsam=fastsam, model=model, loss_fn=loss_fn, x=x, y=y, loader=[(x, y)] * 3,
        optimizer=optimizer, closure=closure,
    )  # fmt: skip
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert tried and not failed, "".join(said)


def test_the_examples_are_found():
    assert {"fastsam.methods.sam.SAM", "fastsam.curvature.monitor.CurvatureMonitor"} <= EXAMPLES.keys()


def test_the_first_program_of_the_site_runs(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    exec(program, {})
    assert re.fullmatch(r"loss \d\.\d{3}\n", capsys.readouterr().out)


# ---- public names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_docstring_and_a_page(module):
    shown = set(re.findall(r"^::: (\S+)$", API, re.MULTILINE))
    for block in re.findall(r"^::: (\S+)\n((?: {4}.*\n)+)", API, re.MULTILINE):
        members = re.search(r" members: \[(.*)\]", block[1])
        shown |= {f"{block[0]}.{name}" for name in (members[1].split(", ") if members else ())}
        if not re.search(r" members: ", block[1]) and block[0] in PUBLIC:
            shown |= {f"{block[0]}.{name}" for name in names_of(block[0])}
    for name in names_of(module):
        homes = {f"{module}.{name}"}
        if module == "fastsam":
            named = getattr(fastsam, name)
            assert named.__doc__, name
            homes.add(f"{named.__module__}.{name}")
        assert homes & shown, f"docs/api has no page for {module}.{name}"


@pytest.mark.parametrize("name", [n for n in fastsam.__all__ if n.endswith("SAM") or n == "VaSSO"])
def test_every_method_states_formula_source_arguments_and_its_paper(name):
    method = getattr(fastsam, name)
    module = sys.modules[method.__module__].__doc__
    assert re.search(r"^ {4}e\s+= |^ {4}g_v = ", module, re.MULTILINE), "no formula"
    assert re.search(r"Sources?: ", module) or "F-SAM" in module, "no source"
    assert "Args:" in method.__doc__ and re.search(r"Raises:|Errors ", method.__doc__)


# ---- pages and links -------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    words = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", words).strip())


def prose(page: Path) -> str:
    return re.sub(r"```.*?```|^ {4}.*?$|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", EVERYWHERE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() if page.parent == ROOT else found.is_file(), f"{target} is not there"
        if anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", found.read_text(), flags=re.DOTALL), re.M)
            assert anchor in map(slug, headings), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT / "docs").as_posix())
def test_no_product_of_a_page_reads_as_a_tag(page):
    assert not re.search(r"<[a-zA-Z]", prose(page)), "a browser takes <g, v> for a tag: write ⟨g, v⟩"


def test_every_page_is_in_the_navigation_once():
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES)


# ---- formulas --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def formulas():
    sys.path.insert(0, str(ROOT / "docs/_site"))
    try:
        yield importlib.import_module("formulas")
    finally:
        sys.path.remove(str(ROOT / "docs/_site"))


def plain(element) -> str:
    """MathML as text, with what its layout says in brackets."""
    inside = [plain(child) for child in element]
    if element.tag == "mfrac":
        return f"[{inside[0]}]/[{inside[1]}]"
    if element.tag in ("msub", "msup", "msubsup", "mover"):
        return inside[0] + "".join(f"{{{x}}}" for x in inside[1:])
    return (element.text or "") + "".join(inside)


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("e = rho w^2 g / (|| |w| g || + 1e-12)", "e=[ρw{2}g]/[‖|w|g‖+10{−12}]"),
        ("h = g_+ - alpha (g - <g, g_+> / ||g_+||^2 g_+)", "h=g{+}−α(g−[⟨g,g{+}⟩]/[‖g{+}‖{2}]g{+})"),
        ("g^ = g / ||g||", "g{^}=[g]/[‖g‖]"),
        ("m <- lmbda m + (1 - lmbda) g      (the first gradient starts m)", "m←λm+(1−λ)g(the first gradient starts m)"),
    ],
)
def test_a_formula_of_a_docstring_becomes_mathml(formulas, line, read):
    from xml.etree import ElementTree

    assert formulas.is_formulas([line])
    assert plain(ElementTree.fromstring(formulas.mathml([line]))) == read


def test_code_is_no_formula_and_what_cannot_be_read_is_refused(formulas):
    assert not formulas.is_formulas(["step = graphs.capture(optimizer, closure, x, y, model=model)"])
    assert not formulas.is_formulas(['schedule = CosineSchedule(optimizer, "rho", end=0.0, steps=1000)'])
    with pytest.raises(ValueError, match="no formula that"):
        formulas.mathml(["e = g ? v"])
