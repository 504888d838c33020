"""`ray-rl submit` as a user types it, against a job server that has no cluster behind it."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from ray_rl import job_server
from ray_rl.errors import ConfigError, RunError
from ray_rl.job_log import JobLog, report_lines
from ray_rl.job_server import JobEnd, JobServer
from ray_rl.submission import Submission, exit_code
from ray_rl.working_folder import PROGRAM, WorkingFolder
from tests.fake_job_server import FakeJobServer, serving

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a recipe and a reward of the user's in it, as the current folder."""
    for name in PROGRAM:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text("ignored*\n")
    for name in ("mine.yaml", "ignored.yaml"):
        shutil.copy(ROOT / "ray_rl" / "recipes" / "laptop-grpo.yaml", tmp_path / name)
    for name in ("reward.py", "ignored.py", "data.jsonl", "ignored.jsonl"):
        (tmp_path / name).write_text("def score(prompt, completion, answer, metadata): return 0.0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def ray_rl(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "ray_rl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment() | more)


def submit(server: FakeJobServer, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    with serving(server):
        return ray_rl("submit", "--address", server.address, *arguments, **more)


def of(*words: str, run_dir: str | None = "/shared/run", report: bool = False, name: str | None = None) -> Submission:
    return Submission.of(words, run_dir=run_dir, brings_report=report, submission_id=name)


def test_a_training_goes_on_where_it_is_submitted_again_and_its_recipe_goes_by_its_place_in_the_folder(here):
    words = of(str(here / "mine.yaml"), "training.steps=3").words
    assert words == (
        "python", "-m", "ray_rl", "train", "mine.yaml", "training.steps=3", "--run-dir", "/shared/run", "--continue",
    )  # fmt: skip
    assert of("laptop-grpo").words[4] == "laptop-grpo"
    assert "s3://bucket/run" in of("laptop-grpo", run_dir="s3://bucket/run").words


@pytest.mark.parametrize("value", ["{kind: fixed, num_continuations: 2}", 'it\'s $HOME `id` "x" !y \\n'])
def test_whatever_is_in_a_value_the_shell_hands_it_on(here, value):
    job = Submission(words=("printf", "%s", value), folder=WorkingFolder.read(here))
    assert subprocess.run(job.entrypoint, shell=True, capture_output=True, text=True, check=True).stdout == value
    assert job.entrypoint.startswith("exec ")


def test_rays_own_command_submits_the_same_job(here):
    job = of("laptop-grpo", "values={kind: none}", "name=it's", name="mine")
    words = shlex.split(job.line("http://h:8265"))
    split = words.index("--")
    assert shlex.join(words[split + 1 :]) == job.entrypoint  # which is what Ray does with them
    assert words[:9] == [
        "ray", "job", "submit", "--address", "http://h:8265", "--submission-id", "mine", "--working-dir", ".",
    ]  # fmt: skip
    assert json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "300"


@pytest.mark.parametrize(
    ("words", "more", "line"),
    [
        ((), {}, "submit: name a recipe"),
        (("laptop-grpo",), {"run_dir": None}, "--run-dir: is missing; name a folder"),
        (("laptop-grpo",), {"run_dir": "runs/x"}, "--run-dir: runs/x would lie in the job's working folder"),
        (
            ("laptop-grpo",),
            {"run_dir": "s3://key:secret@bucket/x"},
            "s3://bucket/x: a URL is no place for a password",
        ),
        (("nowhere",), {}, "recipe: nowhere is neither a file nor a shipped recipe"),
        (("laptop-grpo", "rollout.group_siz=3"), {}, "rollout.group_siz: unknown key"),
        (("laptop-grpo", "model.path=./nowhere"), {}, "model.path: ./nowhere does not exist"),
        (("ignored.yaml",), {}, "recipe: ignored.yaml stays here"),
        (("../outside.yaml",), {}, "recipe: ../outside.yaml lies outside of the working folder"),
        (("mine.yaml", "task=ignored.jsonl"), {}, "task.path: ignored.jsonl stays here"),
        (("mine.yaml", "reward={kind: python, function: 'ignored.py:score'}"), {}, "reward.function: ignored.py stays"),
        (
            ("mine.yaml", "reward={kind: python, function: 'no.py:score'}"),
            {},
            "reward.function: there is no file no.py",
        ),
        (("mine.yaml",), {"report": True}, "--json: brings back the report of `bench`"),
        (("bench", "overlap"), {}, "--run-dir: bench begins no run"),
        (("bench", "overlap", "--json", "x"), {"run_dir": None}, "bench --json: the file would stay on the cluster"),
        (
            ("export", "--checkpoint", "3", "/shared/run", "my-policy"),
            {"run_dir": None},
            "export: my-policy would lie in the job's working folder",
        ),
        (("status", "/shared/run"), {"run_dir": None, "report": True}, "--json: brings back the report of `bench`"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_sent(here, words, more, line):
    shutil.copy(here / "mine.yaml", here.parent / "outside.yaml")
    with pytest.raises(ConfigError) as raised:
        of(*words, **more)
    assert str(raised.value).startswith(line)


def test_an_export_to_the_storage_of_the_cluster_is_sent(here):
    call = ("export", "/shared/run", "--checkpoint=3", "/shared/policy")
    assert of(*call, run_dir=None).words[3:] == call


def test_what_a_recipe_names_from_the_root_is_the_clusters_own(here):
    of("mine.yaml", "model.path=/models/mine", "task=/data/train.jsonl")
    of("mine.yaml", "task=data.jsonl", "reward={kind: python, function: 'reward.py:score'}")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", 0, 1),
    ],
)
def test_the_exit_code_follows_the_job(status, code, expected):
    assert exit_code(JobEnd(status=status, exit_code=code, message="")) == expected


def test_a_job_is_submitted_with_the_folder_and_followed_to_its_end(here):
    server = FakeJobServer(log=["step 1\nst", "ep 2\n"])
    done = submit(server, "mine.yaml", "--run-dir", "/shared/run", "--submission-id", "mine")
    assert done.returncode == 0, done.stderr
    (job,) = server.submitted
    assert job["entrypoint"] == "exec python -m ray_rl train mine.yaml --run-dir /shared/run --continue"
    assert job["submission_id"] == "mine"
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
    ((name, package),) = server.packages.items()
    assert job["runtime_env"]["working_dir"] == f"gcs://{name}"
    (here / "package.zip").write_bytes(package)
    assert {"mine.yaml", "reward.py"} <= set(zipfile.ZipFile(here / "package.zip").namelist())
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("step")] == ["step 1", "step 2"]
    assert "submission id   mine" in lines
    assert lines[-1] == "job mine SUCCEEDED"
    assert done.stderr == ""


def test_a_refused_jobs_exit_code_and_reason_come_back(here):
    message = "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\nerror"
    server = FakeJobServer(end={"status": "FAILED", "driver_exit_code": 2, "message": message})
    done = submit(server, "laptop-grpo", "--run-dir", "/shared/run")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].endswith("FAILED: Job entrypoint command failed with exit code 2")


