"""SGLang as slime launches it: seconds by phase, log-probs against Hugging Face, control requests, a clean end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from slime.config.args import Args
from slime.engine.client import EngineClient
from slime.engine.keys import Keys
from slime.engine.kinds.sglang import engine_port, warm_up
from slime.engine.launch import launch_engine, launch_router
from slime.engine.membership import register_worker
from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams
from slime.engine.server_process import ManagedProcess, find_free_port
from tests.gpu.checks import Report, check
from tests.gpu.runs import kept_directory, run, scratch

HOST = "127.0.0.1"
SETTINGS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 65536,
}
"""Settings for a machine with few kernels; the KV cache is small, because a large one takes long to allocate."""
START_S = 300.0
END_S = 20.0


def make_model(directory: Path) -> Path:
    """Save a small GLM-4 with GLM4-9B's heads (128 channels, half of them rotated) and an uneven distribution."""
    from transformers import AutoConfig, AutoModelForCausalLM

    run(["examples/arithmetic/make_task.py", "--out", str(directory)])
    model_dir = directory / "model"
    config: Any = AutoConfig.from_pretrained(model_dir)
    config.hidden_size, config.head_dim, config.max_position_embeddings = 256, 128, 4096
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.save_pretrained(model_dir)
    return model_dir


@contextmanager
def phases_timed(process: ManagedProcess) -> Iterator[list[tuple[str, float]]]:
    """Yield a list that gets (phase, the time at which it was first seen) while the block waits for the process."""
    seen: list[tuple[str, float]] = [("starting", time.monotonic())]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if (phase := process.phase()) != seen[-1][0]:
                seen.append((phase, time.monotonic()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def started(report: Report, args: Args, logs: Path) -> ManagedProcess:
    """Start an engine, wait until it is warm, and report each phase of its start."""
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    process = launch_engine(
        args, index=0, host=HOST, port=engine_port(HOST, 0), log_path=logs / "engine-0.log", gpu_ids=(gpu,)
    )
    print(f"engine: pid {process.pid}, {process.url}, log {process.log_path}", flush=True)
    with phases_timed(process) as seen:
        process.wait_ready(START_S)
    ready = time.monotonic()
    ends = [*(when for _, when in seen[1:]), ready]
    for (phase, begin), end in zip(seen, ends, strict=True):
        report.row(f"start: {phase}, s", end - begin)
    warm_up(args, process, START_S)
    report.row("start: warming up, s", time.monotonic() - ready)
    report.row("start: all, s", time.monotonic() - seen[0][1])
    return process


def log_probs(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float) -> list[float]:
    """Return the log-probs of `response` after `prompt` by the Hugging Face model, teacher-forced."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.log_softmax(logits / temperature, dim=-1).gather(1, ids[0, len(prompt) :, None])
    return chosen[:, 0].tolist()


def differences(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[GenerateResponse], temperature: float
) -> list[float]:
    return [
        abs(theirs - ours)
        for prompt, response in zip(prompts, responses, strict=True)
        for theirs, ours in zip(
            response.log_probs, log_probs(model, prompt, response.output_ids, temperature), strict=True
        )
    ]


def made_up_prompts(count: int, vocab: int) -> list[list[int]]:
    """Return prompts of different lengths; half of them share a prefix, which the engine has in its cache."""
    rng = random.Random(0)
    shared = [rng.randrange(3, vocab) for _ in range(40)]
    return [
        [*(shared if index % 2 else []), *(rng.randrange(3, vocab) for _ in range(rng.randint(1, 60)))]
        for index in range(count)
    ]


async def compare(report: Report, client: EngineClient, model_dir: Path, *, limit: float, dtype: torch.dtype) -> None:
    """Compare log-probs of sampled tokens with the model in the engine's precision and in fp32, at several settings."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab: Any = AutoConfig.from_pretrained(model_dir).vocab_size
    prompts = made_up_prompts(16, vocab)
    samplings = {
        "temperature 1": SamplingParams(temperature=1.0, max_new_tokens=64, ignore_eos=True),
        "temperature 0.8": SamplingParams(temperature=0.8, max_new_tokens=64, ignore_eos=True),
        "top-p 0.7, top-k 5": SamplingParams(temperature=0.8, top_p=0.7, top_k=5, max_new_tokens=64, ignore_eos=True),
    }
    answers = {
        name: await asyncio.gather(*(client.generate(GenerateRequest(input_ids=p, sampling_params=s)) for p in prompts))
        for name, s in samplings.items()
    }
    for precision in dict.fromkeys((dtype, torch.float32)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        model = loaded.to(device="cuda", dtype=precision)
        for name, responses in answers.items():
            counts = {len(response.output_ids) for response in responses}
            gaps = differences(model, prompts, responses, samplings[name].temperature)
            mean, most = statistics.mean(gaps), max(gaps)
            what = f"{name}: |engine - HF in {str(precision).removeprefix('torch.')}|, mean (max {most:.3g})"
            report.row(what, mean, f"<= {limit:g}, 64 tokens each", mean <= limit and counts == {64})
        wrong = statistics.mean(differences(model, prompts, answers["temperature 0.8"], 1.0))
        report.row("control: the same at the wrong temperature", wrong, f">= {5 * limit:g}", wrong >= 5 * limit)
        shifted = statistics.mean(differences(model, prompts[1:] + prompts[:1], answers["temperature 1"], 1.0))
        report.row("control: after another prompt", shifted, f">= {5 * limit:g}", shifted >= 5 * limit)


def long_requests(client: EngineClient, count: int, tokens: int) -> list[asyncio.Task[GenerateResponse]]:
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    return [
        asyncio.ensure_future(client.generate(GenerateRequest(input_ids=[5 + index, 6, 7], sampling_params=params)))
        for index in range(count)
    ]


async def controls(report: Report, client: EngineClient, url: str, model_dir: Path) -> None:
    tasks = long_requests(client, 8, 3000)
    await asyncio.sleep(2.0)
    begin = time.monotonic()
    await client.abort_all()
    cut = await asyncio.wait_for(asyncio.gather(*tasks), 30)
    report.row("abort: until all have answered, s", time.monotonic() - begin)
    kept = [len(each.output_ids) for each in cut]
    whole = all(each.finish_reason == "abort" and 0 < len(each.log_probs) == len(each.output_ids) for each in cut)
    report.row("abort: tokens kept, each with its log-prob", f"{min(kept)} to {max(kept)}", "1 to 2999", whole)

    tasks = long_requests(client, 4, 200)
    await asyncio.sleep(0.3)
    await client.pause("in_place")
    await asyncio.sleep(8.0)
    done, well = sum(task.done() for task in tasks), await client.is_healthy(url)
    report.row("pause: answers meanwhile", done, "0", done == 0)
    report.row("pause: /health", well, "True", well)
    begin = time.monotonic()
    await client.continue_()
    rest = await asyncio.wait_for(asyncio.gather(*tasks), 60)
    good = all((each.finish_reason, len(each.log_probs)) == ("length", 200) for each in rest)
    report.row("continue: until all have answered, s", time.monotonic() - begin, "200 tokens each", good)

    await client.flush_cache()
    await client.update_weights_from_disk(str(model_dir), "7")
    versions = await client.weight_versions()
    [answer] = await asyncio.gather(*long_requests(client, 1, 4))
    report.row("policy version, of the engine and of an answer", f"{versions} {answer.weight_version}", "['7'] 7")
    report.row("both are", versions == ["7"] and answer.weight_version == "7", "True", versions == ["7"])


async def described(report: Report, client: EngineClient, dtype: str) -> None:
    [info] = await client.describe()
    reported = (info.model_type, info.num_ranks, info.dtype, info.context_length)
    report.row(
        "its report about itself", str(reported), f"('glm4', 1, '{dtype}', ...)", reported[:3] == ("glm4", 1, dtype)
    )


def family(process: ManagedProcess) -> list[psutil.Process]:
    own = psutil.Process(process.pid)
    return [own, *own.children(recursive=True)]


def sockets(report: Report, processes: Sequence[psutil.Process]) -> None:
    """Report the sockets on which the engine listens."""
    heard = sorted(
        {
            f"{each.laddr.ip}:{each.laddr.port} ({process.name()})"
            for process in processes
            for each in process.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        }
    )
    elsewhere = [each for each in heard if not each.startswith((HOST, "::1"))]
    report.row("listens on", "; ".join(heard))
    report.row("of these not on loopback", "; ".join(elsewhere) or "none", "none", not elsewhere)


def ended(report: Report, process: ManagedProcess, how: str, end: Callable[[], None]) -> None:
    """End the engine, and check that no process is left and that the GPU's memory is free again."""
    everyone = family(process)
    used = torch.cuda.mem_get_info()[0]
    begin = time.monotonic()
    end()
    _, alive = psutil.wait_procs(everyone, timeout=END_S)
    alive = [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    report.row(f"{how}: seconds until all {len(everyone)} processes are gone", time.monotonic() - begin)
    report.row(f"{how}: processes left", str([each.name() for each in alive]), "[]", not alive)
    report.row(f"{how}: GB of GPU memory that came back", (torch.cuda.mem_get_info()[0] - used) / 1e9)


async def through_a_router(
    report: Report, args: Args, process: ManagedProcess, logs: Path, model_dir: Path, *, limit: float
) -> None:
    router = launch_router(args, host=HOST, port=find_free_port(), log_path=logs / "router.log")
    try:
        router.wait_ready(60)
        register_worker(router.url, process.url, keys=Keys.of(args))
        async with EngineClient(router.url, engines=[process.url], keys=Keys.of(args)) as client:
            await described(report, client, "bfloat16")
            await compare(report, client, model_dir, limit=limit, dtype=torch.bfloat16)
            if args.bf16:
                await controls(report, client, process.url, model_dir)
    finally:
        router.stop()


def some_args(model_dir: Path, *, bf16: bool, deterministic: bool = False, **settings: Any) -> Args:
    sglang = {**SETTINGS, **settings}
    return Args(
        num_rollout=1,
        rollout_engine="sglang",
        rollout_num_gpus=1,
        hf_checkpoint=str(model_dir),
        bf16=bf16,
        deterministic=deterministic,
        sglang=sglang,
        cpu_threads_per_process=4,
    )


@check(gpus=1, minutes=7)
def engine(report: Report) -> None:
    """Check an engine in bf16 at a router, with an API key; it is ended by stop()."""
    logs = kept_directory(report, "logs")
    with scratch() as directory:
        model_dir = make_model(directory)
        process = started(report, args := some_args(model_dir, bf16=True, api_key="secret-of-the-check"), logs)
        try:
            lines = [" ".join(each.cmdline()) for each in family(process)]
            hidden = not any("secret-of-the-check" in line for line in lines)
            report.row("the API key is on no command line", hidden, "True", hidden)
            mode = oct(process.log_path.stat().st_mode & 0o777)
            report.row("who may read the log, where SGLang writes the key", mode, "0o600", mode == "0o600")
            sockets(report, family(process))
            asyncio.run(through_a_router(report, args, process, logs, model_dir, limit=0.03))
            ended(report, process, "stopped", process.stop)
        finally:
            process.stop()


@check(gpus=1, minutes=5)
def engine_of_fp32_training(report: Report) -> None:
    """Check an engine in bf16 for a trainer in fp32; it is ended by killing its guard."""
    logs = kept_directory(report, "logs")
    with scratch() as directory:
        model_dir = make_model(directory)
        process = started(report, args := some_args(model_dir, bf16=False, dtype="bfloat16"), logs)
        try:
            asyncio.run(through_a_router(report, args, process, logs, model_dir, limit=0.03))
            guard = psutil.Process(process.pid).parent()
            assert guard is not None, "the guard is its parent"
            ended(report, process, "guard killed", lambda: os.kill(guard.pid, signal.SIGKILL))
        finally:
            process.stop()


@check(gpus=1, minutes=5)
def deterministic(report: Report) -> None:
    """Check --deterministic: an answer depends on the request's seed, and not on other requests at the same time."""
    logs = kept_directory(report, "logs")
    with scratch() as directory:
        model_dir = make_model(directory)
        process = started(report, args := some_args(model_dir, bf16=True, deterministic=True), logs)
        try:
            asyncio.run(among_others(report, args, process, logs))
        finally:
            process.stop()


async def among_others(report: Report, args: Args, process: ManagedProcess, logs: Path) -> None:
    """Send the same requests one by one, all at once, and among others."""
    router = launch_router(args, host=HOST, port=find_free_port(), log_path=logs / "router.log")
    try:
        router.wait_ready(60)
        register_worker(router.url, process.url)
        async with EngineClient(router.url, engines=[process.url]) as client:

            async def ask(index: int, seed: int) -> tuple[list[int], list[float]]:
                params = SamplingParams(max_new_tokens=64, ignore_eos=True, sampling_seed=seed)
                ids = [7 + index % 5, *(20 + (3 * index + place) % 100 for place in range(4 + index % 40))]
                answer = await client.generate(GenerateRequest(input_ids=ids, sampling_params=params))
                return answer.output_ids, answer.log_probs

            alone = [await ask(index, index) for index in range(12)]
            together = await asyncio.gather(*(ask(index, index) for index in range(12)))
            crowd = [asyncio.ensure_future(ask(100 + other, other)) for other in range(40)]
            among = await asyncio.gather(*(ask(index, index) for index in reversed(range(12))))
            await asyncio.gather(*crowd)
            for name, found in (("all at once", together), ("among 40 others", among[::-1])):
                tokens = sum(a[0] != b[0] for a, b in zip(alone, found, strict=True))
                bits = sum(a[1] != b[1] for a, b in zip(alone, found, strict=True))
                report.row(f"{name}: answers with other tokens than alone", tokens, "0 of 12", not tokens)
                report.row(f"{name}: answers with other log-probs than alone", bits, "0 of 12", not bits)
            seeds = await asyncio.gather(*(ask(index, 50 + index) for index in range(12)))
            same = sum(a[0] == b[0] for a, b in zip(alone, seeds, strict=True))
            report.row("control: other seeds, answers with the same tokens", same, "0", not same)
    finally:
        router.stop()
