"""The megatron-core that an import would load is the supported one, or the error names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INFO = 'MAJOR = 0\nMINOR = {minor}\nPATCH = 1\nPRE_RELEASE = ""\nVERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)\n'


ALONE = f"import runpy; runpy.run_path({str(ROOT / 'slime/megatron/compat/version.py')!r})['check_megatron_version']()"
"""The check alone; importing slime.megatron goes on to import Megatron, which takes seconds."""


def check_with(*paths: Path, program: str = "import slime.megatron") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)


def megatron_tree(root: Path, info: str | None) -> Path:
    core = root / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('this tree is imported')\n")
    if info is not None:
        (core / "package_info.py").write_text(info)
    return root


def test_the_installed_version_passes():
    assert check_with(program=ALONE).returncode == 0
    assert check_with(ROOT / "missing", program=ALONE).returncode == 0


def test_another_tree_on_pythonpath_is_named(tmp_path: Path):
    same = check_with(megatron_tree(tmp_path / "same", INFO.format(minor=16))).stderr
    assert "this tree is imported" in same, "control: the supported version is taken from wherever it is"
    for name, info, version in (("other", INFO.format(minor=15), "0.15.1"), ("none", None, "unknown")):
        tree = megatron_tree(tmp_path / name, info)
        error = check_with(tree).stderr
        file = tree / "megatron" / "core" / "package_info.py"
        assert f"ValueError: megatron-core at {file} is version {version}, not 0.16.1" in error
        assert "off PYTHONPATH" in error
        assert "this tree is imported" not in error, "nothing of it may run"
        assert check_with(tree, program=ALONE).returncode == 1, "control of the check alone"
