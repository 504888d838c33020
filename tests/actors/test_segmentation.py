"""Segments: joined they are the completion, they never begin in a formula, and the future doesn't move them."""

from __future__ import annotations

import time
from bisect import bisect_left
from itertools import accumulate, pairwise
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import formulas
from actors.formulas import MAX_FORMULA_CHARS, find_formulas
from actors.segmentation import (
    BLANK_CHARS,
    LOOKAHEAD_CHARS,
    SEGMENTERS,
    cuts_clauses,
    cuts_lines,
    cuts_sentences,
    segment,
    token_boundaries,
)
from ray_rl.config.segmentation import (
    ClausesSegmentation,
    CutpointsSegmentation,
    FixedSegmentation,
    LinesSegmentation,
    SentencesSegmentation,
)

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
CUTTERS = (cuts_lines, cuts_sentences, cuts_clauses)
UNEVEN_KINDS = (LinesSegmentation, SentencesSegmentation, ClausesSegmentation, CutpointsSegmentation)

PIECES = (
    *(
        "a",
        "Then ",
        "so x ",
        "e.g. ",
        "i.e., ",
        "Fig. 2",
        " etc. ",
        "3.14",
        "1,000",
        "5",
        " ",
        "  ",
        "\t",
        "é",
        "数。",
        "，",
    ),
    *(
        ". ",
        ", ",
        "! ",
        "? ",
        "...",
        "** ",
        ") ",
        '." ',
        "1. ",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\n   ",
        "\\",
        "\\\\",
        "\\$",
    ),
    *("$", "$$", "$5 ", "$x$", "5$", "$<<", "\\(", "\\)", "\\[", "\\]", "\\\\[2pt]", "\\begin{align}", "\\end{align}"),
    *("\\begin{cases}", "\\end{cases}", "\\begin{", "[asy]", "[/asy]", "\\right.$ ", "&= b", " and ", "Hence"),
)
latex = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
texts = st.one_of(latex, st.text(max_size=60))


@st.composite
def tokenised(draw):
    """A text and where its pieces begin, as a tokenizer of any sort might split it; some pieces are empty."""
    text = draw(texts)
    inner = draw(st.lists(st.integers(0, len(text)), max_size=len(text)))
    starts = sorted([0, *inner, *([len(text)] * draw(st.integers(0, 2)))])
    return text, tuple(starts)


def pieces(cutter, text):
    return [text[a:b] for a, b in pairwise([0, *cutter(text), len(text)])]


# --- formulas


def in_dollars(body):
    return f"${body}$"


BODIES = ("x", "x, y", "a. B", "3, 4", "n = 1,000. So, z", "\\text{costs } \\$5, ok", "-5, 6", "a +\nb, c")
LONG_BODIES = (*BODIES, " a, b.\n\nC, d \\\\[2pt] e ", "$x$, $y$. Z", " \\left. f, g \\right. ", "\n", "")
balanced_formulas = st.one_of(
    st.sampled_from(BODIES[:-1]).map(in_dollars),
    st.sampled_from(("a +\nb, c", "\\frac{1}{2},\nx")).map(in_dollars),
    st.sampled_from([body for body in LONG_BODIES if body[:1] != "$"]).map(lambda body: f"$${body}$$"),
    st.builds(
        lambda ends, body: ends[0] + body + ends[1],
        st.sampled_from(
            (
                ("\\(", "\\)"),
                ("\\[", "\\]"),
                ("\\begin{align*}", "\\end{align*}"),
                ("\\begin{cases}\\begin{cases}", "\\end{cases}, \\end{cases}"),
                ("\\[\\begin{align}", "\\end{align}, \\]"),
                ("[asy]", "[/asy]"),
            )
        ),
        st.sampled_from(LONG_BODIES),
    ),
)
prose = st.sampled_from(
    (" and ", ". Then ", ", so ", ".\n", ".\n\nHence ", " (e.g. ", " is 3.14, or ", "\r\n", " \\$ ", " 1,000 : ")
)


