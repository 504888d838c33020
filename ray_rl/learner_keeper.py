"""The learner and its checkpoints: what is saved when, and how a learner that died comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import TypeVar

from ray_rl.collector import RunStopped
from ray_rl.deadlines import in_thread
from ray_rl.protocols import Learner, LearnerDied
from ray_rl.run_state import RunFolder, RunState

T = TypeVar("T")


class LearnerKeeper:
    """Saves a learner's state, and starts it anew from the newest whole checkpoint at most `max_restarts` times."""

    def __init__(
        self,
        learner: Learner,
        folder: RunFolder,
        *,
        keep: int,
        max_restarts: int,
        timeout: float,
        warn: Callable[[str], None],
    ) -> None:
        """Of one sitting.

        Args:
            learner: has the state of the run's start.
            folder: where checkpoints lie.
            keep: checkpoints, older ones are deleted.
            max_restarts: of the learner, in this sitting.
            timeout: seconds in which the files of a checkpoint must be read or written.
            warn: told what happens.
        """
        self._learner = learner
        self._folder = folder
        self._keep = keep
        self._max_restarts = max_restarts
        self._timeout = timeout
        self._warn = warn
        self.restarts = 0
        """So far."""
        self.saved_step: int | None = None
        """Of the newest checkpoint that is known to be whole."""

    async def save(self, state: RunState) -> None:
        """Make the checkpoint of a state, which the learner has.

        Raises:
            NotWritten: there is no room, or no permission; earlier checkpoints are untouched.
            LearnerDied: a rank's process is gone.
        """
        async with self._entered(self._folder.new_checkpoint(state), f"the checkpoint of step {state.step}") as new:
            new.add("learner", await self._learner.save(new.place / "learner"))
            new.add("policy", await self._learner.export(new.place / "policy"))
            await self._in_thread(new.seal, what=f"the checkpoint of step {state.step} to be on the disk")
        await self._saved(state.step)

    async def revive(self, death: LearnerDied) -> int:
        """Start the ranks anew, with the state of the newest whole checkpoint.

        Returns:
            The step that they are at; 0, the initial policy, without any checkpoint.

        Raises:
            RunStopped: it died too often.
        """
        while True:
            if self.restarts >= self._max_restarts:
                raise RunStopped(
                    f"learner.max_restarts: the learner died {self.restarts + 1} times in this sitting, the last time: "
                    f"{death}; mend what kills it (logs/learner-*.log, or Ray's), then go on with --resume, or raise the limit"
                ) from death
            self.restarts += 1
            start = await self._in_thread(self._folder.find_start, what="the newest whole checkpoint to be found")
            for note in start.notes:
                self._warn(note)
            step = start.state.step
            source = f"the checkpoint of step {step}" if step else "the initial policy, for there is no checkpoint yet"
            self._warn(f"the learner died, restart {self.restarts} of {self._max_restarts} from {source}: {death}")
            try:
                await self._learner.restart()
                if step:
                    await self._learner.load(self._folder.checkpoint(step) / "learner")
            except LearnerDied as again:
                death = again
            else:
                await self._saved(step)
                return step

    async def _saved(self, step: int) -> None:
        """The run is at a step whose checkpoint is whole: later ones and older ones go."""
        self.saved_step = step or None
        prune = partial(self._folder.prune, self._keep, step)
        for line in await self._in_thread(prune, what="checkpoints that nobody needs to be deleted"):
            self._warn(line)

    @asynccontextmanager
    async def _entered(self, manager: AbstractContextManager[T], what: str) -> AsyncIterator[T]:
        """A context that is entered and left in a thread, for what it does there may take its time."""
        entered = await self._in_thread(manager.__enter__, what=f"{what} to be begun")
        try:
            yield entered
        except BaseException as error:
            leave = partial(manager.__exit__, type(error), error, error.__traceback__)
            await self._in_thread(leave, what=f"{what} to be given up")
            raise
        await self._in_thread(partial(manager.__exit__, None, None, None), what=f"{what} to be complete")

    async def _in_thread(self, work: Callable[[], T], *, what: str) -> T:
        return await in_thread(work, self._timeout, what=what, causes="a file system that hangs")
