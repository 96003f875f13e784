"""Builds the extensions in place where there is no ninja: with the commands of ``setup.py``, always from scratch.

python -m benchmarks.build
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup as project  # noqa: E402


def main() -> None:
    results = {}
    for native in project.EXTENSIONS:
        library = ROOT / "fastsam" / f"{native.module}{sysconfig.get_config_var('EXT_SUFFIX')}"
        try:
            if os.environ.get(native.switch) == "0":
                raise project.NotBuilt(f"{native.switch}=0")
            project.replace(library, build(native))
            results[native.name] = "built"
        except project.NotBuilt as reason:
            library.unlink(missing_ok=True)  # an older build must not pass for this one
            results[native.name] = f"not built: {reason}"
        print(f"fastsam: {native.name} extension {results[native.name]}", flush=True)
    (ROOT / "fastsam" / project.BUILD_INFO).write_text(json.dumps(results, indent=2) + "\n")


def build(native) -> Path:
    """Compiles every source at once and links them. Raises ``setup.NotBuilt``."""
    toolchain = native.toolchain()
    folder = ROOT / "build" / "without-ninja" / native.name
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{Path(source).name}.o" for source in native.sources()}
    commands = [
        filled(toolchain.compile, source, out, shlex.join(project.isa_flags(source))) for source, out in objects.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    library = folder / f"{native.module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    run(filled(toolchain.link, shlex.join(map(str, objects.values())), library, ""))
    return library


def filled(command: str, inputs: str, output: Path, isa: str) -> str:
    """The command with ninja's variables replaced by their values."""
    return command.replace("$isa", isa).replace("$in", inputs).replace("$out", shlex.quote(str(output)))


def run(command: str) -> None:
    done = subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise project.NotBuilt(f"the compiler failed: {(done.stdout.strip() or 'it said nothing').splitlines()[0]}")


if __name__ == "__main__":
    main()
