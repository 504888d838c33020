"""Recipes, overrides, and one line per fault with its path and the mend."""

import subprocess
import sys

import pytest
import yaml

from ray_rl.config import ConfigError, RunConfig, load_config, resolve_config
from ray_rl.config.load import recipe_names, recipe_text, task_from_text
from ray_rl.config.values import FixedValues

SHIPPED = {
    "gpu-cluster",
    "gpu-node",
    "gsm8k-grpo",
    "gsm8k-vineppo",
    "laptop-grpo",
    "laptop-vineppo",
    "reasoning-gym",
    "vineppo-paper",
}


def faults(data: dict, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve_config(data, overrides)
    return str(error.value).splitlines()


def test_the_recipes_of_the_readme_are_shipped():
    assert set(recipe_names()) >= SHIPPED


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_named_after_its_file_and_begins_by_saying_what_it_is(name):
    assert load_config(name).name == name
    assert recipe_text(name).startswith("# ")


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_written_as_yaml_resolves_to_itself(name):
    config = load_config(name)
    assert resolve_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_two_laptop_recipes_differ_in_the_algorithm_only():
    vineppo, grpo = load_config("laptop-vineppo").model_dump(), load_config("laptop-grpo").model_dump()
    assert {key for key in vineppo if vineppo[key] != grpo[key]} == {"name", "values", "advantage"}


def test_the_preset_of_the_paper_holds_its_published_numbers():
    config = load_config("vineppo-paper")
    assert (config.samples_per_step, config.minibatch_size, config.learner.epochs) == (512, 64, 2)
    assert config.optimizer_steps == 650 * 16
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_tokens) == (0.6, 0.9, 1024)
    assert config.values == FixedValues(num_continuations=9)
    kl, optimizer = config.learner.kl, config.learner.optimizer
    assert (kl.coefficient, kl.estimator, kl.aggregation, kl.clamp) == (1e-4, "k3", "sequence_sum", 10)
    assert (optimizer.lr, optimizer.warmup_share, optimizer.schedule, optimizer.grad_clip) == (1e-6, 0.03, "linear", 1)
    assert config.advantage.whiten == "minibatch"
    assert config.learner.loss.max_mean_ratio == 10
    assert (config.rollout.group_size, config.segmentation.max_segments) == (8, 25)
    loss = config.learner.loss
    assert (loss.clip_low, loss.clip_high, loss.aggregation) == (0.2, 0.2, "token_mean")
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.0)
    assert (config.evaluation.temperature, config.evaluation.samples) == (0.35, 16)


def test_overrides_are_parsed_as_yaml_and_go_into_nested_sections():
    config = load_config("laptop-grpo", ["learner.optimizer.lr=1e-4", "rollout.stop_token_ids=[1, 2]", "seed=7"])
    assert config.learner.optimizer.lr == 1e-4
    assert config.rollout.stop_token_ids == (1, 2)
    assert config.seed == 7
    assert config.rollout.max_tokens == 96


def test_a_later_override_goes_first():
    assert resolve_config({}, ["seed=1", "seed=2"]).seed == 2


def test_overrides_leave_the_recipe_alone():
    data = {"rollout": {"group_size": 4}}
    resolve_config(data, ["rollout.group_size=2"])
    assert data == {"rollout": {"group_size": 4}}


def test_another_kind_clears_the_keys_of_the_old_one():
    config = load_config("laptop-vineppo", ["segmentation.kind=fixed", "segmentation.tokens=4"])
    assert config.segmentation.model_dump() == {"kind": "fixed", "tokens": 4, "max_segments": None}
    config = load_config("gsm8k-vineppo", ["task.kind=arithmetic", "task.max_steps=5"])
    assert config.task.max_steps == 5


def test_the_same_kind_again_clears_nothing():
    assert load_config("laptop-vineppo", ["task.kind=arithmetic"]) == load_config("laptop-vineppo")


def test_a_section_without_its_kind_means_the_default_kind():
    assert resolve_config({"values": {"num_continuations": 5}}).values.num_continuations == 5


def test_the_short_form_of_a_task():
    assert task_from_text("reasoning-gym:chain_sum?min_terms=2&max_terms=3") == {
        "kind": "reasoning_gym",
        "dataset": "chain_sum",
        "options": {"min_terms": 2, "max_terms": 3},
    }
    assert task_from_text("arithmetic?max_steps=5") == {"kind": "arithmetic", "max_steps": 5}
    assert task_from_text("data/train.jsonl?prompt_column=q") == {
        "kind": "dataset",
        "path": "data/train.jsonl",
        "prompt_column": "q",
    }
    assert resolve_config({"task": "arithmetic?max_steps=5"}).task.max_steps == 5
    assert resolve_config({}, ["task=arithmetic", "task.max_steps=5"]).task.max_steps == 5
    assert faults({"task": "arithmetic?max_steps"}) == ["task: option 'max_steps' has no value; write max_steps=..."]


