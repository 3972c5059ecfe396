"""Asynchronous training: the next rollout is generated while the current one trains.

    slime train-async run.yaml
    python3 train_async.py --hf-checkpoint ... --prompt-data ... --num-rollout ...

    engines     generate 0       generate 1       generate 2       generate 3
    trainers    (wait)           train 0, sync    train 1, sync    train 2, sync

`generate_ahead` waits for the rollout in flight and starts the next one; `train` runs while the engines generate. The
weights that generate a rollout are therefore one rollout older than those that train on it: see --offpolicy-correction
and --max-staleness. --update-weight-pause decides whether a weight sync waits for the rollout in flight or happens
between its requests.

The flags are those of `train`. Engines and trainers need separate devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.cli.simulated import simulate_if_asked
from slime.cluster.main import run
from slime.core.verbs import Verbs


def train(cluster: Verbs) -> None:
    """Run the loop: take the finished rollout and start the next one, train, save, send the weights, evaluate."""
    cluster.sync_weights()
    cluster.evaluate_before_first()
    for rollout in cluster.rollouts():
        batch = cluster.generate_ahead(rollout)  # the generation of the next one begins
        cluster.train(rollout, batch)
        cluster.save_if_due(rollout)
        cluster.sync_weights()
        cluster.evaluate_if_due(rollout)


def main(argv: Sequence[str]) -> None:
    """Train, with generation one rollout ahead; `argv` and errors are those of `train`."""
    run(train, argv, rollouts_ahead=1, after_plan=simulate_if_asked)
