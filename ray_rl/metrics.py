"""What a step and an evaluation come to in numbers. Where the numbers go: `ray_rl.sinks`."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from ray_rl.types import GroupSummary, Prompt, ScoredSample


def step_metrics(
    trained: Sequence[GroupSummary],
    version: int,
    *,
    filtered: Sequence[GroupSummary] = (),
    stale: Sequence[GroupSummary] = (),
) -> dict[str, float]:
    """What was sampled for a step (at least one group) in numbers; metrics of what did not happen are left out.

    Everything is over all sampled groups, dropped ones included: rewards and lengths then describe the policy, whatever
    is filtered, and tokens tell what the step cost. Only `staleness/*`, `groups/count` and `groups/decided_trained` (with
    refill: what was accepted past the limit) are over the groups that are trained on. Means are over completions where a
    completion has the quantity, over tokens for shares of tokens. `reward/std` is the population form over all
    completions. `reward/accuracy` is the share of rewards of at least 1. `rollout/cache_hit_rate` is the share of the
    completions' prompt tokens that the engine found in its prefix cache, `continuations/cache_hit_rate` that of the
    continuations' prefixes.

    A group may mix versions: weights arrive while its completions, or the continuations that its state values average, are
    sampled. `staleness/mixed_fraction` is the share of such groups, `staleness/spread_max` the most versions between the
    oldest and the newest of one group's tokens. The mixture is bounded: no token is newer than `version`, and the buffer
    drops groups with a token older than version - max_staleness, so the spread is at most max_staleness. With 0 none mixes.

    Args:
        trained: the groups that are trained on.
        version: the policy version that is being trained, against which staleness counts.
        filtered: those dropped because they are decided.
        stale: those dropped because they are too old.
    """
    summaries = [*trained, *filtered, *stale]
    rewards = list(chain.from_iterable(summary.rewards for summary in summaries))
    lengths = list(chain.from_iterable(summary.lengths for summary in summaries))
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/accuracy": _share(rewards),
        "reward/failures": _ratio(sum(s.failures for s in summaries), sum(s.graded for s in summaries)),
        "rollout/response_length_mean": statistics.fmean(lengths),
        "rollout/response_length_max": float(max(lengths)),
        "rollout/truncated_rate": sum(s.truncated for s in summaries) / len(rewards),
        "rollout/group_seconds_mean": statistics.fmean(s.cost.seconds for s in summaries),
        "segments/per_trajectory": sum(s.segments for s in summaries) / len(rewards),
        "groups/count": float(len(trained)),
        "groups/filtered": float(len(filtered)),
        "groups/decided_fraction": sum(s.decided for s in summaries) / len(summaries),
        "groups/decided_trained": float(sum(s.decided for s in trained)),
        **_staleness_metrics(trained, version),
        **_cost_metrics(summaries),
    }


def _staleness_metrics(trained: Sequence[GroupSummary], version: int) -> dict[str, float]:
    if not trained:
        return {}
    ages = [version - summary.oldest_version for summary in trained]
    spreads = [summary.newest_version - summary.oldest_version for summary in trained]
    return {
        "staleness/mean": statistics.fmean(ages),
        "staleness/max": float(max(ages)),
        "staleness/mixed_fraction": sum(spread > 0 for spread in spreads) / len(spreads),
        "staleness/spread_max": float(max(spreads)),
    }


def _cost_metrics(summaries: Sequence[GroupSummary]) -> dict[str, float]:
    primary = sum(s.cost.primary_tokens for s in summaries)
    continued = sum(s.cost.continuation_tokens for s in summaries)
    states = sum(s.cost.states for s in summaries)
    prompts = sum(s.cost.prompt_tokens for s in summaries)
    metrics = {
        "tokens/primary": float(primary),
        "tokens/continuations": float(continued),
        "rollout/cache_hit_rate": _ratio(sum(s.cost.cached_prompt_tokens for s in summaries), prompts),
    }
    if states:
        prefix = sum(s.cost.prefix_tokens for s in summaries)
        possible = sum(s.cost.cacheable_prefix_tokens for s in summaries)
        cached = sum(s.cost.cached_prefix_tokens for s in summaries)
        metrics |= {
            "values/states": float(states),
            "values/closed_share": sum(s.cost.closed_states for s in summaries) / states,
            "values/rounds": sum(s.cost.rounds for s in summaries) / len(summaries),
            "groups/skipped": float(sum(not s.cost.continuations for s in summaries)),
            "continuations/per_state": sum(s.cost.continuations for s in summaries) / states,
            "continuations/tokens_share": _ratio(continued, primary + continued),
            "continuations/cache_hit_rate": _ratio(cached, prefix),
            "continuations/cache_hits_of_possible": _ratio(cached, possible),
        }
    valued = [(s.value_mean, s.segments) for s in summaries if math.isfinite(s.value_mean)]
    if valued:
        metrics["values/mean"] = math.fsum(mean * n for mean, n in valued) / sum(n for _, n in valued)
    errors = [(s.value_stderr, s.segments) for s in summaries if math.isfinite(s.value_stderr)]
    if errors:
        metrics["values/stderr"] = math.fsum(error * n for error, n in errors) / sum(n for _, n in errors)
    return metrics


def evaluation_metrics(
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[ScoredSample]],
    greedy: Sequence[Sequence[ScoredSample]] | None,
) -> dict[str, float]:
    """Accuracy on held-out problems.

    `eval/pass@1` and `eval/greedy` are mean rewards: for rewards of 0 and 1 the accuracy, for graded ones the mean
    score. `eval/pass@k` (k = 2, 4, 8, .. and n; only for n > 1 samples) counts an answer as correct when its reward is
    at least 1; `eval/majority@n` is the mean of `majority_reward`.

    Args:
        prompts: [P], at least one.
        sampled: [P][n] answers at the evaluation temperature, the same n for all.
        greedy: [P][1] answers at temperature 0, or None.

    Raises:
        ValueError: numbers of prompts and answers differ.
    """
    if len(sampled) != len(prompts) or (greedy is not None and len(greedy) != len(prompts)):
        raise ValueError(f"{len(prompts)} prompts, {len(sampled)} sampled and {len(greedy or sampled)} greedy answers")
    answers = list(chain.from_iterable(sampled))
    metrics = {
        "eval/pass@1": statistics.fmean(answer.reward.value for answer in answers),
        "eval/response_length_mean": statistics.fmean(answer.tokens for answer in answers),
        "eval/truncated_rate": sum(not answer.finished for answer in answers) / len(answers),
        "eval/failures": sum(answer.reward.failure is not None for answer in answers) / len(answers),
        "eval/problems": float(len(prompts)),
    }
    samples = len(sampled[0])
    for k in _powers_of_two_up_to(samples):
        metrics[f"eval/pass@{k}"] = statistics.fmean(pass_at_k(samples, _correct(row), k) for row in sampled)
    if samples > 1:
        metrics[f"eval/majority@{samples}"] = statistics.fmean(majority_reward(row) for row in sampled)
    if greedy is not None:
        metrics["eval/greedy"] = statistics.fmean(row[0].reward.value for row in greedy)
    return metrics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that at least one of k answers is correct, from n answers of which c are correct.

    1 - C(n - c, k) / C(n, k)  (Chen et al. 2021, arXiv 2107.03374). ``pass_at_k(4, 1, 2) == 0.5``

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_reward(samples: Sequence[ScoredSample]) -> float:
    """Mean reward of the answer given most often; a tie is decided by lot, so it counts the mean over the tied answers.

    Samples without an answer don't vote; without any vote the reward is 0.
    """
    votes = Counter(sample.answer for sample in samples if sample.answer)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    # Tied answers have equally many samples, so the mean over their samples is the mean over the answers.
    return statistics.fmean(sample.reward.value for sample in samples if sample.answer in winners)


def _powers_of_two_up_to(n: int) -> list[int]:
    return sorted({*(2**power for power in range(1, n.bit_length()) if 2**power <= n), *([n] if n > 1 else [])})


def _correct(samples: Iterable[ScoredSample]) -> int:
    return sum(sample.reward.value >= 1 for sample in samples)


def _share(rewards: Sequence[float]) -> float:
    return sum(reward >= 1 for reward in rewards) / len(rewards)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
