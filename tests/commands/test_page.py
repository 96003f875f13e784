"""A report in HTML: what a browser is given holds what the Markdown says, and nothing from elsewhere."""

from __future__ import annotations

from base64 import b64decode
from html.parser import HTMLParser

import pytest

from fastsam.commands.page import writable_folder, write_page

TEXT = """# A report

Made on a <machine> & more: `a < b`, **bold**.

## A table

| name | number |
| --- | ---: |
| SAM | 1.0 ± 0.1 |
| a & b | – |

- left out: one
- left out: two
"""
PNG = b"\x89PNG\r\n\x1a\nand pixels"


class Reader(HTMLParser):
    """Every element with its text, in the order in which they end, and the pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[list[str]] = []
        self.texts: list[tuple[str, str]] = []
        self.pictures: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not {"href", "onclick"} & attributes.keys() and tag not in ("script", "link")
        if tag == "img":
            self.pictures.append(attributes["src"])
        elif tag != "meta":
            self.open.append([tag, ""])

    def handle_endtag(self, tag):
        opened, text = self.open.pop()
        assert opened == tag, "elements that overlap"
        self.texts.append((tag, text))
        if self.open:
            self.open[-1][1] += text

    def handle_data(self, data):
        if self.open:
            self.open[-1][1] += data

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def page(tmp_path):
    (tmp_path / "training_curves.png").write_bytes(PNG)
    write_page(tmp_path / "report.html", "A report", TEXT, [tmp_path / "training_curves.png"])
    return Reader((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_tables_lists_and_words_come_through_whole(page):
    assert not page.open
    assert page.of("h1") == page.of("title") == ["A report"], "the title stands there once"
    assert page.of("th") == ["name", "number"] and page.of("td") == ["SAM", "1.0 ± 0.1", "a & b", "–"]
    assert page.of("li") == ["left out: one", "left out: two"]
    assert page.of("p") == ["Made on a <machine> & more: a < b, bold."]
    assert page.of("code") == ["a < b"] and page.of("strong") == ["bold"]


def test_pictures_lie_inside(page):
    (source,) = page.pictures
    kind, _, data = source.partition(",")
    assert kind == "data:image/png;base64" and b64decode(data) == PNG


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^--output .*file/inside cannot be written to \(.*\): name another folder$"):
        writable_folder(tmp_path / "file" / "inside")
    made = writable_folder(tmp_path / "a" / "b")
    assert made.is_dir() and not list(made.iterdir())
