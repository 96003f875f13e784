"""Builds fastsam's optional extensions: one row of EXTENSIONS each, compiled by ninja, without torch.

An extension that cannot be built does not stop the installation. What happened to each is printed and written
to fastsam/_build_info.json, which `fastsam.backends()` and `fastsam info` show. Environment variables:

    FASTSAM_CPU, FASTSAM_CUDA   unset: build where possible; 0: leave out; 1: fail if it cannot be built
    FASTSAM_CUDA_ARCHS          architectures such as "80 90"; the last one is also kept as PTX
    CXX, CXXFLAGS, LDFLAGS      the C++ compiler and further flags for fastsam._cpu
    CUDACXX, CUDA_HOME          where nvcc is, if not on PATH; NVCC_APPEND_FLAGS is nvcc's own
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "_build_info.json"
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32


class NotBuilt(Exception):
    """Why an extension is missing, in words for the user."""


@dataclass(frozen=True)
class Toolchain:
    """The shell commands of one extension, without the file names."""

    compile: str
    link: str


@dataclass(frozen=True)
class Native:
    """One extension: every source in `folder` with one of `suffixes`, if the first is among them."""

    name: str
    switch: str
    folder: str
    suffixes: tuple[str, ...]
    toolchain: Callable[[], Toolchain]

    @property
    def module(self) -> str:
        return f"_{self.name}"

    def sources(self) -> list[str]:
        """Paths relative to ROOT: neither the messages nor the binaries name the machine they come from."""
        found = sorted(path for suffix in self.suffixes for path in (ROOT / self.folder).glob(f"*{suffix}"))
        return [path.relative_to(ROOT).as_posix() for path in found if X86 or "_avx" not in path.stem]


def cpp_toolchain() -> Toolchain:
    compiler = find_cxx()
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    # CXXFLAGS stand before the flags that the arithmetic relies on: no environment can take those away.
    flags = [
        "-O3",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
        *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
        # No vector type crosses the border of the library, and GCC's AVX-512 header fools its own other warning.
        *("-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
        *(["-DFASTSAM_X86=1"] if X86 else []),
        *include_flags(),
    ]
    libraries = ["-pthread"] if sys.platform == "darwin" else ["-pthread", "-ldl"]
    return Toolchain(
        compile=f"{shlex.join([*compiler, *flags])} $isa -MD -MF $out.d -c $in -o $out",
        link=f"{shlex.join(compiler)} {shared} $in -o $out "
        + shlex.join([*shlex.split(os.environ.get("LDFLAGS", "")), *libraries]),
    )


def cuda_toolchain() -> Toolchain:
    nvcc = find_nvcc()
    flags = [
        *("-O3", "-std=c++17", "-fmad=false", "-cudart", "static"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"),
        *include_flags(),
    ]
    archs = [f"-gencode={code}" for code in gencode(cuda_archs(nvcc))]
    return Toolchain(
        compile=f"{shlex.join([nvcc, *flags, *archs])} -MD -MF $out.d -c $in -o $out",
        link=f"{nvcc} -shared -cudart static $in -o $out",
    )


EXTENSIONS = (
    Native("cpu", "FASTSAM_CPU", "csrc/cpu", (".cpp",), cpp_toolchain),
    Native("cuda", "FASTSAM_CUDA", "csrc/cuda", (".cu", ".cpp"), cuda_toolchain),
)


def isa_flags(source: str) -> list[str]:
    """The instruction sets that a source's name asks for; one without such a name runs on every CPU."""
    stem = Path(source).stem
    if stem.endswith("_avx512"):
        return ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    if stem.endswith("_avx2"):
        return ["-mavx2", "-mf16c"]
    return []


def include_flags() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("pybind11 is not installed (pip install pybind11 ninja)") from None
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise NotBuilt(f"Python.h is not in {python} (install Python's development headers)")
    # -isystem: warnings are for this project's code only.
    return ["-isystem", python, "-isystem", pybind11.get_include()]


def find_cxx() -> list[str]:
    if sys.platform == "win32":
        raise NotBuilt("the C++ kernels are built on Linux and macOS only")
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]):
            return named
        raise NotBuilt(f"the C++ compiler CXX={os.environ['CXX']} was not found")
    for candidate in ("c++", "g++", "clang++"):
        if shutil.which(candidate):
            return [candidate]
    raise NotBuilt("no C++ compiler was found (c++, g++, clang++, or CXX)")


def find_nvcc() -> str:
    if sys.platform != "linux":
        raise NotBuilt("the CUDA kernels are built on Linux only")
    named = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in [named] if named else ["nvcc", f"{home}/bin/nvcc"]:
        path = shutil.which(candidate)
        if path:
            return path
    raise NotBuilt(f"CUDACXX={named} was not found" if named else "nvcc was not found")


