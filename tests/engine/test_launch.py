from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.config.args import Args
from slime.engine.kinds.sglang import installed_version
from slime.engine.launch import launch_engine, launch_router
from slime.engine.server_process import find_free_port

ROOT = Path(__file__).parents[2]


def test_a_key_stays_hidden_in_spawned_children_too(tmp_path: Path) -> None:
    """As in SGLang, the module starts processes that import it again, by its name."""
    (tmp_path / "serving.py").write_text(
        "import multiprocessing, os, sys\n"
        "def child(words): print('child', words, 'SLIME_SECRET_FLAGS' in os.environ, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    process = context.Process(target=child, args=(sys.argv[1:],))\n"
        "    process.start(); process.join(); sys.exit(process.exitcode)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "SLIME_SECRET_FLAGS": '["--api-key=secret"]',
    }
    command = [sys.executable, "-m", "slime.engine.keyed", "serving", "--port", "1"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    assert output == "child ['--port', '1', '--api-key=secret'] False\n"


@pytest.mark.skipif(installed_version() is not None, reason="SGLang is installed")
def test_a_missing_sglang_is_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of a run before\n")
    args = Args(num_rollout=1, rollout_engine="sglang", hf_checkpoint="/model", bf16=True, sglang={"api_key": "secret"})
    process = launch_engine(args, index=0, host="127.0.0.1", port=find_free_port(), log_path=log, gpu_ids=("0",))
    with pytest.raises(RuntimeError, match=r"(?s)engine 0 ended while starting .*sglang"):
        process.wait_ready(60)
    process.stop()
    assert log.stat().st_mode & 0o777 == 0o600, "SGLang writes the key into it"


def test_an_engine_is_launched_from_args(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    args = Args(
        num_rollout=1,
        rollout_engine="embedded",
        hf_checkpoint=str(model_dirs["glm4"]),
        cpu_threads_per_process=1,
        sglang={"context_length": 100, "mem_fraction_static": 0.7},
    )
    port = find_free_port()
    process = launch_engine(args, index=0, host="127.0.0.1", port=port, log_path=tmp_path / "engine.log")
    process.wait_ready(60)
    import json
    import urllib.request

    with urllib.request.urlopen(process.url + "/server_info", timeout=30) as answer:
        assert json.loads(answer.read())["context_length"] == 100
    process.stop()


def test_an_engine_that_cannot_serve_gives_the_reason(tmp_path: Path) -> None:
    args = Args(num_rollout=1, hf_checkpoint="/no/such/dir")
    process = launch_engine(args, index=0, host="127.0.0.1", port=find_free_port(), log_path=tmp_path / "log")
    with pytest.raises(RuntimeError, match="name a Hugging Face directory"):
        process.wait_ready(60)


def test_a_bad_router_flag_shows_the_log(tmp_path: Path) -> None:
    args = Args(num_rollout=1, router={"policy": "by_colour"})
    process = launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=tmp_path / "log")
    with pytest.raises(RuntimeError, match="by_colour"):
        process.wait_ready(60)
