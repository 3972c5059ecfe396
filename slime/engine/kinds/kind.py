"""EngineKind: everything that differs between the kinds of engines when a run starts one.

- Used by: `launch` starts an engine from its kind's record; the driver checks what is installed.
- Invariant: nothing outside this folder knows a kind by its name. What rules and plans need is in
  `slime.config.engine_kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from slime.config.args import Args
from slime.config.engine_kinds import ENGINE_KINDS, ON_CPU
from slime.engine.command_line import ServerCommand
from slime.engine.server_process import ManagedProcess, find_free_port


@dataclass(frozen=True, kw_only=True)
class EngineStart:
    """The inputs for the start of one engine: its model, its place and its number."""

    model_path: str
    """The HF directory, --hf-checkpoint."""
    index: int
    """The number of the engine, from 0."""
    host: str
    port: int
    gpu_ids: Sequence[str] = ()
    """The GPUs in the order of its ranks, as CUDA_VISIBLE_DEVICES names them. Empty: those of the environment."""
    directory: Path | None = None
    """A directory of its own, which is removed after it, if the kind needs one."""


def _free_port(host: str, index: int) -> int:
    return find_free_port(host)


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """One kind of engine. Only `command` is required; the defaults are those of a small server on a CPU.

    An engine is a server that speaks SGLang's HTTP API (`protocol`), answers GET /health with 200 once it is ready, and
    ends on SIGTERM.
    """

    command: Callable[[Args, EngineStart], ServerCommand]
    """Returns how to run it. Raises ValueError if a flag cannot be passed on to it."""
    check: Callable[[Args], object] | None = None
    """Checks that what is installed on a machine can run it; raises ValueError. None: there is nothing to check."""
    is_installed: Callable[[], bool] = lambda: True
    """Returns whether it is installed on this machine at all, so that a driver without GPUs skips its check."""
    port: Callable[[str, int], int] = _free_port
    """Returns a port that is free now, for an address and the number of an engine."""
    phases: tuple[tuple[str, str], ...] = ()
    """Texts in its log, each with what the engine does after it, for messages while it starts."""
    warm_up: Callable[[Args, ManagedProcess, float], None] | None = None
    """Called once it is ready, with the seconds that are left; raises RuntimeError."""
    needs_directory: bool = False
    """Whether it gets a temporary directory of its own."""
    logs_secrets: bool = False
    """Whether it writes its settings into its log, which then only its user may read."""
    takes_free_memory: bool = False
    """Whether it takes a share of the GPU memory that is free when it starts, so that trainers start after it."""


def kind_of(args: Args) -> EngineKind:
    """Return the kind of engine that --rollout-engine names; `auto`, if no GPU has decided it, is the one for a CPU.

    Raises:
        ValueError: the module in the kind's row has no `KIND`.
    """
    module = args.engine.module or ENGINE_KINDS[ON_CPU].module or ""
    kind = vars(import_module(module)).get("KIND")
    if not isinstance(kind, EngineKind):
        raise ValueError(f"--rollout-engine {args.rollout_engine}: {module} has no EngineKind named KIND")
    return kind


def check_here(args: Args) -> None:
    """Check what is installed on this machine, if the run starts engines and their kind is installed here at all.

    Raises:
        ValueError: what is installed cannot be started as the run requires.
    """
    kind = kind_of(args)
    if args.starts_engines and kind.check is not None and kind.is_installed():
        kind.check(args)
