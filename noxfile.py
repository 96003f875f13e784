"""The checks, each in an environment of its own, here and on GitHub alike: ``nox --list``.

    nox -s lint types docs            # without torch, or with one
    nox -s "tests-3.12(torch='2.11.0')"
    nox -s build                      # sdist and wheel, installed into clean environments and tried there

A Python that is not on this machine is left out with a warning. TORCH_INDEX names a package index to take torch from.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.6.0", "2.11.0", "2.13.0", "2.14.1")
TORCH_INDEX = os.environ.get("TORCH_INDEX", "")
#: What a wheel may weigh, MiB: the C++ kernels in three instruction sets, and with the CUDA kernels.
WHEEL_MIB = {"cpu": 1.0, "cuda": 4.0}

nox.options.sessions = ("lint", "types", "docs")
nox.options.default_venv_backend = "venv"


def pins(*without: str) -> str:
    """constraints.txt without the lines of some packages, as a file for pip."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in without]
    path = Path(tempfile.mkdtemp(prefix="fastsam-nox-")) / "constraints.txt"
    path.write_text("\n".join(kept) + "\n")
    return str(path)


def install_torch(session: nox.Session, version: str) -> None:
    index = ("--extra-index-url", TORCH_INDEX) if TORCH_INDEX else ()
    session.install(*index, f"torch=={version}")


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def tests(session: nox.Session, torch: str) -> None:
    """The suite with one Python and one torch. Triton comes with torch's own wheels, or not at all."""
    install_torch(session, torch)
    session.install("-c", pins("torch", "triton"), "-e", ".[test,bench]", f"torch=={torch}")
    session.run("pytest", "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", *session.posargs)


@nox.session
def timm(session: nox.Session) -> None:
    """What fine-tunes timm's models."""
    session.install("-c", pins("torch", "triton"), "-e", ".[timm,test]")
    session.run("pytest", "tests/commands/test_timm.py", "tests/commands/test_finetune.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-c", pins(), "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, which reads the types of what the package imports."""
    install_torch(session, "2.13.0")
    session.install("-c", pins("triton"), "-e", ".[test,bench]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, strictly. It reads the package without importing it."""
    session.install("-c", pins(), "mkdocs", "mkdocs-material", "mkdocstrings-python", "ruff")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """Builds sdist and wheel, weighs the wheel, asks auditwheel for its tag, and tries both in clean environments."""
    session.install("build", "twine", *(["auditwheel"] if sys.platform == "linux" else []))
    folder = Path(session.create_tmp()) / "dist"
    for old in folder.glob("*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(folder))
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    session.run("python", "tests/project/weigh_wheel.py", str(wheel), *(f"{k}={v}" for k, v in WHEEL_MIB.items()))
    if sys.platform == "linux":
        session.run("auditwheel", "show", str(wheel))
    for package, switches in ((wheel, {}), (sdist, {"FASTSAM_CPU": "0", "FASTSAM_CUDA": "0"})):
        clean = Path(session.create_tmp()) / f"clean-{package.suffix[1:]}"
        session.run("python", "-m", "venv", "--clear", str(clean))
        python = str(clean / ("Scripts" if os.name == "nt" else "bin") / "python")
        index = ("--extra-index-url", TORCH_INDEX) if TORCH_INDEX else ()
        session.run(python, "-m", "pip", "install", "--quiet", *index, str(package), external=True, env=switches)
        kernels = "torch" if switches else "cpu"
        script = str(ROOT / "tests/project/installed.py")
        with session.chdir(clean):  # not where the checkout's own fastsam would be found
            session.run(python, "-I", script, kernels, external=True)