@quick
@given(st.lists(st.tuples(prose, balanced_formulas), max_size=8))
def test_no_text_cut_lies_inside_a_balanced_formula(parts):
    text, spans = "", []
    for words, formula in parts:
        text += words
        spans.append((len(text), len(text) + len(formula)))
        text += formula
    text += " end"
    assert [(f.start, f.end) for f in find_formulas(text)] == spans
    assert all(f.balanced for f in find_formulas(text))
    for cutter in CUTTERS:
        for cut in cutter(text):
            assert not any(start < cut < end for start, end in spans)


@pytest.mark.parametrize("opener", ["\\(", "\\[", "\\begin{align}", "[asy]", "$$", "$"])
def test_an_unbalanced_opener_protects_the_rest_of_its_line_only(opener):
    assert pieces(cuts_clauses, f"A, b {opener} x, y. Z\nc, d. E") == [
        "A,",
        f" b {opener} x, y. Z\n",
        "c,",
        " d.",
        " E",
    ]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("costs $5, and $6, ok", []),
        ("costs $5 and $x, y$ ok", ["$x, y$"]),
        ("so $5x, y$ and $6$ too", ["$5x, y$", "$6$"]),
        ("I have 5$, you 6$.\nWe, both", []),
        ("it earned 5 * 2 = $<<5*2=10>>10, and $<<10-3=7>>7.", []),
        ("set $ x, y $ here", ["$ x, y $"]),
        ("set $ 3, 4 $ here", ["$ 3, 4 $"]),
        ("from $5-$10, say", []),
        ("is \\$5, or \\$6", []),
        ("$5.\nThen, 6$", []),
        ("$x +\ny$ and", ["$x +\ny$"]),
        ("a $x, y\n\nz$ b", []),
        ("$$ a, $b$, c $$", ["$$ a, $b$, c $$"]),
        ("$x$$y, z$", ["$x$", "$y, z$"]),
        ("\\[ a \\\\[2pt] b \\]", ["\\[ a \\\\[2pt] b \\]"]),
        ("\\\\(a, b\\\\)", []),
        ("\\[ a, b\nthen \\[ c \\] and \\)", ["\\[ c \\]"]),
        ("\\begin{a} \\begin{a} x \\end{a}", ["\\begin{a} x \\end{a}"]),
        ("\\begin{a} \\begin{b} x \\end{a} y", ["\\begin{a} \\begin{b} x \\end{a}"]),
        ('[asy] label("$A$", (0, 0)); [/asy], next', ['[asy] label("$A$", (0, 0)); [/asy]']),
    ],
)
def test_what_is_a_balanced_formula(text, inside):
    assert [text[f.start : f.end] for f in find_formulas(text) if f.balanced] == inside


@pytest.mark.parametrize(("opener", "closer"), [("\\[", "\\]"), ("$$", "$$"), ("$", "$"), ("[asy]", "[/asy]")])
def test_a_formula_is_protected_up_to_the_stated_length_and_no_further(opener, closer):
    filler = MAX_FORMULA_CHARS - len(opener) - len(closer) - len("a,\nb")
    fits, too_long = (opener + "a,\nb" + "x" * n + closer for n in (filler, filler + 1))
    assert cuts_clauses(fits + " end") == []
    assert cuts_clauses(too_long + " end")[0] == too_long.index("\n") + 1


