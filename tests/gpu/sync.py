"""Weights from a trainer's GPU into a real SGLang: that they arrive, how requests are paused, and how fast it is.

NCCL does not allow two ranks on one GPU. So with one GPU the broadcast goes over gloo, with everything else unchanged,
and the NCCL group itself is tried with one member.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from slime.config.args import Args
from slime.core.pausing import PauseChoice
from slime.engine.bucket_layout import BucketLayout, NamedTensor
from slime.engine.client import EngineClient
from slime.engine.launch import launch_engine
from slime.engine.protocol import WEIGHT_GROUP, GenerateResponse, UpdateWeightsFromDistributed
from slime.engine.server_process import ManagedProcess, find_free_port
from slime.engine.weight_group import WeightGroup, join_weight_group
from slime.models.hf_files import HFReader, write_hf
from slime.sync.broadcast import BroadcastTransport
from slime.sync.buckets import Buckets
from slime.sync.disk import DiskTransport
from slime.sync.proof import PROMPT, check_versions, prove_weights
from slime.sync.transport import Transport
from tests.gpu.checks import Report, check
from tests.gpu.runs import ROOT, scratch

os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as trainers and SGLang have it

LARGEST_SECONDS = 0.5
SHARE = 0.6
"""The least share of a plain broadcast's speed, in buckets of the default size."""
MIB = 1024**2
DEFAULT_MIB = Args().update_weight_buffer_size // MIB
LOOPBACK = "127.0.0.1"
RESPONSE = 450
QUICK_START = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 65536,
}


# ---- models and engines


def tiny(path: Path, family: str, seed: int) -> Path:
    """Save a model with random bf16 weights and an uneven distribution, and a tokenizer that transformers can load."""
    from tests.engine.tiny_models import make_model
    from tools.make_random_checkpoint import make_tokenizer

    make_model(path, family, seed=seed, vocab_size=320, hidden=256, dtype=torch.bfloat16, eos=[0])
    make_tokenizer(512).save_pretrained(path)
    return path


def engine_args(model: Path, **sglang: Any) -> Args:
    return Args(
        hf_checkpoint=str(model),
        rollout_engine="sglang",
        rollout_num_gpus=1,
        bf16=True,
        sglang={**QUICK_START, **sglang},
    )


@contextmanager
def serving(report: Report, model: Path, gpu: int, **sglang: Any) -> Iterator[ManagedProcess]:
    """Start an SGLang that serves `model` on GPU number `gpu`."""
    log = report.path.parent / f"{report.name}-engine.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    args = engine_args(model, **sglang)
    engine = launch_engine(
        args, index=0, host=LOOPBACK, port=find_free_port(LOOPBACK), log_path=log, gpu_ids=(str(gpu),)
    )
    try:
        engine.wait_ready(300)
        report.row("SGLang is ready: seconds", time.monotonic() - start)
        yield engine
    except BaseException:
        print("\n".join(log.read_text(errors="replace").splitlines()[-60:]), flush=True)
        raise
    finally:
        engine.stop()


def client(engine: ManagedProcess) -> EngineClient:
    return EngineClient(engine.url, engines=[engine.url], request_timeout=300)


def connected(engine: ManagedProcess, backend: str, bucket_bytes: int = 512 * MIB) -> BroadcastTransport:
    return BroadcastTransport(
        client(engine),
        engine_ranks=[1],
        address=LOOPBACK,
        port=find_free_port(LOOPBACK),
        backend=backend,
        bucket_bytes=bucket_bytes,
    )


def weights(model: Path) -> list[NamedTensor]:
    reader = HFReader(model)
    return [(name, reader.get(name).cuda()) for name in reader.names()]


def generated(engine: ManagedProcess, number: int, tokens: int) -> list[GenerateResponse]:
    import asyncio

    from slime.engine.protocol import GenerateRequest, SamplingParams

    async def all_at_once() -> list[GenerateResponse]:
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        requests = [GenerateRequest(input_ids=[5 + i, 9, 30], sampling_params=params) for i in range(number)]
        async with client(engine) as asking:
            return list(await asyncio.gather(*map(asking.generate, requests)))

    return asyncio.run(all_at_once())


def median_seconds(action: Callable[[], object], times: int = 5) -> float:
    """Return the median of `times` calls after a warm-up; each call ends when the GPU's work is done."""
    taken: list[float] = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def proof_error(transport: Transport, export: Path, *, version: int) -> str:
    """Return the proof's error; empty if it passes."""
    try:
        prove_weights(transport, export, version=version)
    except RuntimeError as error:
        return str(error)
    return ""


