"""The proof that the engines hold the actor's weights, and nobody else's.

Path: run at the first sync of a run (also after a resume) and in tests; later syncs compare the policy version.
Invariant: the engines' checksum after a sync equals their checksum after loading the actor's HF export from disk.
The weights are wiped in between, so that an engine that ignores the load cannot pass.
"""

from __future__ import annotations

from pathlib import Path

from slime.sync.broadcast import BroadcastTransport


def prove_weights(transport: BroadcastTransport, export: Path, *, version: int) -> None:
    """Compare every engine's checksum after the sync of `version` with that after loading `export`.

    Raises:
        ValueError: naming the engines whose weights differ.
    """
    synced = transport.checksums()
    transport.load_from_disk(str(export), version=version)
    loaded = transport.checksums()
    wrong = [index for index, (a, b) in enumerate(zip(synced, loaded, strict=True)) if a != b]
    if wrong:
        raise ValueError(
            f"weight sync, policy version {version}: engines {wrong} do not hold the actor's weights: checksums after "
            f"the sync {[synced[i] for i in wrong]}, after loading the actor's export {[loaded[i] for i in wrong]}"
        )


def check_versions(transport: BroadcastTransport, *, version: int) -> None:
    """Every engine reports `version`.

    Raises:
        ValueError: naming what each engine reports.
    """
    versions = transport.versions()
    if any(reported != str(version) for reported in versions):
        raise ValueError(f"weight sync: policy version {version} was sent, the engines report {versions}")