@pytest.mark.parametrize(
    "piece", ["\\(", "$", "$$", "$5 ", "5$", ".", ". ", ", ", "\\begin{a}", "\n ", "\n" + " " * 99, "[asy]"]
)
def test_a_policy_that_repeats_itself_does_not_cost_quadratic_time(piece):
    text = piece * (30_000 // len(piece))
    start = time.process_time()
    cuts_clauses(text)
    assert time.process_time() - start < 3  # seconds; a tenth of one when linear, a minute when quadratic


# --- cuts


@quick
@given(texts)
def test_cuts_ascend_and_have_something_visible_on_both_sides(text):
    for cutter in CUTTERS:
        parts = pieces(cutter, text)
        assert "".join(parts) == text
        assert len(parts) == 1 or not any(part == "" or part.isspace() for part in parts)


@quick
@given(texts)
def test_finer_rules_see_all_line_breaks_outside_formulas(text):
    lines, sentences, clauses = (set(cutter(text)) for cutter in CUTTERS)
    assert all(text[cut - 1] in "\r\n" for cut in lines)
    assert {cut for cut in sentences if text[cut - 1] in "\r\n"} <= lines
    assert len(lines) <= len(sentences) <= len(clauses)


@quick
@given(latex, latex, latex, latex)
def test_appending_text_beyond_the_look_ahead_moves_no_cut(head, body, tail, other_tail):
    reach = 100  # the stated look-ahead, with a smaller formula length so that short texts exercise it
    with mock.patch.object(formulas, "MAX_FORMULA_CHARS", reach - (LOOKAHEAD_CHARS - MAX_FORMULA_CHARS)):
        text = (head + (body or "x") * reach)[: len(head) + reach]
        for cutter in CUTTERS:
            early = [[cut for cut in cutter(text + end) if cut <= len(head)] for end in ("", tail, other_tail)]
            assert early[0] == early[1] == early[2]


@settings(quick, max_examples=40)
@given(latex, latex, latex)
def test_appending_text_beyond_the_real_look_ahead_moves_no_cut(head, body, tail):
    text = (head + (body or "x") * LOOKAHEAD_CHARS)[: len(head) + LOOKAHEAD_CHARS]
    for cutter in CUTTERS:
        assert [c for c in cutter(text) if c <= len(head)] == [c for c in cutter(text + tail) if c <= len(head)]


def test_the_look_ahead_covers_all_that_is_looked_at():
    longest_delimiter = len("\\begin{}") + 40
    assert MAX_FORMULA_CHARS + longest_delimiter <= LOOKAHEAD_CHARS
    assert BLANK_CHARS < LOOKAHEAD_CHARS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        ("Pi is 3.14. And 1,000 more.", ["Pi is 3.14.", " And 1,000 more."]),
        ("See Fig. 2. Next, e.g. this. No. 5 is it.", ["See Fig. 2.", " Next, e.g. this.", " No. 5 is it."]),
        ("Is it? No. Then", ["Is it?", " No.", " Then"]),
        ("Cats etc. are fine. Dogs etc. Are they?", ["Cats etc. are fine.", " Dogs etc.", " Are they?"]),
        ("At 5 p.m. he left. At 6 p.m. She left.", ["At 5 p.m. he left.", " At 6 p.m.", " She left."]),
        ("1. Add. 2\n2. Go. a) B. C", ["1. Add.", " 2\n", "2. Go.", " a) B.", " C"]),
        ("1, 2, ... and so on. So... Well", ["1, 2, ... and so on.", " So...", " Well"]),
        ("5! is 120. n! grows. Wow! it is", ["5! is 120.", " n! grows.", " Wow!", " it is"]),
        ('He said "no." Then (yes.) **Bold.** End', ['He said "no."', " Then (yes.)", " **Bold.**", " End"]),
        (
            "Let $x = 2.$ Then $\\left.y\\right.$ is $1, ...$ so. End",
            ["Let $x = 2.$", " Then $\\left.y\\right.$ is $1, ...$ so.", " End"],
        ),
        ("你好。世界！(完。)好", ["你好。", "世界！", "(完。)", "好"]),
        ("a.b www.x.org v1.2", ["a.b www.x.org v1.2"]),
        ("End.  \n\n Next", ["End.  \n\n", " Next"]),
        ("Done. \n  ", ["Done. \n  "]),
        ("", [""]),
    ],
)
def test_sentences(text, expected):
    assert pieces(cuts_sentences, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a, b,c, 1,000, d", ["a,", " b,c,", " 1,000,", " d"]),
        ("so, e.g., x, i.e., y", ["so,", " e.g., x,", " i.e., y"]),
        ("if $x, y,$ then $(1, 2)$, ok", ["if $x, y,$", " then $(1, 2)$,", " ok"]),
        (", starts", [",", " starts"]),
        ("一，二、三。四", ["一，", "二、", "三。", "四"]),
        ("a,\nb", ["a,\n", "b"]),
    ],
)
def test_clauses(text, expected):
    assert pieces(cuts_clauses, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n\nc", ["a\n", "b\n\n", "c"]),
        ("a\n \t\n\r\n  b\rc\r\nd\n", ["a\n \t\n\r\n", "  b\r", "c\r\n", "d\n"]),
        ("\n\na\nb", ["\n\na\n", "b"]),
        ("a. b, c", ["a. b, c"]),
        ("\\[\nx\n\\]\ny", ["\\[\nx\n\\]\n", "y"]),
        ("a\n" + " " * (BLANK_CHARS - 1) + "b", ["a\n", " " * (BLANK_CHARS - 1) + "b"]),
        ("a\n" + " " * BLANK_CHARS + "b", ["a\n" + " " * BLANK_CHARS + "b"]),
    ],
)
def test_lines(text, expected):
    assert pieces(cuts_lines, text) == expected


