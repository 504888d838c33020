"""A task's problems in seeded order for ever, as prompts; the position is all there is to save."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from ray_rl.errors import ConfigError
from ray_rl.types import Problem, Prompt

_LONGEST_TOKEN = 1024
"""Characters that no token exceeds."""
_LOOK_SECONDS = 2.0


class PromptEncoder(Protocol):
    """Renders and tokenises prompts (`ray_rl.tokenizer.TokenizerCodec`)."""

    def encode_prompt(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a prompt, chat template applied; ValueError where the tokenizer cannot express it."""


class EncodeProblem(Protocol):
    """`encode_problem` with all but problem and position given."""

    def __call__(self, problem: Problem, *, position: int) -> Prompt:
        """The problem as the policy sees it."""


def encode_problem(
    codec: PromptEncoder,
    problem: Problem,
    *,
    position: int,
    max_tokens: int,
    system_prompt: str | None = None,
    use_chat_template: bool | None = None,
) -> Prompt:
    """The problem as the policy sees it.

    Args:
        codec: the policy's tokenizer.
        problem: what to encode.
        position: in the prompt stream; -1 for evaluation.
        max_tokens: longest prompt, in tokens, that leaves room for a completion. A longer one is never cut.
        system_prompt: put before the prompt; needs a chat template.
        use_chat_template: None: where the tokenizer has one.

    Raises:
        ConfigError: too long, empty, or not expressible with this tokenizer.
    """
    characters = _characters(problem)
    if characters > max_tokens * _LONGEST_TOKEN:  # told without spending minutes on encoding it
        raise ConfigError(_too_long(problem, f"{characters} characters", max_tokens))
    try:
        token_ids = codec.encode_prompt(
            problem.prompt, system_prompt=system_prompt, use_chat_template=use_chat_template
        )
    except ValueError as error:
        raise ConfigError(f"{error} (problem {problem.problem_id})") from error
    if not token_ids:
        raise ConfigError(f"task: problem {problem.problem_id}: the prompt has no tokens; remove it from the data")
    if len(token_ids) > max_tokens:
        raise ConfigError(_too_long(problem, f"{len(token_ids)} tokens", max_tokens))
    return Prompt(problem=problem, position=position, token_ids=tuple(token_ids))


def _characters(problem: Problem) -> int:
    if isinstance(problem.prompt, str):
        return len(problem.prompt)
    return sum(len(message["content"]) for message in problem.prompt)


def _too_long(problem: Problem, size: str, max_tokens: int) -> str:
    return (
        f"model.max_model_len: the prompt of problem {problem.problem_id} has {size}, and model.max_model_len - "
        f"rollout.max_tokens leaves {max_tokens}; raise the one, lower the other, or remove the problem from the data"
    )


class PromptStream:
    """Position p is problem ``order(epoch)[p % size]`` of epoch ``p // size``; each epoch has a permutation of its own.

    The order follows from seed and size, so a resumed run needs only the position (and may ask for earlier ones).
    """

    def __init__(
        self, problems: Sequence[Problem], encode: EncodeProblem, *, seed: int, shuffle: bool, position: int = 0
    ) -> None:
        """Start at a position.

        Args:
            problems: of the training split; may be lazy, only what is visited is asked for.
            encode: problem and position -> prompt.
            seed: of the order.
            shuffle: False visits the problems as they come.
            position: of the next prompt.

        Raises:
            ConfigError: no problems.
        """
        if not problems:
            raise ConfigError("task: there are no training problems")
        self._problems = problems
        self._encode = encode
        self._seed = seed
        self._shuffle = shuffle
        self._position = position

    @property
    def position(self) -> int:
        """Position of the next prompt, which is the number of prompts handed out."""
        return self._position

    def check(self, seconds: float = _LOOK_SECONDS) -> None:
        """Encode the prompts from the position on, at most an epoch: so many as the time allows.

        What is wrong with the data is known before a run begins, then, and not after hours. The stream does not move.

        Raises:
            ConfigError: as `next` does.
        """
        until = time.monotonic() + seconds
        for position in range(self._position, self._position + len(self._problems)):
            self.at(position)
            if time.monotonic() > until:
                return

    def restore(self, position: int) -> None:
        """Go on at a saved position."""
        self._position = position

    def next(self) -> Prompt:
        """The prompt at the position, which moves on.

        Raises:
            ConfigError: the problem cannot be encoded (`encode_problem`); the position stays.
        """
        prompt = self.at(self._position)
        self._position += 1
        return prompt

    def at(self, position: int) -> Prompt:
        """The prompt at any position (0 or later); the stream does not move. Raises as `next` does."""
        epoch, index = divmod(position, len(self._problems))
        if self._shuffle:
            index = _order(self._seed, epoch, len(self._problems))[index]
        return self._encode(self._problems[index], position=position)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> Sequence[int]:
    order = list(range(size))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
