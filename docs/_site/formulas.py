"""Formulas of the docstrings, which are plain text there, as MathML for the site.

A block is formulas if every line of it reads ``symbol = ...`` or ``symbol <- ...``; words that stand three or more
spaces behind a formula are a remark. The notation: juxtaposition multiplies and binds tighter than ``/``, whose right
side is one factor; ``x_y`` and ``x^y`` are indices and powers, ``x^`` a hat, ``||x||`` a norm, ``<x, y>`` a product.
"""

from __future__ import annotations

import re
from html import escape

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "theta": "θ", "rho": "ρ", "sigma": "σ", "eps": "ε", "lmbda": "λ",
}  # fmt: skip
OPERATORS = {"=": "=", "<-": "←", "+": "+", "-": "−", ">=": "≥", ",": ","}
TOKEN = re.compile(
    r"\s*(<-|>=|\|\||\d+(?:\.\d+)?(?:e-?\d+)?|[A-Za-z]+|[_^]\([^()]*\)|[_^](?:\+|[A-Za-z0-9]+)|\^|[-+=/,<>()|*])"
)
LINE = re.compile(r"[A-Za-z]\w*[\^+]?\s*(=|<-) ")


def is_formulas(lines: list[str]) -> bool:
    """Whether every line is a formula, and none is code."""
    return all(LINE.match(line) and not re.search(r"[\"':\[]|[a-z_]\.[a-z]|\w_?\w+\.$", line) for line in lines)


def mathml(lines: list[str]) -> str:
    """A table of formulas: their left sides, the rest, and the remarks."""
    rows = []
    for line in lines:
        formula, _, remark = re.sub(r"\s{3,}\((?=[a-zA-Z' -])", "\0(", line.strip()).partition("\0")
        left, sign, right = re.split(r"\s+(=|<-)\s+", formula, maxsplit=1)
        cells = [_row(left), f"<mo>{OPERATORS[sign]}</mo>" + _row(right)]
        if remark:
            cells.append(f"<mtext>{escape(remark)}</mtext>")
        rows.append("<mtr>" + "".join(f"<mtd>{cell}</mtd>" for cell in cells) + "</mtr>")
    table = f'<mtable displaystyle="true">{"".join(rows)}</mtable>'
    return f'<div class="formula"><math display="block">{table}</math></div>'


def _row(text: str) -> str:
    return f"<mrow>{''.join(_Reader(text).sequence())}</mrow>"


class _Reader:
    """Reads one formula from the left; what it returns are MathML elements."""

    def __init__(self, text: str) -> None:
        self.tokens = TOKEN.findall(text)
        if "".join(self.tokens) != re.sub(r"\s", "", text):
            raise ValueError(f"no formula that docs/_site/formulas.py can read: {text!r}")

    def sequence(self, *closing: str) -> list[str]:
        """Terms and operators up to one of ``closing``, which is taken."""
        out: list[str] = []
        while self.tokens and self.tokens[0] not in closing:
            if self.tokens[0] in OPERATORS:
                out.append(f"<mo>{OPERATORS[self.tokens.pop(0)]}</mo>")
            else:
                out.append(self.term(closing))
        if closing:
            self.tokens.pop(0)
        return out

    def term(self, closing: tuple[str, ...]) -> str:
        """A product, over a factor where ``/`` follows."""
        factors: list[str] = []
        while self.tokens and self.tokens[0] not in closing and self.tokens[0] not in OPERATORS:
            if self.tokens[0] == "/":
                self.tokens.pop(0)
                fraction = f"<mfrac><mrow>{''.join(factors)}</mrow><mrow>{self.factor(bare=True)}</mrow></mfrac>"
                factors = [fraction]
            else:
                factors.append(self.factor())
        return "".join(factors)

    def factor(self, bare: bool = False) -> str:
        """One factor with its index and power; ``bare`` leaves out the parentheses around it."""
        token = self.tokens.pop(0)
        if token == "(":
            inner = "".join(self.sequence(")"))
            base = inner if bare and not self._follows("^") else f"<mo>(</mo>{inner}<mo>)</mo>"
        elif token in ("||", "|"):
            bar = "‖" if token == "||" else "|"
            base = f"<mo>{bar}</mo>{''.join(self.sequence(token))}<mo>{bar}</mo>"
        elif token == "<":
            base = f"<mo>⟨</mo>{''.join(self.sequence('>'))}<mo>⟩</mo>"
        elif token[0].isdigit():
            mantissa, _, exponent = token.partition("e")
            base = f"<mn>{mantissa}</mn>"
            if exponent:  # only powers of ten are written so
                base = f"<msup><mn>10</mn><mn>{exponent.replace('-', '−')}</mn></msup>"
        elif token == "*":
            base = "<mo>·</mo>"
        else:
            name = GREEK.get(token, token)
            base = f"<mi>{name}</mi>" if len(name) == 1 else f'<mi>{name}</mi><mspace width="0.2em"/>'
        return self._scripts(f"<mrow>{base}</mrow>")

    def _scripts(self, base: str) -> str:
        index = power = None
        while self.tokens and self.tokens[0][0] in "_^":
            token = self.tokens.pop(0)
            if token == "^":
                base = f'<mover accent="true">{base}<mo>^</mo></mover>'
            elif token[0] == "_":
                index = token[1:].strip("()")
            else:
                power = token[1:].strip("()")
        scripts = [_script(s) for s in (index, power) if s is not None]
        tag = "msubsup" if len(scripts) == 2 else "msub" if index is not None else "msup"
        return f"<{tag}>{base}{''.join(scripts)}</{tag}>" if scripts else base

    def _follows(self, start: str) -> bool:
        return bool(self.tokens) and self.tokens[0].startswith(start)


def _script(text: str) -> str:
    if text == "+":
        return "<mo>+</mo>"
    kind = "mn" if text.isdigit() else "mi"
    return f"<{kind}>{escape(text).replace('-', '−')}</{kind}>"
