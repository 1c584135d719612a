"""How scorers are combined in one line: `pickscore`, `mean(pickscore,2*hpsv2)`, `agree(z(pickscore,clip),hpsv2:v2.0)`.

    expression := combination "(" term ("," term)* ")"  |  scorer
    term       := [weight "*"] expression
    scorer     := name[:variant][@revision][?key=value&key=value]        (see `registry`)

Only the form is known here; what a combination makes of scores is in `combine`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from scoring.scorers.registry import Spec, parse_spec

VALUES = ("mean", "z", "rank")
"""Combinations that give every candidate of a group a number."""
ORDERS = ("agree", "pareto")
"""Combinations that only say of two candidates which is preferred, if any."""
TOKEN = re.compile(r"[^\s,()*]+")
WEIGHT = re.compile(r"(?P<number>\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+)\s*\*")


class ExpressionError(ValueError):
    """An expression that cannot be read; the message points at the character."""


@dataclass(frozen=True)
class Leaf:
    """One scorer."""

    spec: Spec
    text: str = field(default="", compare=False)
    """As it was written, the whole expression at the outermost; "" where it was not read from a text."""

    @property
    def leaves(self) -> list[str]:
        """The one scorer."""
        return [str(self.spec)]

    def __str__(self) -> str:
        return str(self.spec)


@dataclass(frozen=True)
class Combination:
    """Several scorers, or combinations of them, with a weight each."""

    kind: str
    weights: tuple[float, ...]
    terms: tuple[Expression, ...]
    text: str = field(default="", compare=False)
    """As it was written, the whole expression at the outermost; "" where it was not read from a text."""

    @property
    def leaves(self) -> list[str]:
        """The scorers, each once, in order of appearance."""
        return list(dict.fromkeys(leaf for term in self.terms for leaf in term.leaves))

    def __str__(self) -> str:
        terms = zip(self.weights, self.terms, strict=True)
        return f"{self.kind}({','.join(str(t) if weight == 1 else f'{_number(weight)}*{t}' for weight, t in terms)})"


def _number(weight: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(weight).removesuffix(".0")


Expression = Leaf | Combination


def parse(text: str, known: Collection[str] | None = None) -> Expression:
    """Reads an expression. `known`: names of scorers there are; None = any name will do.

    `str` of the result reads back as the same expression, and its `text` is what was given. Raises ExpressionError,
    pointing at the character and listing what there is.
    """
    return replace(_Parser(text, known).whole(), text=text)


class _Parser:
    """Recursive descent over one line; `at` is the next character."""

    def __init__(self, text: str, known: Collection[str] | None) -> None:
        self.text, self.known, self.at = text, known, 0

    def whole(self) -> Expression:
        found = self.expression()
        if self.at < len(self.text):
            raise self.error("expected the end", self.at)
        return found

    def expression(self, outer: str | None = None) -> Expression:
        """One expression and the blanks behind it. `outer`: the combination around it."""
        self.blanks()
        start = self.at
        token = TOKEN.match(self.text, start)
        if not token:
            raise self.error("expected a scorer or a combination", start)
        self.at = token.end()
        self.blanks()
        if self.peek() != "(":
            return self.leaf(token[0], start)
        return self.combination(token[0], start, outer)

    def leaf(self, token: str, start: int) -> Leaf:
        try:
            spec = parse_spec(token)
        except ValueError as error:
            raise self.error(str(error), start) from error
        # An unknown name with a ":" is taken for package.module:Class, which only an import can refuse.
        if self.known is not None and spec.name not in self.known and not spec.variant:
            raise self.error(f"unknown scorer {spec.name!r}", start)
        return Leaf(spec)

    def combination(self, kind: str, start: int, outer: str | None) -> Combination:
        if kind not in (*VALUES, *ORDERS):
            raise self.error(f"unknown combination {kind!r}", start)
        if kind in ORDERS and outer:
            raise self.error(f"{kind} gives an order and no number, so it must be outermost, not inside {outer}", start)
        weights: list[float] = []
        terms: list[Expression] = []
        while not terms or self.peek() == ",":
            self.at += 1
            weights.append(self.weight(kind))
            terms.append(self.expression(kind))
        if self.peek() != ")":
            raise self.error('expected "," or ")"', self.at)
        self.at += 1
        self.blanks()
        if kind in ORDERS and len(terms) < 2:
            raise self.error(f"{kind} needs at least two scorers", start)
        return Combination(kind, tuple(weights), tuple(terms))

    def weight(self, kind: str) -> float:
        self.blanks()
        found = WEIGHT.match(self.text, self.at)
        if not found:
            return 1.0
        if kind in ORDERS:
            raise self.error(f"{kind} takes no weights", self.at)
        if not 0 < float(found["number"]) < float("inf"):
            raise self.error("a weight must be a finite number above 0", self.at)
        self.at = found.end()
        return float(found["number"])

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def blanks(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def error(self, what: str, at: int) -> ExpressionError:
        pointer = f"    {self.text}\n    {' ' * at}^"
        known = f"; scorers: {', '.join(sorted(self.known))}, or package.module:Class" if self.known is not None else ""
        return ExpressionError(
            f"{what} at character {at + 1}\n{pointer}\ncombinations: {', '.join((*VALUES, *ORDERS))}{known}"
        )
