"""What a trainer loads when it starts, and what it does not."""

from __future__ import annotations

import json
import sys

import pytest

from slime.cluster.workers import without


def test_modules_are_hidden_while_megatron_is_imported_and_no_longer() -> None:
    sys.modules.pop("cProfile", None)
    with without("cProfile", "json"):
        with pytest.raises(ImportError):
            import cProfile
        assert sys.modules["json"] is json, "what stands there already is in use"
    import cProfile

    assert cProfile.run is not None
    assert sys.modules["json"] is json