WORD_PROBLEM = (
    "Mia sells 12 cups at $2.50 each, so she earns 12*2.50 = $<<12*2.5=30>>30.\n"
    "She pays $1,000/100 = $10 for lemons, i.e. a third.\n"
    "Her profit is $30-$10 = $20.\n"
    "#### 20"
)
SOLUTION = (
    "We want all $x$ with $f(x) = 0.$ Note that\n"
    "\\begin{align*}\n"
    "f(x) &= x^2 - 3x + 2, \\\\[4pt]\n"
    "&= (x-1)(x-2).\n"
    "\\end{align*}\n"
    "By Eq. (1), one factor vanishes, so $x \\in \\{1, 2\\}$. Hence, the sum is\n\n"
    "\\[\n1 + 2 = 3.\n\\]\n\n"
    "The answer is $\\boxed{3}$."
)


def test_a_word_problem_by_hand():
    assert pieces(cuts_lines, WORD_PROBLEM) == WORD_PROBLEM.splitlines(keepends=True)
    assert pieces(cuts_sentences, WORD_PROBLEM) == WORD_PROBLEM.splitlines(keepends=True)
    assert pieces(cuts_clauses, WORD_PROBLEM) == [
        "Mia sells 12 cups at $2.50 each,",
        " so she earns 12*2.50 = $<<12*2.5=30>>30.\n",
        "She pays $1,000/100 = $10 for lemons,",
        " i.e. a third.\n",
        "Her profit is $30-$10 = $20.\n",
        "#### 20",
    ]


def test_a_solution_by_hand():
    display = SOLUTION[SOLUTION.index("\\begin") : SOLUTION.index("By Eq.")]
    assert pieces(cuts_lines, SOLUTION) == [
        "We want all $x$ with $f(x) = 0.$ Note that\n",
        display,
        "By Eq. (1), one factor vanishes, so $x \\in \\{1, 2\\}$. Hence, the sum is\n\n",
        "\\[\n1 + 2 = 3.\n\\]\n\n",
        "The answer is $\\boxed{3}$.",
    ]
    assert pieces(cuts_clauses, SOLUTION) == [
        "We want all $x$ with $f(x) = 0.$",
        " Note that\n",
        display,
        "By Eq. (1),",
        " one factor vanishes,",
        " so $x \\in \\{1, 2\\}$.",
        " Hence,",
        " the sum is\n\n",
        "\\[\n1 + 2 = 3.\n\\]\n\n",
        "The answer is $\\boxed{3}$.",
    ]


# --- boundaries in tokens


def starts_of(*tokens):
    return tuple(accumulate((len(token) for token in tokens[:-1]), initial=0))


def bounds(tokens, cutter=cuts_clauses, **limits):
    text = "".join(tokens)
    return token_boundaries(cutter(text), starts_of(*tokens), text, **limits)


