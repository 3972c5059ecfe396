"""The arguments of a restart, and that only a lost process causes one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from slime.cluster.life.restart import Restarts, resumed_args
from slime.cluster.life.stop import Stop, StopNoticed
from slime.cluster.loop.progress_poll import ProgressPoll
from slime.cluster.on_ray.ray_wait import POLL_S, Waiter, is_broken_link
from slime.config.args import Args
from slime.core.checkpoint_names import newest_checkpoint
from slime.core.errors import Fault, RunError
from tests.cluster.runs import small_ray


def test_the_newest_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    assert newest_checkpoint(None) is None
    assert newest_checkpoint(str(tmp_path)) is None
    for name in ("iter_0000003", "iter_0000012", ".tmp_iter_0000020", "iter_best", "release"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(str(tmp_path)) == 12


def test_a_run_continues_from_its_own_checkpoint() -> None:
    """This holds however the run began: with another run's checkpoint, its weights alone, an earlier one of its own."""
    begun = Args(save="/own", load="/others", ckpt_step=3, finetune=True, no_load_optim=True, no_load_rng=True)
    again = resumed_args(begun)
    assert (again.load, again.ckpt_step) == ("/own", None)
    assert not (again.finetune or again.no_load_optim or again.no_load_rng)
    assert resumed_args(Args(save="/own", no_save_optim=True)).no_load_optim, "there is none in the checkpoint"


def test_a_checkpoint_between_two_faults_resets_the_count() -> None:
    restarts = Restarts(limit=2, newest=None)
    assert [restarts.allow(None), restarts.allow(None), restarts.allow(None)] == [True, True, False]
    assert restarts.total == 2
    assert [restarts.allow(newest) for newest in (3, 3, 5, 5, 5)] == [True, True, True, True, False]
    assert (restarts.in_a_row, restarts.total) == (2, 6)
    assert not Restarts(limit=0, newest=3).allow(4), "no restart at all"


@ray.remote
class Actor:
    def say(self, what: str, after: float = 0.0) -> str:
        time.sleep(after)
        return what

    def refuse(self, error: Exception) -> None:
        raise error

    def answer(self, what: Any) -> None:
        """Let `progress` return this from now on, or raise it."""
        self.what = what

    def progress(self) -> Any:
        if isinstance(self.what, Exception):
            raise self.what
        return self.what

    def die(self, after: float = 0.0) -> None:
        time.sleep(after)
        os._exit(1)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def hang(self) -> None:
        time.sleep(600)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with small_ray():
        yield


@pytest.fixture(scope="module")
def steady(local_ray: None) -> Any:
    """An actor that lives as long as the tests do."""
    return Actor.options(num_cpus=0).remote()


@pytest.fixture
def doomed(local_ray: None) -> Iterator[Any]:
    """An actor of this test alone, whose process runs: starting it may take longer than a test waits."""
    actor: Any = Actor.options(num_cpus=0).remote()
    ray.get(actor.say.remote("here"))
    yield actor
    ray.kill(actor)


@pytest.fixture
def waiter(steady: Any) -> Waiter:
    made = Waiter(where="LOGS", limit=60.0, because="--limit")
    made.name(steady, "the steady one")
    return made


def test_a_refusal_is_not_a_fault(waiter: Waiter, steady: Any) -> None:
    assert waiter.get("trying", [steady.say.remote("here"), steady.say.remote("there")]) == ["here", "there"]
    expected = "trying failed: the steady one: ValueError: --flag 3: too much\nlogs: LOGS"
    with pytest.raises(RunError, match=expected) as caught:
        waiter.get("trying", [steady.refuse.remote(ValueError("--flag 3: too much"))])
    assert not isinstance(caught.value, Fault)


def test_a_collective_without_its_peer_is_a_fault(waiter: Waiter, steady: Any) -> None:
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(Fault, match="trying failed: the steady one: "):
        waiter.get("trying", [steady.refuse.remote(error), steady.say.remote("done")])
    from torch.distributed import DistBackendError  # here: the actors import this module

    assert is_broken_link(DistBackendError("NCCL error"))
    assert not is_broken_link(RuntimeError("CUDA out of memory"))


def test_the_process_that_died_is_named(waiter: Waiter, steady: Any, doomed: Any) -> None:
    waiter.name(doomed, "the doomed one")
    with pytest.raises(Fault, match="trying failed: the doomed one died"):
        waiter.get("trying", [steady.refuse.remote(RuntimeError("no peer")), doomed.die.remote(after=0.5)])


