"""The bytes of Ray's object store that a rollout takes on its way to the trainers.

- Used by: the start of a run, which sizes a local Ray's store and warns if a store is too small, and the plan.
- Invariant: the estimate is an upper bound for the built-in columns: responses of full length, prompts of any length
  that the context permits.

Beyond its store Ray writes objects to disk, which takes seconds a rollout.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.config.context import context_length, longest_prompt

LEAST = 2**30
"""The size of a local store that holds every small rollout."""
ROOM = 1.25
"""The store's size over the bytes of its objects, for Ray's own alignment and the evaluation sets."""
TOKEN_BYTES, RESPONSE_BYTES = 4, 1 + 4 + 2
"""A token takes its id; a response token also mask, log-prob and policy version (see `core.rank_batch`)."""
ROW_BYTES = 64
"""Lengths, reward and numbers of a row, which every data-parallel rank gets of every row."""


def rollout_bytes(args: Args) -> int:
    """Return the most bytes that the rollouts in the store take: one, and with train_async.py the next one, too."""
    samples = args.rollout_batch_size * args.resolved.n_samples_per_prompt
    context, prompt, response = context_length(args), longest_prompt(args), args.rollout_max_response_len
    ends = [context, None if prompt is None else prompt + response]
    longest = min((length for length in ends if length is not None), default=2 * response)
    row = longest * (TOKEN_BYTES + _route_bytes(args)) + min(response, longest) * RESPONSE_BYTES
    return samples * (row + ROW_BYTES * args.data_parallel_size) * (1 + args.rollouts_ahead)


def _route_bytes(args: Args) -> int:
    """Return the bytes of a token's experts under --use-routing-replay."""
    arch = args.architecture
    if not args.use_routing_replay or arch is None:
        return 0
    return arch.num_moe_layers * arch.moe_router_topk * (1 if arch.num_experts <= 128 else 2)


def local_store(args: Args, free: int) -> int:
    """Return the size for the store of a local Ray, whose shared memory has `free` bytes."""
    return max(LEAST, min(int(ROOM * rollout_bytes(args)), int(0.9 * free)))


def shortage(args: Args, store: int) -> str | None:
    """Return a warning if a rollout may be larger than a store of this many bytes; None if it fits."""
    need = int(ROOM * rollout_bytes(args))
    if args.debug_rollout_only or need <= store:
        return None
    return (
        f"Ray's object store has {store / 2**30:.1f} GiB, and a rollout of full length takes up to "
        f"{need / 2**30:.1f} GiB: Ray writes the rest to disk, which takes seconds a rollout; give the machine more "
        "shared memory (/dev/shm), start Ray with a larger --object-store-memory, or make rollouts smaller "
        "(--rollout-batch-size)"
    )