@quick
@given(tokenised(), st.integers(1, 4), st.one_of(st.none(), st.integers(4, 9)), st.one_of(st.none(), st.integers(1, 4)))
def test_boundaries_of_any_text_under_any_tokens(example, min_tokens, max_tokens, max_segments):
    text, starts = example
    total = len(starts)
    with_text = bisect_left(starts, len(text))
    spans = find_formulas(text)
    for cutter in CUTTERS:
        cuts = cutter(text)
        result = token_boundaries(
            cuts, starts, text, min_tokens=min_tokens, max_tokens=max_tokens, max_segments=max_segments
        )
        assert result[0] == 0
        assert result[-1] == total
        assert all(a < b for a, b in pairwise(result))
        assert "".join(text[starts[a] : starts[b] if b < total else None] for a, b in pairwise(result)) == text
        assert all(b - a >= min_tokens for a, b in pairwise(result[:-1]))
        assert max_segments is None or len(result) - 1 <= max_segments
        assert (
            max_segments or not max_tokens or max(b - a for a, b in pairwise((*result[:-1], with_text))) <= max_tokens
        )
        assert all(b < max(with_text, 1) for b in result[:-1])
        if max_tokens is None:
            for boundary in result[1:-1]:
                at = starts[boundary]
                assert any(starts[boundary - 1] < cut <= at for cut in cuts)
                assert not any(span.balanced and span.start < at < span.end for span in spans)
                assert at in cuts or not any(starts[boundary - 1] <= span.start < at for span in spans)


@quick
@given(tokenised(), st.integers(1, 4))
def test_boundaries_taken_as_cuts_are_the_boundaries_again(example, min_tokens):
    text, starts = example
    first = token_boundaries(cuts_clauses(text), starts, text, min_tokens=min_tokens)
    again = token_boundaries([starts[b] for b in first[1:-1]], starts, text, min_tokens=min_tokens)
    assert again == first


@quick
@given(latex, latex, latex, st.data())
def test_later_tokens_move_no_boundary_beyond_the_look_ahead(head, body, tail, data):
    reach = 100
    with mock.patch.object(formulas, "MAX_FORMULA_CHARS", reach - (LOOKAHEAD_CHARS - MAX_FORMULA_CHARS)):
        text = (head + (body or "x") * reach)[: len(head) + reach]
        inner = data.draw(st.lists(st.integers(0, len(text) - 1), max_size=60))
        starts = tuple(sorted([0, *inner]))
        longer = (*starts, *(len(text) + i for i in range(len(tail))))
        limits = {"min_tokens": 2, "max_tokens": 5, "max_segments": 20}
        for cutter in CUTTERS:
            short = token_boundaries(cutter(text), starts, text, **limits)
            full = token_boundaries(cutter(text + tail), longer, text + tail, **limits)
            within = bisect_left(starts, len(head) + 1)
            assert [b for b in short[:-1] if b < within] == [b for b in full[:-1] if b < within]


def test_a_token_belongs_to_the_segment_of_its_first_character():
    assert bounds(["so", ".", " b", " c"]) == (0, 2, 4)
    assert bounds(["so", ". ", "b", " c"]) == (0, 2, 4)
    assert bounds(["a", ", b, ", "c"]) == (0, 2, 3)


def test_several_cuts_in_one_token_are_one():
    assert bounds(["a", ", b, c, d", "e"]) == (0, 2, 3)


def test_a_cut_inside_a_token_that_opens_a_formula_is_dropped():
    assert bounds(["a", ".\n", "$$", "x", "$$"]) == (0, 2, 5)
    assert bounds(["a", ".\n$$", "x", "$$"]) == (0, 4)
    assert bounds(["a", ".\n$", "$", "x", "$$"]) == (0, 5)
    assert bounds(["a", ".\n$x$", " b"]) == (0, 3)


def test_a_cut_inside_the_last_token_with_text_is_dropped():
    text = "a\nb"
    assert token_boundaries(cuts_lines(text), (0, 1), text) == (0, 2)


def test_an_end_of_sequence_alone_is_no_segment():
    text = "a\nb\n"
    assert token_boundaries(cuts_lines(text), (0, 2, 4), text) == (0, 1, 3)
    assert token_boundaries([], (0, 1, 2, 3, 4), text, max_tokens=2) == (0, 2, 5)
    assert token_boundaries([], (0,), "") == (0, 1)


def test_no_tokens_make_no_segments():
    assert token_boundaries([], (), "") == (0,)


