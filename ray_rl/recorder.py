"""A few groups of each step, in full, as JSON lines: what was sampled, where it was cut, what each piece was worth."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

from ray_rl.redaction import redact
from ray_rl.sinks import cut_after_step, write_line
from ray_rl.types import Completion, Continuation, GroupSummary, Reward, StateValue, Trajectory, TrajectoryGroup


class TokenDecoder(Protocol):
    """Says which text each sampled token is (`ray_rl.tokenizer.TokenizerCodec`)."""

    def decode_with_offsets(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """The text, and [T] the offset of each token's first character in it."""


class GroupRecorder:
    """Writes groups to a JSONL file; `read_groups` reads them back."""

    def __init__(
        self, path: Path, groups_per_step: int, decoder: TokenDecoder, *, resume_step: int | None = None
    ) -> None:
        """Write to a file, which is appended to.

        Args:
            path: of the file.
            groups_per_step: how many groups `choose` picks.
            decoder: of the policy's tokens.
            resume_step: groups of later steps, from an interrupted sitting, are removed, and whatever follows a broken line.
                None removes nothing.
        """
        self._path = path
        self._groups_per_step = groups_per_step
        self._decoder = decoder
        if resume_step is not None:
            self.rewind(resume_step)

    def choose(self, summaries: Sequence[GroupSummary]) -> list[int]:
        """Indices of the groups to keep, by mean reward: the best, the worst, the second best, and so on."""
        means = [statistics.fmean(summary.rewards) for summary in summaries]
        worst_first = sorted(range(len(summaries)), key=lambda index: (means[index], -index))
        ends = chain.from_iterable(zip(reversed(worst_first), worst_first, strict=True))
        return list(dict.fromkeys(ends))[: self._groups_per_step]

    def write(self, step: int, group: TrajectoryGroup, advantages: Sequence[Sequence[float] | None]) -> None:
        """Append a group.

        Args:
            step: the training step that consumed it.
            group: all of it.
            advantages: [G][T] per token of each completion; None for a trajectory that trains nothing.

        Raises:
            ValueError: advantages that do not fit the trajectories.
            NotWritten: the system refused.
        """
        write_line(self._path, self._record(step, group, advantages))

    def rewind(self, step: int) -> None:
        """Remove the groups of later steps: the run does those steps again.

        Raises:
            NotWritten: the system refused.
        """
        cut_after_step(self._path, step)

    def _record(
        self, step: int, group: TrajectoryGroup, advantages: Sequence[Sequence[float] | None]
    ) -> dict[str, Any]:
        problem = group.prompt.problem
        return {
            "step": step,
            "prompt_id": group.prompt.prompt_id,
            "problem_id": problem.problem_id,
            "prompt": problem.prompt if isinstance(problem.prompt, str) else [dict(m) for m in problem.prompt],
            "answer": problem.answer,
            "trajectories": [
                self._trajectory(trajectory, per_token)
                for trajectory, per_token in zip(group.trajectories, advantages, strict=True)
            ],
            "continuations": [self._continuation(continuation) for continuation in group.continuations],
        }

    def _trajectory(self, trajectory: Trajectory, advantages: Sequence[float] | None) -> dict[str, Any]:
        completion = trajectory.completion
        if advantages is not None and len(advantages) != len(completion.token_ids):
            raise ValueError(f"{len(advantages)} advantages for {len(completion.token_ids)} tokens")
        tokens = self._pieces(completion)
        return {
            "reward": trajectory.reward.value,
            "parts": dict(trajectory.reward.parts),
            "failure": _reason(trajectory.reward),
            "finish_reason": completion.finish_reason,
            "versions": [[span.version, span.start, span.end] for span in completion.versions],
            "tokens": tokens,
            "token_ids": list(completion.token_ids),
            "behavior_logprobs": list(completion.behavior_logprobs),
            "boundaries": list(trajectory.boundaries),
            "segments": ["".join(tokens[start:end]) for start, end in pairwise(trajectory.boundaries)],
            "values": [_value(value) for value in trajectory.values],
            "advantages": None if advantages is None else list(advantages),
        }

    def _continuation(self, continuation: Continuation) -> dict[str, Any]:
        return {
            "trajectory": continuation.trajectory,
            "boundary": continuation.boundary,
            "text": self._decoder.decode_with_offsets(continuation.completion.token_ids)[0],
            "token_ids": list(continuation.completion.token_ids),
            "finish_reason": continuation.completion.finish_reason,
            "reward": continuation.reward.value,
            "failure": _reason(continuation.reward),
        }

    def _pieces(self, completion: Completion) -> list[str]:
        """[T] the text of each token; joined they are the completion's text. A token amid a character is empty."""
        text, offsets = self._decoder.decode_with_offsets(completion.token_ids)
        return [text[start:end] for start, end in pairwise((*offsets, len(text)))]


def _reason(reward: Reward) -> str | None:
    """Why grading failed: what a grader raises may hold anything."""
    return None if reward.failure is None else redact(reward.failure)


def _value(value: StateValue) -> dict[str, Any]:
    """JSON knows no nan or infinity: an unknown mean or error is null."""
    return {
        "boundary": value.boundary,
        "mean": value.mean if math.isfinite(value.mean) else None,
        "stderr": value.stderr if math.isfinite(value.stderr) else None,
        "count": value.count,
        "closed": value.closed,
    }


def read_groups(path: Path) -> Iterator[dict[str, Any]]:
    """The recorded groups, in the order they were written; a last line that was cut short is left out.

    Raises:
        ValueError: a line amid the file is not JSON.
    """
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