# ---- one GPU


@check(gpus=1, minutes=4)
def gathering(report: Report) -> None:
    """Compare streaming a 4B model as HF tensors and as buckets with a plain copy of as many bytes."""
    with model_4b() as tensors:
        total = sum(tensor.nbytes for _, tensor in tensors())
        report.row("GB of all tensors", total / 1e9)
        plain = plain_copy(total)
        report.row("plain copy: seconds", plain, f"{total / plain / 1e9:.0f} GB/s")

        def stream() -> None:
            for _ in tensors():
                continue

        def fill(bucket_bytes: int) -> None:
            for bucket in Buckets(tensors(), bucket_bytes):
                bucket.layout.flatten(bucket.tensors)

        seconds = median_seconds(stream)
        report.row("iter_hf_tensors: seconds", seconds, f"{total / seconds / 1e9:.0f} GB/s")
        for size in (128, 512, 1024):
            seconds = median_seconds(lambda size=size: fill(size * MIB))
            limit = f"{LARGEST_SECONDS / 2:g}; {total / seconds / 1e9:.0f} GB/s"
            report.row(f"into buckets of {size} MiB: seconds", seconds, limit, ok=seconds < LARGEST_SECONDS / 2)
        first = next(Buckets(tensors(), 64 * MIB))
        back = first.layout.split(first.layout.flatten(first.tensors))
        same = all(torch.equal(a, b) for a, b in zip(first.tensors, back, strict=True))
        report.row("a bucket and back: equal bits", same, True, ok=same)


def plain_copy(total: int) -> float:
    source = torch.empty(total, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source))


@check(gpus=1, minutes=2)
def group(report: Report) -> None:
    """Join the NCCL group with one member, use it, leave it, join it again under its name, and abort it."""
    tensor = torch.arange(64 * MIB, dtype=torch.uint8, device="cuda")
    expected = tensor.clone()
    for broken in (False, False, True):
        joined = join_alone()
        joined.broadcast(tensor)
        joined.close(broken=broken)
    same = torch.equal(tensor, expected)
    report.row("joined three times under one name, left twice and aborted once", "done", ok=True)
    report.row("what was broadcast is unchanged", same, True, ok=same)


def join_alone() -> WeightGroup:
    port = find_free_port(LOOPBACK)
    return join_weight_group(LOOPBACK, port, 0, 1, "slime-weights", "nccl", True, timeout=60)


@check(gpus=1, minutes=6)
def proof(report: Report) -> None:
    """Check a real SGLang's checksum after each kind of sync, the proof with its controls, and the state after it."""
    with scratch() as directory:
        start, actor = tiny(directory / "start", "glm4", 0), tiny(directory / "actor", "glm4", 1)
        export, altered = directory / "export", directory / "altered"
        write_hf(export, weights(actor), start, torch.bfloat16)
        changed = weights(actor)
        index = next(i for i, (name, _) in enumerate(changed) if name.endswith("layers.2.self_attn.k_proj.weight"))
        changed[index][1][3, 5] += 1
        write_hf(altered, changed, start, torch.bfloat16)
        with serving(report, start, 0) as engine:
            (directory / "sent").mkdir()
            fresh = DiskTransport(
                client(engine),
                directory=directory / "sent",
                source_hf_dir=start,
                dtype=torch.bfloat16,
                bucket_bytes=MIB,
            )
            before = fresh.checksums()
            agrees(report, "SGLang as started", fresh, start)
            ways: list[tuple[str, Transport]] = [("gloo", connected(engine, "gloo", 2 * MIB)), ("disk", fresh)]
            for number, (name, transport) in enumerate(ways, start=1):
                transport.send(weights(start), version=10 * number)
                same = transport.checksums() == before
                report.row(f"{name}: start's weights give the first checksum", same, True, ok=same)
                transport.send(weights(actor), version=10 * number + 1)
                differ = transport.checksums() != before
                report.row(f"{name}: the actor's give another", differ, True, ok=differ)
                check_versions(transport, version=10 * number + 1)
                began = time.monotonic()
                prove_weights(transport, export, version=10 * number + 1)
                report.row(f"{name}: the proof passes: seconds", time.monotonic() - began, ok=True)
                agrees(report, f"{name}: after sync and proof", transport, actor)
                transport.send(weights(actor), version=10 * number + 2)
                error = proof_error(transport, altered, version=10 * number + 2)
                noticed = "do not hold the actor's weights" in error
                report.row(f"{name}: control, one entry of one tensor altered", error[:60], "noticed", ok=noticed)
                transport.close()


