from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from slime.config.architecture import hf_architecture, read_hf_config
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.model import Model
from slime.engine.embedded.scheduler import Request, Scheduler
from slime.engine.embedded.weights import EngineWeights
from slime.engine.protocol import SamplingParams

TOLERANCE = 1e-5


@dataclass
class Bench:
    """A scheduler that the test steps instead of its thread."""

    scheduler: Scheduler
    weights: EngineWeights
    finished: list[Request] = field(default_factory=list)

    def add(self, request: Request) -> Request:
        self.scheduler.submit(request)
        self.scheduler._take_commands()
        return request

    def step(self) -> None:
        with torch.inference_mode():
            self.scheduler.step()
            self.scheduler._deliver()

    def run(self) -> list[Request]:
        while self.scheduler.num_running or self.scheduler.num_waiting:
            self.step()
        return self.finished


def make_bench(path: Path, *, rows: int = 64, tokens: int = 64 * 512, dtype: torch.dtype = torch.float32) -> Bench:
    architecture = hf_architecture(read_hf_config(path))
    model = Model(architecture, dtype=dtype)
    cache = KVCache(architecture, dtype=dtype, rows=rows, tokens=tokens)
    finished: list[Request] = []
    scheduler = Scheduler(model, cache, on_finished=finished.extend, on_failure=lambda error: None)
    bench = Bench(scheduler, EngineWeights(model, scheduler), finished)
    bench.weights.load(path, version="0")
    return bench


def request(
    ids: list[int], *, seed: int = 0, start: int = -1, stop: frozenset[int] = frozenset(), **params: Any
) -> Request:
    return Request(
        rid=f"r{seed}",
        input_ids=ids,
        params=SamplingParams(**params),
        seed=seed,
        stop_token_ids=stop,
        logprob_start_len=start,
    )


def prompts(count: int, seed: int = 0, shortest: int = 3, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(tiny_models.VOCAB_SIZE) for _ in range(rng.randint(shortest, longest))] for _ in range(count)
    ]


