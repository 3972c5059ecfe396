"""Trainer and SGLang on one GPU: they take turns holding memory, weights go by CUDA IPC, speeds are next to a copy's.

Whole runs are train.py's, as a user starts them, and their figures are read from metrics.jsonl.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slime.engine.client import EngineClient
from slime.engine.launch import launch_engine
from slime.engine.server_process import ManagedProcess, find_free_port
from slime.engine.sleep import FOR_GENERATION, FOR_WEIGHTS, put_to_sleep
from slime.observability.phases import MEASURED, PHASES
from tests.gpu.checks import Report, check
from tests.gpu.learn import TINY_ENGINE
from tests.gpu.rollout_speed import made_up
from tests.gpu.runs import PLAIN_ENGINE, ROOT, kept_directory, run, scratch, series, train
from tests.gpu.sync import DEFAULT_MIB, LOOPBACK, MIB, engine_args, generated, median_seconds, model_4b
from tests.gpu.trainer_speed import args_of, batch_of, trainer_of

DEFAULT_SYNC_SECONDS = 0.035
"""The most seconds in buckets of the default size."""
LARGEST_SYNC_SECONDS = 0.5
LARGEST_GAP = 0.01
GROWTH_GB = 0.5
"""The growth of memory that is allowed between the second and the last step, for what an allocator keeps."""


@check(gpus=1, minutes=5)
def tiny_run(report: Report) -> None:
    """Run three rollouts of a tiny GLM-4, including the proof of the first weight sync."""
    log_dir = kept_directory(report, "run")
    with scratch() as directory:
        run(["examples/arithmetic/make_task.py", "--out", str(directory), "--seed", "1"])
        model = str(directory / "model")
        words = ["--hf-checkpoint", model, "--ref-load", model, "--prompt-data", str(directory / "train.jsonl")]
        words += ["--input-key", "prompt", "--label-key", "label", "--apply-chat-template", "--rm-type", "random"]
        words += ["--num-rollout", "3", "--rollout-batch-size", "8", "--n-samples-per-prompt", "8"]
        words += ["--rollout-max-response-len", "64", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096"]
        words += ["--lr", "1e-4", "--use-kl-loss", "--kl-loss-coef", "0.01", "--eval-interval", "2"]
        words += ["--eval-prompt-data", f"{directory / 'eval.jsonl'}@[0:16]", "--save", str(directory / "save")]
        words += ["--bf16", "--colocate", "--actor-num-gpus-per-node", "1", "--check-weight-sync", *TINY_ENGINE]
        events = train(words, log_dir)
    gaps = series(events, "train/logprob_gap_mean")
    report.row("rollouts; the weights' proof has passed", len(gaps), 3, len(gaps) == 3)
    report.row("largest mean |train - rollout log-prob|", max(gaps), f"<= {LARGEST_GAP:g}", max(gaps) <= LARGEST_GAP)
    phase_rows(report, events)


def phase_rows(report: Report, events: Sequence[dict[str, Any]]) -> None:
    """Report each phase's median seconds and peak memory."""
    for phase in (*PHASES, "idle", "step"):
        seconds = series(events, f"time/{phase}")
        if any(seconds):
            report.row(f"{phase}: seconds, median", statistics.median(seconds), f"steps: {shown(seconds)}")
    for phase in MEASURED:
        for kind in ("peak", "reserved", "device"):
            sizes = series(events, f"memory/{phase}_{kind}_gb")
            if sizes:
                report.row(f"{phase}: GB at most, {kind}", max(sizes), f"steps: {shown(sizes)}")
    syncs = series(events, "sync/seconds")
    report.row("weight sync itself: seconds, median", statistics.median(syncs), f"steps: {shown(syncs)}")


def shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


# ---- true size, whole runs


@check(gpus=1, minutes=9)
def ten_steps(report: Report) -> None:
    """Take 10 steps of 32 prompts x 8 samples x 512 new tokens with a random Qwen3-0.6B: memory does not grow."""
    events = qwen3_run(report, steps=10, prompts=32, new_tokens=512)
    most: dict[str, float] = {}
    for phase in MEASURED[:3]:
        sizes = series(events, f"memory/{phase}_device_gb")
        most[phase] = max(sizes)
        growth = sizes[-1] - sizes[1]
        report.row(f"{phase}: GB more in the last step than in the second", growth, GROWTH_GB, growth <= GROWTH_GB)
    sync, least = most.pop("weight_sync"), min(most.values())
    report.row("weight sync: GB of the GPU, two models' weights and no more", sync, f"< {least:.3g}", sync < least)


@check(gpus=1, minutes=7)
def one_large_step(report: Report) -> None:
    """Take a step of 128 prompts x 8 samples x 1,024 new tokens with a random Qwen3-0.6B."""
    qwen3_run(report, steps=1, prompts=128, new_tokens=1024)


