"""Checks before a run: what is here against what a recipe asks for, each finding with its mend. Imports no Ray and no torch.

`examine` is `ray-rl doctor`. `require` is what `train` asks first: the same without joining a cluster, in well under two
seconds. A fault is what cannot work; what may work is a warning.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from importlib import util
from pathlib import Path

from ray_rl.config import RunConfig
from ray_rl.config.bundle import LEARNER_RANKS, REWARD_ACTORS, ROLLOUT_ACTORS
from ray_rl.config.labels import is_selected
from ray_rl.config.nodes import Node
from ray_rl.config.orchestration import RayConfig
from ray_rl.config.task import DatasetTaskConfig
from ray_rl.errors import ConfigError, RunError
from ray_rl.footprint import (
    GIB,
    Footprint,
    count_parameters,
    has_tokenizer,
    has_weights,
    hidden_size,
    is_on_hub,
    model_folder,
)
from ray_rl.installation import (
    SETUP,
    Finding,
    installed_vllm,
    open_files,
    packages,
    ports,
    python_version,
    trackers,
    vllm_build,
)
from ray_rl.machine import Machine
from ray_rl.model_files import check_model_folder
from ray_rl.object_store import ObjectStore, Place
from ray_rl.placement import Demand, is_own_ray, knock, named_address, shortage
from ray_rl.weight_file import sweep_dead

_KNOCK_SECONDS = 2.0
_UNFETCHED = "its memory is not estimated; fetch it to have that"


def examine(config: RunConfig | None = None, *, folder: Place = Path("runs"), joins: bool = True) -> Iterator[Finding]:
    """Every check.

    Args:
        config: what is asked for; None: only the machine is looked at.
        folder: of the run, or where it will be made.
        joins: whether a cluster is joined to see what it has; otherwise only whether it answers.
    """
    machine = Machine.look()
    yield python_version()
    yield from packages()
    yield from vllm_build(config, installed_vllm())
    yield from devices(config, machine)
    yield open_files()
    yield ports()
    if isinstance(folder, ObjectStore):
        yield store(folder)
    if config is not None:
        yield from _own_ray(config, machine) if is_own_ray(config) else [_cluster(config, joins=joins)]
        yield from _model(config, machine, folder)
        yield from task(config)
        yield from trackers(config)


def require(config: RunConfig, *, folder: Place = Path("runs")) -> list[str]:
    """What `train` asks before it starts anything.

    Returns:
        Warnings, a line each.

    Raises:
        ConfigError: faults, a line each.
    """
    sweep_dead()  # so that the memory which a killed run's weights take counts as free
    findings = list(examine(config, folder=folder, joins=False))
    faults = [str(finding) for finding in findings if finding.verdict == "fault"]
    if faults:
        raise ConfigError("\n".join(faults))
    return [str(finding) for finding in findings if finding.verdict == "warning"]


def devices(config: RunConfig | None, machine: Machine) -> Iterator[Finding]:
    """Whether this machine has the GPUs that a run with a Ray of its own asks for."""
    if machine.gpus is None:
        found = "there may be GPUs here, and nvidia-smi does not tell"
    elif not machine.gpus:
        found = "no GPU"
    else:
        found = f"{len(machine.gpus)} GPUs of {', '.join(sorted({f'{size / GIB:.0f} GiB' for size in machine.gpus}))}"
    asked = Demand.of(config) if config is not None and is_own_ray(config) else Demand(bundles=())
    if not asked.gpus:
        yield Finding(check="GPUs", found=found)
    elif machine.gpus is None:
        mend = "if the run waits for GPUs in vain, install nvidia-smi or set rollout.gpus_per_actor and learner.gpus_per_rank"
        yield Finding(check="GPUs", found=f"{found}; {asked.gpus:g} are asked for", verdict="warning", mend=mend)
    elif shortage(asked.plain, [Node(name="here", cpus=asked.cpus, gpus=len(machine.gpus))]):
        mend = (
            "rollout.gpus_per_actor=0 learner.gpus_per_rank=0 (CPU), rollout.num_actors or learner.ranks lower, or "
            "ray.address=HOST:PORT of a cluster that has them"
        )
        options = "rollout.gpus_per_actor and learner.gpus_per_rank ask for"
        yield Finding(check="GPUs", found=f"{found}, and {options} {asked.gpus:g}", verdict="fault", mend=mend)
    else:
        yield Finding(check="GPUs", found=f"{found}; {asked.gpus:g} are asked for")


def _own_ray(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    yield cpus(config, machine)
    sections = {ROLLOUT_ACTORS: "rollout", LEARNER_RANKS: "learner", REWARD_ACTORS: "reward_actors"}
    for bundle in sorted(set(Demand.of(config).bundles), key=lambda bundle: bundle.role):
        # Labels that a node must not have are none to miss, and Ray gives every node some of its own.
        missing = (key for key, condition in bundle.labels.items() if not is_selected({key: condition}, {}))
        wanted = [*bundle.resources, *(key for key in missing if not key.startswith("ray.io/"))]
        if wanted:
            section = sections[bundle.role]
            found = f"a Ray of the run's own has no {', '.join(wanted)}, which {section} asks for"
            mend = (
                f"ray.address=HOST:PORT of a cluster that has it, or leave out {section}.resources and {section}.labels"
            )
            yield Finding(check="ray.address", found=found, verdict="fault", mend=mend)


def cpus(config: RunConfig, machine: Machine) -> Finding:
    """Processors against what the actors of a Ray of the run's own ask for."""
    asked = Demand.of(config, rollout_actors=config.rollout.most_actors)
    offered = config.ray.num_cpus
    found = f"{asked.cpus:g} CPUs asked for, {machine.cpus} here"
    least = Demand.of(config)
    if offered is not None and shortage(least.plain, [Node(name="here", cpus=offered, gpus=least.gpus)]):
        mend = "leave ray.num_cpus out"
        found = f"{least.cpus:g} CPUs asked for, and ray.num_cpus offers {offered}"
        return Finding(check="ray.num_cpus", found=found, verdict="fault", mend=mend)
    if asked.cpus > machine.cpus:
        mend = "works, but slowly; lower rollout.num_actors, learner.ranks or their CPUs"
        return Finding(check="CPUs", found=found, verdict="warning", mend=mend)
    return Finding(check="CPUs", found=found)


