"""How many rollout actors a run should have, from what its steps say. Pure decisions; the pool carries them out."""

from __future__ import annotations

from collections.abc import Mapping

from ray_rl.config.rollout import ActorRange

GROW_ABOVE = 0.3
"""Share of a step for which the learner waited for groups."""
SHRINK_BELOW = 0.1
"""The same, where sampling and training take turns: sampling is so short that fewer engines cost next to nothing."""
IDLE_ABOVE = 0.5
"""Share of the time in which they may sample that engines had no group at all."""
STEPS = 2
"""Steps in a row that must say the same."""
PATIENCE = 20
"""Steps for which a size that proved too large is not tried again."""


class Autoscaler:
    """Decides after each step of a run with `rollout.num_actors: {min, max}`.

    With w the share of the step for which the learner waited for groups (``timing/rollout / timing/step``) and i the share of
    the time open to sampling in which the average engine had no group (``timing/engines_idle``):

    - one actor more when w > 0.3 and i < 0.5 in two steps in a row: engines are what the run waits for, and they had work;
    - one fewer when i > 0.5 in two steps in a row: finished groups fill the buffer, or there are fewer groups than engines.

    With max_staleness 0 sampling and training take turns, and engines rest while the learner trains: that is no surplus. The
    time open to sampling is then the sampling phase alone, w is the share of that phase, and there is one more reason for one
    fewer: w < 0.1 in two steps in a row.

    What keeps it from swinging: one actor at a time; a change of size, whoever made it, starts the counting anew and its first
    step does not count; after i or w has spoken against a size, that size is not tried again for 20 steps.
    """

    def __init__(self, bounds: ActorRange, *, takes_turns: bool) -> None:
        """Decide within bounds.

        Args:
            bounds: fewest and most actors.
            takes_turns: whether nothing is sampled while a step trains (training.max_staleness = 0).
        """
        self._bounds = bounds
        self._takes_turns = takes_turns
        self._size: int | None = None
        self._wanting = 0
        """Steps in a row that spoke for more (positive) or for fewer (negative)."""
        self._too_large = bounds.max + 1
        self._patience = 0

    def decide(self, metrics: Mapping[str, float], size: int) -> int:
        """The number of actors from now on.

        Not to be asked while an actor is still starting or ending: the step tells nothing yet about the size that is wanted.

        Args:
            metrics: of the step that has just ended, by their names in metrics.jsonl. A pool that does not tell for how long its
                engines were idle has busy ones.
            size: actors that are wanted at present.
        """
        self._patience = max(self._patience - 1, 0)
        if size != self._size:
            first, self._size, self._wanting = self._size is None, size, 0
            if not first:
                return size
        self._count(self._vote(metrics))
        if self._wanting <= -STEPS and size > self._bounds.min:
            self._too_large, self._patience = size, PATIENCE
            return size - 1
        if self._wanting >= STEPS and size < self._bounds.max and not self._is_rejected(size + 1):
            return size + 1
        return size

    def _vote(self, metrics: Mapping[str, float]) -> int:
        """1: this step speaks for one more; -1: for one fewer."""
        step, rollout = metrics["timing/step"], metrics["timing/rollout"]
        resting = step - rollout if self._takes_turns else 0.0
        open_to_sampling = rollout if self._takes_turns else step
        waited = rollout / step if step > 0 else 0.0
        # The metric may count from a little before the step, or over an evaluation after it.
        idle_seconds = max(metrics.get("timing/engines_idle", 0.0) - resting, 0.0)
        idle = min(idle_seconds / open_to_sampling, 1.0) if open_to_sampling > 0 else 0.0
        if idle > IDLE_ABOVE or (self._takes_turns and waited < SHRINK_BELOW):
            return -1
        return 1 if waited > GROW_ABOVE else 0

    def _count(self, vote: int) -> None:
        self._wanting = self._wanting + vote if self._wanting * vote > 0 else vote

    def _is_rejected(self, size: int) -> bool:
        return self._patience > 0 and size >= self._too_large