def qwen3_run(report: Report, *, steps: int, prompts: int, new_tokens: int) -> list[dict[str, Any]]:
    log_dir = kept_directory(report, "run")
    with scratch() as directory:
        script = "scripts/models/qwen3-0.6B.sh"
        run(["tools/make_random_checkpoint.py", "--from-args", script, "--out", str(directory / "hf")])
        never_ends(directory / "hf")
        rng = random.Random(1)
        lines = [json.dumps({"prompt": made_up(rng), "label": "0"}) + "\n" for _ in range(prompts * steps)]
        (directory / "prompts.jsonl").write_text("".join(lines))
        hf = str(directory / "hf")
        words = ["--hf-checkpoint", hf, "--ref-load", hf, "--prompt-data", str(directory / "prompts.jsonl")]
        words += ["--input-key", "prompt", "--label-key", "label", "--rm-type", "random", "--bf16", "--colocate"]
        words += ["--num-rollout", str(steps), "--rollout-batch-size", str(prompts), "--n-samples-per-prompt", "8"]
        words += ["--rollout-max-response-len", str(new_tokens), "--actor-num-gpus-per-node", "1"]
        words += ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "16384", *PLAIN_ENGINE]
        start = time.monotonic()
        events = train([*words, "--lr", "1e-6"], log_dir)
        report.row("seconds of the run, with all starts", time.monotonic() - start)
    lengths = series(events, "rollout/response_length")
    report.row(
        "mean response length",
        min(lengths),
        f"{new_tokens} (end of text is ignored)",
        min(lengths) >= 0.98 * new_tokens,
    )
    gaps = series(events, "train/logprob_gap_mean")
    report.row("largest mean |train - rollout log-prob|", max(gaps), f"<= {LARGEST_GAP:g}", max(gaps) <= LARGEST_GAP)
    report.row("trainer: tokens a second", statistics.median(series(events, "train/tokens_per_second")))
    phase_rows(report, events)
    return events


def never_ends(model: Path) -> None:
    """Change the files that the engine reads so that no token ends a text."""
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            config = json.loads((model / name).read_text())
            config.pop("eos_token_id", None)
            (model / name).write_text(json.dumps(config, indent=2))


# ---- offload


@check(gpus=1, minutes=4)
def offload_speed(report: Report) -> None:
    """Compare the sleep and wake of Qwen3-0.6B's trainer with a plain copy of pinned memory."""
    from slime.megatron.offload.trainer_memory import TrainerMemory

    plain_copy_rows(report, 4 * 1024 * MIB)
    torch.cuda.empty_cache()  # otherwise the trainer would reuse this memory, and keep it
    with trainer_of(args_of("qwen3-0.6B", "--max-tokens-per-gpu 8192")) as trainer:
        batch = batch_of([1024] * 8, 151936)
        trainer.train(0, batch)
        memory = TrainerMemory(trainer.model, trainer.optimizer)
        before = {name: tensor.double().sum().item() for name, tensor in trainer.iter_hf_tensors()}
        torch.cuda.empty_cache()
        report.row("awake: GB allocated", torch.cuda.memory_allocated() / 1e9)
        for number in range(4):
            taken, moved = timed(lambda: memory.offload_optimizer() + memory.offload_weights())
            name = "first sleep, which takes host memory" if number == 0 else f"sleep {number}"
            report.row(f"{name}: seconds", taken, f"{moved / 1e9:.2f} GB, {moved / taken / 1e9:.1f} GB/s")
            asleep = torch.cuda.memory_reserved() / 1e9
            if number == 3:
                live_rows(report)
            taken, moved = timed(memory.reload)
            report.row(f"wake {number}: seconds", taken, f"{moved / 1e9:.2f} GB, {moved / taken / 1e9:.1f} GB/s")
        report.row("asleep: GB reserved", asleep, "<= 0.5", asleep <= 0.5)
        after = {name: tensor.double().sum().item() for name, tensor in trainer.iter_hf_tensors()}
        report.row("weights as before", before == after, True, before == after)
        metrics = trainer.train(1, batch)
        report.row(
            "it trains on: loss, gradient norm", f"{metrics['train/loss']:.3g}, {metrics['train/grad_norm']:.3g}"
        )


def live_rows(report: Report) -> None:
    """Report what is on the device: memory in use, and the largest storages that Python knows."""
    report.row("asleep: GB allocated", torch.cuda.memory_allocated() / 1e9, "far below what is reserved: fragmented")
    found: dict[int, tuple[int, str]] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.is_cuda:
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes(), f"{thing.dtype} {list(thing.shape)}"
    for size, what in sorted(found.values(), reverse=True)[:6]:
        report.row("asleep: MB of a live storage", size / 1e6, what)


def timed(action: Callable[[], int]) -> tuple[float, int]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    moved = action()
    torch.cuda.synchronize()
    return time.perf_counter() - start, moved


