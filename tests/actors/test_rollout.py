import asyncio
import itertools
import math
import random
from collections import Counter

import pytest

from actors.rollout import Rollout, summarize
from actors.sampling import request_seed
from actors.scoring import InPlaceScorer
from ray_rl.config import RunConfig, resolve_config
from ray_rl.types import Completion, Prompt, Reward
from tests.fakes import completion, prompt

VOCABULARY = {1: "1", 2: "2", 3: "\n", 4: "#", 5: ""}
END = 5


class Codec:
    """One character per token."""

    def decode_with_offsets(self, token_ids):
        texts = [VOCABULARY[token] for token in token_ids]
        starts = [sum(map(len, texts[:index])) for index in range(len(texts))]
        return "".join(texts), tuple(starts)


class Engine:
    """Answers each prefix with what the test wrote down, in turn, and remembers what it was asked."""

    def __init__(self, answers: dict[tuple[int, ...], list[Completion]]) -> None:
        self.answers = answers
        self.asked: list[tuple[tuple[int, ...], int, int]] = []
        self.priorities: set[int] = set()
        self.seeds: Counter[tuple[tuple[int, ...], int | None]] = Counter()
        self.turn = {prefix: itertools.cycle(answers) for prefix, answers in answers.items()}

    async def generate(self, token_ids, *, n, max_tokens, temperature=None, priority=0, seeds=None):
        self.asked.append((tuple(token_ids), n, max_tokens))
        self.priorities.add(priority)
        self.seeds.update((tuple(token_ids), seed) for seed in seeds or [None] * n)
        return tuple(next(self.turn[tuple(token_ids)]) for _ in range(n))


# "1\n#2" ends with the right answer, "1\n#1" with a wrong one; the prompt is (1, 2, 3), the answer "2".
RIGHT, WRONG = (1, 3, 4, 2, END), (1, 3, 4, 1, END)
PROMPT = (1, 2, 3)


def vineppo(**rollout) -> RunConfig:
    return resolve_config({"rollout": {"group_size": 2, "max_tokens": 8} | rollout, "values": {"num_continuations": 2}})


def collect(config: RunConfig, engine: Engine):
    rollout = Rollout(config, engine, InPlaceScorer(config.reward), Codec())
    return asyncio.run(rollout.collect(prompt(token_ids=PROMPT)))


def test_vineppo_values_each_distinct_state_once_with_the_tokens_that_are_left():
    engine = Engine(
        {
            PROMPT: [completion(RIGHT), completion(WRONG, cached=2)],
            (*PROMPT, 1, 3): [completion((4, 2, END), cached=3), completion((4, 1, END), cached=3)],
        }
    )
    group = collect(vineppo(), engine)
    assert engine.asked == [(PROMPT, 2, 8), (PROMPT, 1, 8), (PROMPT, 1, 8), ((*PROMPT, 1, 3), 2, 6)]
    right, wrong = group.trajectories
    assert [t.reward.value for t in group.trajectories] == [1.0, 0.0]
    assert right.boundaries == wrong.boundaries == (0, 2, 5)
    assert [(v.boundary, v.mean, v.count) for v in right.values] == [(0, 0.5, 2), (2, 0.5, 2)]
    assert right.values == wrong.values
    assert group.cost.states == 2
    assert group.cost.primary_tokens == 10
    assert group.cost.continuation_tokens == 10 + 6
    assert (group.cost.prompt_tokens, group.cost.cached_prompt_tokens) == (2 * 3, 2)
    assert (group.cost.prefix_tokens, group.cost.cached_prefix_tokens) == (2 * 3 + 2 * 5, 2 + 6)
    assert group.cost.cacheable_prefix_tokens == 0  # no prefix fills a block


def test_fixed_values_wait_for_no_other_completion_of_the_group():
    class OneIsSlow(Engine):
        """The second completion comes only when the first one's state is being continued."""

        def __init__(self):
            super().__init__({PROMPT: [completion(RIGHT)], (*PROMPT, 1, 3): [completion((4, 2, END))]})
            self.continued = asyncio.Event()
            self.sampled = 0

        async def generate(self, token_ids, *, n, max_tokens, temperature=None, priority=0, seeds=None):
            if len(token_ids) > len(PROMPT):
                self.continued.set()
            elif n == 1:
                self.sampled += 1
                if self.sampled == 2:
                    await asyncio.wait_for(self.continued.wait(), 10)
            return await super().generate(token_ids, n=n, max_tokens=max_tokens)

    assert len(collect(vineppo(), OneIsSlow()).trajectories) == 2


