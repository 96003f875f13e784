"""Links out of docs/ on their way to the site: what they point to, a script or a result, is copied into it.

In the repository they are relative paths that work where the file is read. On the site the same files lie under
``repository/``. A link to a file that does not exist stops the strict build, as one inside docs/ does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "repository"
LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)")
log = get_plugin_logger("links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in list(files.documentation_pages()):
        source = ROOT / "docs" / page.src_uri
        for _, target in LINK.findall(source.read_text(encoding="utf-8")):
            path = (source.parent / target).resolve()
            uri = _uri(path)
            if uri is not None and path.is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    source = ROOT / "docs" / page.file.src_uri

    def changed(link: re.Match) -> str:
        path = (source.parent / link[2]).resolve()
        uri = _uri(path)
        if uri is None:
            return link[0]
        if not path.is_file():
            log.warning(f"{page.file.src_uri} links to {link[2]}, which is not a file of the repository")
        return link[1] + "../" * page.file.src_uri.count("/") + uri

    return LINK.sub(changed, markdown)


def _uri(path: Path) -> str | None:
    """Where a file outside docs/ lies on the site; a page of Markdown stays the text that it is."""
    if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT):
        return None
    name = path.relative_to(ROOT).as_posix()
    return f"{FOLDER}/{name}.txt" if path.suffix in (".md", ".py", ".toml", ".h", ".cpp") else f"{FOLDER}/{name}"