def _cluster(config: RunConfig, *, joins: bool) -> Finding:
    address = named_address(config)
    if not joins:
        try:
            knock(address, _KNOCK_SECONDS)
        except OSError as error:
            mend = "start one there, or unset RAY_ADDRESS and use ray.address=local"
            found = f"no Ray answers at {address}: {error.strerror or error}"
            return Finding(check="ray.address", found=found, verdict="fault", mend=mend)
        return Finding(check="ray.address", found=f"something answers at {address}")
    from ray_rl.ray_session import cluster_nodes, ray_session

    try:
        with ray_session(config):
            nodes = cluster_nodes()
    except RunError as error:
        return Finding(check="ray.address", found=str(error).removeprefix("ray.address: "), verdict="fault")
    return room(config, nodes)


def room(config: RunConfig, nodes: Sequence[Node]) -> Finding:
    """Whether a cluster has a place for every actor; who waits for longer than usual counts on nodes that are yet to come."""
    missing = shortage(Demand.of(config), nodes)
    if not missing:
        return Finding(check="ray.address", found=f"the cluster at {named_address(config)} has a place for every actor")
    seconds = config.ray.placement_timeout
    if seconds > RayConfig().placement_timeout:
        mend = f"the run waits {seconds:g} s (ray.placement_timeout) for an autoscaler; without one, add nodes or ask for less"
        return Finding(check="ray.address", found=missing, verdict="warning", mend=mend)
    mend = "add nodes or ask for less; where an autoscaler adds them, ray.placement_timeout says how long to wait"
    return Finding(check="ray.address", found=missing, verdict="fault", mend=mend)


def _model(config: RunConfig, machine: Machine, folder: Place) -> Iterator[Finding]:
    path = config.model.path
    place = model_folder(config)
    offline = _is_on("HF_HUB_OFFLINE")
    if place is None:
        mend = "unset HF_HUB_OFFLINE, or give a folder" if offline else _UNFETCHED
        found = f"{path} is not on this machine, and " + ("HF_HUB_OFFLINE is set" if offline else "will be fetched")
        yield Finding(check="model.path", found=found, verdict="fault" if offline else "warning", mend=mend)
        return
    parts = {"weights": has_weights(place), "tokenizer": has_tokenizer(place)}
    missing = [name for name, is_there in parts.items() if not is_there]
    if missing and is_on_hub(config) and not offline:
        found = f"{path} has no {' and no '.join(missing)} in {place} yet, which will be fetched"
        yield Finding(check="model.path", found=found, verdict="warning", mend=_UNFETCHED)
        return
    try:
        check_model_folder(str(place))
    except ConfigError as error:
        yield Finding(check="model.path", found=str(error).removeprefix("model.path: "), verdict="fault")
        return
    if not parts["tokenizer"]:
        mend = "put its tokenizer.json there"
        yield Finding(check="model.path", found=f"{path} has no tokenizer", verdict="fault", mend=mend)
    parameters = count_parameters(place)
    if parameters is None:
        found = f"{path}: its files do not tell how large it is; memory is not estimated"
        yield Finding(check="model.path", found=found)
        return
    yield Finding(check="model.path", found=f"{path}: {parameters / 1e6:,.0f} M parameters")
    footprint = Footprint.of(config, parameters=parameters, hidden_size=hidden_size(place))
    if is_own_ray(config):
        yield memory(config, footprint, machine)
        yield from device_memory(config, footprint, machine)
        yield shared_memory(config, footprint, machine)
    if isinstance(folder, Path):
        yield disk(config, footprint, folder)