def test_all_that_is_sampled_for_a_prompt_goes_by_its_position():
    engine = Engine({PROMPT: [completion(RIGHT)], (*PROMPT, 1, 3): [completion((4, 2, END))]})
    config = vineppo()
    rollout = Rollout(config, engine, InPlaceScorer(config.reward), Codec())
    asyncio.run(rollout.collect(prompt(position=7, token_ids=PROMPT)))
    assert engine.priorities == {7}
    asyncio.run(rollout.evaluate(prompt(position=-1, token_ids=PROMPT), samples=1, temperature=1.0))
    assert engine.priorities == {7, -1}


ADAPTIVE = {"kind": "adaptive", "pooling": "passing"}


def test_adaptive_values_continue_nothing_when_the_group_is_decided_and_open_states_when_it_is_not():
    config = resolve_config({"rollout": {"group_size": 8, "max_tokens": 8}, "values": ADAPTIVE})
    decided = Engine({PROMPT: [completion(WRONG)]})
    group = collect(config, decided)
    assert len(decided.asked) == 8
    assert (group.continuations, group.cost.rounds, group.cost.closed_states) == ((), 0, group.cost.states)
    assert all(value.closed for trajectory in group.trajectories for value in trajectory.values)
    half = {(*PROMPT, 1, 3): [completion((4, 2, END)), completion((4, 1, END))]}
    open_group = collect(config, Engine({PROMPT: [completion(RIGHT), completion(WRONG)]} | half))
    assert [(v.mean, v.count) for v in open_group.trajectories[0].values] == [(3 / 7, 7), (3 / 7, 7)]


class Seeded(Engine):
    """Tokens follow from the seeds; completions come in whatever order `delays` gives."""

    def __init__(self, delays: int) -> None:
        super().__init__({})
        self.delays = random.Random(delays)

    async def generate(self, token_ids, *, n, max_tokens, temperature=None, priority=0, seeds=None):
        self.seeds.update((tuple(token_ids), seed) for seed in seeds or [None] * n)
        for _ in range(self.delays.randrange(20)):
            await asyncio.sleep(0)
        assert seeds is not None
        rest = {3: (1, 3, 4), 5: (4,)}[len(token_ids)]
        return tuple(completion((*rest, random.Random(seed).choice((1, 2)), END)) for seed in seeds)


def seeds_of(config: RunConfig, *, delays: int = 0, position: int = 3) -> Counter:
    engine = Seeded(delays)
    rollout = Rollout(config, engine, InPlaceScorer(config.reward), Codec())
    asyncio.run(rollout.collect(prompt(position=position, token_ids=PROMPT)))
    return engine.seeds


GRPO = {"values": {"kind": "none"}, "advantage": {"kind": "grpo"}}
KINDS = [GRPO, {"values": {"num_continuations": 2}}, {"values": ADAPTIVE}]


@pytest.mark.parametrize("kind", KINDS, ids=["grpo", "fixed", "adaptive"])
def test_a_deterministic_group_asks_for_the_same_seeds_each_time_whatever_ends_first(kind):
    config = resolve_config({"deterministic": True, "rollout": {"group_size": 8, "max_tokens": 8}} | kind)
    first = seeds_of(config, delays=1)
    assert all(seeds_of(config, delays=delays) == first for delays in range(2, 8))
    assert max(first.values()) == 1, "no two requests of a group share a seed"
    seeds = {seed for _, seed in first}
    for other in (seeds_of(config, position=4), seeds_of(config.model_copy(update={"seed": 1}))):
        assert seeds.isdisjoint(seed for _, seed in other)


def test_evaluation_has_the_same_seeds_at_each_step_and_others_for_each_problem():
    config = resolve_config({"deterministic": True})
    asked = []
    for position in (0, 0, 1):
        engine = Engine({PROMPT: [completion(RIGHT)]})
        rollout = Rollout(config, engine, InPlaceScorer(config.reward), Codec())
        of_problem = prompt(position=position, token_ids=PROMPT).problem
        held_out = Prompt(problem=of_problem, position=-1, token_ids=PROMPT)
        asyncio.run(rollout.evaluate(held_out, samples=2, temperature=1.0))
        asked.append(engine.seeds)
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2
    assert asked[0].keys().isdisjoint(asked[2])


