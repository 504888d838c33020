"""Who writes into a run's logs/, and what. All of it in processes of their own, for logging is the process's."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from rich.console import Console

from ray_rl.progress import ConsoleProgress
from ray_rl.redaction import MASK
from ray_rl.run_logs import component_log
from tests.little_room import with_little_room

ROOT = Path(__file__).resolve().parent.parent.parent
SENTINEL = "sentinel-77aa01"


def run(program: str, **environment: str) -> str:
    """What a program shows on standard error."""
    head = "import logging\nfrom pathlib import Path\nfrom ray_rl.run_logs import driver_log, inherit_log, keep_log\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": SENTINEL} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_an_actor_logs_into_its_file_what_it_and_its_children_say(tmp_path):
    program = f"""
    import subprocess, sys
    import logging.config
    keep_log(Path({str(tmp_path)!r}, "rollout-0.log"), "apart")
    logging.config.dictConfig(dict(version=1, disable_existing_loggers=False))  # as vLLM's import does
    logging.getLogger("apart").propagate = False
    logging.getLogger("apart").error("of an engine")
    logging.getLogger("actors.x").info("of ours")
    logging.getLogger("other").info("too little")
    logging.getLogger("other").warning("enough")
    child = "from ray_rl.run_logs import inherit_log; import logging; inherit_log(); logging.warning('of a child')"
    subprocess.run([sys.executable, "-c", child], check=True)
    """
    assert run(program).splitlines() == ["enough", "of a child"]
    run(program)
    lines = (tmp_path / "rollout-0.log").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["of an engine", "of ours", "enough", "of a child"] * 2


def test_an_actor_that_cannot_reach_the_folder_goes_on_without(tmp_path):
    gone = tmp_path / "gone"
    assert run(f"keep_log(Path({str(gone)!r}, 'rollout-0.log'))\nlogging.getLogger('x').warning('x')") == "x\n"
    assert not gone.exists()


def test_without_a_folder_nothing_is_kept_nor_inherited():
    assert component_log(None, "rollout-0") is None
    assert run("keep_log(None)\ninherit_log()\nlogging.getLogger('x').warning('x')") == "x\n"


def test_the_driver_keeps_what_it_tells_and_warnings_are_still_shown_once(tmp_path):
    program = f"""
    with driver_log(Path({str(tmp_path)!r}) / "logs") as tell:
        tell("step 1")
        logging.getLogger("ray_rl.x").info("not for the screen")
        logging.getLogger("ray_rl.x").warning("for both")
    logging.getLogger("ray_rl.x").warning("for the screen")
    """
    assert run(program).splitlines() == ["for both", "for the screen"]
    run(program)
    begin, *rest = (
        line.partition("run: ")[2] or line for line in (tmp_path / "logs" / "driver.log").read_text().splitlines()
    )
    assert begin.endswith("begins")
    assert [line.rpartition(": ")[2] for line in rest[:3]] == ["step 1", "not for the screen", "for both"]
    assert len(rest) == 7


def test_no_log_holds_a_secret(tmp_path):
    program = f"""
    with driver_log(Path({str(tmp_path)!r})) as tell:
        tell("a {SENTINEL}")
        try:
            raise ValueError("b {SENTINEL}")
        except ValueError:
            logging.getLogger("ray_rl").exception("c %s", "{SENTINEL}")
    """
    assert SENTINEL not in run(program)
    text = (tmp_path / "driver.log").read_text()
    assert SENTINEL not in text
    assert text.count(MASK) >= 3


def test_on_a_full_disk_lines_are_lost_and_nothing_else(tmp_path):
    program = """
    from ray_rl.run_logs import driver_log
    with driver_log(Path("logs")) as tell:
        for _ in range(100):
            tell("x" * 100)
    print("went on")
    """
    assert with_little_room(tmp_path, program) == "went on\n"


def test_what_is_no_terminal_gets_a_line_for_each_step_and_so_does_the_log(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    screen, told = io.StringIO(), []
    step = {"reward/mean": 0.5, "reward/accuracy": 0.25, "perf/tokens_per_second": 1234.0, "timing/step": 2.0}
    with ConsoleProgress(3, console=Console(file=screen, width=40), also=told.append) as progress:
        progress.phase("training")
        progress.phase("training")
        progress.step(1, step)
        progress.step(2, step)
        progress.warn(f"something [odd] {SENTINEL}")
    lines = screen.getvalue().splitlines()
    assert lines == told
    assert lines[0] == "training"
    assert lines[1].startswith("step 1/3  reward 0.500  accuracy 0.250  1,234 tok/s")
    assert lines[3] == f"warning: something [odd] {MASK}"
