"""What a run needs besides actors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from actors.rewards import check_python_function
from ray_rl.config import RunConfig
from ray_rl.config.reward import PythonRewardConfig
from ray_rl.embedded import policy_path
from ray_rl.model_files import check_model_folder
from ray_rl.prompt_stream import PromptStream, encode_problem
from ray_rl.ray_session import ray_session
from ray_rl.startup import Startup
from ray_rl.tasks import make_task
from ray_rl.tokenizer import load_tokenizer


class Prepared:
    """What a run needs besides actors: the tokenizer, the prompts to train on, the prompts to evaluate on."""

    def __init__(self, config: RunConfig, *, evaluates: bool = True) -> None:
        """Read model and data; held-out problems only for a run that evaluates.

        Raises:
            ConfigError: one of them is not what the configuration says.
        """
        model, source = config.model, model_source(config)
        if isinstance(config.reward, PythonRewardConfig):
            check_python_function(config.reward.function)
        check_model_folder(source)
        task = make_task(config.task)
        self.codec = load_tokenizer(source, trust_remote_code=model.trust_remote_code, revision=model.revision)
        self.codec.check_ends(config.rollout.stop_token_ids)
        encode = partial(
            encode_problem,
            self.codec,
            system_prompt=model.system_prompt,
            use_chat_template=model.chat_template,
            max_tokens=model.max_model_len - config.rollout.max_tokens,
        )
        self.stream = PromptStream(task.problems("train"), encode, seed=config.seed, shuffle=config.training.shuffle)
        self.stream.check()
        held_out = task.problems("eval") if evaluates else ()
        count = min(len(held_out), config.evaluation.problems)
        self.evaluation_prompts = [encode(held_out[index], position=-1) for index in range(count)]


@contextmanager
def prepared_in_ray(config: RunConfig, startup: Startup, *, evaluates: bool = True) -> Iterator[Prepared]:
    """Read model and data, then have a Ray: what is wrong with them is told before anything is started.

    Raises as `Prepared` and `ray_session` do.
    """
    prepared = Prepared(config, evaluates=evaluates)
    startup.reached("prepared")
    with ray_session(config):
        startup.reached("ray")
        yield prepared


def model_source(config: RunConfig) -> str:
    """What transformers and vLLM load: a folder, or a Hugging Face name."""
    if config.model.path == "embedded":
        return str(policy_path())
    local = Path(config.model.path).expanduser()
    return str(local.resolve()) if local.is_dir() else config.model.path
