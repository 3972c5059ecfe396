"""Reward functions and hooks that tests name by dotted path; each does to one sample what its label names.

Every reward worker of these tests loads this file, so it imports little; `rollout_hooks_for_tests` has hooks that
import more.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np

from slime.config.args import Args
from slime.core.sample import Sample, Status


def by_label(args, sample):
    match sample.label:
        case "hang":
            time.sleep(1000)
        case "exit":
            os._exit(3)
        case "raise":
            raise KeyError("no such thing")
        case "segfault":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            return float("nan")
        case "inf":
            return -np.inf
        case "text":
            return "1.0"
        case "none":
            return None
        case "dict":
            return {"right": 1.0, "short": np.float32(0.5)}
        case "empty dict":
            return {}
        case "bool":
            return True
        case "print":
            print("a reward function may print")
            return 0.25
    return float(sample.label)


def leaves_a_sleeper(args, sample):
    """Leave a process that sleeps for as many seconds as the label gives, as a daemon with an empty environment."""
    if sample.label == "hang":
        time.sleep(1000)
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve(shutil.which("sleep"), ["sleep", sample.label], {})
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.1)
    return 1.0


_kept = []


def leaks(args, sample):
    """Keep as many MB as the label gives (with `grow`, more and more in one call); the reward is the process's id."""
    if sample.label == "grow":
        while True:
            _kept.append(bytearray(os.urandom(1000) * 10_000))
            time.sleep(0.01)
    _kept.append(bytearray(os.urandom(1000) * 1000 * int(sample.label)))
    time.sleep(0.1)
    return os.getpid()


async def by_label_async(args, sample):
    if sample.label == "hang":
        await asyncio.sleep(1000)
    return by_label(args, sample)


async def misbehaves(args, sample):
    """Wait as many seconds as the label gives, or do what it names; the reward is 1 if this ends."""
    match sample.label:
        case "block":
            time.sleep(1000)
        case "regex":
            re.match(r"(a+)+$", "a" * 60 + "b")  # C code that never releases the interpreter
        case "swallow":
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(1000)
        case "exit":
            await asyncio.sleep(0.1)
            os._exit(3)
        case "sys.exit":
            await asyncio.sleep(0.1)
            sys.exit(3)
        case "cancelled":
            raise asyncio.CancelledError
        case "exit later":
            asyncio.get_running_loop().call_later(0.1, os._exit, 3)
            await asyncio.sleep(1000)
        case "exit and leave a child":
            if os.fork() == 0:
                time.sleep(60)
            os._exit(3)
        case "two waits":
            await asyncio.sleep(0.6)
            await asyncio.sleep(0.6)
        case "blocks for 0.9 s":
            await asyncio.sleep(0.1)
            time.sleep(0.9)
        case _:
            await asyncio.sleep(float(sample.label))
    return 1.0


_in_flight, _most = 0, 0
_barriers = {}


async def waits_for_others(args, sample):
    """Wait until as many calls as the label gives are in flight; return the most that have ever been."""
    global _in_flight, _most
    _in_flight += 1
    _most = max(_most, _in_flight)
    await _barriers.setdefault(sample.label, asyncio.Barrier(int(sample.label))).wait()
    _in_flight -= 1
    return float(_most)


def sleeps(args, sample):
    time.sleep(float(sample.label))
    return 1.0


def entries(args, sample):
    """Return a dict that is odd in the way that the label names."""
    reward = {"score": 1.0, "pred": "72", "length": 7}
    match sample.label:
        case "no score":
            del reward["score"]
        case "text score":
            reward["score"] = "1.0"
        case "odd":
            reward |= {
                "half": "a\ud800b",
                "nan": np.nan,
                "huge": 10**400,
                "array": np.arange(3),
                "object": object(),
                3: 4,
            }
        case "large":
            reward |= {f"key{number}": "x" * 100 for number in range(20_000)} | {"text": "x" * 10_000_000}
        case "breaks":
            raise ValueError("half of a pair: \ud800")
    return reward


async def entries_async(args, sample):
    return entries(args, sample)


def entries_of_group(args, samples):
    return [entries(args, sample) for sample in samples]


async def generate_and_judge(args, sample, sampling_params, context):
    """Judge each sample alone."""
    sample = generate_plain(args, sample, sampling_params, context)
    sample.reward = entries(args, sample)
    return sample


def group(args, samples, **kwargs):
    """Do to the whole group what the first label that is no number names."""
    match samples[0].label:
        case "rank":
            return [sample.index for sample in samples]
        case "array":
            return np.linspace(0, 1, len(samples))
        case "dicts":
            return [{"a": 1.0, "b": 0.5} for _ in samples]
        case "none":
            return [by_label(args, sample) for sample in samples]
        case "short":
            return [1.0] * (len(samples) - 1)
        case "number":
            return 1.0
    return [by_label(args, sample) for sample in samples]


