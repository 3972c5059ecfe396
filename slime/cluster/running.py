"""Start the cluster of a run, and say at the end what the run has made.

- Called by: `restart`, once for each attempt of a run. It starts the processes, opens the run's files, and yields
  a `Cluster`, which the training loop uses.
- Invariant: leaving the block ends every process that it started. The run's directory is changed only once trainers and
  prompts have been loaded, so that a run that cannot start leaves an earlier one as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from slime.cluster.actors import running_processes
from slime.cluster.cluster import Cluster
from slime.cluster.engines.colocation import make_memory_schedule
from slime.cluster.life.ending import closing_lines
from slime.cluster.life.stop import Stop
from slime.cluster.loop.start_trackers import start_trackers
from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.config.secrets import masker_of
from slime.observability.best_checkpoint import BestCheckpoint
from slime.observability.console.hints import RewardHints
from slime.observability.console.run_console import RunConsole
from slime.observability.logs import log_to_file
from slime.observability.run_directory import RunDirectory
from slime.observability.run_record import add_start, command_line, describe_start


def _run_directory(args: Args) -> RunDirectory:
    """Return the run's directory, locked together with every other place that the run writes to."""
    directories = [args.save_debug_train_data, args.save if args.num_rollout != 0 else None]
    outputs = [args.save_hf, args.save_debug_rollout_data]
    return RunDirectory(
        Path(args.resolved.log_dir),
        [Path(path) for path in directories if path is not None],
        [Path(path) for path in outputs if path is not None],
    )


@contextmanager
def running_cluster(
    args: Args, stop: Stop, *, restarts: int = 0, begin: float | None = None, opening: str = ""
) -> Iterator[Cluster]:
    """Start a cluster for the block; leaving the block ends every process that it started.

    Args:
        args: the run's arguments.
        stop: asked by a signal; until the loop trains, a signal ends the run at once.
        restarts: how often faults have ended this run before.
        begin: when it began, by `time.monotonic`; None: now.
        opening: the plan that has been printed, which goes into the driver's log and run.json.

    Raises:
        RunError: naming what does not start.
    """
    begin = time.monotonic() if begin is None else begin
    with ExitStack() as cleanup:
        directory = _run_directory(args)
        cleanup.callback(directory.close)
        log_to_file(directory.logs, "driver", masker_of(args))
        console = RunConsole()
        cleanup.callback(console.close)
        console.log(opening)
        processes = cleanup.enter_context(running_processes(args, directory.logs, console))
        stop.install()  # Ray has replaced our handler with its own
        memory = make_memory_schedule(args, processes)
        loaded, warnings = memory.load()
        last, policy_version = processes.num_rollouts, 0
        first, state = (0, None) if loaded is None else (loaded.next_rollout_id, loaded.state)
        if state is not None:
            policy_version = state["policy_version"]
            restoring = [processes.manager.load_state_dict.remote(state["rollout"])]
            processes.waiter.get("restoring the data side", restoring)
        # From here on the run is accepted, so what it reports goes into its directory.
        directory.write_args(dump_args(args))
        source = None if loaded is None else Path(loaded.source)
        in_place = source is not None and args.save is not None and Path(args.save) in source.parents
        continued = state is not None and in_place
        console.begin(total=last, done=first, hints=_hints(args), faults=restarts)
        # A run without rollouts writes no metrics again, so it keeps all of them, also those after the checkpoint.
        seen = first if last else None
        metrics, damage = directory.continue_metrics(seen) if continued else (directory.new_metrics(), list[str]())
        cleanup.callback(metrics.close)
        run_id = directory.run_id(new=not continued)
        facts = {"run": run_id, "rollouts_done": first, "restarts": restarts}
        damage += add_start(directory.path, describe_start(command_line(), opening, masker_of(args), facts))
        metrics.track(start_trackers(args, run_id, first), console.say)
        if state is not None and last:
            metrics.write(first, state["times"])
        best = None
        if args.keep_best_checkpoint is not None and args.save is not None and last:
            best = BestCheckpoint(Path(args.save), args.keep_best_checkpoint, say=console.say)
            if source is not None and continued:
                best.saved(source, step=first)
        if restarts:
            metrics.write(first, {"fault/run_restarts": restarts})
        for warning in [*warnings, *damage]:
            console.say(f"WARNING {warning}")
        if loaded is not None:
            console.say(f"actor loaded from {loaded.source}, starting at rollout {first}")
        if 0 < last <= first:
            console.say(f"nothing left to train: {first} of {last} rollouts are done")
        memory.connect()
        processes.started()
        cluster = Cluster(
            args,
            stop=stop,
            processes=processes,
            memory=memory,
            metrics=metrics,
            console=console,
            best=best,
            rollouts=range(first, last),
            policy_version=policy_version,
        )
        with cluster.last_save():
            yield cluster
        outcome = cluster.outcome(time.monotonic() - begin, loaded=loaded and loaded.source)
    for line in closing_lines(args, outcome):
        console.say(line, whole=line.startswith(("model: ", "next: ")))  # these are copied


def _hints(args: Args) -> RewardHints | None:
    """Return the hints about rewards; None if the loss does not come from comparing the rewards themselves."""
    changed = args.custom_reward_post_process_path is not None or args.overlong_buffer_len is not None
    return RewardHints(args.rollout_batch_size) if args.compares_group and not changed else None