def agrees(report: Report, what: str, transport: Transport, model: Path) -> None:
    """Compare the engine's log-probs of a prompt with those of Hugging Face's model in fp32."""
    import transformers

    [found] = transport.prompt_log_probs(PROMPT).values()
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = reference.cuda().eval()
    tokens = torch.tensor(PROMPT).cuda()
    with torch.inference_mode():
        log_probs = reference(tokens[None]).logits[0].log_softmax(-1)
    expected = log_probs[:-1].gather(-1, tokens[1:, None])[:, 0].cpu()
    gap = float((torch.tensor(found) - expected).abs().mean())
    report.row(f"{what}: mean |log-prob - Hugging Face's in fp32|", gap, 0.03, ok=gap < 0.03)


@check(gpus=1, minutes=6)
def pauses(report: Report) -> None:
    """Change weights under requests in flight: the engine works afterwards, and reports the version of its tokens."""
    with scratch() as directory:
        old, new = tiny(directory / "old", "glm4", 0), tiny(directory / "new", "glm4", 1)
        with serving(report, old, 0, disable_radix_cache=True) as engine:
            transport = connected(engine, "gloo", 2 * MIB)
            transport.send(weights(old), version=1)
            generated(engine, 8, 16)  # warms up
            choices: Sequence[PauseChoice] = ("drain", "abort", "retract", "in_place")
            for number, choice in enumerate(choices, start=2):
                transport._pause_choice = choice
                with ThreadPoolExecutor(1) as pool:
                    answers = pool.submit(generated, engine, 8, RESPONSE)
                    time.sleep(0.7)
                    flying = not answers.done()
                    sent = transport.send(weights(new if number % 2 == 0 else old), version=number)
                    found = answers.result()
                ends = {answer.finish_reason for answer in found}
                versions = {answer.weight_version for answer in found}
                whole = {len(answer.output_ids) == RESPONSE for answer in found}
                version = str(number if choice in ("retract", "in_place") else number - 1)
                expected = ({"abort"}, {False}) if choice == "abort" else ({"length"}, {True})
                report.row(
                    f"{choice}: 8 requests ended by, whole, version; seconds waited and sent",
                    f"{ends} {whole} {versions} {sent.waited:.2f} {sent.seconds:.2f}",
                    f"{expected}, {version}; in flight {flying}",
                    ok=flying and (ends, whole) == expected and versions == {version},
                )
                agrees(report, f"{choice}: the engine after it", transport, new if number % 2 == 0 else old)
            transport.close()


# ---- two GPUs


@check(gpus=2, minutes=6)
def broadcast(report: Report) -> None:
    """Check a trainer and SGLang on two GPUs: log-probs agree after a sync over NCCL, and the proof passes."""
    from slime.megatron.trainer import Trainer
    from tests.megatron.tiny import make_args

    with scratch() as directory:
        start, actor = tiny(directory / "start", "glm4", 0), tiny(directory / "actor", "glm4", 1)
        args = make_args(actor, bf16=True, rollout_temperature=1.0, max_tokens_per_gpu=1024)
        trainer = Trainer(args, rank=0, world_size=1, init_method=f"file://{directory}/store")
        trainer.load()
        with serving(report, start, 1) as engine:
            mean, _ = gap(trainer, engine)
            report.row("control, before the first sync: mean |log-prob difference|", mean, "> 0.1", ok=mean > 0.1)
            transport = connected(engine, "nccl", 2 * MIB)
            for version in (1, 2):
                transport.send(trainer.iter_hf_tensors(), version=version)
            trainer.save_hf(directory / "export", dtype=trainer.params_dtype)
            prove_weights(transport, directory / "export", version=2)
            report.row("the proof passes", True, ok=True)
            transport.send(trainer.iter_hf_tensors(), version=3)
            check_versions(transport, version=3)
            mean, largest = gap(trainer, engine)
            report.row("mean |trainer's - engine's log-prob|", mean, 0.02, ok=mean < 0.02)
            report.row("largest", largest)
            transport.close()
            again = connected(engine, "nccl", 2 * MIB)  # the group's name is free on both sides
            again.send(trainer.iter_hf_tensors(), version=4)
            check_versions(again, version=4)
            report.row("left, and joined again", True, ok=True)
            again.close()
        trainer.close()


