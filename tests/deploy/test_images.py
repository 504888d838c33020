"""The Dockerfiles: instructions, the Makefile's steps, what they copy, and who runs in them."""

import fnmatch
import os
import re
import subprocess

import pytest

from tests.deploy.deployments import DEPLOY, ROOT

ACCELERATORS = ("cpu", "cuda")
INSTRUCTIONS = {"ARG", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions(accelerator: str) -> list[tuple[str, str]]:
    """Name and arguments, continued lines joined."""
    text = (DEPLOY / f"Dockerfile.{accelerator}").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def arguments(accelerator: str, name: str) -> list[str]:
    return [rest for one, rest in instructions(accelerator) if one == name]


def reaches_the_build(path: str) -> bool:
    """By .dockerignore: the last pattern that fits decides."""
    taken = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch.fnmatch(path, pattern):
            taken = line.startswith("!")
    return taken


def dry_run(*words: str) -> str:
    make = ["make", "--dry-run", *words]
    # As from a shell, also where a make has started these tests: below another one it says which folder it enters.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_it_is_one_image_of_known_instructions_and_pinned_to_a_version(accelerator):
    names = [name for name, _ in instructions(accelerator)]
    assert names[0] == "FROM"
    assert names.count("FROM") == 1
    assert set(names) <= INSTRUCTIONS
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", arguments(accelerator, "FROM")[0])


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_packages_are_installed_by_the_makefile_alone(accelerator):
    runs = arguments(accelerator, "RUN")
    (packages,) = (run for run in runs if "make packages" in run)
    assert not any("pip" in run for run in runs)
    given = dict(word.split("=") for word in packages.split() if "=" in word)
    assert given["ACCELERATOR"] == accelerator
    commands = dry_run(*packages.removeprefix("make ").split())
    assert f"{given['VENV']}/bin/pip install" in commands
    assert "install --quiet --disable-pip-version-check -r deploy/requirements.txt" in commands
    assert "-e ." not in commands  # ray-rl comes with the job, or as a copy


def test_setup_is_the_same_steps_and_ray_rl_itself():
    for accelerator in ACCELERATORS:
        packages = dry_run("packages", "VENV=nowhere", f"ACCELERATOR={accelerator}")
        setup = dry_run("setup", "VENV=nowhere", f"ACCELERATOR={accelerator}")
        assert packages in setup
        assert setup.replace(packages, "").count("pip install") == 1


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_what_it_copies_is_there_and_reaches_the_build_and_is_all_that_does(accelerator):
    sources = [rest.split()[1] for rest in arguments(accelerator, "COPY")]
    assert all((ROOT / source).exists() and reaches_the_build(source) for source in sources)
    named = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert named == set(sources)
    assert not any(reaches_the_build(path) for path in (".venv", "runs", ".git", "ray_rl/__pycache__"))


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_the_code_comes_after_the_packages_so_that_a_change_of_it_builds_in_seconds(accelerator):
    names = [f"{name} {rest}" for name, rest in instructions(accelerator)]
    packages = next(index for index, line in enumerate(names) if "make packages" in line)
    copied = {line.split()[2] for line in names[:packages] if line.startswith("COPY")}
    assert copied == {"Makefile", "deploy/requirements.txt"}


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_nothing_runs_as_root_and_what_runs_finds_python_in_any_shell(accelerator):
    """Kubernetes' runAsNonRoot needs a number; a login shell takes PATH from /etc/profile."""
    assert arguments(accelerator, "USER") == ["1000:1000"]
    after = instructions(accelerator)[[name for name, _ in instructions(accelerator)].index("USER") :]
    assert not any("apt-get" in rest for _, rest in after)
    environment = " ".join(arguments(accelerator, "ENV"))
    assert "PATH=/opt/venv/bin:$PATH" in environment
    assert "PYTHONPATH=/opt/ray-rl" in environment
    assert any("/etc/profile.d/" in run for run in arguments(accelerator, "RUN"))


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_it_has_what_its_packages_and_the_cluster_launcher_start_beside_python(accelerator):
    (installed,) = (run for run in arguments(accelerator, "RUN") if "apt-get install" in run)
    assert {"g++", "libnuma1", "make", "openssh-client", "rsync"} <= set(installed.split())


def test_the_copy_is_every_room_that_a_job_may_need():
    copied = {rest.split()[1] for rest in arguments("cpu", "COPY")}
    assert {"ray_rl", "actors", "learner", "benchmarks"} <= copied
    assert arguments("cpu", "COPY") == arguments("cuda", "COPY")