def test_a_request_seed_is_the_same_on_every_machine_and_fits_the_engine():
    seed = request_seed(0, prompt(position=7), (1, 3), 2)
    assert seed == 3_192_774_776_794_530_421
    assert 0 <= seed < 2**63


def test_without_deterministic_no_request_has_a_seed():
    engine = Engine({PROMPT: [completion(RIGHT)], (*PROMPT, 1, 3): [completion((4, 2, END))]})
    collect(vineppo(), engine)
    assert {seed for _, seed in engine.seeds} == {None}


def test_given_completions_are_valued_without_sampling_them_again():
    config = vineppo()
    engine = Engine({PROMPT: [completion(RIGHT)], (*PROMPT, 1, 3): [completion((4, 2, END)), completion((4, 1, END))]})
    rollout = Rollout(config, engine, InPlaceScorer(config.reward), Codec())
    rewards = [Reward(value=1.0), Reward(value=0.0)]
    group = asyncio.run(rollout.values_of(prompt(token_ids=PROMPT), [completion(RIGHT), completion(WRONG)], rewards))
    assert engine.asked == [(PROMPT, 2, 8), ((*PROMPT, 1, 3), 2, 6)]
    assert [trajectory.reward for trajectory in group.trajectories] == rewards
    assert [v.mean for v in group.trajectories[1].values] == [1.0, 0.5]


def test_what_an_engine_raises_comes_as_itself():
    class Dead(Engine):
        async def generate(self, token_ids, *, n, max_tokens, temperature=None, priority=0, seeds=None):
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        collect(vineppo(), Dead({}))


def test_a_truncated_completion_is_unfinished_and_not_graded():
    config = vineppo().model_copy(update={"reward": vineppo().reward.model_copy(update={"unfinished": -1.0})})
    cut = completion((4, 2), finished=False)
    engine = Engine({PROMPT: [cut, cut]})
    group = collect(config, engine)
    assert [t.reward.value for t in group.trajectories] == [-1.0, -1.0]
    assert summarize(group).truncated == 2
    assert summarize(group).graded == 0


def test_grpo_makes_no_continuations():
    engine = Engine({PROMPT: [completion(RIGHT), completion(WRONG)]})
    config = resolve_config(
        {"rollout": {"group_size": 2, "max_tokens": 8}, "values": {"kind": "none"}, "advantage": {"kind": "grpo"}}
    )
    group = collect(config, engine)
    assert len(engine.asked) == 1
    assert group.continuations == ()
    assert all(t.values == () and t.boundaries == (0, 5) for t in group.trajectories)
    summary = summarize(group)
    assert summary.rewards == (1.0, 0.0)
    assert math.isnan(summary.value_mean)


def test_a_continuation_is_scored_together_with_its_prefix():
    # The answer's marker lies in the prefix: only prefix and continuation together can be right.
    engine = Engine(
        {
            PROMPT: [completion((4, 3, 2, END))] * 2,
            (*PROMPT, 4, 3): [completion((4, 2, END)), completion((1, END))],
        }
    )
    group = collect(vineppo(), engine)
    of_second = [c for c in group.continuations if c.boundary == 2]
    assert [c.reward.value for c in of_second] == [1.0, 0.0]


def test_evaluation_returns_answers_for_majority_votes():
    config = vineppo()
    engine = Engine({PROMPT: [completion(RIGHT), completion(WRONG)]})
    rollout = Rollout(config, engine, InPlaceScorer(config.reward), Codec())
    samples = asyncio.run(rollout.evaluate(prompt(token_ids=PROMPT), samples=2, temperature=1.0))
    assert [(s.reward.value, s.answer, s.tokens, s.finished) for s in samples] == [
        (1.0, "2", 5, True),
        (0.0, "1", 5, True),
    ]


def test_an_unfinished_evaluation_answer_does_not_vote():
    config = vineppo()
    engine = Engine({PROMPT: [completion((4, 2), finished=False), completion(RIGHT)]})
    rollout = Rollout(config, engine, InPlaceScorer(config.reward), Codec())
    samples = asyncio.run(rollout.evaluate(prompt(token_ids=PROMPT), samples=2, temperature=1.0))
    assert [(s.reward.value, s.answer, s.finished) for s in samples] == [(0.0, "", False), (1.0, "2", True)]
