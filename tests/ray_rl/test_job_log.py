import json

from ray_rl.job_log import JobLog, report_lines


def taken(*pieces: str) -> tuple[list[str], str]:
    shown: list[str] = []
    log = JobLog(shown.append)
    for piece in pieces:
        log.take(piece)
    log.end()
    return shown, log.report


def test_lines_are_shown_whole_whatever_pieces_they_come_in():
    assert taken("on", "e\ntwo\n", "\nthree") == (["one", "two", "", "three"], "")


def test_a_report_is_kept_and_not_shown_even_with_other_lines_in_between():
    text = json.dumps({"a": [1, 2], "b": {}}, indent=2)
    lines = report_lines(text).splitlines(keepends=True)
    shown, report = taken("before\n", lines[0], "a warning\n", *lines[1:], "after\n")
    assert shown == ["before", "a warning", "after"]
    assert report == text


def test_the_last_report_is_the_one():
    texts = [json.dumps({"cases": list(range(count))}, indent=2) for count in (1, 3)]
    assert taken("".join(map(report_lines, texts)))[1] == texts[-1]


def test_a_log_that_begins_anew_is_shown_once():
    shown: list[str] = []
    log = JobLog(shown.append)
    log.take("one\ntw")
    log.begin_anew()
    log.take("one\n")
    log.begin_anew()
    log.take("one\ntwo\nthree\n")
    assert shown == ["one", "two", "three"]