async def group_async(args, samples):
    if samples[0].label == "hang":
        await asyncio.sleep(1000)
    return group(args, samples)


async def group_of_group(args, samples):
    """Return collections for the whole group, in order; group 0 gets one reward too few."""
    assert [sample.index for sample in samples] == sorted(sample.index for sample in samples)
    assert len({sample.group_index for sample in samples}) == 1
    assert all(sample.status in (Status.COMPLETED, Status.TRUNCATED) for sample in samples)
    rewards = [place / 10 + len(samples) for place in range(len(samples))]
    return rewards[1:] if samples[0].group_index == 0 else rewards


async def blocks_in_group_0(args, sample):
    """Block the event loop although it is written as async, so that nothing else can run at the same time."""
    if sample.group_index == 0:
        time.sleep(60)
    return float(sample.index % 2)


_loops = []


async def loops_seen(args, sample):
    """Return how many event loops this process has run rewards in: a session kept between calls is bound to one."""
    if asyncio.get_running_loop() not in _loops:
        _loops.append(asyncio.get_running_loop())
    return len(_loops)


async def process_id(args, sample):
    return os.getpid()


def pop_last(args, rollout_id, buffer, num_samples):
    taken = [group for group in buffer if group[0].metadata.get("seen") != rollout_id][-num_samples:]
    for group in taken:
        buffer.remove(group)
    return taken


def pop_nothing(args, rollout_id, buffer, num_samples):
    """Return groups that it leaves in the buffer."""
    return buffer[:num_samples]


def pop_too_many(args, rollout_id, buffer, num_samples):
    return buffer * 5


async def coin(args, sample):
    """Return 0 or 1 at random."""
    return random.Random(sample.index).randint(0, 1)


async def by_index(args, sample):
    """Return 0.5 for sample 0 of each group, and 1 for the others (with groups of two)."""
    return 0.5 if sample.index % 2 == 0 else 1.0


async def fails_on_odd(args, sample):
    return None if sample.index % 2 else 1.0


async def fails_in_group_0(args, sample):
    return None if sample.group_index == 0 else float(sample.index % 2)


def drop_all(args, samples, **kwargs):
    return SimpleNamespace(keep=False, reason="too easy")


def keep_every_third(args, samples, **kwargs):
    return samples[0].group_index % 3 == 0


def double_rewards(args, samples):
    return [2 * (sample.reward or 0.0) for sample in samples]


def threes(args, samples):
    return [3 for _ in samples]


def mask_first_half(args, samples):
    for sample in samples[: len(samples) // 2]:
        sample.loss_mask = [0] * sample.response_length


def generate_plain(args, sample, sampling_params, context):
    """Answer without an engine, with the seed as text."""
    sample.response = str(sampling_params.sampling_seed)
    tokens = context.tokenizer(sample.response)["input_ids"]
    sample.tokens = sample.tokens + tokens
    sample.response_length = len(tokens)
    sample.rollout_log_probs = [0.0] * len(tokens)
    sample.policy_versions = [0] * len(tokens)
    sample.status = Status.COMPLETED
    return sample


async def generate_nothing(args, sample, sampling_params, context):
    return None


async def generate_deaf(args, sample, sampling_params, context):
    """Ignore aborts for sample 4 and later."""
    if sample.index >= 4:
        await asyncio.sleep(1000)
    return generate_plain(args, sample, sampling_params, context)


async def generate_broken(args, sample, sampling_params, context):
    raise LookupError("a mistake in the user's code")


async def generate_anew(args, sample, sampling_params, context):
    """Return a new Sample, which does not know its place in the group."""
    return Sample(prompt=sample.prompt, tokens=[1, 2], prompt_length=1, response_length=1)


def talks(args: Args, sample: Sample) -> float:
    """Print in every way, and fail for odd samples."""
    print("printed", sample.index)
    logging.getLogger("mine").info("logged %d", sample.index)
    subprocess.run(["sh", "-c", f"echo from a child {sample.index}"], check=True)
    os.write(2, b"native without an end")
    return 1.0 if sample.index % 2 == 0 else {}["unit"]


async def talks_together(args: Args, sample: Sample) -> float:
    """Print while other calls are in flight."""
    print("begins", end=" ")
    await asyncio.sleep(0.01)
    print("ends")
    return 1.0 if sample.index % 2 == 0 else {}["unit"]
