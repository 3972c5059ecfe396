"""A run on external engines and router: it trains them, and leaves everything but the weights as it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from slime.engine.client import EngineClient
from slime.engine.keys import Keys
from slime.engine.membership import register_worker
from slime.engine.protocol import GenerateRequest, SamplingParams
from slime.engine.server_process import ask
from tests.cluster.runs import Task, events, flags, train, without
from tests.sync.served import serving

pytestmark = [pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]


def test_a_run_on_external_engines_and_router(task: Task, tmp_path: Path) -> None:
    """Weights go by disk. One engine is registered with the router before the run, and stays after it."""
    save = tmp_path / "run"
    keys = Keys(control="known-to-its-owner")
    given = f"me:Me:admin:{keys.control}"
    served = serving(task.other_model, tmp_path / "logs", engines=2, control_plane_api_keys=[given])
    with served as (first, second, router):
        register_worker(router.url, first.url, keys=keys)
        port = router.url.rpartition(":")[2]
        extra = ["--rollout-external-engines", first.url, second.url, "--update-weight-transport", "disk"]
        extra += ["--sglang-router-ip", "127.0.0.1", "--sglang-router-port", port, "--num-rollout", "2"]
        extra += ["--actor-num-gpus-per-node", "1"]
        extra += ["--router-control-plane-api-keys", given]
        extra += ["--update-weight-buffer-size", "200000", "--save-hf", str(save / "hf")]
        output = train(without(flags(task, save, *extra), "--rollout-num-gpus"), tmp_path / "log.txt")
        assert "runs already" in output
        assert "requires no key" not in output

        gaps = events(save, "train/logprob_gap_max")
        assert sorted(gaps) == [1, 2]
        assert max(gaps.values()) <= 1e-4, gaps
        assert min(events(save, "sync/write_gb_per_s").values()) > 0
        assert not (save / "engine-weights").exists()

        async def ask_engines() -> tuple[list[str], list[str], list[str]]:
            async with EngineClient(router.url, engines=[first.url, second.url]) as client:
                versions, trained = await client.weight_versions(), await client.weights_checksum()
                await client.reset_weights()
                await client.update_weights_from_disk(str(save / "hf"), "export")
                return versions, trained, await client.weights_checksum()

        async def generate(url: str) -> int:
            async with EngineClient(url) as client:
                params = SamplingParams(max_new_tokens=3, ignore_eos=True)
                return len(
                    (await client.generate(GenerateRequest(input_ids=[5, 6], sampling_params=params))).output_ids
                )

        versions, trained, exported = asyncio.run(ask_engines())
        assert versions == ["3", "3"], "one before the first rollout, and one after each"
        assert trained == exported, "they hold the weights that the run has exported"
        assert [asyncio.run(generate(url)) for url in (first.url, second.url, router.url)] == [3, 3, 3]
        listed = [worker["url"] for worker in ask(router.url, "GET", api_key=keys.control)[1]["workers"]]
        assert listed == [first.url], "the run's own entries are gone, and others stay"