def test_without_following_it_ends_when_the_job_is_submitted(here):
    server = FakeJobServer(stays=True)
    done = submit(server, "laptop-grpo", "--run-dir", "/shared/run", "--no-follow")
    assert done.returncode == 0
    assert "hello" not in done.stdout
    assert f"ray job stop --address {server.address} raysubmit_1" in done.stdout


def test_a_log_whose_connection_breaks_is_shown_once(here):
    server = FakeJobServer(log=["one\n", "two\nth", "ree\n"], cuts=[2, 1])
    done = submit(server, "laptop-grpo", "--run-dir", "/shared/run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-4:] == ["one", "two", "three", "job raysubmit_1 SUCCEEDED"]


HEARS_CTRL_C = """
# Who was started in the background of a shell inherits that SIGINT is ignored.
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from ray_rl.cli import main
main()
"""


def test_ctrl_c_leaves_the_job_alone(here):
    with serving(FakeJobServer(stays=True)) as server:
        call = [sys.executable, "-P", "-c", HEARS_CTRL_C, "submit", "--address", server.address, "--", "status", "/x"]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None
        while process.stdout.readline() != "hello\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert rest.startswith("job raysubmit_1 goes on")
    assert f"ray job logs --address {server.address} --follow raysubmit_1" in rest


def test_the_report_of_a_benchmark_is_written_here(here):
    text = json.dumps({"cases": {"overlap": {}}}, indent=2)
    server = FakeJobServer(log=["table\n", report_lines(text)])
    done = submit(server, "--json", "report.json", "--", "bench", "overlap", "--quick")
    assert done.returncode == 0, done.stderr
    assert server.submitted[0]["entrypoint"] == "exec python -m ray_rl bench overlap --quick --json -"
    assert (here / "report.json").read_text() == text + "\n"
    assert "table\njob" in done.stdout


def test_a_job_that_ends_well_without_its_report_is_an_error(here):
    done = submit(FakeJobServer(), "--json", "report.json", "--", "bench", "overlap")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --json: the job ended well and printed no report")


def test_a_submission_that_the_server_refuses_is_one_line(here):
    refusal = (
        "Traceback (most recent call last):\n  File ...\nValueError: Job with submission_id mine already exists.\n"
    )
    done = submit(FakeJobServer(refusal=refusal), "--submission-id", "mine", "--", "status", "/x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: submit: ")
    assert "ValueError: Job with submission_id mine already exists" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_token_is_sent_and_its_lack_is_one_line(here):
    server = FakeJobServer(token="a" * 32)
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    assert submit(server, "--", "status", "/x", **given).returncode == 0
    done = submit(server, "--", "status", "/x", RAY_AUTH_MODE="disabled")
    assert done.returncode == 2
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "head:8265", "http://", "http://127.0.0.1:x"])
def test_an_address_where_no_job_server_answers_is_one_line_within_seconds(here, address):
    began = time.monotonic()
    done = ray_rl("submit", "--address", address, "--", "status", "/x")
    assert time.monotonic() - began < 10
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --address: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_password_in_the_address_is_refused_without_being_shown(here):
    done = ray_rl("submit", "--address", "http://me:hunter2@head:8265", "--", "status", "/x")
    assert done.returncode == 2
    assert "no place for a password" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def test_the_address_comes_from_the_environment_too_and_the_option_wins(here):
    with serving(FakeJobServer()) as server:
        taken = ray_rl("submit", "--", "status", "/x", RAY_API_SERVER_ADDRESS=server.address)
        assert taken.returncode == 0, taken.stderr
        elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "RAY_ADDRESS": "127.0.0.1:1"}
        won = ray_rl("submit", "--address", server.address, "--", "status", "/x", **elsewhere)
        assert won.returncode == 0, won.stderr
        assert len(server.submitted) == 2
    assert ray_rl("submit", "--", "status", "/x").stderr.startswith("error: --address: name the cluster's job server")


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Waits of a job server's client are short, and what it leaves in the environment goes."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    for name in ("_ANSWER_SECONDS", "_LOST_SECONDS", "_QUIET_SECONDS", "_PAUSE_SECONDS"):
        monkeypatch.setattr(job_server, name, 0.1 if name == "_PAUSE_SECONDS" else 0.5)


