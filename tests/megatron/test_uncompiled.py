"""On a CPU megatron-core's fused functions are plain ones, and torch's compiler is not loaded for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys, types
{first}
import slime.megatron.model.build
from megatron.core.fusions.fused_bias_swiglu import swiglu
print(type(swiglu) is types.FunctionType and not hasattr(swiglu, "_torchdynamo_orig_callable"))
print("torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="where CUDA is, they are compiled")
@pytest.mark.parametrize(
    ("first", "expected"),
    [("", ["True", "False"]), ("import megatron.core", ["False", "True"])],
    ids=["slime first", "control: megatron-core first"],
)
def test_fused_functions_are_as_they_were_written(first: str, expected: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(first=first)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == expected
