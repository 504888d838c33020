import json
from pathlib import Path

from benchmarks.suite import CaseResult, to_json
from ray_rl.job_log import JobLog


def test_a_report_that_is_printed_is_the_one_that_would_be_written(tmp_path, capsys):
    results = {"x": CaseResult(headline={"a": float("nan")}, rows=[{"b": 1.5}], details={"c": [{}]})}
    to_json(tmp_path / "report.json", results)
    to_json(Path("-"), results)
    log = JobLog(print)
    log.take(capsys.readouterr().out)
    assert json.loads(log.report) == json.loads((tmp_path / "report.json").read_text())
    assert json.loads(log.report)["cases"]["x"]["a"] is None