def cuda_archs(nvcc: str) -> list[str]:
    """FASTSAM_CUDA_ARCHS, or those of 80, 90 and 100 that this nvcc knows."""
    asked = os.environ.get("FASTSAM_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if asked:
        if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in asked):
            raise SystemExit(f"FASTSAM_CUDA_ARCHS must list numbers such as '80 90', not {' '.join(asked)!r}")
        return asked
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]
    if not archs:
        raise NotBuilt(f"{nvcc} compiles for none of sm_80, sm_90 and sm_100")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the last for those that come after."""
    *older, newest = archs
    return [f"arch=compute_{arch},code=sm_{arch}" for arch in older] + [
        f"arch=compute_{newest},code=[sm_{newest},compute_{newest}]"
    ]


def ninja_path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def ninja_file(toolchain: Toolchain, sources: Iterable[str], folder: str, output: str) -> str:
    """The text of build.ninja: one object for each source with a depfile, and one link."""
    lines = ["ninja_required_version = 1.5", f"builddir = {ninja_path(folder)}", ""]
    lines += ["rule compile", f"  command = {toolchain.compile}", "  depfile = $out.d", "  deps = gcc"]
    lines += ["  description = compile $in", ""]
    lines += ["rule link", f"  command = {toolchain.link}", "  description = link $out", ""]
    objects = []
    for source in sources:
        objects.append(ninja_path(f"{folder}/{Path(source).name}.o"))
        lines += [
            f"build {objects[-1]}: compile {ninja_path(source)}",
            f"  isa = {shlex.join(isa_flags(source))}",
        ]
    lines += [
        "",
        f"build {ninja_path(output)}: link {' '.join(objects)}",
        f"default {ninja_path(output)}",
        "",
    ]
    return "\n".join(lines)


def find_ninja() -> str:
    try:
        import ninja

        places = [ninja.BIN_DIR]
    except ImportError:
        places = []
    for place in [*places, None]:  # None: PATH, where pip's isolated build environment has it
        path = shutil.which("ninja", path=place)
        if path:
            return path
    raise NotBuilt("ninja was not found (pip install ninja)")


def run_ninja(script: Path) -> None:
    """Run ninja from ROOT, show what it says as it says it, and keep the first error for the reason."""
    said: list[str] = []
    command = [find_ninja(), "-f", str(script)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line.strip())
    if process.returncode:
        errors = [line for line in said if re.search(r"\berror\b|undefined reference|not found", line, re.IGNORECASE)]
        raise NotBuilt(f"the compiler failed: {(errors or said or ['it said nothing'])[0]}")


def compile_extension(native: Native) -> Path:
    """Build one extension under build/ and return the finished library."""
    sources = native.sources()
    if not any(source.endswith(native.suffixes[0]) for source in sources):
        raise NotBuilt(f"{native.folder} has no {native.suffixes[0]} files")
    toolchain = native.toolchain()
    folder = f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}/{native.name}"
    output = f"{folder}/{native.module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    script = ROOT / folder / "build.ninja"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(ninja_file(toolchain, sources, folder, output))
    run_ninja(script)
    return ROOT / output


class NinjaBuild(build_ext):
    """setuptools' build_ext with the compiling left to ninja; an editable install is an in-place build."""

    def run(self) -> None:
        package = self.package_folder()
        package.mkdir(parents=True, exist_ok=True)
        self.installed = [package / BUILD_INFO]
        results: dict[str, str] = {}
        fatal: list[str] = []
        for native in EXTENSIONS:
            switch = os.environ.get(native.switch, "")
            if switch not in ("", "0", "1"):
                raise SystemExit(f"{native.switch} must be 0, 1 or unset, not {switch!r}")
            library = package / f"{native.module}{sysconfig.get_config_var('EXT_SUFFIX')}"
            try:
                if switch == "0":
                    raise NotBuilt(f"{native.switch}=0")
                replace(library, compile_extension(native))
                self.installed.append(library)
                results[native.name] = "built"
            except NotBuilt as reason:
                library.unlink(missing_ok=True)  # an older build must not pass for this one
                results[native.name] = f"not built: {reason}"
                if switch == "1":
                    fatal.append(f"{native.name} {results[native.name]}, and {native.switch}=1 requires it")
            print(f"fastsam: {native.name} extension {results[native.name]}", file=sys.stderr, flush=True)
        (package / BUILD_INFO).write_text(json.dumps(results, indent=2) + "\n")
        if fatal:
            raise SystemExit("fastsam: " + "; ".join(fatal))

    def package_folder(self) -> Path:
        if self.inplace:
            return ROOT / "fastsam"
        return Path(self.build_lib, "fastsam")

    def get_outputs(self) -> list[str]:
        if self.inplace:
            return list(self.get_output_mapping())
        return [str(path) for path in getattr(self, "installed", [])]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        installed = getattr(self, "installed", [])
        return {str(Path(self.build_lib, "fastsam", path.name)): str(path) for path in installed}


def replace(destination: Path, source: Path) -> None:
    """Copy in one step: a process that has the old library loaded keeps it whole."""
    if destination.exists() and filecmp.cmp(source, destination, shallow=False):
        return
    unfinished = destination.with_name(destination.name + ".new")
    shutil.copy2(source, unfinished)
    os.replace(unfinished, destination)


def check_setuptools(version: str) -> None:
    """An older one stops at pyproject.toml with a page of validation errors."""
    if int(version.partition(".")[0]) < 77:
        raise SystemExit(
            f"fastsam needs setuptools 77 or newer to build, and this is {version}: "
            "pip install -U setuptools, or leave out --no-build-isolation"
        )


if __name__ == "__main__":
    check_setuptools(setuptools.__version__)
    setup(
        ext_modules=[Extension(f"fastsam.{native.module}", native.sources(), optional=True) for native in EXTENSIONS],
        cmdclass={"build_ext": NinjaBuild},
    )
