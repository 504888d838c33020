"""deploy/slurm.sh, run with programs that take the place of Slurm's and of Ray's: its lines, what it starts, how it ends."""

import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest

from ray_rl.config import load_config
from ray_rl.config.nodes import Node
from ray_rl.placement import Demand, shortage
from tests.deploy.deployments import DEPLOY, ROOT, parsed

SCRIPT = DEPLOY / "slurm.sh"
DIRECTIVES = dict(
    re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line).groups()
    for line in SCRIPT.read_text().splitlines()
    if line.startswith("#SBATCH")
)

PROGRAMS = {
    "scontrol": """
        [[ $1 == show && $2 == hostnames ]] && printf 'node%s\\n' 0 1 2
    """,
    # With --ntasks=1 as a question, otherwise on each node.
    "srun": """
        while [[ $1 == --* ]]; do [[ $1 == --ntasks=1 ]] && asked=1; shift; done
        if [[ $1 == hostname ]]; then echo "10.0.0.7 fe80::1"; exit; fi
        for ((node = SLURM_JOB_NUM_NODES - 1; node >= 0; node--)); do
          SLURM_NODEID=$node "$@" || exit $?
        done
    """,
    # What the real one does is read from its own source: the program after -- runs on the head only, here node 0.
    "ray": """
        printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
        [[ -n ${RAY_DOES_NOT_START:-} ]] && exit 0
        ((SLURM_NODEID == 0)) || exit 0
        while [[ $1 != -- ]]; do shift; done
        shift
        "$@"
    """,
    "python": """
        printf '%q ' "$RAY_ADDRESS" "$@" > "$TRAINED"
        exit ${TRAINING_EXITS:-0}
    """,
}


class Submission:
    """One `sbatch`, on three nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls, self.trained = folder / "calls", folder / "trained"
        programs = folder / ".venv" / "bin"  # as a checkout has them, first on the path
        programs.mkdir(parents=True)
        for name, body in PROGRAMS.items():
            (programs / name).write_text("#!/usr/bin/env bash\n" + textwrap.dedent(body))
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "TRAINED": str(self.trained),
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_NAME": DIRECTIVES["job-name"],
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "node[0-2]",
            "SLURM_JOB_NUM_NODES": DIRECTIVES["nodes"],
            "SLURM_CPUS_PER_TASK": DIRECTIVES["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": DIRECTIVES["gpus-per-node"],
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def starts(self) -> list[list[str]]:
        """What was asked of Ray before the --, the head's last."""
        calls = [shlex.split(line) for line in self.calls.read_text().splitlines()]
        return [call[: call.index("--")] for call in calls]

    def training(self) -> list[str]:
        return shlex.split(self.trained.read_text())


@pytest.fixture
def submission(tmp_path):
    return Submission(tmp_path)


def test_its_syntax_is_right():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=10)


def test_directives_stand_before_the_first_command_where_slurm_reads_them():
    lines = [line for line in SCRIPT.read_text().splitlines() if line and not re.match(r"#( |$|!)", line)]
    assert all(line.startswith("#SBATCH") for line in lines[: len(DIRECTIVES)])
    assert not any(line.startswith("#SBATCH") for line in lines[len(DIRECTIVES) :])


def test_a_job_that_was_preempted_comes_back_and_has_its_nodes_to_itself():
    """`ray symmetric-run` ends with `ray stop`, which stops every Ray of the user on a node."""
    assert {"requeue", "exclusive"} <= set(DIRECTIVES)
    assert DIRECTIVES["open-mode"] == "append"
    assert DIRECTIVES["ntasks-per-node"] == "1"


def test_the_run_by_default_is_a_recipe_that_fits_on_the_nodes_and_goes_on(submission):
    done = submission.run()
    assert done.returncode == 0, done.stderr
    address, *command = submission.training()
    assert re.fullmatch(r"10\.0\.0\.7:2\d{4}", address)
    assert command[:2] == ["-m", "ray_rl"]
    options = parsed(command[2:])
    assert options["continued"]
    assert options["run_dir"] == submission.folder / "runs" / "ray-rl"
    config = load_config(options["recipe"], options["overrides"])
    cpus, gpus = float(DIRECTIVES["cpus-per-task"]), float(DIRECTIVES["gpus-per-node"])
    pools = ["learner", *["rollout"] * (int(DIRECTIVES["nodes"]) - 1)]
    nodes = [Node(name=pool, cpus=cpus, gpus=gpus, labels={"pool": pool}) for pool in pools]
    assert not shortage(Demand.of(config, rollout_actors=config.rollout.most_actors), nodes)


def test_every_node_starts_ray_with_options_that_ray_has(submission):
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    known = {option for command in (start, symmetric_run) for one in command.params for option in one.opts}
    submission.run()
    starts = submission.starts()
    assert len(starts) == 3
    for words in starts:
        assert words[0] == "symmetric-run"
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
    assert [next(word for word in words if "labels" in word) for words in starts] == [
        "--labels=pool=rollout",
        "--labels=pool=rollout",
        "--labels=pool=learner",
    ]


def test_what_is_given_is_trained_whatever_characters_it_has(submission):
    given = ["gpu-node", "rollout.num_actors={min: 1, max: 4}", "task.prompt_suffix=it's $HOME"]
    submission.run(*given, RUN_DIR=str(submission.folder / "a b"))
    assert submission.training()[3:] == ["train", *given, "--run-dir", str(submission.folder / "a b"), "--continue"]


def test_a_ray_that_does_not_start_fails_the_job_although_ray_says_nothing(submission):
    done = submission.run(RAY_DOES_NOT_START="1")
    assert done.returncode == 1
    assert "did not come to its end" in done.stderr


def test_a_run_that_fails_fails_the_job_and_one_that_ends_leaves_nothing_behind(submission):
    assert submission.run(TRAINING_EXITS="3").returncode == 3
    assert submission.run().returncode == 0
    assert not list(submission.folder.glob("runs/*.done"))


def test_each_job_has_a_token_of_its_own_which_no_file_and_no_output_holds(submission):
    submission.run()
    text = SCRIPT.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_AUTH_TOKEN=$(od" in text
    assert not any("TOKEN" in word for words in submission.starts() for word in words)


def test_it_stands_where_its_comment_says():
    assert SCRIPT.relative_to(ROOT) == Path("deploy/slurm.sh")
    assert os.access(SCRIPT, os.X_OK)