def test_short_pieces_merge_forwards():
    tokens = ["a", ", ", "b", ", ", "c", ", ", "d", ", ", "e"]
    assert bounds(tokens) == (0, 2, 4, 6, 8, 9)
    assert bounds(tokens, min_tokens=3) == (0, 4, 8, 9)
    assert bounds(["a", ",", " ", "b", ",", " ", "c"], min_tokens=4) == (0, 5, 7)


def test_long_segments_are_split_again():
    tokens = ["a"] * 5 + [",", " "] + ["b"] * 2 + [",", " "] + ["c"] * 7
    assert bounds(tokens) == (0, 6, 10, 18)
    assert bounds(tokens, max_tokens=4) == (0, 4, 6, 10, 14, 18)
    assert bounds(tokens, max_tokens=4, min_tokens=4) == (0, 4, 8, 12, 16, 18)


def test_after_max_segments_nothing_is_cut():
    tokens = ["a", ", ", "b", ", ", "c", ", ", "d"]
    assert bounds(tokens, max_segments=2) == (0, 2, 7)
    assert bounds(tokens, max_segments=1) == (0, 7)
    assert bounds(["a"] * 9, max_segments=2, max_tokens=3) == (0, 3, 9)


@pytest.mark.parametrize(
    "limits", [{"min_tokens": 0}, {"min_tokens": 3, "max_tokens": 2}, {"max_tokens": 0}, {"max_segments": 0}]
)
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ValueError, match="need 1 <="):
        token_boundaries([], (0,), "a", **limits)


def test_each_kind_of_configuration_has_its_segmenter():
    text = "Hm, a. B\nc"
    starts = tuple(range(len(text)))
    logprobs = (-0.5, 0.0) * 5
    by_kind = {
        "lines": (LinesSegmentation(), (0, 9, 10)),
        "sentences": (SentencesSegmentation(), (0, 6, 9, 10)),
        "clauses": (ClausesSegmentation(min_tokens=2), (0, 3, 6, 9, 10)),
        "cutpoints": (CutpointsSegmentation(every=2), (0, 3, 7, 10)),
        "fixed": (FixedSegmentation(tokens=4), (0, 4, 8, 10)),
    }
    assert set(by_kind) == set(SEGMENTERS)
    for config, expected in by_kind.values():
        assert segment(config, text, starts, logprobs) == expected
    assert segment(SentencesSegmentation(max_tokens=5, max_segments=3), text, starts, logprobs) == (0, 5, 6, 10)
    assert segment(FixedSegmentation(tokens=4, max_segments=2), text, starts, logprobs) == (0, 4, 10)


SEVERAL_LIMITS = st.fixed_dictionaries(
    {"min_tokens": st.integers(1, 4), "max_tokens": st.none() | st.integers(4, 9), "max_segments": st.none()}
)


@quick
@given(tokenised(), SEVERAL_LIMITS, st.data())
def test_each_kind_keeps_the_text_and_its_limits_of_length(example, limits, data):
    text, starts = example
    logprobs = data.draw(st.lists(st.floats(-3, 0), min_size=len(starts), max_size=len(starts)))
    with_text = bisect_left(starts, len(text))
    for kind in UNEVEN_KINDS:
        result = segment(kind(**limits), text, starts, logprobs)
        assert (result[0], result[-1]) == (0, len(starts))
        assert "".join(text[starts[a] : [*starts, len(text)][b]] for a, b in pairwise(result)) == text
        assert all(b - a >= limits["min_tokens"] for a, b in pairwise(result[:-1]))
        longest = max(b - a for a, b in pairwise((*result[:-1], with_text)))
        assert limits["max_tokens"] is None or longest <= limits["max_tokens"]
    tokens = limits["min_tokens"]
    fixed = segment(FixedSegmentation(tokens=tokens), text, starts, logprobs)
    assert all(b - a == tokens for a, b in pairwise(fixed[:-1]))
    assert with_text - fixed[-2] <= tokens


@pytest.mark.parametrize("kind", [*UNEVEN_KINDS, FixedSegmentation])
def test_log_probabilities_that_do_not_match_the_tokens_are_refused(kind):
    with pytest.raises(ValueError, match="2 tokens came with 1 log-probabilities"):
        segment(kind(), "ab", (0, 1), (0.0,))
