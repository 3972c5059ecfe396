"""The collector pauses during imports, and runs as before afterwards."""

from __future__ import annotations

import gc

import pytest

from slime.core.imports import importing


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_pauses_and_goes_on(enabled: bool) -> None:
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            import no_such_module  # noqa: F401  # pyright: ignore[reportMissingImports]
        assert gc.isenabled() == enabled, "also after a failed import"
        assert gc.get_freeze_count() > frozen
    finally:
        (gc.enable if before else gc.disable)()
