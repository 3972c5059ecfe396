"""A step of slime's Trainer against a plain Hugging Face training step: 8 M parameters, one process each.

    python -m bench.trainer           (make bench-trainer)

Each side has a process of its own, so that its peak memory is its own (the peak above what it used after loading its
libraries), and the sides take their steps in alternation: log-probs of every token, the policy-gradient loss, backward,
clipping to norm 1, AdamW. Invariant: both sides start from the same weights and get the same tokens, and their first
losses and gradient norms agree, so the same work is compared.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bench.common import OUTPUTS, Goal, Spread, Table, in_turns, machine, ratios, write_result

GOAL = 0.9
LEARNING_RATE = 1e-4
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "eos_token_id": 1,
}


class Side(Protocol):
    """The measurements in each process."""

    @staticmethod
    def load_libraries() -> None: ...

    def step(self) -> dict[str, float]:
        """Take one training step; return `loss` and `grad_norm`."""
        ...

    @property
    def model(self) -> torch.nn.Module: ...


def row_lengths(kind: str, num_tokens: int) -> list[int]:
    """Return `equal` rows of 256, or `spread` rows of 16 to 240, the same for both sides, with `num_tokens` in all."""
    if kind == "equal":
        return [256] * (num_tokens // 256) if num_tokens >= 256 else [num_tokens]
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(int(rng.integers(16, 241)))
    lengths[-1] -= sum(lengths) - num_tokens
    return [length for length in lengths if length > 1]


def make_rows(lengths: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return random tokens, and an advantage for each row."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, SHAPE["vocab_size"], length) for length in lengths]
    return rows, rng.choice([-1.0, 1.0, 2.0], len(rows)).astype(np.float32)


class SlimeSide:
    """slime.megatron.Trainer on one rank; every row is a prompt of one token and its response."""

    @staticmethod
    def load_libraries() -> None:
        import slime.megatron.trainer  # noqa: F401  # pyright: ignore[reportUnusedImport]

    def __init__(self, model_dir: str, lengths: Sequence[int], threads: int) -> None:
        from slime.config.architecture import hf_architecture, read_hf_config
        from slime.config.args import Args
        from slime.core.batch import TrainBatch
        from slime.megatron.trainer import Trainer

        rows, advantages = make_rows(lengths)
        responses = np.asarray(lengths) - 1
        self._batch = TrainBatch(
            np.asarray(lengths),
            responses,
            {
                "tokens": np.concatenate(rows),
                "loss_mask": np.ones(int(responses.sum()), dtype=np.float32),
                "rewards": advantages,
                "group_indices": np.zeros(len(rows), dtype=np.int64),
                "sample_indices": np.arange(len(rows)),
            },
        )
        args = Args(
            architecture=hf_architecture(read_hf_config(Path(model_dir))),
            hf_checkpoint=model_dir,
            ref_load=model_dir,
            num_rollout=1000,
            num_steps_per_rollout=1,
            rollout_batch_size=1,
            n_samples_per_prompt=len(rows),
            cpu_threads_per_process=threads,
            bf16=False,
            lr=LEARNING_RATE,
            weight_decay=0.0,
            clip_grad=1.0,
            use_dynamic_batch_size=True,
            max_tokens_per_gpu=sum(lengths),
            log_probs_chunk_size=1024,
            calculate_per_token_loss=True,
            custom_advantage_function_path="bench.trainer.rewards_as_advantages",
        )
        self._store = tempfile.NamedTemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.trainer = Trainer(args, rank=0, world_size=1, init_method=f"file://{self._store.name}-store")
        self.trainer.load()
        self._rollout = 0

    @property
    def model(self) -> torch.nn.Module:
        return self.trainer.model[0]

    def step(self) -> dict[str, float]:
        self._rollout += 1
        metrics = self.trainer.train(self._rollout, self._batch)
        return {"loss": metrics["train/loss"], "grad_norm": metrics["train/grad_norm"]}


def rewards_as_advantages(args: Any, batch: Any) -> np.ndarray:
    """Put each row's reward on all its tokens, so that both sides weight their tokens equally."""
    return np.repeat(batch.columns["rewards"], batch.response_lengths_N)


