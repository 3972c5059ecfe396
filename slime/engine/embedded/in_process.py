"""The embedded engine without its HTTP server, for programs that hold trainer and engine in one process.

- Used by: examples/minimal/grpo.py, and benchmarks that need the engine alone.
- Invariant: only the scheduler's thread uses the model, so weights never change during a forward pass.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slime.core.architecture import Architecture
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.model import Model
from slime.engine.embedded.request import Request
from slime.engine.embedded.scheduler import Scheduler
from slime.engine.embedded.weights import EngineWeights
from slime.engine.protocol import SamplingParams


class InProcessEngine:
    """Continuous batching in a thread of its own.

    Args:
        rows: the largest number of requests that run at once; further ones wait.
        context: the largest number of tokens of a request, prompt and response.
        stop_token_ids: tokens that end a response.
    """

    def __init__(
        self, architecture: Architecture, *, rows: int, context: int, stop_token_ids: Sequence[int] = ()
    ) -> None:
        model = Model(architecture)
        cache = KVCache(architecture, dtype=torch.float32, rows=rows, tokens=rows * context)
        self._done: queue.SimpleQueue[list[Request] | BaseException] = queue.SimpleQueue()
        self._scheduler = Scheduler(model, cache, on_finished=self._done.put, on_failure=self._done.put)
        self._weights = EngineWeights(model, self._scheduler, sessions=False)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._scheduler.start()

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy a whole set of weights, by Hugging Face names.

        Raises:
            ValueError: a tensor is missing, unknown, or has another shape.
        """
        names, tensors = list(weights), list(weights.values())
        self._scheduler.call(
            lambda: self._weights.write_bucket(names, tensors, version=str(version), flush=True)
        ).result()

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seed: int) -> list[Request]:
        """Answer each prompt, and return its request with `output_ids`, their `log_probs` and `finish_reason`.

        The seed of prompt i is `seed` + i, so a batch with other seeds is another draw.

        Raises:
            RuntimeError: a forward pass failed, or gave numbers that are not finite.
        """
        requests = [
            Request(str(i), list(prompt), params, seed + i, stop_token_ids=self._stop_token_ids)
            for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            self._scheduler.submit(request)
        left = len(requests)
        while left:
            done = self._done.get()
            if isinstance(done, BaseException):
                raise RuntimeError("the engine's forward failed") from done
            left -= len(done)
        for request in requests:
            if request.error is not None:
                raise RuntimeError(request.error)
        return requests

    def close(self) -> None:
        """End the thread."""
        self._scheduler.stop()
