"""Samples of groups for the run's folder, with their advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray.exceptions import RayError

from actors.pool_member import in_a_line
from learner.advantages import token_advantages
from ray_rl.config import RunConfig
from ray_rl.deadlines import DeadlineExceeded, wait
from ray_rl.protocols import CollectedGroup
from ray_rl.recorder import GroupRecorder
from ray_rl.run_state import RunFolder
from ray_rl.tokenizer import TokenizerCodec


class Recorder:
    """A `GroupRecorder` that fetches the few groups it wants, with the advantages that the learner gave them."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, codec: TokenizerCodec, step: int, warn: Callable[[str], None]
    ) -> None:
        self._config = config
        self._warn = warn
        path = folder.path / "groups.jsonl"
        self._recorder = GroupRecorder(path, config.logging.groups_per_step, codec, resume_step=step)

    async def record(self, step: int, groups: Sequence[CollectedGroup]) -> None:
        """Of the groups that are still there."""
        for index in self._recorder.choose([collected.summary for collected in groups]):
            try:
                group = await wait(groups[index].ref, self._config.learner.step_timeout, what="a group to record")
            except (RayError, DeadlineExceeded) as error:
                self._warn(f"a group of step {step} is not recorded, since it is gone: {in_a_line(error)}")
            else:
                self._recorder.write(step, group, token_advantages(group, self._config.advantage))

    def rewind(self, step: int) -> None:
        """As `GroupRecorder.rewind`."""
        self._recorder.rewind(step)