class PlainSide:
    """transformers and torch.optim, as one would write it by hand.

    `layout` is rows (padded on the right to the longest) or packed (one row with positions that restart in each
    sequence, so that transformers masks across sequences).
    """

    @staticmethod
    def load_libraries() -> None:
        from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401  # pyright: ignore

    def __init__(self, model_dir: str, lengths: Sequence[int], layout: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        rows, advantages = make_rows(lengths)
        tensors = [torch.from_numpy(row) for row in rows]
        longest = max(lengths)
        total = sum(length - 1 for length in lengths)
        if layout == "packed":
            self._inputs = {
                "input_ids": torch.cat(tensors)[None],
                "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            }
            last = np.cumsum(lengths) - 1
            inside = torch.ones(sum(lengths) - 1, dtype=torch.bool)
            inside[last[:-1]] = False  # from one row into the next
            self._advantages = torch.from_numpy(np.repeat(advantages, lengths))[None, 1:]
            self._weights = (inside.float() / total)[None]
        else:
            ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            there = torch.arange(longest) < torch.tensor(lengths)[:, None]
            # without padding there is nothing to mask, and attention uses its fast path
            self._inputs = {"input_ids": ids} | ({} if bool(there.all()) else {"attention_mask": there.long()})
            self._advantages = torch.from_numpy(advantages)[:, None].expand(-1, longest - 1)
            self._weights = there[:, 1:].float() / total

    def step(self) -> dict[str, float]:
        logits = self.model(**self._inputs, use_cache=False).logits[:, :-1]
        targets = self._inputs["input_ids"][:, 1:]
        log_probs = torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None]).squeeze(-1)
        ratio = (log_probs - log_probs.detach()).exp()
        plain, clipped = -self._advantages * ratio, -self._advantages * ratio.clamp(0.8, 1.2)
        loss = (torch.maximum(plain, clipped) * self._weights).sum()
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}


PARTS = ("rows, packing", "forward", "log-probs, loss", "backward", "norm, clipping", "optimizer", "metrics")


class _Timed:
    """Autograd's engine, with a mark before and after each backward pass."""

    def __init__(self, engine: Any, mark: Callable[[], None]) -> None:
        self._engine, self._mark = engine, mark

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        self._mark()
        try:
            return self._engine.run_backward(*args, **kwargs)
        finally:
            self._mark()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class Markers:
    """The time at which each part of a step begins, from hooks of torch alone, equal on both sides. Used by `with`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._times: list[float] = []
        self._model = model

    def __enter__(self) -> Markers:
        self._engine = engine = torch.autograd.Variable._execution_engine
        torch.autograd.Variable._execution_engine = _Timed(engine, self._mark)  # pyright: ignore[reportAttributeAccessIssue]
        self._hooks = [
            self._model.register_forward_pre_hook(lambda *_: self._mark()),
            self._model.register_forward_hook(lambda *_: self._mark()),
            register_optimizer_step_pre_hook(lambda *_: self._mark()),
            register_optimizer_step_post_hook(lambda *_: self._mark()),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        torch.autograd.Variable._execution_engine = self._engine
        for hook in self._hooks:
            hook.remove()

    def _mark(self) -> None:
        self._times.append(time.perf_counter())

    def step(self, side: Side) -> dict[str, float]:
        """Return the seconds of each part of one step (one forward, one backward, one optimizer step)."""
        self._times.clear()
        self._mark()
        side.step()
        self._mark()
        spans = [end - start for start, end in pairwise(self._times)]
        return dict(zip(PARTS, spans, strict=True))


def operators(side: Side, steps: int) -> dict[str, float]:
    """Return seconds per step inside each operator itself, without the operators that it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            side.step()
    return {event.key: event.self_cpu_time_total * 1e-6 / steps for event in profile.key_averages()}


