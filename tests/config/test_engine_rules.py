"""Rules for external engines and routers, and for the weight sync to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from config_run import Run

from slime.config.resolve import cuda_available, in_directory
from slime.plan.summary import format_plan

URLS = "http://127.0.0.1:4000 http://127.0.0.1:4001"
NEAR = f"--rollout-external-engines {URLS}"
OWN = "--rollout-engine embedded --rollout-num-gpus 1"
SGLANG = "--bf16 --rollout-engine sglang --rollout-num-gpus 1 --dry-run"
FAR = "--rollout-external-engines http://10.0.0.7:4000"


@pytest.fixture
def bare(run: Run) -> Run:
    """A command line without engines."""
    words = " ".join(run.base).replace("--rollout-engine embedded --rollout-num-gpus 2 ", "")
    return replace(run, base=words.split())


def test_each_url_is_one_engine(bare: Run) -> None:
    args, problems = bare.load(*NEAR.split())
    assert (args.num_engines, problems) == (2, [])
    assert bare.args(*NEAR.split(), "--rollout-num-gpus", "2").num_engines == 2
    assert bare.args(*NEAR.split(), "--rollout-num-gpus-per-engine", "4").num_engines == 2
    trains_alone = ["--debug-train-only", "--load-debug-rollout-data", f"{bare.data}.dump"]
    threads = bare.args("--rollout-num-gpus", "0", *trains_alone).cpu_threads_per_process
    assert bare.args(*NEAR.split()).cpu_threads_per_process == threads, "only what the run starts shares the cores"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{NEAR} --rollout-num-gpus 3", "--rollout-num-gpus 3: --rollout-external-engines names 2"),
        (f"{NEAR} --rollout-num-gpus 0", "--rollout-num-gpus 0: --rollout-external-engines names 2"),
        (f"{NEAR} http://127.0.0.1:4000", "http://127.0.0.1:4000 is given twice"),
        ("--rollout-external-engines 10.0.0.7:4000", "10.0.0.7:4000 is not an engine's URL"),
        ("--rollout-external-engines http://10.0.0.7", "http://10.0.0.7 is not an engine's URL"),
        ("--rollout-external-engines http://10.0.0.7:4000/v1", "http://10.0.0.7:4000/v1 is not an engine's URL"),
        ("--rollout-external-engines http://10.0.0.7:99999", "http://10.0.0.7:99999 is not an engine's URL"),
        (f"{NEAR} --colocate --dry-run", "--colocate shares the training GPUs with engines that the run starts"),
        (f"{FAR}", "neither it nor --save was given, and http://10.0.0.7:4000 must read files there"),
        ("--bf16 --rollout-engine sglang --rollout-num-gpus 1", "--rollout-engine sglang: SGLang needs a GPU"),
        (f"{OWN} --sglang-pp-size 2", "--sglang-pp-size 2: an engine must be one tensor-parallel group"),
        (f"{OWN} --sglang-api-key=", "--sglang-api-key: is empty, and an empty key does not count"),
        (f"{OWN} --router-api-key kéy", "--router-api-key: has a space, a control character or a letter outside"),
        (f"{OWN} --router-control-plane-api-keys x", "--router-control-plane-api-keys: value 1 of 1 has 1 of the 4"),
        (f"{OWN} --router-control-plane-api-keys a:b:admin:c a:b:root:c", "value 2 of 2 has a role other than admin"),
        (f"{OWN} --router-control-plane-api-keys a:b:admin:", "value 1 of 1 has a KEY that is empty"),
        (f"{OWN} --router-control-plane-api-keys :b:admin:c", "value 1 of 1 has no ID or no NAME"),
        (
            f"{OWN} --sglang-router-ip 10.0.0.9 --sglang-router-port 9 --router-control-plane-api-keys a:b:user:c",
            "--router-control-plane-api-keys: no key has the role admin",
        ),
        (
            f"{SGLANG} --sglang-tokenizer-worker-num 2 --sglang-api-key a",
            "--sglang-tokenizer-worker-num 2: SGLang accepts no API key with several tokenizer workers, but --sglang-",
        ),
        (f"{OWN} --sglang-admin-api-key 2", "one key is used for all requests"),
        (f"{OWN} --sglang-router-port 4000", "--sglang-router-port 4000: is half of an address"),
        (
            f"{SGLANG} --no-bf16",
            "--rollout-engine sglang: SGLang's kernels on CUDA compute in 16 bits, but its engines would have to",
        ),
        (
            f"{SGLANG} --bf16 --sglang-dtype float",
            "SGLang's kernels on CUDA compute in 16 bits",
        ),
        (
            f"{SGLANG} --update-weight-pause retract",
            "--update-weight-pause retract: SGLang cannot flush its prefix cache while requests wait",
        ),
        (
            "--colocate --actor-num-gpus-per-node 3 --rollout-num-gpus-per-engine 2 --dry-run",
            "--rollout-num-gpus-per-engine 2: does not divide the 3 training GPUs, which --colocate shares",
        ),
    ],
)
def test_one_error(bare: Run, words: str, message: str) -> None:
    assert message in bare.error(*words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            f"{NEAR} --rollout-engine sglang",
            "--rollout-engine sglang: no effect: --rollout-external-engines already run",
        ),
        (f"{NEAR} --sglang-context-length 64 --sglang-api-key a", "--sglang-context-length: no effect"),
        (
            f"{OWN} --sglang-router-ip 127.0.0.1 --sglang-router-port 9 --router-policy random",
            "--router-policy: no effect: the router already runs",
        ),
        ("--bf16 --colocate --rollout-engine sglang --dry-run --update-weight-pause retract", "no request in flight"),
        (f"{OWN} --update-weight-pause retract", "train.py has no request in flight while weights change"),
        (f"{SGLANG} --update-weight-pause in_place --sglang-disable-radix-cache", "no request in flight"),
        (f"{SGLANG} --sglang-tokenizer-worker-num 2", "so everyone who reaches an engine can change its weights"),
        (f"{OWN} --update-weight-disk-dir x --no-check-weight-sync", "no weights are written to files"),
    ],
)
def test_one_warning(bare: Run, words: str, message: str) -> None:
    [warning] = bare.warnings(*words.split())
    assert message in warning


@pytest.mark.parametrize(
    "words",
    [
        f"{FAR} --update-weight-disk-dir DIR",
        f"{FAR} --save DIR",
        f"{FAR} --no-check-weight-sync",
        f"{NEAR} --update-weight-transport disk",
        f"{OWN} --update-weight-transport disk --update-weight-disk-dir DIR",
        f"{OWN} --sglang-router-ip 10.0.0.9 --sglang-router-port 9",
        f"{OWN} --sglang-router-ip 10.0.0.9 --sglang-router-port 9 --sglang-api-key a --router-api-key b",
        f"{OWN} --router-control-plane-api-keys a:b:user:c",
        f"{OWN} --sglang-router-ip 10.0.0.9 --sglang-router-port 9 --router-control-plane-api-keys a:b:admin:c:d",
        f"{SGLANG} --no-bf16 --sglang-dtype bfloat16",
    ],
)
def test_passes(bare: Run, words: str) -> None:
    args, problems = bare.load(*words.replace("DIR", str(bare.directory / "out")).split())
    assert problems == []
    assert in_directory(args, "own").update_weight_disk_dir is not None


def test_weight_files_are_next_to_the_checkpoints(bare: Run) -> None:
    run = OWN.split()
    assert bare.args(*run, "--save", "s", "--log-dir", "l").update_weight_disk_dir == "s/engine-weights"
    assert in_directory(bare.args(*run, "--log-dir", "l"), "own").update_weight_disk_dir == "own/engine-weights"
    assert bare.args(*run, "--log-dir", "l", "--save-interval", "0").update_weight_disk_dir == "l/engine-weights"
    assert bare.args(*run, "--update-weight-disk-dir", "d").update_weight_disk_dir == "d"


def test_the_joined_cluster_decides_the_engine_kind(bare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--rollout-num-gpus", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert bare.args(*words).rollout_engine == ("sglang" if cuda_available() else "embedded")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    args, problems = bare.load(*words)
    decided = "sglang" if cuda_available() else "auto"
    assert args.rollout_engine == decided
    assert decided == "sglang" or "SGLang if Ray's cluster has GPUs" in format_plan(args, problems)


@pytest.mark.skipif(cuda_available(), reason="is about a machine without CUDA")
def test_precision_and_pauses_when_the_cluster_decides(bare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head node without GPUs must not decide that a cluster's GPUs train in fp32 or use embedded engines."""
    bare.base.remove("--no-bf16")
    words = ("--rollout-num-gpus", "1", "--dry-run")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert bare.warnings(*words) == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    [warning] = bare.warnings(*words)
    assert "this machine has no CUDA, so the run computes in fp32" in warning
    assert bare.warnings(*words, "--bf16") == bare.warnings(*words, "--no-bf16") == []
    assert "SGLang cannot flush its prefix cache" in bare.error(*words, "--bf16", "--update-weight-pause", "in_place")