def plain_copy_rows(report: Report, size: int) -> None:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    down = median_seconds(lambda: host.copy_(there, non_blocking=True), 3)
    up = median_seconds(lambda: there.copy_(host, non_blocking=True), 3)
    report.row("plain copy to pinned memory: GB/s", size / down / 1e9)
    report.row("plain copy from pinned memory: GB/s", size / up / 1e9)


# ---- weights


@check(gpus=1, minutes=7)
def sync_speed(report: Report) -> None:
    """Compare the sync of 4B weights by CUDA IPC, into a real SGLang that sleeps and wakes, with a plain copy."""
    from slime.sync.colocate import ColocatedTransport
    from slime.sync.proof import check_versions
    from slime.sync.transport import Opening
    from tools.make_random_checkpoint import hf_config, make_tokenizer, shape_of_script

    with scratch() as directory:
        config = hf_config(shape_of_script(ROOT / "scripts/models/qwen3-4B.sh", None))
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(directory / "model")
        make_tokenizer(4096).save_pretrained(directory / "model")
        with colocated_engine(report, directory / "model") as engine:
            used = in_use()
            report.row("engine awake: GB of the device", used)
            report.row("all memory given back: seconds", seconds_of(engine, put_to_sleep))
            report.row("asleep: GB of the device", in_use(), "<= 4", in_use() <= 4)
            with model_4b() as tensors:
                opening = Opening(
                    args=engine_args(directory / "model"),
                    rank=0,
                    dtype=torch.bfloat16,
                    backend="nccl",
                    router_url=engine.url,
                    engine_urls=[engine.url],
                    engine_ranks=[1],
                    shared_with=[[0]],
                )
                transport = ColocatedTransport.open(opening)
                taken = seconds_of(engine, lambda client: client.resume_memory(FOR_WEIGHTS))
                report.row("memory for weights taken: seconds", taken)
                undefined = transport.checksums()
                report.row("first sync: seconds", transport.send(tensors(), version=1).seconds)
                check_versions(transport, version=1)
                sums = transport.checksums()
                report.row("memory that was taken held other weights", sums != undefined, True, sums != undefined)
                sizes_rows(report, transport, tensors)
                same = transport.checksums() == sums
                report.row("the same weights give the same checksum", same, True, ok=same)
                taken = seconds_of(engine, lambda client: client.resume_memory(FOR_GENERATION))
                report.row("memory for the KV cache taken: seconds", taken)
                answers = generated(engine, 8, 16)
                right = all(len(a.output_ids) == 16 and a.weight_version == "9" for a in answers)
                report.row("it generates, with the last version", right, True, ok=right)
                report.row("both awake: GB of the device", in_use())
                report.row("all memory given back again: seconds", seconds_of(engine, put_to_sleep))
                transport.close()


def sizes_rows(report: Report, transport: Any, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Report syncs with the versions 2 to 9, two for each bucket size."""
    total = sum(tensor.nbytes for _, tensor in tensors())
    plain = plain_device_copy(total)
    report.row("plain copy on the device: seconds", plain, f"{total / 1e9:.2f} GB, {total / plain / 1e9:.0f} GB/s")
    version = 1
    for size in (256, 512, 1024, 2048):
        transport._bucket_bytes = size * MIB
        taken: list[float] = []
        for _ in range(2):
            version += 1
            taken.append(transport.send(tensors(), version=version).seconds)
        most = DEFAULT_SYNC_SECONDS if size == DEFAULT_MIB else LARGEST_SYNC_SECONDS
        report.row(
            f"sync in buckets of {size} MiB: seconds",
            min(taken),
            f"<= {most}; each: {shown(taken)}; {total / min(taken) / 1e9:.1f} GB/s",
            ok=min(taken) <= most,
        )


def plain_device_copy(size: int) -> float:
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return median_seconds(lambda: target.copy_(source))


@contextmanager
def colocated_engine(report: Report, model: Path) -> Iterator[ManagedProcess]:
    args = replace(
        engine_args(model, load_format="dummy", mem_fraction_static=0.5), colocate=True, offload=True
    )  # this switches on the memory saver
    log = report.path.parent / f"{report.name}-engine.log"
    log.unlink(missing_ok=True)
    port = find_free_port(LOOPBACK)
    start = time.monotonic()
    engine = launch_engine(args, index=0, host=LOOPBACK, port=port, log_path=log, gpu_ids=("0",))
    try:
        engine.wait_ready(300)
        report.row("SGLang is ready: seconds", time.monotonic() - start)
        yield engine
    except BaseException:
        print("\n".join(log.read_text(errors="replace").splitlines()[-60:]), flush=True)
        raise
    finally:
        engine.stop()


def seconds_of(engine: ManagedProcess, action: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> float:
    async def act() -> float:
        async with EngineClient(engine.url, engines=[engine.url]) as client:
            start = time.perf_counter()
            await action(client)
            return time.perf_counter() - start

    return asyncio.run(act())


def in_use() -> float:
    """Return the GB in use on the device, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9
