"""A report as one HTML file with its tables and pictures inside, which a browser opens from disk.

The text is the Markdown that the reports write anyway, of which this knows headings, tables, lists, paragraphs,
``code`` and ``**bold**``.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path

__all__ = ["writable_folder", "write_page"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
.number { text-align: right; }
tbody tr:nth-child(even) { background: var(--soft); }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: .85rem; opacity: .8; } code { background: var(--soft); padding: 0 .2em; }
"""


def write_page(path: Path, title: str, markdown: str, pictures: Iterable[Path] = ()) -> Path:
    """Writes ``path``: the text under ``title``, then each picture (PNG) with its file's name. Returns ``path``.

    A first heading of the text that is the title is not repeated. Raises ``OSError`` if a file cannot be read or
    written.
    """
    body = re.sub(rf"\A# {re.escape(title)}\n", "", markdown)
    shown = "\n".join(_picture(Path(picture)) for picture in pictures)
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{_body(body)}\n{shown}\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path


def writable_folder(path: Path, option: str = "--output") -> Path:
    """Makes a folder and sees that it can be written to, before minutes are spent. Raises ``OSError`` if not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".fastsam-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"{option} {path} cannot be written to ({error.strerror or error}): name another folder"
        ) from None
    return path


def _picture(path: Path) -> str:
    data = b64encode(path.read_bytes()).decode()
    name = escape(path.stem.replace("_", " ").replace("-", " "))
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(path.name)}</figcaption></figure>"


def _body(markdown: str) -> str:
    return "\n".join(_block(block) for block in re.split(r"\n\s*\n", markdown.strip()) if block)


def _block(block: str) -> str:
    lines = block.split("\n")
    if heading := re.match(r"(#{1,4}) (.*)", lines[0]):
        level = max(2, len(heading[1]))
        rest = "\n".join(lines[1:])
        return f"<h{level}>{_inline(heading[2])}</h{level}>" + (f"\n{_block(rest)}" if rest.strip() else "")
    if lines[0].startswith("|"):
        end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
        return _table(lines[:end]) + (f"\n{_block(chr(10).join(lines[end:]))}" if lines[end:] else "")
    if all(line.startswith("- ") for line in lines):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _table(lines: list[str]) -> str:
    header, alignment, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    kinds = [' class="number"' if mark.endswith(":") else "" for mark in alignment]

    def row(cells: list[str], tag: str) -> str:
        shown = (f"<{tag}{kind}>{_inline(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    head = row(header, "th")
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
