import json
import subprocess
import sys
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


def test_a_report_that_could_not_be_written_is_told_before_anything_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "learn", "--json", str(tmp_path / "nowhere" / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --json: {tmp_path}/nowhere is not a folder; make it first\n"
