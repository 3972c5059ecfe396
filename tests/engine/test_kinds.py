"""A kind of engine is one file and one row of ENGINE_KINDS: a dummy is added that way, and started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest

from slime.config.args import Args
from slime.config.engine_kinds import AUTO, ENGINE_KINDS, ON_CPU, ON_GPUS, EngineFacts
from slime.config.flags.table import all_flags
from slime.config.rules.case import Case
from slime.config.rules.engines import sglang
from slime.config.rules.no_effect import no_effect
from slime.engine.kinds.kind import EngineKind, kind_of
from slime.engine.launch import OwnEngine
from slime.engine.server_process import is_healthy


@pytest.fixture
def dummy(tmp_path: Path) -> Iterator[Args]:
    """Add the one row whose file is `dummy_kind.py`; return Args that choose it."""
    rows = cast(dict[str, EngineFacts], ENGINE_KINDS)
    rows["dummy"] = EngineFacts(
        label="a dummy", module="tests.engine.dummy_kind", on_cpu=True, settings=frozenset({"api_key"})
    )
    yield Args(num_rollout=1, rollout_num_gpus=1, rollout_engine="dummy", hf_checkpoint=str(tmp_path))
    del rows["dummy"]


def test_every_row_is_a_choice_with_a_record() -> None:
    [spec] = [spec for spec in all_flags() if spec.name == "rollout_engine"]
    assert spec.choices == tuple(ENGINE_KINDS)
    for name in ENGINE_KINDS:
        assert isinstance(kind_of(Args(rollout_engine=name)), EngineKind)
    assert kind_of(Args(rollout_engine=AUTO)) is kind_of(Args(rollout_engine=ON_CPU))
    assert (ENGINE_KINDS[ON_GPUS].on_gpus, ENGINE_KINDS[ON_CPU].on_cpu) == (True, True)


def test_a_dummy_kind_is_started(dummy: Args, tmp_path: Path) -> None:
    engine = OwnEngine(dummy, index=0, log_path=tmp_path / "engine.log", gpu_ids=())
    assert (engine.phase(), engine.alive()) == ("starting", False)
    url = engine.start("127.0.0.1")
    try:
        assert is_healthy(url)
        assert (engine.phase(), engine.alive()) == ("ready", True)
        assert f"opening {tmp_path}" in (tmp_path / "engine.log").read_text()
    finally:
        engine.stop()
    assert not engine.alive()
    assert not is_healthy(url)


def test_rules_read_the_facts_of_a_dummy_kind(dummy: Args) -> None:
    case = Case(args=with_settings(dummy, {"api_key": "k", "mem_fraction_static": 0.5}), given=frozenset())
    assert list(sglang(case)) == [], "it needs no GPU"
    [problem] = [each for each in no_effect(case) if each.where.startswith("--sglang")]
    assert problem.where == "--sglang-mem-fraction-static"
    assert (dummy.engines_on_cpu, dummy.gpus_per_engine, dummy.fp32_fault) == (True, 0, None)


def with_settings(args: Args, sglang: Mapping[str, object]) -> Args:
    return Args(**{**vars(args), "sglang": sglang})


def test_a_row_without_a_record_is_named(dummy: Args) -> None:
    rows = cast(dict[str, EngineFacts], ENGINE_KINDS)
    rows["dummy"] = EngineFacts(label="nothing", module="tests.engine.tiny_models")
    with pytest.raises(ValueError, match=r"--rollout-engine dummy: tests\.engine\.tiny_models has no EngineKind"):
        kind_of(dummy)
