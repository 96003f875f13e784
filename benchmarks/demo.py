"""The demo's result for docs/demo.md: runs ``fastsam demo``, keeps its numbers and picture, rewrites the page's table.

python -m benchmarks.demo            # some two minutes on two quiet cores
python -m benchmarks.demo --check    # runs nothing; exit 1 if the page's table is not that of the kept result
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.marks import with_block
from fastsam.commands import demo

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "demo.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 if the page's table is out of date")
    options = parser.parse_args(arguments)
    if not options.check:
        with tempfile.TemporaryDirectory() as folder:
            demo.run(Path(folder))
            shutil.copy(Path(folder) / "results.json", RESULTS / "demo.json")
            shutil.copy(Path(folder) / "curvature.png", RESULTS / "demo-curvature.png")
    current = PAGE.read_text()
    updated = with_demo_block(current, json.loads((RESULTS / "demo.json").read_text()))
    if options.check:
        if updated != current:
            print(f"{PAGE}: the demo's table is not that of {RESULTS / 'demo.json'}", file=sys.stderr)
        return int(updated != current)
    PAGE.write_text(updated)
    return 0


def with_demo_block(text: str, results: dict) -> str:
    """``text`` with everything between the demo's marks replaced by its table and caption."""
    return with_block(text, "demo", demo.markdown_table(results).removesuffix("\n"))


if __name__ == "__main__":
    sys.exit(main())
