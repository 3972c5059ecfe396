"""cache_aware on a real router: a prompt's samples reach one engine, and a shared beginning does not gather prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from recording_engine import recording_engine

from slime.config.args import Args
from slime.config.router_policy import router_policy, with_router_policy
from slime.engine.launch import launch_router
from slime.engine.membership import register_worker
from slime.engine.server_process import ask, find_free_port

SAMPLES, ENGINES = 4, 3
SHARED = list(range(1000, 1060))
"""The beginning of every prompt, 60 % of it."""
PROMPTS = [SHARED + [100 * number + place for place in range(40)] for number in range(20, 26)]


def engines_of_prompts(settings: Mapping[str, Any], log: Path) -> list[set[int]]:
    """Send every prompt SAMPLES times, all in flight at once; return for each of them the engines that it reached."""
    answers = threading.Event()
    with ExitStack() as stack:
        router = launch_router(Args(router=settings), host="127.0.0.1", port=find_free_port(), log_path=log)
        stack.callback(router.stop)
        engines = [stack.enter_context(recording_engine(answers)) for _ in range(ENGINES)]
        router.wait_ready(60)
        for engine in engines:
            register_worker(router.url, engine.url)
        pool = stack.enter_context(ThreadPoolExecutor(SAMPLES * len(PROMPTS)))
        stack.callback(answers.set)
        asked: list[Future[int]] = []
        for prompt in [prompt for prompt in PROMPTS for _ in range(SAMPLES)]:
            body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}}
            asked.append(pool.submit(lambda body=body: ask(router.url, "POST", body, path="/generate")[0]))
            while sum(len(engine.prompts) for engine in engines) < len(asked) and not asked[-1].done():
                time.sleep(0.001)
        answers.set()
        assert [each.result() for each in asked] == [200] * len(asked)
        return [{place for place, engine in enumerate(engines) if prompt in engine.prompts} for prompt in PROMPTS]


def test_samples_of_a_prompt_reach_one_engine(tmp_path: Path) -> None:
    args = Args(
        rollout_engine="sglang",
        rollout_num_gpus=ENGINES,
        rollout_num_gpus_per_engine=1,
        n_samples_per_prompt=SAMPLES,
        rollout_max_response_len=64,
    )
    policy = router_policy(args, len(PROMPTS[0]))
    found = engines_of_prompts(with_router_policy(args, policy).router, tmp_path / "router.log")
    assert [len(engines) for engines in found] == [1] * len(PROMPTS)
    assert set.union(*found) == set(range(ENGINES))


@pytest.mark.parametrize(("policy", "number"), [("round_robin", ENGINES), ("cache_aware", 1)])
def test_other_settings_spread_or_gather_prompts(policy: str, number: int, tmp_path: Path) -> None:
    """Round robin sends a prompt to all engines, and cache_aware as the router sets it sends all prompts to one."""
    found = engines_of_prompts({"policy": policy}, tmp_path / "router.log")
    assert len(set.union(*found)) == number
    assert [len(engines) for engines in found] == [number] * len(PROMPTS)
