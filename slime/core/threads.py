"""How the OpenMP threads of a run's processes wait for each other."""

from __future__ import annotations

THREADS_SLEEP_SOON = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
"""Environment for OpenMP: idle threads spin briefly and then sleep, so that other processes get the cores.

They do not sleep at once, because small operators follow each other within about ten microseconds and waking up takes
longer than that. With two threads, a step of the demo's trainer takes 1.2 to 1.5 s if idle threads sleep at once and
1.0 s with these values. GOMP_SPINCOUNT overrides the policy in GNU's OpenMP, which PyTorch's wheels contain; other
implementations read the policy alone.
"""
