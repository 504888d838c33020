"""The yardstick itself against a policy whose values are known, with 5 standard errors (chance of failure 6e-7 each)."""

import asyncio
import math
import random

import pytest

from benchmarks.bank import Bank
from benchmarks.values.reference import Reference
from ray_rl.config.values import FixedValues
from tests.actors.chain import Chain, mean_and_error
from tests.fakes import completion

CHAIN = Chain(n=3, q=0.7)


def filled(seed, samples):
    rng = random.Random(seed)
    group = CHAIN.group(FixedValues(num_continuations=1), rng, group_size=2)
    reference = Reference(group.trajectories)
    asked = []

    async def draw(state, count):
        asked.append(count)
        drawn = [CHAIN.sample(rng, state.prefix).token_ids for _ in range(count)]
        return [(tokens, CHAIN.reward((*state.prefix, *tokens)).value) for tokens in drawn]

    tokens = asyncio.run(reference.fill(samples, draw))
    return group, reference, asked, tokens


def test_every_state_gets_enough_and_later_ones_need_fewer():
    _, reference, asked, tokens = filled(0, 64)
    assert asked[0] == 64
    assert all(0 < count < 64 for count in asked[1:])
    assert len(asked) <= reference.states
    assert tokens > 64


def test_values_and_advantages_are_unbiased_and_their_variance_is_the_one_they_have():
    value_errors, advantage_errors, claimed = [], [], []
    for seed in range(400):
        group, reference, _, _ = filled(seed, 16)
        trajectory = group.trajectories[0]
        tokens, reward = trajectory.completion.token_ids, trajectory.reward.value
        true = [CHAIN.value(tokens[:depth]) for depth in range(3)] + [reward]
        for depth, estimate in enumerate(reference.values(0)):
            value_errors.append(estimate.mean - true[depth])
        for depth, estimate in enumerate(reference.advantages(0, reward)):
            advantage_errors.append(estimate.mean - (true[depth + 1] - true[depth]))
            claimed.append(estimate.variance)
    for errors in (value_errors, advantage_errors):
        mean, error = mean_and_error(errors)
        assert abs(mean) <= 5 * error
    mean, error = mean_and_error([e**2 - c for e, c in zip(advantage_errors, claimed, strict=True)])
    assert abs(mean) <= 5 * error
    assert math.fsum(claimed) > 0


def test_a_prompt_is_undecided_when_both_outcomes_were_seen():
    assert filled(0, 64)[1].undecided
    reference = Reference([])

    async def draw(state, count):
        return [((1,), 1.0)] * count

    asyncio.run(reference.fill(4, draw))
    assert not reference.undecided


class Counting:
    def __init__(self):
        self.asked = []

    async def generate(self, token_ids, *, n, max_tokens, temperature=None, priority=0):
        self.asked.append(n)
        return tuple(completion((len(self.asked), index)) for index in range(n))


def test_readers_of_a_bank_share_its_draws_and_never_read_one_twice():
    engine = Counting()
    bank = Bank(engine)

    async def read():
        first, second = bank.reader(), bank.reader()
        three = await first.generate((1, 2), n=3, max_tokens=5)
        nine = await second.generate((1, 2), n=9, max_tokens=5)
        more = await first.generate((1, 2), n=2, max_tokens=5)
        return three, nine, more

    three, nine, more = asyncio.run(read())
    assert nine[:3] == three
    assert nine[3:5] == more
    assert engine.asked == [3, 6]
    assert bank.tokens == 18


def test_a_bank_refuses_another_temperature():
    with pytest.raises(ValueError, match="configured temperature"):
        asyncio.run(Bank(Counting()).reader().generate((1,), n=1, max_tokens=2, temperature=0.0))
