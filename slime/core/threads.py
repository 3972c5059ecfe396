"""How the threads of a run's processes wait for each other."""

from __future__ import annotations

THREADS_SLEEP_SOON = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
"""Environment for OpenMP: who waits sleeps soon, for others of the run share the cores, and who spins keeps them from
those it waits for. Not at once: small operators follow each other within some ten microseconds, and waking takes longer
than that. With two threads a step of the demo's trainer takes 1.2 to 1.5 s where they sleep at once, 1.0 s so.
GOMP_SPINCOUNT goes before the policy in GNU's OpenMP, which PyTorch's wheels bring; others know the policy alone."""
