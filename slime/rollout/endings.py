"""Decide from its own tokens whether a response has ended.

- Called by: `generate` after every part, whatever finish reason the engine gave.
- Invariant: a response never continues after a token or a text that ends it.

The engine's finish reason is not enough: SGLang answers "abort" or "length" if that coincides with the end of the
response. Only its versions from 0.5.21 on look for stops first.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.core.sample import Sample
from slime.engine.protocol import GenerateResponse, SamplingParams
from slime.rollout.context import RolloutContext


def has_ended(sample: Sample, params: SamplingParams, context: RolloutContext) -> bool:
    """Return whether the newest token ends the response: it is a stop token, or it completes a stop text.

    As in SGLang, `ignore_eos` switches off all stop tokens but no stop text, and a stop text may end within the
    token. A token that the policy did not sample (loss_mask 0) ends nothing.
    """
    mask_R = sample.array("loss_mask")
    if not sample.response_length or (mask_R is not None and not mask_R[-1]):
        return False
    if not params.ignore_eos and int(sample.tokens_T[-1]) in context.end_token_ids.union(params.stop_token_ids or ()):
        return True
    return bool(params.stop_strings) and _text_has_ended(sample, params.stop_strings, context)


def _text_has_ended(sample: Sample, stops: Sequence[str], context: RolloutContext) -> bool:
    # A token has at least one byte of text, or none at all (then it is not part of a stop text).
    count = max(len(stop.encode()) for stop in stops) + 1
    tail = sample.response_tokens_R[-count:].tolist()
    text, before = (context.decode(tokens, skip_special_tokens=False) for tokens in (tail, tail[:-1]))
    known = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), min(len(text), len(before)))
    return any(text.find(stop, max(0, known - len(stop) + 1)) >= 0 for stop in stops)


def cut_at_stop_across_parts(
    sample: Sample, response: GenerateResponse, stops: Sequence[str], context: RolloutContext
) -> GenerateResponse:
    """Cut the response at a stop text that began in the part before, because an engine looks at its own part alone."""
    longest = max(map(len, stops))
    tail = sample.response_tokens_R[-2 * longest :].tolist()
    length_before = len(context.decode(tail, skip_special_tokens=False))
    for count in range(1, len(response.tokens_R) + 1):
        text = context.decode(tail + response.tokens_R[:count].tolist(), skip_special_tokens=False)
        # Search from the first position at which a stop text would reach across the end of the part before.
        found = (text.find(stop, max(0, length_before - len(stop) + 1)) for stop in stops)
        if any(0 <= start < length_before for start in found):
            return response.with_tokens(count, "stop")
        if len(text) - length_before >= longest:
            break
    return response
