"""The proof that the engines hold the actor's weights, and nobody else's.

Path: run at the first sync of a run (also after a resume) and in tests; later syncs compare the policy version.
Invariant: the engines' checksum after a sync equals their checksum after loading the actor's HF export from disk.
The weights are wiped in between, so that an engine that ignores the load cannot pass; the export is gathered and
written anew, so that a sync by disk is never compared with its own files.
"""

from __future__ import annotations

from pathlib import Path

from slime.sync.transport import Transport


def prove_weights(transport: Transport, export: Path, *, version: int) -> None:
    """Compare every engine's checksum after the sync of `version` with that after loading `export`.

    Raises:
        RuntimeError: naming the engines whose weights differ.
    """
    synced = transport.checksums()
    transport.load_from_disk(str(export.absolute()), version=version)
    loaded = transport.checksums()
    wrong = [f"{url} ({synced[url]}, {loaded[url]})" for url in synced if synced[url] != loaded[url]]
    if wrong:
        raise RuntimeError(
            f"weight sync, policy version {version}: engines do not hold the actor's weights: {', '.join(wrong)} "
            "(checksums after the sync, and after loading the actor's export)"
        )


def check_versions(transport: Transport, *, version: int) -> None:
    """Every engine reports `version`.

    Raises:
        RuntimeError: naming the engines that report another.
    """
    wrong = [f"{url} reports {told}" for url, told in transport.versions().items() if told != str(version)]
    if wrong:
        raise RuntimeError(f"weight sync: policy version {version} was sent, {', '.join(wrong)}")
