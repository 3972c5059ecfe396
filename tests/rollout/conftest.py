"""A tokenizer of one token a character with GLM-4's special tokens, and engines that serve a random GLM-4 with it."""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.engine.client import EngineClient
from slime.engine.launch import launch_router
from slime.engine.membership import register_worker
from slime.engine.server_process import ManagedProcess, find_free_port
from slime.rollout.context import RolloutContext
from slime.rollout.reward_pool.pool import RewardPool
from tests.forked_engine import ForkedEngine

SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if tools %}tools:{{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    characters = sorted(set(string.printable[:95]) | {"\n"})
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *characters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|user|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


@pytest.fixture
def data_file(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes rows (dicts, or raw lines) as jsonl and returns the path."""

    def write(rows: Sequence[dict[str, Any] | str], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random GLM-4 that speaks the tokenizer above; each token ends a response with a chance of about 1 in 100."""
    import torch
    from transformers import Glm4Config, Glm4ForCausalLM

    torch.manual_seed(0)
    config = Glm4Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    path = tmp_path_factory.mktemp("model")
    Glm4ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def router_url(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start two embedded engines and register them with a real router."""
    logs = tmp_path_factory.mktemp("logs")
    args = Args(rollout_engine="embedded", hf_checkpoint=str(model_dir))
    router = launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=logs / "router.log")
    started: list[ManagedProcess | ForkedEngine] = [router]
    try:
        for index in range(2):
            seed = ("--random-seed", str(index))
            started.append(ForkedEngine(model_dir, *seed, log_path=logs / f"engine{index}.log"))
        for process in started:
            process.wait_ready(120)
        for engine in started[1:]:
            register_worker(router.url, engine.url)
        yield router.url
    finally:
        for process in reversed(started):
            process.stop()


@pytest.fixture
def run_with_engines(router_url: str, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Return a function that runs `async work(context)` with a context for `args`, and closes everything afterwards."""

    def run(args: Args, work: Callable[[RolloutContext], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with EngineClient(router_url, request_timeout=60) as client:
                rewards = RewardPool(args)
                try:
                    return await work(RolloutContext(args, client, tokenizer, rewards))
                finally:
                    rewards.close()

        return asyncio.run(main())

    return run
