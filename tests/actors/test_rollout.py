import asyncio
import math

from actors.rollout import Rollout, summarize
from actors.scoring import InPlaceScorer
from ray_rl.config import RunConfig, resolve_config
from ray_rl.types import Completion
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
    """Answers each prefix with what the test wrote down, and remembers what it was asked."""

    def __init__(self, answers: dict[tuple[int, ...], list[Completion]]) -> None:
        self.answers = answers
        self.asked: list[tuple[tuple[int, ...], int, int]] = []

    async def generate(self, token_ids, *, n, max_tokens, temperature=None):
        self.asked.append((tuple(token_ids), n, max_tokens))
        return tuple(self.answers[tuple(token_ids)][:n])


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
            PROMPT: [completion(RIGHT), completion(WRONG)],
            (*PROMPT, 1, 3): [completion((4, 2, END), cached=3), completion((4, 1, END), cached=3)],
        }
    )
    group = collect(vineppo(), engine)
    assert engine.asked == [(PROMPT, 2, 8), (PROMPT, 2, 8), ((*PROMPT, 1, 3), 2, 6)]
    right, wrong = group.trajectories
    assert [t.reward.value for t in group.trajectories] == [1.0, 0.0]
    assert right.boundaries == wrong.boundaries == (0, 2, 5)
    assert [(v.boundary, v.mean, v.count) for v in right.values] == [(0, 0.5, 2), (2, 0.5, 2)]
    assert right.values == wrong.values
    assert group.cost.states == 2
    assert group.cost.primary_tokens == 10
    assert group.cost.continuation_tokens == 10 + 6
    assert (group.cost.prefix_tokens, group.cost.cached_prefix_tokens) == (2 * 3 + 2 * 5, 6)


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
