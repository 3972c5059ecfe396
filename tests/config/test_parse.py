"""The parsing of argv and YAML: forms, precedence, errors and the frozen result."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from config_run import ROOT, Run

from slime.config.args import Args
from slime.config.parse import dump_args, load_args
from slime.config.resolve import resolve


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--lr", "2e-6"], "lr", 2e-6),
        (["--lr=2e-6"], "lr", 2e-6),
        (["--lr", "1", "--lr", "2e-6"], "lr", 2e-6),
        (["--balance-data"], "balance_data", True),
        (["--balance-data", "--no-balance-data"], "balance_data", False),
        (["--balance-data=false"], "balance_data", False),
        (["--no-load-optim"], "no_load_optim", True),
        (["--no-load-optim", "--load-optim"], "no_load_optim", False),
        (["--no-rope-fusion"], "no_rope_fusion", True),
        (["--no-check-weight-sync"], "check_weight_sync", False),
        (["--eval-top-k", "-1"], "eval_top_k", -1),
        (["--rollout-stop", "a", "b c"], "rollout_stop", ("a", "b c")),
        (["--rollout-stop=--"], "rollout_stop", ("--",)),
        (["--rollout-stop-token-ids", "1", "2"], "rollout_stop_token_ids", (1, 2)),
        (["--kl-loss-type", "k2"], "kl_loss_type", "k2"),
    ],
)
def test_forms(run: Run, words: list[str], name: str, value: object) -> None:
    assert vars(run.args(*words))[name] == value


@pytest.mark.parametrize(
    ("text", "tokens"), [("64000", 64000), ("64k", 64000), ("64Ki", 65536), ("25.6k", 25600), ("1.5M", 1500000)]
)
def test_numbers_that_sglang_reads_with_suffixes(run: Run, text: str, tokens: int) -> None:
    flags = ("--sglang-context-length", "--sglang-max-total-tokens", "--sglang-max-prefill-tokens")
    assert {run.args(flag, text).sglang[flag[9:].replace("-", "_")] for flag in flags} == {tokens}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--sglang-cuda-graph-bs 1 2", {"cuda_graph_bs_decode": [1, 2]}),
        ("--sglang-cuda-graph-bs=4", {"cuda_graph_bs_decode": [4]}),
        ("--sglang-stream-output", {"incremental_streaming_output": True}),
        ("--sglang-enable-breakable-cuda-graph", {"cuda_graph_backend_prefill": "breakable"}),
        ("--sglang-prefill-cp-mode in-seq-split", {"cp_strategy": "zigzag"}),
    ],
)
def test_old_names_of_sglangs_flags(run: Run, tmp_path: Path, words: str, expected: dict[str, object]) -> None:
    assert dict(run.args(*words.split()).sglang) == expected
    flag, *values = words.replace("=", " ").split()
    value = "true" if not values else f"[{', '.join(values)}]" if values[0].isdigit() else values[0]
    (tmp_path / "old.yaml").write_text(f"{flag.removeprefix('--')}: {value}\n")
    assert dict(run.args("--config", str(tmp_path / "old.yaml")).sglang) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--sglang-cuda-graph-bs 1 --sglang-cuda-graph-bs-decode 2",
            "--sglang-cuda-graph-bs-decode: is another name of --sglang-cuda-graph-bs, which is also given; give "
            "only --sglang-cuda-graph-bs-decode",
        ),
        (
            "--sglang-elastic-ep-rejoin 3",
            "--sglang-elastic-ep-rejoin 3: takes no value; write --sglang-elastic-ep-join-mode recover",
        ),
        (
            "--sglang-torchao-config int8wo",
            "--sglang-torchao-config: SGLang 0.5.21 no longer has this flag; quantize with --sglang-quantization, "
            "or leave it out",
        ),
        (
            "--sglang-config own.yaml",
            "--sglang-config own.yaml: slime sets it itself; slime would not see the flags in it: give each as "
            "--sglang-*",
        ),
    ],
)
def test_old_names_that_are_refused(run: Run, words: str, message: str) -> None:
    assert run.errors(*words.split()) == [message]


def test_an_old_name_overrides_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("sglang_cuda_graph_bs_decode: [1]\n")
    args = run.args("--config", str(tmp_path / "new.yaml"), "--sglang-cuda-graph-bs", "2")
    assert dict(args.sglang) == {"cuda_graph_bs_decode": [2]}
    (tmp_path / "off.yaml").write_text("sglang_enable_breakable_cuda_graph: false\n")
    [error] = run.errors("--config", str(tmp_path / "off.yaml"))
    assert "is a switch that now has another name; write sglang-cuda-graph-backend-prefill: breakable" in error


def test_pass_through(run: Run) -> None:
    args = run.args(
        *("--moe-layer-freq", "[0]*1+[1]*3", "--no-masked-softmax-fusion", "--recompute-modules", "mlp", "core_attn"),
        *("--sglang-mem-fraction-static", "0.7", "--router-policy", "round_robin", "--no-bias-swiglu-fusion"),
    )
    assert dict(args.megatron_extra) == {
        "moe_layer_freq": [0, 1, 1, 1],
        "masked_softmax_fusion": False,
        "recompute_modules": ["mlp", "core_attn"],
        "bias_activation_fusion": False,
    }
    assert dict(args.sglang) == {"mem_fraction_static": 0.7}
    assert dict(args.router) == {"policy": "round_robin"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rolout-batch-size", "4"], "--rolout-batch-size: unknown flag; did you mean --rollout-batch-size?"),
        (["--rollout_batch_size=4"], "--rollout_batch_size: unknown flag; did you mean --rollout-batch-size?"),
        (
            ["--mem-fraction-static", ".5"],
            "--mem-fraction-static: unknown flag; did you mean --sglang-mem-fraction-static?",
        ),
        (["--qqqq"], "--qqqq: unknown flag; --help names slime"),
        (["--train-iters", "5"], "--train-iters: slime's loop counts rollouts"),
        (["--lr", "fast"], "--lr fast: must be a number;"),
        (["--lr", "-1"], "--lr -1: must be a number >= 0;"),
        (["--lr", "nan"], "--lr nan: must be a number;"),
        (["--lr"], "--lr (nothing): must be one value;"),
        (["--lr", "1", "2"], "--lr 1 2: must be one value;"),
        (["--num-rollout", "1.5"], "--num-rollout 1.5: must be a whole number;"),
        (["--rollout-top-p", "1.5"], "--rollout-top-p 1.5: must be a number > 0 and <= 1;"),
        (["--kl-loss-type", "k4"], "--kl-loss-type k4: must be one of k1, k2, k3, low_var_kl;"),
        (["--spec", "a"], "--spec a: must be 2 values;"),
        (["--balance-data", "yes"], "--balance-data yes: takes no value; write --balance-data or --no-balance-data"),
        (["--lr=1", "2"], "'2': does not follow a flag;"),
        (["--sglang-tp-size", "2"], "--sglang-tp-size 2: slime sets it itself; use --rollout-num-gpus-per-engine"),
        (["--sglang-tensor-parallel-size=2"], "--sglang-tensor-parallel-size 2: slime sets it itself;"),
        (["--sglang-context-length", "1.5Ki"], "--sglang-context-length 1.5Ki: must be a whole number, or one such"),
        (["--sglang-max-total-tokens", "64K"], "--sglang-max-total-tokens 64K: must be a whole number, or one such"),
        (["--rollout-batch-size", "1k"], "--rollout-batch-size 1k: must be a whole number;"),
        (["--update-weight-pause", "wait"], "--update-weight-pause wait: must be one of drain, abort, in_place,"),
        (["--log-probs-chunk-size", "0"], "--log-probs-chunk-size 0: must be a number >= 1;"),
        (["--sglang-port", "1"], "--sglang-port 1: slime sets it itself;"),
        (["--sglang-model-path", "x"], "--sglang-model-path x: slime sets it itself; use --hf-checkpoint"),
        (["--moe-layer-freq", "__import__('os')"], "--moe-layer-freq __import__('os'): must be a number, a list"),
    ],
)
def test_refused(run: Run, words: list[str], message: str) -> None:
    assert run.error(*words).startswith(message)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2", 2),
        ("[0, 1]", [0, 1]),
        ("[0]*1+[1]*45", [0] + [1] * 45),
        ("([0]*2+[1])*2", [0, 0, 1, 0, 0, 1]),
        ("[0]+[1]*2*2", [0, 1, 1, 1, 1]),
    ],
)
def test_layer_pattern(run: Run, text: str, pattern: object) -> None:
    assert run.args("--moe-layer-freq", text).megatron_extra["moe_layer_freq"] == pattern


@pytest.mark.parametrize("text", ["[0]*", "[0]+", "([0]", "[0]*-1", "[a]", "[0][1]", "[0]*10000000000", ""])
def test_layer_pattern_refuses(run: Run, text: str) -> None:
    assert "--moe-layer-freq" in run.error("--moe-layer-freq", text)


def test_all_errors_at_once(run: Run) -> None:
    errors = run.errors("--rolout-seed", "1", "--lr", "-1", "--fp16", "--eval-interval", "2", "--num-epoch", "1")
    assert [error.split(":")[0].split()[0] for error in errors] == [
        "--rolout-seed",
        "--lr",
        "--num-rollout",
        "--eval-interval",
        "--fp16",
    ]


def test_a_bad_value_is_reported_once() -> None:
    """A misspelled --num-rollout is not also reported as missing, nor a bad --over-sampling-batch-size as too small."""
    base = ["--dry-run", "--hf-checkpoint", "x", "--rollout-num-gpus", "1", "--n-samples-per-prompt", "2"]
    run = Run(Path("."), base)
    more = ["--label-key", "label", "--rm-type", "deepscaler"]
    assert run.error(*more, "--num-rolout", "3").startswith("--num-rolout: unknown flag")
    assert run.error(*more, "--num-rollout", "x").startswith("--num-rollout x: must be a whole number")


def test_yaml_and_precedence(run: Run) -> None:
    file = run.directory / "run.yaml"
    file.write_text(
        "lr: 1e-5\nweight-decay: 0.25\nbalance_data: true\nrollout_stop: [a, b]\nsglang-mem-fraction-static: 0.5\n"
        "no_masked_softmax_fusion: true\nmoe_layer_freq: [0, 1]\neval_top_p: null\n"
    )
    args = run.args("--config", str(file), "--lr", "3e-5")
    assert (args.lr, args.weight_decay, args.balance_data, args.rollout_stop) == (3e-5, 0.25, True, ("a", "b"))
    assert dict(args.sglang) == {"mem_fraction_static": 0.5}
    assert dict(args.megatron_extra) == {"masked_softmax_fusion": False, "moe_layer_freq": [0, 1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "lrr: unknown flag; did you mean --lr?"),
        ("lr: [1, 2]", "lr [1, 2]: must be one value, not a list;"),
        ("lr: null", "lr None: must be a value;"),
        ("balance_data: 1", "balance_data 1: must be true or false;"),
        ("config: other.yaml", "config: a configuration file cannot name another;"),
        ("- lr", "is not a mapping;"),
        ("lr: [", "cannot be read"),
    ],
)
def test_yaml_refused(run: Run, text: str, message: str) -> None:
    file = run.directory / "run.yaml"
    file.write_text(text)
    assert message in run.error("--config", str(file))


def test_missing_yaml(run: Run) -> None:
    assert run.error("--config", "nowhere.yaml").startswith("--config nowhere.yaml: cannot be read")


def test_args_are_frozen_and_can_be_sent(run: Run) -> None:
    args = run.args("--sglang-mem-fraction-static", "0.5")
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        args.sglang["mem_fraction_static"] = 0.6  # type: ignore[index]
    assert pickle.loads(pickle.dumps(args)) == args


def test_args_yaml_gives_the_same_args(run: Run) -> None:
    args, _ = run.load(
        *("--sglang-fp8-gemm-backend", "auto", "--moe-layer-freq", "[0,1]", "--no-masked-softmax-fusion"),
        *("--rollout-stop", "a", "--num-steps-per-rollout", "2", "--lr", "1e-5"),
    )
    file = run.directory / "args.yaml"
    file.write_text(dump_args(args))
    again, warnings = load_args(["--config", str(file)])
    assert dataclasses.replace(again, config=None) == args
    other = load_args(["--config", str(file), "--lr", "2e-5"])[0]
    assert dataclasses.replace(other, config=None) != args
    assert [w for w in map(str, warnings) if "sglang" not in w and "moe" not in w] == []


HELP_WITH_IMPORTS_BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('megatron', 'sglang', 'sglang_router', 'ray', 'transformers', 'torch'):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.argv = ['train.py', '--help', 'all']
import runpy
runpy.run_path('train.py', run_name='__main__')
"""


