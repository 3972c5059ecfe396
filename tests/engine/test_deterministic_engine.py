"""With --enable-deterministic-inference a request gets the same tokens and log-probs, to the bit, in any company."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_scheduler import Bench, make_bench, prompts, request

from slime.engine.embedded import fixed_shapes
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.fixed_shapes import FixedShapes, find_sizes

Answer = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Wish:
    """One request to be made again and again."""

    ids: list[int]
    seed: int
    length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


def wishes(count: int, seed: int) -> list[Wish]:
    """Of shared and of own prompts, long and short, some greedy, some with tokens cut off."""
    rng = random.Random(seed)
    texts = prompts(count // 2, seed=seed, shortest=1, longest=90)
    return [
        Wish(
            ids=rng.choice(texts),
            seed=number,
            length=rng.choice((1, 3, 20, 60, 110)),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 1.0, 0.9)),
            top_k=rng.choice((-1, -1, 20)),
        )
        for number in range(count)
    ]


def bench_of(path: Path, *, deterministic: bool = True, rows: int = 96, width: int = 256, sizes: tuple[int, ...] = ()):
    """An engine with `rows` cache rows of `width` positions."""
    dtype = torch.bfloat16 if "bf16" in path.name else torch.float32
    bench = make_bench(path, rows=rows, tokens=rows * width, dtype=dtype)
    if deterministic:
        scheduler = bench.scheduler
        spare = fixed_shapes.SPARE_ROWS
        scheduler.cache = KVCache(
            scheduler.model.architecture, dtype=dtype, rows=rows, tokens=rows * width, spare_rows=spare
        )
        sizes = sizes or find_sizes(scheduler.model)
        scheduler.fixed_shapes = FixedShapes(scheduler.model, scheduler.cache, sizes)
    return bench


def ask(bench: Bench, wish: Wish) -> None:
    params = {"temperature": wish.temperature, "top_p": wish.top_p, "top_k": wish.top_k}
    bench.add(request(wish.ids, seed=wish.seed, max_new_tokens=wish.length, **params))


def answers(bench: Bench) -> dict[str, Answer]:
    done = {r.rid: (list(r.output_ids), list(r.log_probs)) for r in bench.run()}
    bench.finished.clear()
    return done


def alone(bench: Bench, asked: list[Wish]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for wish in asked:
        ask(bench, wish)
        found |= answers(bench)
    return found


def in_company(bench: Bench, asked: list[Wish], rng: random.Random) -> dict[str, Answer]:
    """All of them in random order, coming at random times."""
    for wish in rng.sample(asked, len(asked)):
        ask(bench, wish)
        for _ in range(rng.choice((0, 0, 0, 1, 5))):
            bench.step()
    return answers(bench)


@pytest.mark.parametrize("family", ["glm4", "qwen3", "llama3", "glm4-bf16"])
def test_company_order_row_and_width_change_nothing(family: str, model_dirs: dict[str, Path]) -> None:
    asked = wishes(40, seed=1)
    expected = alone(bench_of(model_dirs[family]), asked)
    for seed, (rows, width) in enumerate([(96, 256), (7, 256), (30, 512)]):
        bench = bench_of(model_dirs[family], rows=rows, width=width)
        assert in_company(bench, asked, random.Random(seed)) == expected
    assert len({tuple(tokens) for tokens, _ in expected.values()}) > 30


def test_control_the_default_path_feels_its_company(model_dirs: dict[str, Path]) -> None:
    asked = wishes(40, seed=1)
    expected = alone(bench_of(model_dirs["glm4"], deterministic=False), asked)
    found = in_company(bench_of(model_dirs["glm4"], deterministic=False), asked, random.Random(0))
    assert found != expected
    assert {rid: tokens for rid, (tokens, _) in found.items()} == {rid: tokens for rid, (tokens, _) in expected.items()}
