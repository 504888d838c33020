"""A completion cut into segments: boundaries in token offsets, decided by what precedes them.

First the text gives cuts, character offsets at which a new segment begins; then the tokens give boundaries. Nothing is
changed or re-tokenised, so the segments joined are the completion. The source idea is VinePPO's (arXiv 2410.01679):
meaningful blocks, cut at line breaks, sentence ends or commas outside formulas. Two kinds count tokens instead:
`cutpoints` those that the policy was uncertain of (`actors.cutpoints`), `fixed` all of them.

Guarantees, for every text:

- No text cut lies inside a balanced formula (`actors.formulas` says what that is; at most MAX_FORMULA_CHARS characters
  long), nor on the rest of a line after an unbalanced opener. Splits of over-long segments (`max_tokens`),
  `cutpoints` and `fixed` ignore text.
- A cut at character c depends on ``text[: c + LOOKAHEAD_CHARS]`` alone: whatever is appended later, it neither appears
  nor goes. The look-ahead closes formulas; all else needs BLANK_CHARS at most. Were the future free to move a
  boundary, the state's value would be conditioned on it. Hence short pieces merge forwards, never backwards.
- Each cut has something visible before it (since the cut before) and after it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.cutpoints import uncertain_cuts
from actors.formulas import MAX_FORMULA_CHARS, Formula, find_formulas

if TYPE_CHECKING:
    from ray_rl.config.segmentation import (
        CutpointsSegmentation,
        FixedSegmentation,
        LimitedSegmentation,
        SegmentationConfig,
    )

LOOKAHEAD_CHARS = MAX_FORMULA_CHARS + 48
"""Characters after a cut that may have a say in it; 48 for a delimiter that begins within reach and ends beyond."""
BLANK_CHARS = 80
"""White space this long is taken for a segment of nothing: line breaks further apart than this are two runs."""

_LINE_BREAKS = re.compile(rf"[\r\n](?:[^\S\r\n]{{0,{BLANK_CHARS}}}[\r\n])*+")
_CLOSING = r"[\"'\u2019\u201d\u00bb\u300d\u300f\uff09)\]*_]*+"
_SPACED = rf"(?=[^\S\r\n]{{1,{BLANK_CHARS}}}(?P<follower>\S))"
_UNSPACED = rf"(?=[^\S\r\n]{{0,{BLANK_CHARS}}}\S)"
_STOP = re.compile(rf"(?<![.!?])(?P<stop>[.!?]++){_CLOSING}{_SPACED}|[\u3002\uff01\uff1f\uff61]++{_CLOSING}{_UNSPACED}")
_COMMA = re.compile(rf"(?P<comma>,){_CLOSING}{_SPACED}|[\uff0c\u3001]{_UNSPACED}")
_FORMULA_TAIL = re.compile(r"(?<!\.)(?<!\\left)(?<!\\right)([.,])\s*+(?:\$\$?|\\\)|\\\]|\\end\{[^{}\r\n]+\})\Z")
_FOLLOWER = re.compile(_SPACED)
_WORD = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]{1,12}\Z")
_LABEL = re.compile(r"[^\S\r\n]*[-*_#>(]*[^\S\r\n]?(?:\d{1,3}|[^\W\d_])")

_NEVER_LAST = frozenset(
    ("e.g", "eg", "i.e", "ie", "cf", "vs", "viz", "resp", "approx", "al", "dr", "mr", "mrs", "ms", "prof", "st")
)
"""Abbreviations that never end a sentence."""
_BEFORE_NUMBERS = frozenset(
    ("fig", "figs", "eq", "eqs", "no", "nos", "sec", "ch", "vol", "p", "pp", "ex", "thm", "def", "prop", "lem", "cor")
)
"""Abbreviations when a number or a bracket follows; words of their own otherwise."""
_SOMETIMES_LAST = frozenset(("etc", "a.m", "p.m", "inc", "ltd", "co", "jr", "sr", "u.s", "ed", "eds"))
"""Abbreviations that end a sentence only if a capital letter follows."""


def cuts_lines(text: str) -> list[int]:
    """Character offsets, ascending and inside (0, len(text)), after the line breaks outside formulas.

    The line break belongs to the segment that it ends; line breaks with only white space between them are one.
    """
    return _keep(text, (match.end() for match in _LINE_BREAKS.finditer(text)), find_formulas(text))


def cuts_sentences(text: str) -> list[int]:
    """As `cuts_lines`, and after the ends of sentences outside formulas.

    A sentence ends with ``. ! ?`` and closing quotes and brackets, where white space follows; the full-width ones need
    none. The white space belongs to the next segment, as tokenizers hold a space and the word after it together. Not
    ends: decimal points, abbreviations ("e.g.", "Fig. 2"), labels of a list ("1. Add"), dots of omission unless a
    capital follows, factorials. A formula that ends with a full stop ends a sentence too.
    """
    formulas = find_formulas(text)
    return _keep(text, [*_line_cuts(text), *_sentence_cuts(text), *_formula_cuts(text, formulas, ".")], formulas)


def cuts_clauses(text: str) -> list[int]:
    """As `cuts_sentences`, and after commas outside formulas.

    White space must follow the comma (so 1,000 stays whole), unless it is a full-width one.
    """
    formulas = find_formulas(text)
    stops = [*_line_cuts(text), *_sentence_cuts(text), *_formula_cuts(text, formulas, ".,")]
    return _keep(text, [*stops, *_comma_cuts(text)], formulas)


def token_boundaries(
    cuts: Sequence[int],
    token_starts: Sequence[int],
    text: str,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    max_segments: int | None = None,
) -> tuple[int, ...]:
    """Boundaries 0 = b_0 < b_1 < ... < b_n = T in token offsets, n segments; ``(0,)``, no segment, for no tokens.

    A token belongs to the segment of its first character. A cut inside a token that also opens a formula is dropped,
    since the next token may begin inside the formula; several cuts in one token are one. Trailing tokens without text
    (the end-of-sequence token) join the last segment.

    Args:
        cuts: Ascending character offsets at which segments begin.
        token_starts: [T], not descending: where each token's first character lies; len(text) for trailing ones without
            text.
        text: The completion without special tokens.
        min_tokens: A cut fewer tokens after the last kept one is dropped. Only the last segment may be shorter.
        max_tokens: Longer segments are split every so many tokens, formulas or not. None: never.
        max_segments: When so many segments have begun, nothing is cut any more. None: no limit.

    Raises:
        ValueError: A limit below 1, or `max_tokens` below `min_tokens`.
    """
    with_text = bisect_left(token_starts, len(text))
    wanted = []
    opener_starts = [formula.start for formula in find_formulas(text)] if cuts else []
    for cut in cuts:
        token = bisect_left(token_starts, cut)
        if token >= with_text:
            break
        start = token_starts[token]
        inside_token = start > cut
        if inside_token and bisect_left(opener_starts, token_starts[token - 1]) < bisect_left(opener_starts, start):
            continue
        wanted.append(token)
    return _limit(wanted, with_text, len(token_starts), min_tokens, max_tokens, max_segments)


def segment(
    config: SegmentationConfig, text: str, token_starts: Sequence[int], behavior_logprobs: Sequence[float]
) -> tuple[int, ...]:
    """Boundaries of a completion as `token_boundaries` gives them, cut as `config.kind` says.

    Args:
        config: The kind, and the limits of the segments.
        text: The completion without special tokens.
        token_starts: [T], as in `token_boundaries`.
        behavior_logprobs: [T], natural logs, of the policy that sampled at the temperature it sampled with.

    Raises:
        ValueError: Not as many log-probabilities as tokens.
    """
    if len(behavior_logprobs) != len(token_starts):
        raise ValueError(f"{len(token_starts)} tokens came with {len(behavior_logprobs)} log-probabilities")
    return SEGMENTERS[config.kind](config, text, token_starts, behavior_logprobs)


def _text(
    cuts: Callable[[str], list[int]], config: LimitedSegmentation, text: str, starts: Sequence[int], _: Sequence[float]
) -> tuple[int, ...]:
    return token_boundaries(
        cuts(text),
        starts,
        text,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        max_segments=config.max_segments,
    )


def _cutpoints(
    config: CutpointsSegmentation, text: str, starts: Sequence[int], logprobs: Sequence[float]
) -> tuple[int, ...]:
    wanted = uncertain_cuts(logprobs, every=config.every, threshold=config.threshold)
    with_text = bisect_left(starts, len(text))
    return _limit(wanted, with_text, len(starts), config.min_tokens, config.max_tokens, config.max_segments)


def _fixed(config: FixedSegmentation, text: str, starts: Sequence[int], _: Sequence[float]) -> tuple[int, ...]:
    return token_boundaries((), starts, text, max_tokens=config.tokens, max_segments=config.max_segments)


SEGMENTERS: Mapping[str, Callable[[Any, str, Sequence[int], Sequence[float]], tuple[int, ...]]] = {
    "lines": partial(_text, cuts_lines),
    "sentences": partial(_text, cuts_sentences),
    "clauses": partial(_text, cuts_clauses),
    "cutpoints": _cutpoints,
    "fixed": _fixed,
}
"""Each kind of `ray_rl.config.segmentation` and what it does: (config, text, token_starts, logprobs) -> boundaries."""


def _limit(
    wanted: Iterable[int],
    with_text: int,
    total: int,
    min_tokens: int,
    max_tokens: int | None,
    max_segments: int | None,
) -> tuple[int, ...]:
    """`wanted` token offsets (ascending) thinned and filled up to the limits of `token_boundaries`, and its errors."""
    if not 1 <= min_tokens <= (min_tokens if max_tokens is None else max_tokens):
        raise ValueError(f"need 1 <= min_tokens <= max_tokens, got {min_tokens=}, {max_tokens=}")
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"need 1 <= max_segments, got {max_segments=}")
    if total == 0:
        return (0,)
    bounds = [0]
    for token in (*(token for token in wanted if token < with_text), with_text):
        while max_tokens is not None and token - bounds[-1] > max_tokens:
            bounds.append(bounds[-1] + max_tokens)
        if token < with_text and token - bounds[-1] >= min_tokens:
            bounds.append(token)
    return (*bounds[:max_segments], total)


def _keep(text: str, candidates: Iterable[int], formulas: Sequence[Formula]) -> list[int]:
    """The candidates, ascending, that lie inside (0, len(text)), outside formulas and between visible characters."""
    kept: list[int] = []
    last = protected = upcoming = 0
    for cut in sorted(candidates):
        while upcoming < len(formulas) and formulas[upcoming].start < cut:
            protected = max(protected, formulas[upcoming].end)
            upcoming += 1
        if cut >= protected and _visible(text, last, cut) and _visible(text, cut, cut + BLANK_CHARS):
            kept.append(cut)
            last = cut
    return kept


def _visible(text: str, start: int, end: int) -> bool:
    piece = text[start:end]
    return piece != "" and not piece.isspace()


def _line_cuts(text: str) -> list[int]:
    return [match.end() for match in _LINE_BREAKS.finditer(text)]


def _sentence_cuts(text: str) -> list[int]:
    return [match.end() for match in _STOP.finditer(text) if match["stop"] is None or _ends_sentence(text, match)]


def _comma_cuts(text: str) -> list[int]:
    return [match.end() for match in _COMMA.finditer(text) if not _follows_abbreviation(text, match.start())]


def _formula_cuts(text: str, formulas: Sequence[Formula], stops: str) -> list[int]:
    """Offsets after the balanced formulas whose last character is one of `stops`, where white space follows."""
    cuts = []
    for formula in formulas:
        tail = _FORMULA_TAIL.search(text[max(formula.start, formula.end - 64) : formula.end])
        if formula.balanced and tail is not None and tail[1] in stops and _FOLLOWER.match(text, formula.end):
            cuts.append(formula.end)
    return cuts


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Whether ``. ! ?`` end a sentence: by the word before them and the first character after the white space."""
    start, stop, follower = match.start(), match["stop"], match["follower"]
    word = _word_before(text, start)
    if stop == ".":
        if word in _NEVER_LAST or _is_label(text, start):
            return False
        if word in _BEFORE_NUMBERS:
            return not (follower.isdigit() or follower == "(")
        return word not in _SOMETIMES_LAST or follower.isupper()
    if stop.startswith(".."):
        return follower.isupper()
    factorial = stop == "!" and (text[start - 1 : start].isdigit() or text[start - 1 : start] == ")" or len(word) == 1)
    return not factorial or follower.isupper()


def _follows_abbreviation(text: str, end: int) -> bool:
    """Whether "e.g." or its like ends at `end`."""
    return text[max(0, end - 1) : end] == "." and _word_before(text, end - 1) in _NEVER_LAST


def _word_before(text: str, end: int) -> str:
    """The word, or initials with dots between, that ends at `end`, in small letters; empty without."""
    match = _WORD.search(text, max(0, end - 13), end)
    return match[0].lower() if match else ""


def _is_label(text: str, end: int) -> bool:
    """Whether a number or a letter, with Markdown signs perhaps, is all that its line holds before `end`."""
    window = max(0, end - 16)
    line_start = max(text.rfind("\n", window, end), text.rfind("\r", window, end)) + 1
    return (line_start > 0 or window == 0) and _LABEL.fullmatch(text, line_start, end) is not None
