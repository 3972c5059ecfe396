"""External engines (`--rollout-external-engines`), which run already: check them at the start, free them at the end.

- Called by: the driver checks them before anything starts. The rollout manager frees them before and after its run.
- Invariant: a run begins only with engines that serve its model and do nothing else, and it stops none of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from slime.config.args import Args
from slime.config.context import SPARE_OF_INPUTS, engine_limits, rollout_limits
from slime.engine.client import EngineClient, EngineError
from slime.engine.engine_info import EngineInfo
from slime.engine.keys import Keys
from slime.engine.protocol import WEIGHT_GROUP

POLL_S = 0.2
STEP_TIMEOUT_S = 3.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundEngines:
    """The answers of the engines, in the order of --rollout-external-engines."""

    urls: tuple[str, ...] = ()
    num_ranks: tuple[int, ...] = ()
    """The number of members that each brings into a weight group."""
    warnings: tuple[str, ...] = ()


async def find_engines(args: Args, *, say: Callable[[str], None]) -> FoundEngines:
    """Wait for all engines of --rollout-external-engines, with a message through `say`, then read what each serves.

    Nothing is found, and nothing is waited for, if the run uses no such engine.

    Raises:
        EngineError: an engine did not answer within --engine-start-timeout, or is no engine.
        ValueError: an engine serves another model.
    """
    urls = args.rollout_external_engines
    if not urls or args.debug_train_only:
        return FoundEngines()
    async with EngineClient("", engines=urls, keys=Keys.of(args)) as client:
        await asyncio.gather(*(_wait_for(client, url, args.engine_start_timeout, say) for url in urls))
        infos = await client.describe()
    for url, info in zip(urls, infos, strict=True):
        check_model(args, url, info)
    return FoundEngines(
        urls=urls,
        num_ranks=tuple(info.num_ranks for info in infos),
        warnings=tuple(text for url, info in zip(urls, infos, strict=True) for text in _doubts(args, url, info)),
    )


async def _wait_for(client: EngineClient, url: str, timeout: float, say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + timeout
    if await client.is_healthy(url):
        return
    say(f"waiting for the engine {url}, up to {timeout:g} s (--engine-start-timeout)")
    while not await client.is_healthy(url):
        if time.monotonic() > deadline:
            raise EngineError(
                url,
                0,
                f"not healthy within --engine-start-timeout {timeout:g} s; start the engine there, or correct "
                "--rollout-external-engines",
            )
        await asyncio.sleep(POLL_S)


def check_model(args: Args, url: str, info: EngineInfo) -> None:
    """Raise ValueError if the engine's model differs in shape from the trained one, or has no complete weights."""
    if args.debug_rollout_only and not info.weights_complete:
        raise ValueError(
            f"--rollout-external-engines {url}: it waits for the rest of a set of weights, and --debug-rollout-only "
            "sends none; restart it"
        )
    if args.deterministic and not info.deterministic:
        raise ValueError(
            f"--rollout-external-engines {url}: with --deterministic, but its answers depend on the requests that it "
            "has at the same time; start it with --enable-deterministic-inference"
        )
    if args.use_routing_replay and not info.returns_routed_experts:
        raise ValueError(
            f"--rollout-external-engines {url}: with --use-routing-replay, it does not return the experts of tokens; "
            "start it with --enable-return-routed-experts"
        )
    arch = args.architecture
    if arch is None:
        return
    ours: Mapping[str, Any] = {name: value for name, value in asdict(arch).items() if name not in _OF_THE_CONTEXT}
    named = {} if info.model_type is None else {"family": info.model_type}
    theirs = named if info.architecture is None else info.architecture
    differ = [
        f"{name} {theirs[name]} there and {value} here"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    ]
    if differ:
        raise ValueError(
            f"--rollout-external-engines {url}: it serves another model ({info.model_path}) than the one that is "
            f"trained (--hf-checkpoint {args.hf_checkpoint}): {', '.join(differ)}; start it with the same model"
        )


_OF_THE_CONTEXT = ("max_position_embeddings",)


def _doubts(args: Args, url: str, info: EngineInfo) -> Iterable[str]:
    """Yield warnings about settings that may be intended, or may be a mistake."""
    if args.debug_rollout_only and info.weight_version not in ("0", "default"):
        yield (
            f"--rollout-external-engines {url}: it holds weights of version {info.weight_version}, which another run "
            "has sent, and --debug-rollout-only sends none: restart it to generate with --hf-checkpoint"
        )
    dtype = "bfloat16" if args.bf16 else "float32"
    if info.dtype not in (None, dtype):
        yield (
            f"--rollout-external-engines {url}: it computes in {info.dtype}, the trainer in {dtype}: their log-probs "
            "will differ slightly"
        )
    if info.context_length is not None:
        asked, taken = rollout_limits(args), engine_limits(info.context_length)
        pairs = ((asked.sequence, taken.sequence), (asked.request, taken.request))
        if any(ours is not None and theirs is not None and ours > theirs for ours, theirs in pairs):
            yield (
                f"--rollout-external-engines {url}: its context is {info.context_length} tokens, and prompt with "
                f"response may have {asked.sequence}: it will refuse longer ones; "
                f"set --rollout-max-context-len {info.context_length - SPARE_OF_INPUTS}"
            )


async def free_engines(client: EngineClient, groups: Sequence[str] = (WEIGHT_GROUP,)) -> None:
    """Bring the client's engines back to the state after their start.

    Then nothing is in flight, no weight-update session is open, they are not paused, and they are in none of the weight
    `groups`.
    This runs at the start, to clear what a killed run left, and at the end, for the next user. A dead engine is logged.
    """
    steps = (
        client.abort_all,
        client.update_sessions.end_left_open,  # an engine that is not paused ends a session only when it is idle
        client.continue_,
        *(partial(client.forget_weights_update_group, group) for group in groups),
    )
    for step in steps:
        try:
            await asyncio.wait_for(step(), STEP_TIMEOUT_S)
        except (EngineError, TimeoutError) as error:
            logger.warning("freeing the engines: %r", error)