def test_a_server_that_listens_and_says_nothing_is_waited_for_no_longer_than_needed(impatient):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"waited 0\.5 s for the job server"):
            JobServer.connect(address)


def test_a_connection_that_is_never_closed_keeps_nobody_from_the_end_of_the_job(impatient):
    with serving(FakeJobServer(hangs=True)) as server:
        assert JobServer.connect(server.address).follow("raysubmit_1", JobLog(print)).status == "SUCCEEDED"


@pytest.mark.parametrize(
    ("log", "silence"), [([f"{number}\n" for number in range(8)], 0.2), (["one\n"], 0.7)], ids=["speaks", "is silent"]
)
def test_a_proxy_that_cuts_every_connection_does_not_make_a_running_job_a_lost_one(impatient, log, silence):
    cuts = list(range(1, 8)) if len(log) == 8 else [1, 1]
    with serving(FakeJobServer(log=log, cuts=cuts, cut_after=silence)) as server:
        shown: list[str] = []
        assert JobServer.connect(server.address).follow("raysubmit_1", JobLog(shown.append)).status == "SUCCEEDED"
        assert shown == [line.strip() for line in log]


def test_a_server_that_does_not_come_back_is_an_error_that_says_so(impatient):
    with serving(FakeJobServer(knows_no_job=True)) as server:
        client = JobServer.connect(server.address)
        with pytest.raises(
            RunError, match=r"waited 0\.5 s for the job server .* does not exist.*may go on all the same"
        ):
            client.follow("raysubmit_1", JobLog(print))
