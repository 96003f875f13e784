"""What scripts write into documents: a block between the marks ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

from __future__ import annotations

from pathlib import Path


def with_block(text: str, name: str, block: str) -> str:
    """``text`` with ``block``, on lines of its own, for whatever is between the marks of ``name``.

    Raises ``ValueError`` unless the text has exactly one pair of marks, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} followed by one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def rewrite(path: Path, name: str, block: str) -> None:
    """The same in a file, which is left as it is where it has no such marks."""
    path.write_text(with_block(path.read_text(encoding="utf-8"), name, block), encoding="utf-8")
