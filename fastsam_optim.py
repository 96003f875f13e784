"""The ``fastsam`` command under the distribution's own name: it says so where ``import fastsam`` finds another package.

Fast Segment Anything imports as ``fastsam``, too. Where its folder comes first, nothing inside this package can run.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["main", "other_package"]


def main() -> None:
    """Entry point of the console script, and of ``python -m fastsam_optim``."""
    if found := other_package():
        sys.exit(
            f"fastsam: `import fastsam` finds {found}, which is another package's (Fast Segment Anything has the same "
            "import name): install fastsam-optim into an environment without it, and start outside of its folder"
        )
    from fastsam.commands.cli import main as command

    command()


def other_package() -> str | None:
    """The file or folder that ``import fastsam`` would load if it is not fastsam-optim's; imports nothing."""
    spec = find_spec("fastsam")
    if spec is None:
        return None  # the import says by itself that there is none
    if spec.origin is None:
        return next(iter(spec.submodule_search_locations or ()), "an empty folder")
    if "fastsam-optim" in Path(spec.origin).read_text(encoding="utf-8", errors="replace"):
        return None
    return spec.origin


if __name__ == "__main__":
    main()
