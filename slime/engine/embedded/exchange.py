"""Read requests to /generate and write their answers, as SGLang does.

- Called by: `server` makes a `Request` for the scheduler here, and the answer from the finished request.
- Invariant: an answer is SGLang's for the same request, or a ValueError (status 400) with the reason. No request is
  served in another way than it asks. `tests/engine/sglang_answers.py` compares the two, by SGLang's version.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from slime.config.context import engine_limits
from slime.engine.embedded.request import Request
from slime.engine.embedded.settings import Settings
from slime.engine.embedded.text import Text
from slime.engine.protocol import GenerateRequest, SamplingParams, encode_routes

GREEDY_BELOW = 1e-6
"""Below this temperature SGLang takes the most likely token, with the log-prob of the raw logits."""
LONGEST_TOKEN = 128
"""The most characters of a token; a text that cannot fit into the context is refused before it is tokenized."""


class Exchange:
    """Converts requests and answers. Its only state is the random numbers for requests without a seed."""

    def __init__(self, settings: Settings, text: Text) -> None:
        self._settings = settings
        self._text = text
        self._limits = engine_limits(settings.context_length)
        self._random = random.Random(settings.seed)

    def to_request(self, asked: GenerateRequest, rid: str) -> Request:
        """Return the request for the scheduler. Raises ValueError if SGLang, or this engine, does not serve it."""
        ids = self._input_ids(asked)
        params = self._resolve(asked, len(ids))
        self._check_returns(asked, len(ids))
        own = params.stop_token_ids or ()
        return Request(
            rid=rid,
            input_ids=ids,
            params=params,
            seed=self._random.getrandbits(63) if params.sampling_seed is None else params.sampling_seed,
            # ignore_eos switches off the request's own stop tokens, too.
            stop_token_ids=frozenset() if params.ignore_eos else self._settings.stop_token_ids.union(own),
            logprob_start_len=asked.logprob_start_len if asked.return_logprob else -1,
            return_routes=asked.return_routed_experts,
            stop_check=self._text.stop_check(params.stop_strings),
        )

    def _input_ids(self, asked: GenerateRequest) -> list[int]:
        vocabulary, context = self._settings.architecture.vocab_size, self._settings.context_length
        text = asked.text or ""
        if len(text) > context * LONGEST_TOKEN:
            raise ValueError(f"text has {len(text)} characters; that is longer than the context of {context} tokens")
        ids = self._text.encode(text) if asked.input_ids is None else asked.input_ids
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"input_ids has to hold tokens in [0, {vocabulary}); it holds {len(ids)} tokens")
        return ids

    def _resolve(self, asked: GenerateRequest, length: int) -> SamplingParams:
        """Return the sampling parameters with the engine's own values filled in."""
        params, context, limits = asked.sampling_params, self._settings.context_length, self._limits
        assert limits.sequence is not None and limits.request is not None, "an engine has both"
        if length >= context:
            raise ValueError(
                f"The input ({length} tokens) is longer than the model's context length ({context} tokens)."
            )
        if not asked.fills_context and length + params.max_new_tokens > context:
            raise ValueError(
                f"Requested token count exceeds the model's maximum context length of {context} tokens: {length} "
                f"input tokens and {params.max_new_tokens} new ones; lower max_new_tokens"
            )
        if length > limits.request:
            raise ValueError(
                f"Input length ({length} tokens) exceeds the maximum allowed length ({limits.request + 1} tokens); "
                "use a shorter input"
            )
        room = limits.sequence - length
        return replace(
            params,
            max_new_tokens=room if asked.fills_context else min(params.max_new_tokens, room),
            temperature=0.0 if params.temperature < GREEDY_BELOW else params.temperature,
        )

    def _check_returns(self, asked: GenerateRequest, length: int) -> None:
        if asked.return_logprob and asked.logprob_start_len > length:
            raise ValueError(
                f"logprob_start_len={asked.logprob_start_len} is higher than the number of input tokens ({length}); "
                "use a smaller one"
            )
        if not asked.return_routed_experts:
            return
        if not self._settings.returns_routed_experts:
            raise ValueError(
                "return_routed_experts: this engine keeps no routes; start it with --enable-return-routed-experts"
            )
        if asked.routed_experts_start_len > length:
            raise ValueError(
                f"routed_experts_start_len is {asked.routed_experts_start_len}; it has to lie in [0, {length}], the "
                "length of the prompt"
            )

    def to_answer(self, done: Request, asked: GenerateRequest) -> dict[str, Any]:
        """Return the JSON of a finished request."""
        reason = done.finish_reason or {}
        meta: dict[str, Any] = {
            "id": done.rid,
            "finish_reason": reason,
            "prompt_tokens": len(done.input_ids),
            "completion_tokens": len(done.output_ids),
            "cached_tokens": done.cached_tokens,
            "weight_version": done.weight_version,
            "e2e_latency": time.monotonic() - done.started,
        }
        if asked.return_logprob:
            meta["output_token_logprobs"] = [(p, t, None) for p, t in zip(done.log_probs, done.output_ids, strict=True)]
            meta["input_token_logprobs"] = self._input_log_probs(done)
        if done.routes is not None:
            # SGLang counts all layers, with zeros in those that have no experts.
            routes = F.pad(done.routes, (0, 0, self._settings.architecture.first_dense_layers, 0))
            meta["routed_experts"] = encode_routes(routes[asked.routed_experts_start_len :].numpy())
        text = self._text.render(done.output_ids, done.params, reason.get("matched"))
        return {"text": text, "output_ids": done.output_ids, "meta_info": meta}

    def _input_log_probs(self, done: Request) -> list[tuple[float | None, int, None]]:
        """Return log-probs from `logprob_start_len` on, the first None; empty if the request never ran."""
        start, known = done.logprob_start_len, done.input_log_probs
        targets = done.input_ids[start:] if start >= 0 else []
        if len(targets) != len(known) + 1:
            return []
        # SGLang writes 0 for the last token of the vocabulary here.
        last = self._settings.architecture.vocab_size - 1
        return [(p, t if t < last else 0, None) for p, t in zip([None, *known], targets, strict=True)]