def gap(hf: Any, done: Request) -> float:
    """Return the largest difference between the engine's log-probs of a response (and prompt, if asked) and HF's."""
    want = tiny_models.hf_log_probs(hf, done.ids, done.params.temperature)
    first = len(done.input_ids) - 1
    pairs = list(zip(want[first:], done.log_probs, strict=True))
    if done.logprob_start_len >= 0:
        raw = tiny_models.hf_log_probs(hf, done.input_ids, 1.0)  # SGLang's rule, whatever the temperature
        pairs += zip(raw[done.logprob_start_len :], done.input_log_probs, strict=True)
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("family", ["glm4", "qwen3", "qwen2", "llama3"])
def test_log_probs_equal_huggingface(family: str, model_dirs: dict[str, Path]) -> None:
    """Requests of three temperatures arrive while others run, with fewer rows than requests, and shared prompts."""
    bench = make_bench(model_dirs[family], rows=6, tokens=6 * 128)
    hf = tiny_models.hf_model(model_dirs[family])
    texts = prompts(8)
    rng = random.Random(1)
    for i in range(30):
        new = rng.randint(1, 40)
        temperature = (0.0, 0.8, 1.0)[i % 3]
        start = (-1, 0, 5)[i % 5 % 3]
        bench.add(request(texts[i // 4], seed=i, start=start, temperature=temperature, max_new_tokens=new))
        if i % 2:
            bench.step()
    done = bench.run()
    assert len(done) == 30
    assert all(len(r.output_ids) == r.params.max_new_tokens == len(r.log_probs) for r in done)
    assert sum(r.cached_tokens > 0 for r in done) > 3
    assert max(gap(hf, r) for r in done) <= TOLERANCE
    # Control: a small change of one weight is noticed.
    with torch.no_grad():
        hf.model.layers[2].self_attn.k_proj.weight[3] *= 1.001
    assert max(gap(hf, r) for r in done) > TOLERANCE


@pytest.mark.parametrize("family", ["glm4", "qwen3"])
def test_responses_do_not_depend_on_other_requests(family: str, model_dirs: dict[str, Path]) -> None:
    alone = make_bench(model_dirs[family])
    expected: dict[str, list[int]] = {}
    texts = prompts(6, seed=2)
    for i in range(12):
        done = alone.add(request(texts[i % 6], seed=i, max_new_tokens=10 + 2 * i))
        alone.run()
        expected[done.rid] = done.output_ids
    crowd = make_bench(model_dirs[family], rows=5, tokens=5 * 128)
    for i in range(12):
        crowd.add(request(texts[i % 6], seed=i, max_new_tokens=10 + 2 * i))
        if i % 3 == 0:
            crowd.step()
    assert {r.rid: r.output_ids for r in crowd.run()} == expected
    # Control: the responses of one prompt under different seeds differ.
    assert expected["r0"][:10] != expected["r6"][:10]


def test_a_prompt_sent_many_times_is_prefilled_once(model_dirs: dict[str, Path]) -> None:
    bench = make_bench(model_dirs["glm4"])
    forwards: list[int] = []
    prefill = bench.scheduler.model.prefill
    bench.scheduler.model.prefill = lambda p, *rest: (forwards.append(len(p)), prefill(p, *rest))[1]
    first, second = prompts(2, seed=3, shortest=20, longest=24)
    for i in range(8):
        bench.add(request(first if i < 5 else second, seed=i, max_new_tokens=6))
    bench.step()
    assert sum(forwards) == 2
    bench.add(request(first, seed=9, max_new_tokens=6))  # while the others run
    bench.step()
    assert sum(forwards) == 2
    hf = tiny_models.hf_model(model_dirs["glm4"])
    assert max(gap(hf, r) for r in bench.run()) <= TOLERANCE
    bench.add(request(first, seed=10, max_new_tokens=6))  # no running request is left to copy from
    bench.run()
    assert sum(forwards) == 3


def test_rows_grow_and_keep_their_content(model_dirs: dict[str, Path]) -> None:
    bench = make_bench(model_dirs["qwen3"], rows=4, tokens=4 * 128)
    hf = tiny_models.hf_model(model_dirs["qwen3"])
    for i in range(3):
        bench.add(request([1, 2, 3 + i], seed=i, max_new_tokens=30))
    bench.step()
    bench.add(request([4] * 40, seed=3, max_new_tokens=60))  # fits: rows of 128 for four
    bench.add(request([5] * 40, seed=4, max_new_tokens=200))  # waits until there are only two rows, of 256 positions
    bench.step()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (4, 1)
    done = bench.run()
    assert len(done) == 5
    assert max(gap(hf, r) for r in done) <= TOLERANCE


def test_a_request_ends_for_each_reason(model_dirs: dict[str, Path]) -> None:
    bench = make_bench(model_dirs["glm4"])
    free = bench.add(request([1, 2, 3], max_new_tokens=40))
    bench.run()
    assert free.finish_reason == {"type": "length", "length": 40}
    stop = free.output_ids[7]
    stopped = bench.add(request([1, 2, 3], max_new_tokens=40, stop=frozenset([stop])))
    bench.run()
    assert stopped.finish_reason == {"type": "stop", "matched": stop}
    assert stopped.output_ids == free.output_ids[: free.output_ids.index(stop) + 1]
    # SGLang's order: a pending abort, the length, stop texts, stop tokens.
    count = len(stopped.output_ids)
    full = bench.add(request([1, 2, 3], max_new_tokens=count, stop=frozenset([stop])))
    both = bench.add(request([1, 2, 3], max_new_tokens=count, stop=frozenset([stop])))
    text = bench.add(request([1, 2, 3], max_new_tokens=40, stop=frozenset([stop])))
    text.stop_check = lambda ids: "text" if len(ids) == count else None
    while len(both.output_ids) < count - 1:
        bench.step()
    bench.scheduler.abort(lambda r: r is both)
    bench.run()
    assert full.finish_reason == {"type": "length", "length": count}
    assert (both.finish_reason or {})["type"] == "abort"
    assert text.finish_reason == {"type": "stop", "matched": "text"}
    assert full.output_ids == both.output_ids == text.output_ids == stopped.output_ids
    nothing = bench.add(request([1, 2, 3], max_new_tokens=0, start=0))
    bench.run()
    assert nothing.output_ids == nothing.log_probs == []
    assert nothing.finish_reason == {"type": "length", "length": 0}
    assert len(nothing.input_log_probs) == 2


def test_an_abort_keeps_the_tokens(model_dirs: dict[str, Path]) -> None:
    bench = make_bench(model_dirs["glm4"], rows=3)
    hf = tiny_models.hf_model(model_dirs["glm4"])
    for i, text in enumerate(prompts(5, seed=4)):
        bench.add(request(text, seed=i, max_new_tokens=50))
    for _ in range(10):
        bench.step()
    assert bench.scheduler.abort(lambda r: r.rid == "r0") == 1
    assert bench.scheduler.abort(lambda r: r.rid == "r0") == 0, "it has been aborted already"
    assert not bench.finished, "it ends with the token of the next step"
    bench.step()
    bench.step()
    assert bench.scheduler.abort(lambda _: True) == 4
    bench.step()
    done = {r.rid: r for r in bench.finished}
    assert [len(done[f"r{i}"].output_ids) for i in range(5)] == [12, 14, 14, 3, 0]
    messages = [(r.finish_reason or {})["message"] for _, r in sorted(done.items())]
    assert messages == ["Aborted"] * 4 + ["Abort in waiting queue"]
    assert all(r.finish_reason is not None and r.finish_reason["type"] == "abort" for r in done.values())
    assert max(gap(hf, r) for r in done.values() if r.output_ids) <= TOLERANCE


def test_retracted_requests_continue_with_their_tokens(model_dirs: dict[str, Path]) -> None:
    texts = prompts(4, seed=5)
    expected: list[list[int]] = []
    for interrupted in (False, True):
        bench = make_bench(model_dirs["glm4"])
        for i, text in enumerate(texts):
            bench.add(request(text, seed=i, max_new_tokens=30))
        for _ in range(12):
            bench.step()
        if interrupted:
            bench.scheduler.retract()
            assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (0, 4)
            bench.scheduler.cache.clear()
        outputs = [r.output_ids for r in sorted(bench.run(), key=lambda r: r.rid)]
        expected = expected or outputs
        assert outputs == expected


@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_events_changes_a_response(seed: int, model_dirs: dict[str, Path]) -> None:
    """Requests arrive, are aborted, retracted and flushed at random, with too few rows."""
    rng = random.Random(seed)
    texts = prompts(5, seed=seed, longest=30)
    lengths = [rng.choice((0, 1, 2, 7, 30, 90)) for _ in range(40)]
    alone = make_bench(model_dirs["glm4"])
    expected: list[list[int]] = []
    for i, length in enumerate(lengths):
        expected.append(alone.add(request(texts[i % 5], seed=i, max_new_tokens=length)).output_ids)
        alone.run()
    bench = make_bench(model_dirs["glm4"], rows=7, tokens=7 * 64)
    scheduler, aborted = bench.scheduler, 0
    for i, length in enumerate(lengths):
        bench.add(request(texts[i % 5], seed=i, max_new_tokens=length, start=rng.choice((-1, -1, 0))))
        for _ in range(rng.choice((0, 0, 1, 4))):
            bench.step()
        with torch.inference_mode():
            if rng.random() < 0.2:
                victim = f"r{rng.randrange(i + 1)}"
                aborted += scheduler.abort(lambda r, victim=victim: r.rid == victim)
            if rng.random() < 0.1:
                scheduler.retract()
                scheduler.cache.clear()
    done = {int(r.rid[1:]): r for r in bench.run()}
    assert len(done) == 40
    assert aborted == sum(r.finish_reason is not None and r.finish_reason["type"] == "abort" for r in done.values())
    for i, r in done.items():
        whole = r.finish_reason is not None and r.finish_reason["type"] == "length"
        assert r.output_ids == (expected[i] if whole else expected[i][: len(r.output_ids)])
        if r.logprob_start_len == 0 and whole:
            assert len(r.input_log_probs) == len(r.input_ids) - 1


def test_weights_under_running_requests(model_dirs: dict[str, Path]) -> None:
    """With a flush the new weights make the cache again; without it, the old cache is used on."""
    new_hf = tiny_models.hf_model(model_dirs["glm4-b"])
    gaps: dict[bool, float] = {}
    for flush in (True, False):
        bench = make_bench(model_dirs["glm4"])
        running = bench.add(request([1, 2, 3, 4, 5, 6], max_new_tokens=20))
        for _ in range(9):
            bench.step()
        bench.weights.load(model_dirs["glm4-b"], version="1", flush=flush)
        bench.run()
        assert running.weight_version == "1"
        want = tiny_models.hf_log_probs(new_hf, running.ids, 1.0)[5:]
        gaps[flush] = max(abs(a - b) for a, b in zip(want[11:], running.log_probs[11:], strict=True))
    assert gaps[True] <= TOLERANCE
    assert gaps[False] > TOLERANCE


def test_nan_logits_fail_only_the_request(model_dirs: dict[str, Path]) -> None:
    bench = make_bench(model_dirs["glm4"])
    bench.scheduler.model.final_norm.fill_(float("nan"))
    broken = bench.add(request([1, 2], max_new_tokens=3))
    bench.run()
    assert broken.error is not None
    assert "not finite" in broken.error
    bench.weights.load(model_dirs["glm4"], version="2")
    well = bench.add(request([1, 2], max_new_tokens=3))
    bench.run()
    assert (well.error, len(well.output_ids)) == (None, 3)


def test_bf16_error_is_as_small_as_huggingfaces(model_dirs: dict[str, Path]) -> None:
    path = model_dirs["glm4-bf16"]
    bench = make_bench(path, dtype=torch.bfloat16)
    for i, text in enumerate(prompts(6, seed=6)):
        bench.add(request(text, seed=i, max_new_tokens=40))
    done = bench.run()
    half, single = tiny_models.hf_model(path), tiny_models.hf_model(path).float()
    ours, theirs = [], []
    for r in done:
        want = tiny_models.hf_log_probs(single, r.ids, 1.0)[len(r.input_ids) - 1 :]
        rounded = tiny_models.hf_log_probs(half, r.ids, 1.0)[len(r.input_ids) - 1 :]
        ours += [abs(a - b) for a, b in zip(want, r.log_probs, strict=True)]
        theirs += [abs(a - b) for a, b in zip(want, rounded, strict=True)]
    assert 0 < sum(ours) < 1.5 * sum(theirs)


def test_a_cancelled_command_does_no_harm(model_dirs: dict[str, Path]) -> None:
    scheduler = make_bench(model_dirs["glm4"]).scheduler
    gone, wrong, right = scheduler.call(lambda: 1), scheduler.call(lambda: 1 // 0), scheduler.call(lambda: 2)
    gone.cancel()
    scheduler._take_commands()
    assert right.result(timeout=0) == 2
    with pytest.raises(ZeroDivisionError):
        wrong.result(timeout=0)