def memory(config: RunConfig, footprint: Footprint, machine: Machine) -> Finding:
    """Memory of this machine against the estimate, for a run with a Ray of its own."""
    ranks, actors = config.learner.ranks, config.rollout.most_actors
    wanted, least = (footprint.on_one_machine(config, count) for count in (actors, config.rollout.least_actors))
    found = (
        f"about {_gib(wanted)} wanted ({ranks} x {_gib(footprint.rank_host)} learner, {actors} x "
        f"{_gib(footprint.engine_host)} engine), {_gib(machine.memory)} here, {_gib(machine.available)} free"
    )
    mend = "fewer rollout.num_actors, a smaller rollout.kv_cache_gib, learner.lora or a smaller model"
    if least > machine.memory:
        return Finding(check="memory", found=found, verdict="fault", mend=mend)
    if wanted > machine.available:
        return Finding(check="memory", found=found, verdict="warning", mend=f"end other programs; or {mend}")
    return Finding(check="memory", found=found)


def device_memory(config: RunConfig, footprint: Footprint, machine: Machine) -> Iterator[Finding]:
    """The smallest GPU of this machine against what a rank, and an engine without its cache, must hold."""
    if not machine.gpus:
        return
    smallest = min(machine.gpus)
    share = config.rollout.gpu_memory_share * min(1.0, config.rollout.gpus_per_actor)
    for role, wanted, there, mend in (
        ("learner rank", footprint.rank_device, smallest, "learner.zero_stage, offload_optimizer or lora"),
        ("engine", footprint.engine_device, int(share * smallest), "rollout.tensor_parallel or gpu_memory_share"),
    ):
        found = f"about {_gib(wanted)} wanted by a {role}, {_gib(there)} there"
        if wanted > there:
            yield Finding(check="GPU memory", found=found, verdict="fault", mend=f"see {mend}, or a smaller model")
        elif wanted:
            yield Finding(check="GPU memory", found=found)


def shared_memory(config: RunConfig, footprint: Footprint, machine: Machine) -> Finding:
    """Room for a published version and for Ray's object store."""
    files = footprint.weight_files(config)
    store = config.ray.object_store_mib * 2**20
    found = f"{_gib(files + store)} wanted (the weights, ray.object_store_mib), {_gib(machine.shared_memory)} free"
    mend = "enlarge /dev/shm (docker run --shm-size=..., or remount it)"
    if files > machine.shared_memory:
        return Finding(check="shared memory", found=found, verdict="fault", mend=mend)
    if files + store > machine.shared_memory:
        return Finding(
            check="shared memory", found=found, verdict="warning", mend=f"{mend}, or lower ray.object_store_mib"
        )
    return Finding(check="shared memory", found=found)


def disk(config: RunConfig, footprint: Footprint, folder: Path) -> Finding:
    """Room for the checkpoints that are kept and the one being written, less what earlier ones will give back."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    present = sum(file.stat().st_size for file in folder.glob("checkpoints/**/*") if file.is_file())
    wanted = max((config.checkpoint.keep + 1) * footprint.checkpoint - present, 0)
    free = shutil.disk_usage(there).free
    found = f"about {_gib(wanted)} wanted for {config.checkpoint.keep + 1} checkpoints, {_gib(free)} free in {there}"
    if wanted > free:
        mend = "make room, lower checkpoint.keep, or name another place with --run-dir"
        return Finding(check="disk", found=found, verdict="warning", mend=mend)
    return Finding(check="disk", found=found)


def store(folder: ObjectStore) -> Finding:
    """Whether a run's folder in an object store can be written, read and cleared."""
    try:
        folder.prove()
    except RunError as error:
        return Finding(check="--run-dir", found=str(error), verdict="fault")
    return Finding(check="--run-dir", found=f"{folder} can be written and read")


def task(config: RunConfig) -> Iterator[Finding]:
    """Whether what the task and the reward need is here, as far as that can be seen without reading it."""
    needs = {"reasoning_gym": "reasoning_gym", "math": "math_verify"}
    for option, kind in (("task.kind", config.task.kind), ("reward.kind", config.reward.kind)):
        module = needs.get(kind)
        if module is not None and util.find_spec(module) is None:
            yield Finding(
                check=option, found=f"{kind} needs {module}, which is not installed", verdict="fault", mend=SETUP
            )
    if isinstance(config.task, DatasetTaskConfig) and not Path(config.task.path).expanduser().exists():
        offline = _is_on("HF_DATASETS_OFFLINE") or _is_on("HF_HUB_OFFLINE")
        how = "from the Hugging Face cache" if offline else "from the Hugging Face hub or its cache"
        yield Finding(check="task.path", found=f"{config.task.path} is read {how}")
    else:
        yield Finding(check="task", found=config.task.kind)


def _is_on(name: str) -> bool:
    """Whether a switch of Hugging Face's libraries is set in the environment."""
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
