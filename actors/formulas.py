r"""Where the formulas of a text lie: ``$..$  $$..$$  \(..\)  \[..\]  \begin{x}..\end{x}  [asy]..[/asy]``.

Read from left to right; the first opener wins and everything up to its closer is one formula. A closer belongs to the
nearest open opener of its kind, so that of two ``\[`` before one ``\]`` the first is unbalanced. A backslash takes the
next character with it: ``\$`` is a dollar sign and ``\\[2pt]`` a line break with a distance.

*Balanced* means: closed within ``MAX_FORMULA_CHARS``. Longer ones count as unbalanced, because a segment boundary may
look ahead only so far. An unbalanced opener protects the rest of its line and nothing more.

Dollars are ambiguous, and these rules decide:

- ``5$.`` (a digit before, white space or punctuation after) is a price and opens nothing.
- ``$5``, ``$ 5``, ``$-5`` and ``$<<`` (the calculator notes of GSM8K) may be a price: they open a formula only if the
  next dollar stands on the same line and neither starts another price (``$5 and $6``) nor looks like an opener (white
  space before it and a character to enclose after it, as in ``$5 and $x$``). Otherwise they open nothing and protect
  nothing.
- any other ``$`` is closed by the next one on its line; or within its paragraph, if both sides are tight: no white
  space next to them inside, and no letter, digit or backslash after the closer.

Everything takes time linear in the length of the text, whatever a policy may write.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

MAX_FORMULA_CHARS = 2000
"""Longest balanced formula in characters, delimiters included."""

_MARK = re.compile(
    r"\\begin\{(?P<begin>[^{}\r\n]{1,40})\}|\\end\{(?P<end>[^{}\r\n]{1,40})\}|\\(?P<escaped>[\s\S])"
    r"|(?P<dollar>\$)|\[(?P<asy>/?asy)\]"
)
_BRACKETS = {"(": ("()", True), ")": ("()", False), "[": ("[]", True), "]": ("[]", False)}
_LINE_BREAK = re.compile(r"[\r\n]")
_BLANK_LINE = re.compile(r"(?:\r\n|\r|\n)[^\S\r\n]*+[\r\n]")
_PRICE = re.compile(r"\s?[-+\u2212]?(?:\.?\d|<<)")
_AFTER_PRICE = frozenset(".,;:!?)]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """Characters [start, end) of a text in which no segment may begin, but for `start` itself."""

    start: int
    """Offset of the opener's first character."""
    end: int
    """Balanced: offset after the closer. Unbalanced: the end of the opener's line (MAX_FORMULA_CHARS at most)."""
    balanced: bool


class _Mark(NamedTuple):
    start: int
    end: int
    kind: str
    opens: bool


class _Dollars(NamedTuple):
    """For each mark index: the first mark from it on that is a dollar, or begins two adjoining dollars (-1: none)."""

    single: list[int]
    double: list[int]


def find_formulas(text: str) -> list[Formula]:
    """The formulas of `text` ordered by start: balanced ones don't overlap, unbalanced ones may hold later ones.

    Whether and where a formula with start o lies depends on ``text[: o + MAX_FORMULA_CHARS + 48]`` alone.
    """
    marks = _find_marks(text)
    partners = _match_brackets(marks)
    dollars = _find_dollars(marks)
    formulas: list[Formula] = []
    index = 0
    while index < len(marks):
        mark = marks[index]
        after = index + 1
        if mark.kind == "$":
            display = after < len(marks) and dollars.double[index] == index
            closer = _display_closer(index, marks, dollars) if display else _dollar_closer(text, index, marks, dollars)
            opens = display or closer >= 0 or not _may_be_price(text, mark.start)
            after += display
        else:
            opens, closer = mark.opens, partners.get(index, -1)
        if opens:
            if closer >= 0 and marks[closer].end - mark.start <= MAX_FORMULA_CHARS:
                formulas.append(Formula(start=mark.start, end=marks[closer].end, balanced=True))
                after = closer + 1
            else:
                formulas.append(Formula(start=mark.start, end=_line_end(text, mark.start), balanced=False))
        index = after
    return formulas


def _find_marks(text: str) -> list[_Mark]:
    marks = []
    for match in _MARK.finditer(text):
        start, end = match.span()
        group = match.lastgroup
        if group == "escaped":
            bracket = _BRACKETS.get(match["escaped"])
            if bracket is not None:
                marks.append(_Mark(start, end, *bracket))
        elif group == "dollar":
            marks.append(_Mark(start, end, "$", True))
        elif group == "asy":
            marks.append(_Mark(start, end, "asy", match["asy"] == "asy"))
        else:
            name = match["begin"] or match["end"]
            marks.append(_Mark(start, end, "{" + name, group == "begin"))
    return marks


def _match_brackets(marks: list[_Mark]) -> dict[int, int]:
    """Index of the closer of each opener that has one; dollars apart."""
    open_marks: defaultdict[str, list[int]] = defaultdict(list)
    partners = {}
    for index, mark in enumerate(marks):
        if mark.kind == "$":
            continue
        if mark.opens:
            open_marks[mark.kind].append(index)
        elif open_marks[mark.kind]:
            partners[open_marks[mark.kind].pop()] = index
    return partners


def _find_dollars(marks: list[_Mark]) -> _Dollars:
    single, double = [-1] * (len(marks) + 2), [-1] * (len(marks) + 2)
    for index in range(len(marks) - 1, -1, -1):
        single[index], double[index] = single[index + 1], double[index + 1]
        if marks[index].kind == "$":
            if single[index + 1] == index + 1 and marks[index + 1].start == marks[index].end:
                double[index] = index
            single[index] = index
    return _Dollars(single, double)


def _display_closer(index: int, marks: list[_Mark], dollars: _Dollars) -> int:
    """Index of the last mark of the ``$$`` that closes the one at `index`; -1 without."""
    first = dollars.double[index + 2]
    return first + 1 if first >= 0 else -1


def _dollar_closer(text: str, index: int, marks: list[_Mark], dollars: _Dollars) -> int:
    """Index of the mark that closes the single dollar at `index`, by the rules on the module; -1 without."""
    start = marks[index].start
    closer = dollars.single[index + 1]
    if closer < 0 or marks[closer].end - start > MAX_FORMULA_CHARS or _ends_price(text, start):
        return -1
    at = marks[closer].start
    spaced = text[at - 1].isspace()
    follower = text[at + 1 : at + 2]
    if _LINE_BREAK.search(text, start, at):
        tight = not spaced and not text[start + 1].isspace() and not follower.isalnum() and follower != "\\"
        paragraph = _BLANK_LINE.search(text, start, at) is None
        return closer if tight and paragraph and not _may_be_price(text, start) else -1
    if _may_be_price(text, start):
        looks_like_opener = spaced and follower != "" and not follower.isspace() and follower not in _AFTER_PRICE
        if looks_like_opener or ((spaced or not follower.isspace()) and _PRICE.match(text, at + 1)):
            return -1
    return closer


def _may_be_price(text: str, dollar: int) -> bool:
    return _ends_price(text, dollar) or _PRICE.match(text, dollar + 1) is not None


def _ends_price(text: str, dollar: int) -> bool:
    after = text[dollar + 1 : dollar + 2]
    return dollar > 0 and text[dollar - 1].isdigit() and (after == "" or after.isspace() or after in _AFTER_PRICE)


def _line_end(text: str, start: int) -> int:
    limit = min(len(text), start + MAX_FORMULA_CHARS)
    match = _LINE_BREAK.search(text, start, limit)
    return match.start() if match else limit
