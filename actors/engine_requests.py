"""What one request to vLLM asks for, and what its answer means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_rl.types import Completion, VersionSpan

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams


def sampling_params(
    *, max_tokens: int, temperature: float, top_p: float, stop_token_ids: Sequence[int], seed: int | None = None
) -> SamplingParams:
    """One sample with the log-probabilities of its tokens; temperature 0 is greedy, seed None draws from the engine's own."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_token_ids=list(stop_token_ids),
        # Of the sampled token only, in flat lists: a dict per token is what the garbage collector would spend its time on.
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_params() -> SamplingParams:
    """The log-probabilities of the prompt's own tokens."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def logprobs_of_prompt(output: RequestOutput, token_ids: Sequence[int]) -> tuple[float, ...]:
    """[P - 1] of token_ids[1:], from the answer to a request with `scoring_params`."""
    rows = (output.prompt_logprobs or [])[1:]
    return tuple(row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True) if row is not None)


def completion(output: RequestOutput) -> Completion:
    """The one sample of an answer.

    Raises:
        RuntimeError: it ended otherwise than by a stop token or by its length, or lacks what was asked for.
    """
    from vllm.logprobs import FlatLogprobs

    sample = output.outputs[0]
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"request {output.request_id} ended with {sample.finish_reason!r}, neither stop nor length")
    token_ids = tuple(sample.token_ids)
    logprobs = tuple(sample.logprobs.logprobs) if isinstance(sample.logprobs, FlatLogprobs) else ()
    if len(logprobs) != len(token_ids) or sample.weight_versions is None:
        raise RuntimeError(
            f"request {output.request_id}: {len(token_ids)} tokens came with {len(logprobs)} log-probabilities and "
            f"version spans {sample.weight_versions}"
        )
    return Completion(
        token_ids=token_ids,
        behavior_logprobs=logprobs,
        versions=tuple(
            VersionSpan(version=int(span.version), start=span.start, end=span.end) for span in sample.weight_versions
        ),
        finish_reason="stop" if sample.finish_reason == "stop" else "length",
        cached_tokens=output.num_cached_tokens or 0,
    )
