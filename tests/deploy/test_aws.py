"""deploy/aws.yaml: by the schema and the checks of Ray's own launcher, closed to the world, and large enough for the recipe."""

import shlex
import subprocess

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from ray_rl.config import load_config
from tests.deploy.deployments import DEPLOY, assert_grows_as_the_recipe_does

CONFIG = yaml.safe_load((DEPLOY / "aws.yaml").read_text())
TYPES = CONFIG["available_node_types"]


def ray_starts() -> list[str]:
    commands = [*CONFIG["head_start_ray_commands"], *CONFIG["worker_start_ray_commands"]]
    return [command for command in commands if "ray start" in command]


def test_rays_launcher_takes_it():
    validate_config(prepare_config(CONFIG))


def test_a_misspelt_field_would_be_found():
    from jsonschema import ValidationError

    with pytest.raises(ValidationError):
        validate_config(prepare_config({**CONFIG, "head_node_typo": "head"}))


def test_its_nodes_hold_the_cluster_recipe_from_the_fewest_to_the_most():
    assert_grows_as_the_recipe_does(load_config("gpu-cluster"), CONFIG)
    assert CONFIG["max_workers"] == sum(kind.get("max_workers", 0) for kind in TYPES.values())


def test_ray_is_started_with_options_that_it_has():
    known = {option for parameter in start.params for option in parameter.opts}
    for command in ray_starts():
        words = shlex.split(command[command.index("ray start") :])
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


def test_every_command_is_shell():
    for key, commands in CONFIG.items():
        if key.endswith("_commands"):
            for command in commands:
                subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)


def test_the_dashboard_listens_to_the_head_alone_and_no_port_but_ssh_is_opened():
    (head,) = (command for command in ray_starts() if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "IpPermissions" not in CONFIG["provider"]["security_group"]


def test_every_container_asks_for_the_token_that_is_brought_to_it():
    assert "--env RAY_AUTH_MODE=token" in CONFIG["docker"]["run_options"]
    assert CONFIG["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_the_shared_folder_is_mounted_on_every_machine_and_in_every_container():
    assert "--volume /shared:/shared" in CONFIG["docker"]["run_options"]
    assert any("mount -t nfs4" in command for command in CONFIG["initialization_commands"])


def test_only_rollouts_lie_on_machines_that_may_be_taken_away():
    spot = {name for name, kind in TYPES.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"rollout"}