def test_help_needs_nothing_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_WITH_IMPORTS_BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    flags = set(done.stdout.split())
    assert {"--rollout-batch-size", "--moe-router-topk", "--sglang-mem-fraction-static", "--router-policy"} <= flags
    assert not {"--sglang-tp-size", "--sglang-port"} & flags  # refused by name


def test_help_into_a_closed_pager() -> None:
    command = f"{sys.executable} train.py --help all | head -n 3"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.count("\n"), done.stderr) == (3, "")


def test_train_py_stops_before_anything_starts(run: Run) -> None:
    run.data.write_text("{\n")
    command = [sys.executable, "train.py", *run.base, "--rolout-seed", "3", "--num-steps-per-rollout", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "3 problems with the arguments:" in done.stderr
    for expected in ("--rolout-seed: unknown flag", "--num-steps-per-rollout 3: 4 prompts", f"{run.data}:1: not JSON"):
        assert expected in done.stderr
    assert done.stdout == ""


def test_resolved_values_have_no_none() -> None:
    args = resolve(Args(save="/runs/a", lr=2e-6, eps_clip=0.1))
    resolved = args.resolved
    assert (resolved.log_dir, resolved.critic_lr, resolved.eps_clip_high) == ("/runs/a", 2e-6, 0.1)
    assert (resolved.num_steps_per_rollout, resolved.global_batch_size) == (1, args.global_batch_size)
    with pytest.raises(RuntimeError, match=r"args\.log_dir has no value: .*parse\.load_args"):
        _ = Args().resolved.log_dir