def test_only_the_silent_process_is_named(waiter: Waiter, steady: Any, doomed: Any) -> None:
    """Progress keeps a wait alive: the limit counts from the last progress."""
    waiter.name(doomed, "the doomed one")
    waiter.set_limit(2.0, because="--limit")
    hanging = doomed.hang.remote()
    with pytest.raises(Fault, match=r"trying: no answer for 2 s \(--limit\) from the doomed one; .* LOGS"):
        waiter.get("trying", [steady.say.remote("here"), hanging])
    looks: list[float] = []

    def moves() -> int:
        looks.append(time.monotonic())
        return min(len(looks), 4)

    with pytest.raises(Fault, match="no answer"):
        waiter.get("trying", [hanging], meanwhile=moves, every=0.5)
    assert looks[-1] - looks[0] > 3


def test_a_signal_ends_only_waits_that_allow_it(waiter: Waiter, steady: Any) -> None:
    said: list[str] = []
    stop = Stop()
    waiter.heed(stop, said.append)
    hanging: Any = Actor.options(num_cpus=0).remote()
    try:
        stop.asked = signal.SIGTERM
        assert waiter.get("rollout 3: training", [steady.say.remote("done", after=1.5 * POLL_S)]) == ["done"]
        with pytest.raises(StopNoticed):
            waiter.get("generation", [hanging.hang.remote()], give_up=True)
    finally:
        ray.kill(hanging)
    [line] = said
    assert line.startswith("SIGTERM: rollout 3: training is finished, what was trained is saved, and the run ends; ")


def test_background_work_fails_under_its_own_name(waiter: Waiter, doomed: Any) -> None:
    waiter.name(doomed, "the doomed one")
    waiter.watch("the work in the background", doomed.die.remote())
    busy: Any = Actor.options(num_cpus=0).remote()
    try:
        with pytest.raises(Fault, match="the work in the background failed: the doomed one died"):
            waiter.get("trying", [busy.hang.remote()])
    finally:
        ray.kill(busy)


# --- the progress that the console shows -------------------------------------------------------------------------


def polled(manager: Any, shown: list[Any], warned: list[str]) -> ProgressPoll:
    return ProgressPoll(manager, show=shown.append, warn=warned.append, every=0.0)


def looked(poll: ProgressPoll, until: Callable[[], bool]) -> None:
    """Look until the condition holds; no look may take long."""
    deadline = time.monotonic() + 60
    while not until():
        before = time.monotonic()
        poll.look()
        assert time.monotonic() - before < 5 and before < deadline
        time.sleep(0.05)


def test_progress_is_fetched_without_waiting(waiter: Waiter, steady: Any, doomed: Any) -> None:
    """An actor that is busy answers later, and then its answer is shown; meanwhile the driver's wait goes on."""
    shown: list[Any] = []
    poll = polled(steady, shown, [])
    ray.get(steady.answer.remote("half"))
    waiter.between = poll.look
    waiter.get("trying", [doomed.sleep.remote(4.0)])
    assert shown and set(shown) == {"half"}
    busy = polled(doomed, shown, [])
    doomed.sleep.remote(2.0)
    doomed.answer.remote("late")
    looked(busy, lambda: shown[-1] == "late")


def test_progress_that_fails_ends_no_wait(waiter: Waiter, steady: Any, doomed: Any) -> None:
    """One warning is printed. If the manager has died, there is none: the wait for the manager reports it."""
    shown: list[Any] = []
    warned: list[str] = []
    poll = polled(steady, shown, warned)
    ray.get(steady.answer.remote(ValueError("a broken count")))
    waiter.between = poll.look
    looked(poll, lambda: bool(warned))
    assert waiter.get("trying", [doomed.sleep.remote(2.0)]) == [None]
    assert (len(warned), shown) == (1, [])
    dead = polled(doomed, shown, warned)
    waiter.name(doomed, "the doomed one")
    waiter.between = dead.look
    with pytest.raises(Fault, match="the doomed one died"):
        waiter.get("trying", [doomed.die.remote(after=1.0)])
    for _ in range(20):
        dead.look()
        time.sleep(0.05)
    assert (len(warned), shown) == (1, [])
