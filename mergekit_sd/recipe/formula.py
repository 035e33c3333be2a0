"""Formulas of `op = "formula"`: sums of models and differences, `"mix + 0.7*(db - sd15)"`.

Owns the grammar and what makes a formula sound. A model counts 1 and a difference 0; sums add up
and factors multiply. What comes out at 1 is a model, at 0 a difference, and all else is a mistake:
`a + b` has twice a model's values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_sd.operations.types import Space
from mergekit_sd.recipe.positions import Where
from mergekit_sd.text import shown

DEEPEST = 50
# How far a sum of factors may be from 0 or 1: 0.3 + 0.6 + 0.1 is not quite 1.
ROUNDING = 1e-9
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
        | (?P<name>[^\W\d]\w*)
        | "(?P<double>[^"]*)" | '(?P<single>[^']*)'
        | (?P<sign>[-+*/()−·×])
        | (?P<end>$)
    )""",
    re.VERBOSE,
)
_SIGNS = {"−": "-", "·": "*", "×": "*"}


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of models, steps and sums in brackets, each times its factor."""

    terms: tuple[tuple[float, Term], ...]

    def names(self) -> Iterator[str]:
        """Every name, as often as it stands there."""
        for _, term in self.terms:
            yield from (term,) if isinstance(term, str) else term.names()

    def count(self, counts: Mapping[str, float]) -> float:
        """How many models it sums up to, given the same of its names: 1 is a model, 0 a difference."""
        return sum(factor * count_of(term, counts) for factor, term in self.terms)

    def text(self, names: Mapping[str, str]) -> str:
        """The formula written out, with each name replaced by another."""
        text = ""
        for factor, term in self.terms:
            body = _written(names[term]) if isinstance(term, str) else f"({term.text(names)})"
            sign = ("-" if factor < 0 else "") if not text else (" - " if factor < 0 else " + ")
            text += sign + (body if abs(factor) == 1 else f"{abs(factor)!r}*{body}")
        return text

    def leading(self, counts: Mapping[str, float]) -> str | None:
        """The first name that is no part of a difference; its tensors are the result's."""
        for _, term in self.terms:
            if count_of(term, counts) != 0:
                return term if isinstance(term, str) else term.leading(counts)
        return None


Term: TypeAlias = str | Sum


def _written(name: str) -> str:
    quote = "'" if '"' in name else '"'
    return name if re.fullmatch(r"[^\W\d]\w*", name) else f"{quote}{name}{quote}"


def count_of(term: Term, counts: Mapping[str, float]) -> float:
    """How many models a term sums up to; rounding is forgiven."""
    count = counts[term] if isinstance(term, str) else term.count(counts)
    nearest = round(count)
    return float(nearest) if abs(count - nearest) < ROUNDING else count


def parse_formula(text: str, where: Where) -> Sum:
    """Read a formula; RecipeError at `where` for what is none."""
    return _Parser(text, where).whole()


def space_of(formula: Sum, spaces: Mapping[str, Space], where: Where) -> Space:
    """Whether it makes a model or a difference; RecipeError where it is neither."""
    count = count_of(formula, counts_of(spaces))
    if count not in (0, 1):
        raise where.error(
            f"The formula sums up to {count:g} models; a model is 1, a difference of models 0.",
            hint="let the factors of whole models add up to 1, or write (x - y) where a difference is meant",
        )
    return "weight" if count else "delta"


def counts_of(spaces: Mapping[str, Space]) -> dict[str, float]:
    """What each name counts: a model 1, a difference 0."""
    return {name: 0.0 if space == "delta" else 1.0 for name, space in spaces.items()}


class _Parser:
    """Recursive descent over sum → product → factor; a value is a number or a Sum."""

    def __init__(self, text: str, where: Where) -> None:
        self._text, self._where = text, where
        self._here = self._start = 0
        self._kind = self._token = ""
        self._depth = 0
        self._next()

    def whole(self) -> Sum:
        value = self._sum()
        if self._kind != "end":
            raise self._bad(f'"{shown(self._token)}" is not expected here')
        return self._model(value, "the formula")

    def _sum(self) -> float | Sum:
        value = self._product()
        while self._at("+", "-"):
            sign = 1.0 if self._take() == "+" else -1.0
            other = self._product()
            if isinstance(value, float) and isinstance(other, float):
                value += sign * other
            else:
                left, right = self._model(value, "a sum"), self._model(other, "a sum")
                value = Sum((*left.terms, *((sign * factor, term) for factor, term in right.terms)))
        return value

    def _product(self) -> float | Sum:
        value = self._factor()
        while self._at("*", "/"):
            divides = self._take() == "/"
            other = self._factor()
            if divides:
                if not isinstance(other, float) or other == 0:
                    raise self._bad("only numbers divide, and not 0")
                other = 1.0 / other
            if isinstance(value, float) and isinstance(other, float):
                value *= other
            elif isinstance(value, Sum) and isinstance(other, Sum):
                raise self._bad("models cannot be multiplied with each other")
            else:
                number, terms = (value, other) if isinstance(value, float) else (other, value)
                assert isinstance(number, float)
                assert isinstance(terms, Sum)
                value = Sum(tuple((number * factor, term) for factor, term in terms.terms))
        return value

    def _factor(self) -> float | Sum:
        if self._at("+", "-"):
            self._deeper()
            negative = self._take() == "-"
            value = self._factor()
            self._depth -= 1
            if not negative:
                return value
            return -value if isinstance(value, float) else Sum(tuple((-f, term) for f, term in value.terms))
        if self._kind == "number":
            return float(self._take())
        if self._kind == "name":
            return Sum(((1.0, self._take()),))
        if self._at("("):
            self._deeper()
            self._take()
            value = self._sum()
            if not self._at(")"):
                raise self._bad("a bracket is not closed")
            self._take()
            self._depth -= 1
            # A sum in brackets stays together: a tensor that one of a difference lacks has no difference.
            return value if isinstance(value, float) or len(value.terms) == 1 else Sum(((1.0, value),))
        raise self._bad("a name, a number or ( is expected")

    def _at(self, *signs: str) -> bool:
        return self._kind == "sign" and self._token in signs

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._bad("the brackets are nested too deeply")

    def _take(self) -> str:
        token = self._token
        self._next()
        return token

    def _next(self) -> None:
        match = _TOKEN.match(self._text, self._here)
        if match is None:
            self._start = len(self._text) - len(self._text[self._here :].lstrip())
            raise self._bad(f'"{shown(self._text[self._start])}" is not expected here')
        kind = str(match.lastgroup)
        self._start, self._here = match.start(kind), match.end()
        self._kind = {"double": "name", "single": "name"}.get(kind, kind)
        self._token = _SIGNS.get(match[kind], match[kind])

    def _model(self, value: float | Sum, what: str) -> Sum:
        if isinstance(value, float):
            raise self._bad(f"{what} needs a model beside the number {value:g}")
        return value

    def _bad(self, what: str) -> Exception:
        return self._where.error(
            f"The formula cannot be read: {what} (character {self._start + 1}).",
            hint='write a sum such as "mix + 0.7*(db - sd15)"; put names of other than letters and digits in quotes',
        )
