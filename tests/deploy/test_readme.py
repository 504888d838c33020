"""deploy/README.md: the commands that it tells a newcomer to type exist, with the options that it gives them."""

import re
import shlex

import pytest
from ray.scripts.scripts import cli as ray_cli

from ray_rl.config import load_config
from ray_rl.config.cluster_shape import load_shape
from tests.deploy.deployments import DEPLOY, KUBERAY, ROOT, autoscaling, nodes, parsed, resource

TEXT = (DEPLOY / "README.md").read_text()


def commands(program: str) -> list[list[str]]:
    """What stands in its blocks of code, and between backquotes, without comments."""
    lines = [line.strip() for line in TEXT.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", TEXT)
    simple = [part.strip() for line in lines for part in re.split(r"\s#\s|;|&&", line)]
    return [shlex.split(part)[1:] for part in simple if part.startswith(f"{program} ")]


@pytest.mark.parametrize("words", commands("ray-rl"), ids=" ".join)
def test_a_command_of_ours_exists_with_its_options(words):
    known = "gpu-cluster" if words[0] == "validate" else None  # where it says RECIPE
    options = parsed([known if word == "RECIPE" and known else word for word in words])
    named = options.get("recipe") or next(iter(options.get("words") or []), None)
    if named not in (None, "status", "scale", "bench"):
        load_config(named)


@pytest.mark.parametrize("words", commands("ray"), ids=" ".join)
def test_a_command_of_rays_exists_with_its_options(words):
    command = ray_cli
    while hasattr(command, "commands") and words:
        name, *words = words
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("program", ["sbatch", "kubectl", "docker"])
def test_files_that_commands_name_are_there(program):
    files = [word for words in commands(program) for word in words if word.startswith("deploy/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_links_lead_to_files_and_to_headings():
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in TEXT.splitlines()}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            assert (DEPLOY / target).exists()


def test_the_shape_on_paper_is_the_cluster_of_the_job():
    shape = load_shape(DEPLOY / "shapes" / "kuberay.yaml")
    cluster = autoscaling(resource("RayJob", KUBERAY / "rayjob.yaml")["spec"]["rayClusterSpec"])

    def said(those):
        return sorted((node.cpus, node.gpus, node.memory_gib, sorted(node.labels.items())) for node in those)

    assert said(shape.nodes()) == said(nodes(cluster, "min_workers"))
    assert said([*shape.nodes(), *shape.addable()]) == said(nodes(cluster, "max_workers"))


def test_the_readme_of_the_repository_leads_here():
    assert "](deploy/README.md)" in (ROOT / "README.md").read_text()
