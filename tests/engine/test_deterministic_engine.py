"""With --enable-deterministic-inference a request gets the same tokens and log-probs, to the bit, in any batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch
from test_scheduler import Bench, make_bench, prompts, request
from tiny_models import StartEngine

from slime.config.args import Args
from slime.engine.client import EngineClient
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.fixed_shapes import SIZES, SPARE_ROWS, FixedShapes, find_sizes
from slime.engine.engine_info import EngineInfo
from slime.engine.external import check_model
from tests.forked_engine import ForkedEngine

Answer = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Wish:
    """A request that is made again and again."""

    ids: list[int]
    seed: int
    length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1


def wishes(count: int, seed: int) -> list[Wish]:
    """Return requests with shared and own prompts, long and short, some greedy, some with restricted tokens."""
    rng = random.Random(seed)
    texts = prompts(count // 2, seed=seed, shortest=1, longest=90)
    return [
        Wish(
            ids=rng.choice(texts),
            seed=number,
            length=rng.choice((1, 3, 20, 40, 80)),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 1.0, 0.9)),
            top_k=rng.choice((-1, -1, 20)),
        )
        for number in range(count)
    ]


def bench_of(path: Path, *, deterministic: bool = True, rows: int = 96, width: int = 256) -> Bench:
    """An engine with `rows` cache rows of `width` positions."""
    dtype = torch.bfloat16 if "bf16" in path.name else torch.float32
    bench = make_bench(path, rows=rows, tokens=rows * width, dtype=dtype)
    if deterministic:
        scheduler = bench.scheduler
        model = scheduler.model
        scheduler.cache = KVCache(
            model.architecture, dtype=dtype, rows=rows, tokens=rows * width, spare_rows=SPARE_ROWS
        )
        scheduler.fixed_shapes = FixedShapes(model, scheduler.cache, find_sizes(model))
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


def among_others(bench: Bench, asked: list[Wish], rng: random.Random) -> dict[str, Answer]:
    """Run all of them in random order, with random arrival times."""
    for wish in rng.sample(asked, len(asked)):
        ask(bench, wish)
        for _ in range(rng.choice((0, 0, 0, 1, 5))):
            bench.step()
    return answers(bench)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No size of this model is a multiple of a vector register's."""
    return tiny_models.make_model(tmp_path_factory.mktemp("odd") / "odd", "qwen3", vocab_size=131, hidden=24)


@pytest.mark.parametrize("family", ["glm4", "odd", "glm4-bf16"])
def test_other_requests_order_row_and_width_change_nothing(
    family: str, model_dirs: dict[str, Path], odd_model: Path
) -> None:
    asked = wishes(16, seed=1)
    path = model_dirs.get(family, odd_model)
    expected = alone(bench_of(path), asked)
    for seed, (rows, width) in enumerate([(96, 192), (5, 320)]):
        bench = bench_of(path, rows=rows, width=width)
        assert among_others(bench, asked, random.Random(seed)) == expected
    assert len({tuple(tokens) for tokens, _ in expected.values()}) > 12


def test_control_the_default_path_depends_on_others(model_dirs: dict[str, Path]) -> None:
    """The fast path differs in the last bits of log-probs, so a token may differ once in a long while."""
    asked = wishes(16, seed=1)
    expected = alone(bench_of(model_dirs["glm4"], deterministic=False), asked)
    found = among_others(bench_of(model_dirs["glm4"], deterministic=False), asked, random.Random(0))
    assert found != expected


def test_log_probs_are_the_default_paths_within_rounding(model_dirs: dict[str, Path]) -> None:
    asked = wishes(12, seed=2)
    ours, theirs = (
        among_others(bench_of(model_dirs["llama3"], deterministic=on), asked, random.Random(0)) for on in (True, False)
    )
    for rid, (tokens, log_probs) in ours.items():
        assert tokens == theirs[rid][0]
        assert log_probs == pytest.approx(theirs[rid][1], abs=1e-5)


@dataclass(frozen=True)
class DependsOnItsRow:
    """A model whose logits in chunks of the given sizes differ slightly in the last row."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    sizes: tuple[int, ...]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.logits(hidden)
        if len(hidden) in self.sizes:
            found[-1, 3] = torch.nextafter(found[-1, 3], torch.tensor(float("inf")))
        return found


def test_a_size_with_differing_rows_is_unused(model_dirs: dict[str, Path]) -> None:
    model = make_bench(model_dirs["glm4"]).scheduler.model
    sizes, logits = find_sizes(model), model.logits
    assert sizes[0] > 1, "on this machine chunks are not what they should be, and generation is slow"
    model.logits = DependsOnItsRow(logits, sizes[:1])
    assert find_sizes(model) == sizes[1:]
    model.logits = DependsOnItsRow(logits, SIZES)
    assert find_sizes(model) == (1,)


def test_engines_report_whether_they_are_deterministic(
    model_dirs: dict[str, Path], glm4_engine: ForkedEngine, start_engine: StartEngine
) -> None:
    args = Args(deterministic=True, rollout_external_engines=("http://e:1",))
    deterministic = start_engine(model_dirs["glm4"], "--enable-deterministic-inference")

    async def describe() -> list[EngineInfo]:
        async with EngineClient("", engines=[glm4_engine.url, deterministic.url]) as client:
            return await client.describe()

    default, right = asyncio.run(describe())
    check_model(args, "http://e:1", right)
    with pytest.raises(ValueError, match="start it with --enable-deterministic-inference"):
        check_model(args, "http://e:1", default)
    check_model(Args(), "http://e:1", default)