def memory_bytes(name: str) -> int:
    """Return VmRSS or VmHWM of this process (Linux); `ru_maxrss` would include memory of the process that forked it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def serve(pipe: Connection, make: type[SlimeSide] | type[PlainSide], arguments: Sequence[Any]) -> None:
    """Run the process of one side: do what the pipe requests."""
    make.load_libraries()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # from here on, the high-water mark is counted
    before = memory_bytes("VmRSS")
    side = make(*arguments)
    while (asked := pipe.recv()) is not None:
        if asked == "step":
            start, cpu = time.perf_counter(), time.process_time()
            metrics = side.step()
            pipe.send({**metrics, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu})
        elif asked == "parts":
            with Markers(side.model) as markers:
                pipe.send(markers.step(side))
        elif asked == "operators":
            pipe.send(operators(side, 3))
        elif asked == "memory":
            pipe.send(memory_bytes("VmHWM") - before)


class Remote:
    """One side in its own process."""

    def __init__(self, make: type[SlimeSide] | type[PlainSide], *arguments: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._process = context.Process(target=serve, args=(theirs, make, (*arguments, threads)), daemon=True)
        self._process.start()
        theirs.close()
        self.steps: list[dict[str, float]] = []

    def ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()

    def seconds(self) -> float:
        self.steps.append(self.ask("step"))
        return self.steps[-1]["seconds"]

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def compare(model_dir: str, lengths: Sequence[int], threads: int, rounds: int) -> dict[str, Any]:
    """Return seconds by turn, peak memory, parts and operators of each side."""
    sides = {"slime": Remote(SlimeSide, model_dir, lengths, threads=threads)}
    sides["plain"] = Remote(PlainSide, model_dir, lengths, "rows", threads=threads)
    if len(set(lengths)) > 1:
        sides["plain, packed"] = Remote(PlainSide, model_dir, lengths, "packed", threads=threads)
    try:
        seconds = in_turns({name: side.seconds for name, side in sides.items()}, rounds=rounds, warmup=2)
        check_same_work({name: side.steps[0] for name, side in sides.items()})
        memory = {name: side.ask("memory") for name, side in sides.items()}
        cpu = {name: [step["cpu"] for step in side.steps[2:]] for name, side in sides.items()}
        turns = [{name: side.ask("parts") for name, side in sides.items()} for _ in range(rounds)]
        parts = {name: {part: Spread.of(turn[name][part] for turn in turns).median for part in PARTS} for name in sides}
        spent = {name: side.ask("operators") for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    return {"seconds": seconds, "cpu": cpu, "memory": memory, "parts": parts, "operators": spent}


def check_same_work(first: dict[str, dict[str, float]]) -> None:
    """Check that first losses and gradient norms agree: otherwise the sides did different work."""
    for name, step in first.items():
        for key in ("loss", "grad_norm"):
            ours, theirs = first["slime"][key], step[key]
            if abs(ours - theirs) > 1e-4 * abs(theirs):
                raise RuntimeError(f"{key} of the first step: slime {ours:.7g}, {name} {theirs:.7g}")


def make_model_dir(path: Path, **changes: Any) -> float:
    """Make a random Qwen3 with `changes` to its config; return its millions of parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **changes}))
    model.save_pretrained(path)
    return model.num_parameters() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "trainer.json")
    given = parser.parse_args()
    facts = machine()
    speed = Table(
        "Tokens/s of one training step",
        ["rows", "threads", "slime", "plain step", "ratio", "ratio in CPU time", "peak memory", "plain step's"],
    )
    where = Table("Where a step's time goes (ms)", ["part"])
    goals: list[Goal] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        millions = make_model_dir(Path(directory))
        for kind, threads in [("equal", threads) for threads in given.threads] + [("spread", given.threads[0])]:
            lengths = row_lengths(kind, given.tokens)
            name = (
                f"{len(lengths)} × {lengths[0]}"
                if kind == "equal"
                else f"{len(lengths)}, {min(lengths)}–{max(lengths)}"
            )
            result = compare(directory, lengths, threads, given.rounds)
            raw[f"{name}, {threads} threads"] = result
            add_rows(speed, where, goals, name, threads, sum(lengths), result)
    speed.note = f"Qwen3 of {millions:.1f} M parameters, {given.tokens} tokens a step, fp32; medians (lowest–highest). "
    speed.note += "Peak memory: what the process held at most beyond its libraries."
    write_result(given.out, [speed, where, operator_table(raw)], goals, facts, raw)


def add_rows(
    speed: Table, where: Table, goals: list[Goal], name: str, threads: int, num_tokens: int, result: dict[str, Any]
) -> None:
    seconds, cpu, memory = result["seconds"], result["cpu"], result["memory"]
    for peer in seconds:
        if peer == "slime":
            continue
        rates = {side: [num_tokens / value for value in seconds[side]] for side in ("slime", peer)}
        ratio = ratios(rates["slime"], rates[peer])
        row = [f"{name}{peer.removeprefix('plain')}", str(threads), Spread.of(rates["slime"]).show()]
        row += [Spread.of(rates[peer]).show(), ratio.show(2), ratios(cpu[peer], cpu["slime"]).show(2)]
        speed.rows.append([*row, f"{memory['slime'] / 2**20:.0f} MiB", f"{memory[peer] / 2**20:.0f} MiB"])
        goals.append(Goal(f"trainer / plain step, rows {row[0]}, {threads} thread(s)", ratio.median, GOAL))
    where.columns = [*where.columns, *(f"{side}: {name}, {threads} thr." for side in seconds)]
    if not where.rows:
        where.rows = [[part] for part in (*PARTS, "all")]
    for row, part in zip(where.rows, (*PARTS, "all"), strict=True):
        for side in seconds:
            parts = result["parts"][side]
            row += [f"{1e3 * (sum(parts.values()) if part == 'all' else parts[part]):,.1f}"]  # pyright: ignore


def operator_table(raw: dict[str, Any]) -> Table:
    """Return the most expensive operators of the first case."""
    name, result = next(iter(raw.items()))
    spent = {side: result["operators"][side] for side in ("slime", "plain")}
    ranked = sorted({*spent["slime"], *spent["plain"]}, key=lambda op: -max(s.get(op, 0.0) for s in spent.values()))
    table = Table(
        f"The most expensive operators (ms per step, {name}; the profiler itself costs some)", ["operator", *spent]
    )
    for op in ranked[:14]:
        table.rows.append([f"`{op}`", *(f"{1e3 * s.get(op, 0.0):,.1f}" for s in spent.values())])
    return table


if __name__ == "__main__":
    main()
