"""The build, tried on a throw-away project that has this project's setup.py and three-line kernels."""

import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SWITCHES = (
    "FASTSAM_CPU",
    "FASTSAM_CUDA",
    "FASTSAM_CUDA_ARCHS",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDACXX",
    "CUDA_HOME",
)
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
X86 = platform.machine().lower() in ("x86_64", "amd64")

BINDINGS = """
#include <Python.h>
#include "shared.h"
int avx2_file();
int avx512_file();
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__cpu() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddIntConstant(m, "plain", COMPILED_FOR);
#ifdef FASTSAM_X86
  PyModule_AddIntConstant(m, "avx2", avx2_file());
  PyModule_AddIntConstant(m, "avx512", avx512_file());
#endif
  return m;
}
"""
SHARED = """
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define COMPILED_FOR 512
#elif defined(__AVX2__) && defined(__F16C__)
#define COMPILED_FOR 2
#else
#define COMPILED_FOR 0
#endif
"""
FAKE_NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_90; exit 0; fi
while [ "$#" -gt 0 ]; do case "$1" in -o) : > "$2";; -MF) echo "x:" > "$2";; esac; shift; done
"""

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is built on Linux only")


class Project:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        self.write("README.md", "a project")
        self.write("fastsam/__init__.py", '__version__ = "1.2.3"\n')
        self.write("fastsam_optim.py", "")
        self.write("csrc/cpu/bindings.cpp", BINDINGS)
        self.write("csrc/cpu/shared.h", SHARED)
        self.write("csrc/cpu/kernels_avx2.cpp", '#include "shared.h"\nint avx2_file() { return COMPILED_FOR; }\n')
        self.write("csrc/cpu/kernels_avx512.cpp", "#include <immintrin.h>\nint avx512_file() { return 512; }\n")

    def write(self, path: str, text: str) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k not in SWITCHES} | variables
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def build(self, **variables: str) -> subprocess.CompletedProcess:
        return self.run("setup.py", "build_ext", "--inplace", **({"FASTSAM_CUDA": "0"} | variables))

    def recorded(self) -> dict[str, str]:
        return json.loads((self.folder / "fastsam/_build_info.json").read_text())

    def libraries(self) -> list[str]:
        return sorted(path.name.partition(".")[0] for path in (self.folder / "fastsam").glob("*.so"))

    def ninja(self, extension: str) -> str:
        return next(self.folder.glob(f"build/*/{extension}/build.ninja")).read_text()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_without_a_compiler_the_build_succeeds_and_gives_the_reason(project):
    run = project.build(CXX="/nonexistent/c++")
    assert run.returncode == 0, run.stdout
    reason = "not built: the C++ compiler CXX=/nonexistent/c++ was not found"
    assert f"fastsam: cpu extension {reason}" in run.stdout
    assert project.recorded() == {"cpu": reason, "cuda": "not built: FASTSAM_CUDA=0"}
    assert project.libraries() == []


def test_a_required_extension_that_cannot_be_built_stops_the_build(project):
    run = project.build(CXX="/nonexistent/c++", FASTSAM_CPU="1")
    assert run.returncode != 0
    assert "FASTSAM_CPU=1 requires it" in run.stdout


def test_a_switch_of_another_value_is_refused(project):
    run = project.build(FASTSAM_CPU="yes")
    assert run.returncode != 0
    assert "FASTSAM_CPU must be 0, 1 or unset, not 'yes'" in run.stdout


def test_a_switched_off_extension_is_left_out_and_an_older_build_of_it_removed(project):
    project.write(f"fastsam/_cpu{SUFFIX}", "an older build")
    assert project.build(FASTSAM_CPU="0").returncode == 0
    assert project.recorded()["cpu"] == "not built: FASTSAM_CPU=0"
    assert project.libraries() == []


@needs_compiler
def test_a_compile_error_is_shown_and_recorded(project):
    project.write("csrc/cpu/kernels_avx2.cpp", "int avx2_file() { return undeclared_name; }\n")
    run = project.build()
    assert run.returncode == 0
    assert "return undeclared_name" in run.stdout, "the compiler's own output is missing"
    assert project.recorded()["cpu"].startswith("not built: the compiler failed: csrc/cpu/kernels_avx2.cpp:1:")
    assert project.libraries() == []


@needs_compiler
def test_each_source_is_compiled_for_the_instruction_sets_in_its_name(project):
    run = project.build(FASTSAM_CPU="1")
    assert run.returncode == 0, run.stdout
    assert project.recorded()["cpu"] == "built"
    script = "from fastsam import _cpu as m; print(m.plain, getattr(m, 'avx2', 2), getattr(m, 'avx512', 512))"
    assert project.run("-c", script).stdout.split() == ["0", "2", "512"]
    text = project.ninja("cpu")
    common = re.search(r"rule compile\n  command = (.*)", text)[1]
    for flag in ("-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"):
        assert flag in common
    assert "-march" not in text and "-mavx" not in common
    if X86:
        isa = dict(re.findall(r"compile csrc/cpu/(\w+)\.cpp\n  isa = ?(.*)", text))
        avx512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl"
        assert isa == {"bindings": "", "kernels_avx2": "-mavx2 -mf16c", "kernels_avx512": avx512}


@needs_compiler
@pytest.mark.skipif(not X86, reason="the sources that do not include the header are for x86")
def test_an_edited_header_recompiles_only_the_sources_that_include_it(project):
    assert project.build().returncode == 0
    assert "no work to do" in project.build().stdout
    project.write("csrc/cpu/shared.h", SHARED + "\n// edited\n")
    compiled = re.findall(r"compile csrc/cpu/(\w+)\.cpp", project.build().stdout)
    assert sorted(compiled) == ["bindings", "kernels_avx2"]


@needs_compiler
def test_wheels_carry_the_extension_and_the_record(project):
    script = "import setuptools.build_meta as b; print(b.build_{0}('out'))"
    for kind in ("wheel", "editable", "sdist"):
        run = project.run("-c", script.format(kind), FASTSAM_CPU="1", FASTSAM_CUDA="0")
        assert run.returncode == 0, run.stdout
        if kind == "wheel":
            assert project.libraries() == [], "a wheel must not write into the sources"
            (wheel,) = (project.folder / "out").glob("*.whl")
            names = zipfile.ZipFile(wheel).namelist()
            assert wheel.name.startswith("fastsam_optim-1.2.3-cp") and "fastsam_optim.py" in names
            assert f"fastsam/_cpu{SUFFIX}" in names
            assert "fastsam/_build_info.json" in names
            wheel.unlink()
    assert project.libraries() == ["_cpu"], "an editable install builds in place"
    (sdist,) = (project.folder / "out").glob("*.tar.gz")
    listing = subprocess.run(["tar", "-tf", sdist], capture_output=True, text=True, check=True).stdout
    assert "csrc/cpu/shared.h" in listing and "constraints.txt" in listing
    assert ".so\n" not in listing and "_build_info.json" not in listing


@needs_linux
@pytest.mark.parametrize(
    "asked, expected",
    [
        ("", ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]),
        ("90;120", ["arch=compute_90,code=sm_90", "arch=compute_120,code=[sm_120,compute_120]"]),
    ],
    ids=["those nvcc knows", "FASTSAM_CUDA_ARCHS"],
)
def test_cuda_sources_are_compiled_for_each_architecture_and_the_last_also_to_ptx(project, asked, expected):
    nvcc = project.write("bin/nvcc", FAKE_NVCC)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    project.write("csrc/cuda/gram.cu", "")
    run = project.build(FASTSAM_CPU="0", FASTSAM_CUDA="1", CUDACXX=str(nvcc), FASTSAM_CUDA_ARCHS=asked)
    assert run.returncode == 0, run.stdout
    assert project.recorded()["cuda"] == "built"
    text = project.ninja("cuda")
    assert re.findall(r"-gencode=([^' ]+)", text) == expected
    assert "-fmad=false" in text and "-shared -cudart static" in text


@needs_linux
def test_without_nvcc_the_cuda_extension_is_left_out_with_the_reason(project):
    project.write("csrc/cuda/gram.cu", "")
    run = project.build(FASTSAM_CPU="0", FASTSAM_CUDA="", CUDACXX="/nonexistent/nvcc")
    assert run.returncode == 0
    assert project.recorded()["cuda"] == "not built: CUDACXX=/nonexistent/nvcc was not found"


def test_another_processor_gets_neither_the_avx_sources_nor_their_macro(project, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("CXX", sys.executable)  # found, never run
    setup = _load(project.folder / "setup.py", monkeypatch)
    assert setup.EXTENSIONS[0].sources() == ["csrc/cpu/bindings.cpp"]
    assert "FASTSAM_X86" not in setup.cpp_toolchain().compile


@pytest.mark.skipif(not X86 or shutil.which("nm") is None, reason="needs x86-64 and nm")
def test_no_function_is_compiled_for_two_instruction_sets():
    """The linker keeps one of two equal inline functions: the AVX-512 one would crash other machines."""
    objects = [path for path in ROOT.glob("build/*/cpu/*.o") if (ROOT / "csrc/cpu" / path.stem).exists()]
    if not objects:
        pytest.skip("the extension was not built here")
    for machine in {path.parent for path in objects}:
        owners: dict[str, set[str]] = {}
        for path in (p for p in objects if p.parent == machine):
            listing = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True)
            for symbol in re.findall(r"^\w+ [WVu] (\w+)$", listing.stdout, re.MULTILINE):
                owners.setdefault(symbol, set()).add(path.stem)
        shared = {s: files for s, files in owners.items() if len(files) > 1 and any("_avx" in f for f in files)}
        assert shared == {}


def test_an_old_setuptools_is_told_so_in_one_sentence(project):
    script = "import runpy, setuptools; setuptools.__version__ = '68.2.2'; runpy.run_path('setup.py', {}, '__main__')"
    run = project.run("-c", script)
    assert run.returncode == 1
    assert run.stdout.startswith("fastsam needs setuptools 77 or newer to build, and this is 68.2.2: pip install -U")
    assert len(run.stdout.splitlines()) == 1


def test_no_source_includes_a_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    found = [p.name for p in sources if re.search(r'#\s*include\s*[<"](torch|ATen|c10)\b', p.read_text())]
    assert found == []


def test_what_is_pinned_is_declared_and_torch_is_not_needed_to_build():
    pyproject = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    extras = [line for lines in pyproject["project"]["optional-dependencies"].values() for line in lines]
    declared: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, pyproject["project"]["dependencies"] + extras):
        declared.setdefault(requirement.name, []).append(requirement)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert "torch==2.13.0" in pins
    for name, _, pinned in (pin.partition("==") for pin in pins):
        assert all(requirement.specifier.contains(pinned) for requirement in declared[name])
    needed = {Requirement(line).name for line in pyproject["build-system"]["requires"]}
    assert needed == {"setuptools", "pybind11", "ninja"}
    assert needed <= set(declared), "`make` builds without isolation: the dev extra must bring what the build needs"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_installs_torch_first_and_runs_every_check(project):
    run = subprocess.run(
        ["make", "--no-print-directory", "-n", "test"], cwd=project.folder, capture_output=True, text=True, check=True
    )
    order = [
        "-m venv",
        "--no-deps",
        "--no-build-isolation -e '.[dev]'",
        "build_ext",
        "ruff check",
        "ruff format",
        "bin/mypy",
        "mkdocs build --strict",
        "-m pytest",
    ]
    places = [run.stdout.index(text) for text in order]
    assert places == sorted(places)
    assert all("-c constraints.txt" in line for line in run.stdout.splitlines() if "pip install" in line)


@pytest.mark.parametrize(("runs", "last", "status"), [
    (["4 passed"], "4 passed", 0),
    (["4 failed, 3 passed"], "4 failed, 3 passed", 2),
    (["1 error, 1 failed"], "1 error, 1 failed", 2),
    (["2 failed, 3 passed", "2 passed"], "2 failed, 3 passed", 0),
    (["2 failed, 3 passed", "1 failed, 1 passed"], "1 failed, 1 passed", 2),
])  # fmt: skip
def test_ci_ends_with_the_summary_of_pytest_and_runs_a_few_failures_once_more(tmp_path, runs, last, status):
    """``runs``: what pytest says each time that make is called."""
    make = tmp_path / "make"
    (tmp_path / "said").write_text("".join(f"===== {said} in 0.10s =====\n" for said in runs))
    make.write_text(
        f"#!/bin/sh\ncd {tmp_path}\necho \"$@\" | tee -a calls\necho 'FAILED tests/a.py::b'\n"
        'said=$(sed -n "$(wc -l < calls)p" said)\necho "$said"\necho \'make: later words\'\n'
        'case "$said" in *failed*) exit 2;; esac\n'
    )
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run([ROOT / ".ci/run"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == status
    assert run.stdout.splitlines()[-1] == f"===== {last} in 0.10s ====="
    again = "test ARGS=-n 0 --last-failed --last-failed-no-failures none"
    assert (tmp_path / "calls").read_text().splitlines() == ["test", again][: len(runs)]
    assert ("then run alone:\nFAILED tests/a.py::b" in run.stdout) == (len(runs) > 1), "it is named"


def _load(path: Path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fastsam_setup", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fastsam_setup", module)
    spec.loader.exec_module(module)
    return module
