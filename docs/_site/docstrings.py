"""Docstrings on their way to the site: formulas become MathML, roles such as :class:`~fastsam.SAM` links."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
import formulas

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when the object that it belongs to is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value, obj)


def rewritten(text: str, obj: griffe.Object) -> str:
    """Markdown of a docstring."""
    # <g, v> in a sentence is an inner product, not a tag; code keeps its own.
    prose = re.sub(r"(`+)[^`]+\1|^(?: {4,}|>>> |\.\.\. ).*$|<(?=\w)", _escaped, text, flags=re.MULTILINE)
    blocks = re.sub(r"(?:(?<=\n\n)|\A)(?: {4,}\S.*(?:\n|\Z))+", _block, prose)
    return ROLE.sub(lambda role: _link(role[2], bool(role[1]), obj), blocks)


def _escaped(match: re.Match) -> str:
    return "&lt;" if match[0] == "<" else match[0]


def _block(match: re.Match) -> str:
    lines = [line.strip() for line in match[0].rstrip("\n").split("\n")]
    return f"{formulas.mathml(lines)}\n" if formulas.is_formulas(lines) else match[0]


def _link(target: str, short: bool, obj: griffe.Object) -> str:
    shown = target.rpartition(".")[2] if short else target
    owner = obj if isinstance(obj, griffe.Class) else obj.parent
    if target.startswith("fastsam."):
        path = target
    elif target.startswith("SAM."):  # a method that all of them have
        path = f"fastsam.optimizer.SharpnessAware.{target[4:]}"
    else:
        path = f"{owner.path}.{target}" if owner is not None else target
    # optional: what has no page of its own stays a word
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
