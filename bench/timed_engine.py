"""An engine with log-normal response lengths and a forward pass of known duration, inside the real server.

    python -m bench.timed_engine '{"median": 64, ...}' --model-path DIR --port N     (a Timing, and the engine's flags)

- Used by: `rollout_schedule`. Scheduler, slots, protocol, weight updates and aborts are those of the embedded engine.
- Invariant: a response that is cut and continued later, in another batch or on another engine, gets the length that it
  would have had without the cut.

The model is a chain over tokens. The first token of a response says how many tokens follow (drawn from the distribution
of lengths with the request's own sampling seed), each next token is smaller by one, and 0 ends the response: a response
of 4 tokens is 3, 2, 1, 0.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import ROOT
from slime.core.architecture import Architecture
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.model import Model
from slime.engine.embedded.server import main as serve
from slime.engine.server_process import ManagedProcess, find_free_port

PROMPT_WORDS = 16
CONTEXT = 1024


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Lengths in tokens, times in seconds."""

    median: float
    """exp(mu) of the log-normal distribution of lengths."""
    sigma: float
    cap: int
    """The longest response; longer ones are cut there."""
    step: float | None
    """Seconds of one decode step, for any batch size; None: the model really computes, for as long as it takes."""
    prefill_token: float = 0.0
    """Seconds of each prompt token that is not in the cache."""

    def length_probabilities(self) -> list[float]:
        """Return P(length = 1), P(length = 2), ..., P(length > cap)."""

        def below(length: int) -> float:
            if not length:
                return 0.0
            return 0.5 * (1 + math.erf(math.log(length / self.median) / (self.sigma * math.sqrt(2))))

        inner = [below(length) - below(length - 1) for length in range(1, self.cap + 1)]
        return [*inner, 1 - below(self.cap)]

    @property
    def mean_length(self) -> float:
        """Return the mean length of responses, where cut ones count as `cap`."""
        return sum(min(i + 1, self.cap) * p for i, p in enumerate(self.length_probabilities()))

    @property
    def vocabulary(self) -> int:
        """Tokens 0..cap say how many follow; after them come the words of prompts."""
        return self.cap + 1 + PROMPT_WORDS


class CountingModel(Model):
    """The forward pass of `Model`, or a sleep; the sampled token depends on the last token alone."""

    def __init__(self, architecture: Architecture, *, dtype: torch.dtype, timing: Timing) -> None:
        super().__init__(architecture, dtype=dtype)
        self._timing = timing
        size = timing.vocabulary
        self._next = torch.full((size, size), -torch.inf)
        follows = torch.arange(1, timing.cap + 1)
        self._next[follows, follows - 1] = 0.0
        first = torch.tensor(timing.length_probabilities()).log()
        self._next[0, : len(first)] = first  # (reached if a client ignores the end)
        self._next[timing.cap + 1 :, : len(first)] = first

    def prefill(self, prompts_P: list[list[int]], cache: KVCache, first_row: int) -> Tensor:
        if self._timing.step is None:
            super().prefill(prompts_P, cache, first_row)
        else:
            time.sleep(self._timing.prefill_token * sum(map(len, prompts_P)))
        width = max(map(len, prompts_P))
        return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts_P])[..., None]

    def decode(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
        if self._timing.step is None:
            super().decode(tokens_B, positions_B, cache)
        else:
            time.sleep(self._timing.step)
        return tokens_B[:, None]

    def logits(self, hidden_N: Tensor) -> Tensor:
        if self._timing.step is None:
            super().logits(torch.zeros(len(hidden_N), self.architecture.hidden_size, dtype=self.dtype))
        return self._next[hidden_N[:, 0]]


def make_model(directory: Path, timing: Timing, *, layers: int, hidden: int) -> Path:
    """Make an HF directory with a GLM-4 of this size, random weights, and a tokenizer for the chain's words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Glm4Config, Glm4ForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = [str(i) for i in range(timing.cap + 1)] + [f"w{i}" for i in range(PROMPT_WORDS)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="0", pad_token="w0")
    config = Glm4Config(
        vocab_size=timing.vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 32),
        num_key_value_heads=2,
        head_dim=min(32, hidden // 2),
        attention_bias=True,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=timing.cap + 1,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Glm4ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_prompts(path: Path, count: int, length: int) -> Path:
    """Return `count` different prompts of `length` tokens."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            words = " ".join(f"w{rng.randrange(PROMPT_WORDS)}" for _ in range(length))
            file.write(json.dumps({"prompt": words, "label": ""}) + "\n")
    return path


def launch_timed_engine(model: Path, timing: Timing, *, slots: int, log: Path) -> ManagedProcess:
    """Start an engine with room for `slots` requests at a time; `wait_ready` waits for it."""
    port = find_free_port()
    command = [sys.executable, "-m", "bench.timed_engine", json.dumps(asdict(timing)), "--model-path", str(model)]
    command += ["--port", str(port), "--max-running-requests", str(slots), "--random-seed", str(port)]
    return ManagedProcess(
        f"engine {port}",
        [*command, "--max-total-tokens", str(slots * CONTEXT)],
        url=f"http://127.0.0.1:{port}",
        log_path=log,
        environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


def main(argv: Sequence[str]) -> int:
    given: dict[str, Any] = json.loads(argv[0])
    return serve(argv[1:], make_model=partial(CountingModel, timing=Timing(**given)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