def gap(trainer: Any, engine: ManagedProcess) -> tuple[float, float]:
    """Return the mean and largest |trainer's - engine's log-prob| of tokens that the engine generates."""
    from slime.core.batch import TrainBatch

    answers = generated(engine, 16, 128)
    tokens = [token for i, answer in enumerate(answers) for token in (5 + i, 9, 30, *answer.output_ids)]
    found = np.array([p for answer in answers for p in answer.log_probs], dtype=np.float32)
    columns: dict[str, Any] = {
        "tokens": np.array(tokens),
        "loss_mask": np.ones(len(found), dtype=np.float32),
        "rewards": np.zeros(16, dtype=np.float32),
        "group_indices": np.zeros(16, dtype=np.int64),
        "sample_indices": np.arange(16),
    }
    gaps = np.abs(trainer.log_probs(TrainBatch(np.full(16, 131), np.full(16, 128), columns)) - found)
    return float(gaps.mean()), float(gaps.max())


@check(gpus=2, minutes=8)
def speed(report: Report) -> None:
    """Compare the sync of 4B weights over NCCL into SGLang with a plain broadcast of equal bytes in equal pieces."""
    from tools.make_random_checkpoint import hf_config, make_tokenizer, shape_of_script

    with scratch() as directory:
        config = hf_config(shape_of_script(ROOT / "scripts/models/qwen3-4B.sh", None))
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(directory / "model")
        make_tokenizer(4096).save_pretrained(directory / "model")
        with (
            model_4b() as tensors,
            serving(report, directory / "model", 1, load_format="dummy", mem_fraction_static=0.5) as engine,
        ):
            total = sum(tensor.nbytes for _, tensor in tensors())
            report.row("GB", total / 1e9)
            transport = connected(engine, "nccl")
            first = transport.send(tensors(), version=1)
            report.row("first sync, which also connects: seconds", first.seconds)
            sums = transport.checksums()
            version = 1
            for size in (512, 1024, 2048, 4096):
                plain = plain_broadcast(total, size * MIB)
                transport._bucket_bytes = size * MIB
                transport._buckets.clear()
                taken: list[float] = []
                version += 1
                transport.send(tensors(), version=version)  # allocates this size's memory, on both sides
                for _ in range(5):
                    version += 1
                    taken.append(transport.send(tensors(), version=version).seconds)
                seconds = statistics.median(taken)
                share = plain / seconds
                report.row(
                    f"sync in buckets of {size} MiB: share of a plain broadcast's speed",
                    share,
                    f"{SHARE if size == DEFAULT_MIB else 0}; {seconds:.4f} s, {total / seconds / 1e9:.1f} GB/s, plain "
                    f"broadcast {total / plain / 1e9:.1f}",
                    ok=seconds <= LARGEST_SECONDS and (size != DEFAULT_MIB or share >= SHARE),
                )
                print("each:", ", ".join(f"{each:.3f}" for each in taken), flush=True)
            same = transport.checksums() == sums
            report.row("the same weights give the same checksum", same, True, ok=same)

            def nothing() -> None:
                with transport.paused():
                    return

            def session() -> None:
                with transport.updating():
                    return

            report.row("drain, flush, pause and continue: seconds", median_seconds(nothing))
            report.row("the same with an empty session: seconds", median_seconds(session))
            transport.close()


@check(gpus=2, minutes=8)
def killed_in_broadcast(report: Report) -> None:
    """Break a broadcast over NCCL: SGLang is killed inside it, or waits in it for a trainer that has left.

    Three members need three GPUs, so here the trainer is the peer that is lost: for NCCL all members are alike.
    """
    with scratch() as directory:
        model = tiny(directory / "model", "glm4", 0)
        write_hf(directory / "export", weights(model), model, torch.bfloat16)
        with serving(report, model, 1) as engine:
            transport = connected(engine, "nccl", MIB)
            transport.send(weights(model), version=1)
            began, error = killed_inside(transport, engine, weights(model))
            seconds = time.monotonic() - began
            report.row("SGLang was killed inside a sync: seconds until an error", seconds, 45, ok=seconds <= 45)
            report.row("the error", error[:80], "names it", ok=engine.url in error)
            transport.leave()
        with serving(report, model, 1) as engine:
            transport = connected(engine, "nccl", MIB)
            transport.send(weights(model), version=1)
            left_inside(report, transport, engine, weights(model))
        with serving(report, model, 1) as engine:  # as the supervisor starts it again
            began = time.monotonic()
            transport = connected(engine, "nccl", MIB)
            transport.send(weights(model), version=2)
            check_versions(transport, version=2)
            answers = generated(engine, 4, 16)
            report.row("started again, it is sent weights and answers: seconds", time.monotonic() - began)
            right = all(len(answer.output_ids) == 16 and answer.weight_version == "2" for answer in answers)
            report.row("its answers are whole and have the version", right, True, ok=right)
            prove_weights(transport, directory / "export", version=2)
            report.row("the proof passes", True, ok=True)
            transport.close()


