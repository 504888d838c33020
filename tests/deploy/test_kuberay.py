"""deploy/kuberay: fields as KubeRay's definitions have them, what its operator refuses beyond them, and what the recipes need."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import validate_config

from ray_rl.placement import Demand, shortage
from tests.deploy.deployments import (
    KUBERAY,
    assert_grows_as_the_recipe_does,
    autoscaling,
    documents,
    groups,
    nodes,
    pods,
    quantity,
    resource,
    training,
)

FIELDS = json.loads(Path(__file__).with_name("kuberay_fields.json").read_text())
FILES = sorted(KUBERAY.glob("*.yaml"))
JOBS = [KUBERAY / "rayjob.yaml", KUBERAY / "rayjob-cpu.yaml"]
RAY = [*JOBS, KUBERAY / "raycluster.yaml"]
KINDS = {
    "RayCluster": "ray.io/v1",
    "RayJob": "ray.io/v1",
    "PersistentVolumeClaim": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}
OURS = {"app.kubernetes.io/part-of": "ray-rl"}
LABEL_KEY = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


def by_name(file: Path) -> str:
    return file.name


def ray_resource(file: Path) -> dict:
    return resource("RayCluster" if file.name == "raycluster.yaml" else "RayJob", file)


def cluster_of(file: Path) -> dict:
    spec = ray_resource(file)["spec"]
    return spec.get("rayClusterSpec", spec)


def faults(kind: str, value: object) -> list[str]:
    schema = {**FIELDS["kinds"][kind], "$defs": FIELDS["$defs"]}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(value)]


@pytest.mark.parametrize("file", FILES, ids=by_name)
def test_every_document_is_of_a_known_kind_and_has_only_published_fields_of_the_right_types(file):
    for document in documents(file):
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        kind = document["kind"]
        assert document["apiVersion"] == KINDS[kind]
        if kind == "NetworkPolicy":
            assert set(document["spec"]) == {"podSelector", "policyTypes", "ingress"}
            assert not faults("ingress", document["spec"]["ingress"])
        else:
            assert not faults(kind, document["spec"])


@pytest.mark.parametrize(
    ("path", "value"),
    [("headGroupSpec.template.spec.securityContex", {}), ("workerGroupSpecs", {}), ("authOptions.mode", "tokens")],
)
def test_a_field_that_is_misspelt_or_of_another_type_would_be_found(path, value):
    spec = resource("RayCluster", KUBERAY / "raycluster.yaml")["spec"]
    *parents, last = path.split(".")
    inner = spec
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert faults("RayCluster", spec)


@pytest.mark.parametrize("file", RAY, ids=by_name)
def test_ray_is_of_the_version_that_is_installed_in_the_images(file):
    assert cluster_of(file)["rayVersion"] == metadata.version("ray")


@pytest.mark.parametrize("file", RAY, ids=by_name)
def test_the_operator_takes_names_labels_and_start_parameters(file):
    """KubeRay refuses these although its definitions allow them."""
    assert len(ray_resource(file)["metadata"]["name"]) <= 47
    for group in groups(cluster_of(file)):
        assert "labels" not in group["rayStartParams"]  # the group's own field, which the autoscaler reads, too
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert all(LABEL_KEY.fullmatch(key) for key in group.get("labels", {}))
        assert group["minReplicas"] <= group.get("replicas", 1) <= group["maxReplicas"]
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"  # autoscaler v2


@pytest.mark.parametrize("file", RAY, ids=by_name)
def test_rays_autoscaler_finds_in_it_what_it_needs(file):
    config = autoscaling(cluster_of(file))
    validate_config(config)
    labels = {name: kind["labels"] for name, kind in config["available_node_types"].items()}
    assert [*labels.values()] == [group.get("labels", {}) for group in groups(cluster_of(file))]


@pytest.mark.parametrize("file", JOBS, ids=by_name)
def test_a_job_trains_a_recipe_that_exists_in_a_folder_on_the_shared_volume_and_goes_on_when_it_comes_back(file):
    config, options = training(ray_resource(file)["spec"]["entrypoint"])
    assert options["continued"]
    assert options["run_dir"].is_relative_to("/shared")
    assert config.ray.address in ("local", "auto")  # which in a job both mean its cluster


@pytest.mark.parametrize("file", JOBS, ids=by_name)
def test_the_pods_hold_the_recipe_from_the_fewest_to_the_most(file):
    config, _ = training(ray_resource(file)["spec"]["entrypoint"])
    assert_grows_as_the_recipe_does(config, autoscaling(cluster_of(file)))


def test_the_gpu_recipe_fills_what_its_cluster_has_and_no_pod_is_to_spare():
    config, _ = training(ray_resource(KUBERAY / "rayjob.yaml")["spec"]["entrypoint"])
    most_nodes = nodes(autoscaling(cluster_of(KUBERAY / "rayjob.yaml")), "max_workers")
    most = Demand.of(config, rollout_actors=config.rollout.most_actors)
    for pool in ("learner", "rollout"):
        last = next(node for node in reversed(most_nodes) if node.labels.get("pool") == pool)
        assert shortage(most, [node for node in most_nodes if node is not last])


def test_the_job_and_the_cluster_that_stays_are_the_same_cluster():
    assert cluster_of(KUBERAY / "rayjob.yaml") == cluster_of(KUBERAY / "raycluster.yaml")


@pytest.mark.parametrize("file", RAY, ids=by_name)
def test_every_pod_is_unprivileged(file):
    for pod in pods(ray_resource(file)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    workers = [group["template"]["spec"] for group in cluster_of(file)["workerGroupSpecs"]]
    assert not any(
        worker["automountServiceAccountToken"] for worker in workers
    )  # only the autoscaler, on the head, needs it
    assert cluster_of(file)["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("file", RAY, ids=by_name)
def test_nobody_outside_reaches_the_job_server_and_nobody_does_without_the_token(file):
    cluster = cluster_of(file)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in cluster["headGroupSpec"]
    policy = resource("NetworkPolicy", KUBERAY / "network.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == OURS
    templates = [group["template"] for group in groups(cluster)]
    if file in JOBS:
        templates.append(ray_resource(file)["spec"]["submitterPodTemplate"])
    assert all(template["metadata"]["labels"] == OURS for template in templates)


@pytest.mark.parametrize("file", RAY, ids=by_name)
def test_the_run_folder_is_shared_and_weights_have_room_in_memory_that_counts_as_the_pods(file):
    claims = {
        document["metadata"]["name"] for one in FILES for document in documents(one) if "Claim" in document["kind"]
    }
    for group in groups(cluster_of(file)):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] in claims
        shared_memory = mounts["/dev/shm"]["emptyDir"]
        assert shared_memory["medium"] == "Memory"
        assert quantity(shared_memory["sizeLimit"]) < quantity(pod["containers"][0]["resources"]["limits"]["memory"])
        store = int(group["rayStartParams"].get("object-store-memory", 0))
        assert store <= quantity(shared_memory["sizeLimit"]) / 2  # the rest is for the weights


@pytest.mark.parametrize("file", RAY, ids=by_name)
def test_health_is_asked_of_every_node_of_ray_where_it_answers(file):
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS  # they answer without a token

    for group in groups(cluster_of(file)):
        (container,) = group["template"]["spec"]["containers"]
        for probe in ("livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in PUBLIC_EXACT_PATHS
            assert asked["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_the_first_contact_needs_one_machine_and_no_file_system_for_several():
    file = KUBERAY / "rayjob-cpu.yaml"
    cluster = cluster_of(file)
    claim = resource("PersistentVolumeClaim", file)["spec"]
    assert claim["accessModes"] == ["ReadWriteOnce"]
    least = [group["template"]["spec"]["containers"][0]["resources"]["requests"] for group in groups(cluster)]
    assert sum(quantity(pod["cpu"]) for pod in least) <= 4 - 1
    assert sum(quantity(pod["memory"]) for pod in least) <= 10 * 2**30


def test_no_file_holds_a_secret():
    for file in FILES:
        text = yaml.safe_dump(documents(file))
        assert "stringData" not in text
        assert not re.search(r"name: \w*(TOKEN|PASSWORD|KEY)\w*\n\s*value:", text)
