"""The short form of `make test-layouts`, and the bugs that it has to notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from worker_pool import WorkerPool

from tests.layouts.bugs import BUGS, exercises
from tests.layouts.draws import draw
from tests.layouts.one_step import Pair, run_cut, run_pair, run_plain

pytestmark = pytest.mark.dist

SHORT = ((10, 2), (38, 2), (30, 2), (27, 4), (33, 4), (101, 4))
"""Seeds and numbers of processes. In the first two draws the experts' tensor parallelism differs from the other
layers', in the last two there are virtual stages; three have a critic."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("seed", "num_ranks"), SHORT)
def test_a_split_step_equals_the_whole_one(seed: int, num_ranks: int, workers: WorkerPool, root: Path) -> None:
    drawn = draw(seed, root, num_ranks=num_ranks)
    errors = run_pair(workers, drawn, root).errors()
    assert max(errors.values()) <= 1, (str(drawn), errors)


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_the_first_draw_with_a_bug_notices_it(bug: str, workers: WorkerPool, root: Path) -> None:
    drawn = next(each for each in (draw(seed, root, num_ranks=2) for seed in range(100)) if exercises(bug, each))
    plain, near = run_plain(workers, drawn, root)
    wrong = Pair(plain, run_cut(workers, drawn, root, plain.batch, bug), near).errors()
    of_critic = ("critic's gradient", "critic's weights")
    shown = of_critic if bug == "unweighted critic" else ("gradient", "gradient norm", "weights")
    assert min(wrong[name] for name in shown) > 100, (str(drawn), wrong)
    right = Pair(plain, run_cut(workers, drawn, root, plain.batch), near).errors()
    assert max(right.values()) <= 1, (str(drawn), right)


def test_the_seed_decides_the_whole_draw(root: Path) -> None:
    assert draw(7, root) == draw(7, root) and str(draw(7, root)) != str(draw(8, root))