def killed_inside(
    transport: BroadcastTransport, engine: ManagedProcess, tensors: Sequence[NamedTensor]
) -> tuple[float, str]:
    """Kill the engine and its children while half of the tensors are sent; return the time and the sync's error."""
    began = 0.0

    def dying() -> Iterator[NamedTensor]:
        nonlocal began
        yield from tensors[: len(tensors) // 2]
        process = psutil.Process(engine.pid)
        everyone = [process, *process.children(recursive=True)]
        for each in everyone:
            each.kill()
        began = time.monotonic()
        yield from tensors[len(tensors) // 2 :]

    try:
        transport.send(dying(), version=2)
    except RuntimeError as error:
        return began, str(error)
    return began, "no error"


def left_inside(
    report: Report, transport: BroadcastTransport, engine: ManagedProcess, tensors: Sequence[NamedTensor]
) -> None:
    """Announce a bucket and leave instead of broadcasting it, then look whether SGLang hangs, and for how long."""
    import asyncio

    layout = BucketLayout.of(tensors[:4])
    bucket = UpdateWeightsFromDistributed(
        names=layout.names,
        dtypes=layout.dtypes,
        shapes=layout.shapes,
        group_name=WEIGHT_GROUP,
        flush_cache=False,
        load_format="flattened_bucket",
    )

    async def announced() -> str:
        async with client(engine) as asking:
            await asking.update_sessions.begin()
            try:
                await asyncio.wait_for(asking.update_weights_from_distributed(bucket), 10)
            except TimeoutError:
                return "no answer within 10 s"
        return "answered before the broadcast"

    async def hanging() -> list[str]:
        async with client(engine) as asking:
            return await asking.presence.hanging(WEIGHT_GROUP)

    report.row("a bucket that is announced and not broadcast", asyncio.run(announced()))
    began = time.monotonic()
    transport.leave()
    report.row("the trainer has left: seconds", time.monotonic() - began)
    began = time.monotonic()
    found = asyncio.run(hanging())
    seconds = time.monotonic() - began
    report.row("it hangs", bool(found), f"found in {seconds:.1f} s, at most 20", ok=seconds <= 20)
    began = time.monotonic()
    engine.stop()
    report.row("a hanging SGLang is ended: seconds", time.monotonic() - began, 30, time.monotonic() - began <= 30)


@contextmanager
def model_4b() -> Iterator[Callable[[], Iterator[tuple[str, Tensor]]]]:
    """Make Qwen3-4B with random bf16 weights on this process's GPU; yield a function that streams its HF tensors."""
    from slime.megatron.model.build import architecture_of, build_model
    from slime.megatron.model.hf_weights import iter_hf_tensors
    from slime.megatron.parallel import close_parallel, init_parallel
    from tests.gpu.trainer_speed import args_of

    args = args_of("qwen3-4B")
    with scratch() as directory:
        init_parallel(args, rank=0, world_size=1, init_method=f"file://{directory}/store")
        try:
            model = build_model(args, wrap=True)
            arch = architecture_of(args)
            with torch.no_grad():
                yield lambda: iter_hf_tensors(model, arch)
        finally:
            close_parallel()


def plain_broadcast(total: int, piece: int) -> float:
    """Return the seconds for `total` bytes, in pieces, from the first GPU to a process on the second one."""
    port = find_free_port(LOOPBACK)
    sizes = [piece] * (total // piece) + [total % piece]
    words = [sys.executable, "-m", "tests.gpu.sync", str(port), *map(str, sizes)]
    receiver = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "1"})
    group = join_weight_group(LOOPBACK, port, 0, 2, "plain", "nccl", True, timeout=60)
    source = torch.empty(piece, dtype=torch.uint8, device="cuda")

    def send() -> None:
        for size in sizes:
            group.broadcast(source[:size])

    seconds = median_seconds(send)
    group.close()
    assert receiver.wait(30) == 0
    return seconds


def receive(port: int, sizes: Sequence[int]) -> None:
    group = join_weight_group(LOOPBACK, port, 1, 2, "plain", "nccl", False, timeout=60)
    target = torch.empty(max(sizes), dtype=torch.uint8, device="cuda")
    for _ in range(6):  # as often as `median_seconds` sends
        for size in sizes:
            group.broadcast(target[:size])
    group.close()


if __name__ == "__main__":
    receive(int(sys.argv[1]), [int(size) for size in sys.argv[2:]])