def test_unknown_keys_fail_with_their_path():
    lines = faults({"rollout": {"group_sise": 4}, "learner": {"kl": {"beta": 1}}, "values": {"k": 3}, "extra": 1})
    assert [line.partition(":")[0] for line in lines] == ["rollout.group_sise", "values.k", "learner.kl.beta", "extra"]
    assert all("unknown key" in line for line in lines)


FAULTS = {
    "group_size 1": (
        ["advantage.kind=grpo", "values.kind=none", "rollout.group_size=1"],
        "rollout.group_size: 1 gives grpo nothing to compare",
    ),
    "K 0": (
        ["values.num_continuations=0"],
        "values.num_continuations: Input should be greater than or equal to 1 (got",
    ),
    "no values": (["values.kind=none"], "values.kind: none, but advantage.kind=vineppo needs state values"),
    "wasted values": (["advantage.kind=rloo"], "values.kind: fixed would spend continuations that advantage.kind=rloo"),
    "K without states": (
        ["values.kind=none", "advantage.kind=grpo", "values.num_continuations=3"],
        "values.num_continuations: unknown key",
    ),
    "budget": (
        ["values.kind=adaptive", "values.token_budget=0.1"],
        "values.token_budget: 0.1 per token of 8 completions buys less than one continuation of full length; use at least",
    ),
    "pooling off-policy": (
        ["values.pooling=passing", "rollout.top_p=0.9"],
        "values.pooling: passing counts samples by the policy's own",
    ),
    "lone continuation": (
        ["values.train_on_continuations=true", "values.num_continuations=1"],
        "values.train_on_continuations: with one continuation per state there is no other to compare it with",
    ),
    "reward out of range": (
        ["values.kind=adaptive", "reward.unfinished=-1"],
        "values.reward_range: [0, 1] leaves out reward.unfinished = -1; set it",
    ),
    "reward range": (
        ["values.kind=adaptive", "values.reward_range=[1, 0]"],
        "values: reward_range: [1.0, 0.0]; the smaller one comes first",
    ),
    "minibatch": (
        ["learner.minibatch_size=7"],
        "learner.minibatch_size: 7 does not divide training.prompts_per_step x rollout.group_size = 32 x 8 = 256",
    ),
    "ranks": (
        ["learner.minibatch_size=2", "learner.ranks=4"],
        "learner.minibatch_size: 2 is fewer sequences than learner.ranks = 4",
    ),
    "length": (
        ["rollout.max_tokens=64", "model.max_model_len=64"],
        "rollout.max_tokens: 64 leaves no room for a prompt within model.max_model_len = 64; lower it or raise",
    ),
    "nccl": (["weights.kind=nccl"], "weights.kind: nccl needs GPUs on both ends"),
    "nccl on a shared GPU": (
        ["weights.kind=nccl", "rollout.gpus_per_actor=0.5", "learner.gpus_per_rank=1"],
        "weights.kind: nccl needs GPUs on both ends",
    ),
    "idle GPUs": (["rollout.gpus_per_actor=2"], "rollout.gpus_per_actor: 2, of which an engine uses"),
    "GPUs of a rank": (["learner.gpus_per_rank=2"], "learner.gpus_per_rank: 2, but a rank computes on one GPU"),
    "shared GPU": (["learner.gpus_per_rank=0.5", "learner.ranks=2"], "learner.gpus_per_rank: 0.5, but a rank"),
    "float16 on CPU": (["model.dtype=float16"], "model.dtype: float16, which DeepSpeed trains on GPUs only"),
    "offloaded reference, none": (
        ["learner.kl.offload_reference=true"],
        "learner.kl: offload_reference: without a coefficient there is no reference",
    ),
    "offloaded reference, sharded": (
        ["learner.kl={coefficient: 0.1, offload_reference: true}", "learner.zero_stage=3"],
        "learner.kl.offload_reference: with ZeRO-3 it is sharded over the GPUs; leave it out",
    ),
    "shared prefixes": (
        ["model.attention=eager", "learner.share_prefixes=true"],
        "learner.share_prefixes: model.attention=eager knows no shared prefixes",
    ),
    "flash attention": (["model.attention=flash_attention_2"], "model.attention: flash_attention_2 needs GPUs"),
    "system prompt": (
        ["model.system_prompt=Think.", "model.chat_template=false"],
        "model.system_prompt: needs a chat template, and model.chat_template is false",
    ),
    "foreign scorer": (["reward.kind=reasoning_gym"], "reward.kind: reasoning_gym can only score problems that"),
    "nothing to compare with": (
        ["task.kind=dataset", "task.path=x.jsonl", "task.answer_column=null"],
        "task.answer_column: null, but reward.kind=exact compares with a reference answer",
    ),
    "tensor parallel": (
        ["rollout.tensor_parallel=2"],
        "rollout.tensor_parallel: 2 needs as many GPUs per actor; set rollout.gpus_per_actor=2",
    ),
    "model": (["model.path=./no/such"], "model.path: ./no/such does not exist; give a folder in Hugging Face format"),
    "task order": (["task.min_steps=9"], "task: min_steps 9 exceeds max_steps 7: swap them"),
    "type": (["training.steps=many"], "training.steps: Input should be a valid integer"),
    "kind": (["values.kind=magic"], "values: "),
    "missing": (["task.kind=dataset"], "task.path: is required"),
    "function": (["reward.kind=python", "reward.function=x"], "reward.function: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_its_path_and_the_mend(fault):
    overrides, message = FAULTS[fault]
    (line,) = faults({}, *overrides)
    assert line.startswith(message)


def test_every_fault_between_sections_is_told_at_once():
    lines = faults({}, "values.kind=none", "weights.kind=nccl", "learner.minibatch_size=7")
    assert [line.partition(":")[0] for line in lines] == ["learner.minibatch_size", "values.kind", "weights.kind"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size", "rollout.group_size: not an override; write section.key=value"),
        ("=3", "=3: not an override"),
        ("rollout..x=3", "rollout..x=3: not an override"),
        ("seed=[1", "seed: '[1' is not valid YAML"),
    ],
)
def test_a_malformed_override_is_told(override, message):
    (line,) = faults({}, override)
    assert line.startswith(message)


def test_a_recipe_that_is_not_there_or_no_mapping_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"^recipe: nope is neither a file nor a shipped recipe \(.*laptop-grpo"):
        load_config("nope")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"a recipe is a mapping of sections, not a list"):
        load_config(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML: "):
        load_config(str(tmp_path / "broken.yaml"))


def test_a_hugging_face_name_is_not_taken_for_a_folder():
    assert RunConfig(model={"path": "Qwen/Qwen2.5-0.5B-Instruct"}).model.path == "Qwen/Qwen2.5-0.5B-Instruct"


def test_checking_a_configuration_imports_nothing_heavy():
    program = (
        "import sys; from ray_rl.config import load_config; load_config('laptop-vineppo')\n"
        "print(*{'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found.split() == []


def test_paths_that_exist_here_are_kept_whole_so_that_a_run_resumes_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grader.py").write_text("def score(prompt, completion, answer, metadata): return 1.0\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = resolve_config(
        {"reward": {"kind": "python", "function": "grader.py:score"}, "task": {"kind": "dataset", "path": "rows.jsonl"}}
    )
    assert config.reward.function == f"{tmp_path / 'grader.py'}:score"
    assert config.task.path == str(tmp_path / "rows.jsonl")
    assert resolve_config({"model": {"path": "owner/name", "max_model_len": 4096}}).model.path == "owner/name"


def test_a_length_beyond_the_models_positions_is_told_before_the_model_is_loaded():
    with pytest.raises(ConfigError, match=r"^model\.max_model_len: 512 exceeds the 256 positions of embedded"):
        resolve_config({}, ["model.max_model_len=512"])


def test_absolute_paths_say_nothing_here_when_the_run_takes_place_elsewhere():
    given = {"model": {"path": "/models/of/the/cluster"}}
    assert faults(given)[0].startswith("model.path: /models/of/the/cluster does not exist")
    assert resolve_config(given, elsewhere=True).model.path == "/models/of/the/cluster"
    with pytest.raises(ConfigError, match=r"model\.path: \./mine does not exist"):
        resolve_config({"model": {"path": "./mine"}}, elsewhere=True)


@pytest.mark.parametrize(("job", "is_kept"), [('{"runtime_env": {"working_dir": "gcs://x.zip"}}', True), ("{}", False)])
def test_in_a_job_a_path_stays_what_it_is_on_every_node(tmp_path, monkeypatch, job, is_kept):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    function = resolve_config({"reward": {"kind": "python", "function": "mine.py:score"}}).reward.function
    assert function == ("mine.py:score" if is_kept else f"{tmp_path}/mine.py:score")
