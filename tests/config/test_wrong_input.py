"""Wrong input for each of the page's flags: misspelled, of a wrong type, out of range and contradicting others.

The flags are read from the page's own arrays, its model script and its launch lines, so none can be forgotten.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from config_run import GLM4_TINY, ROOT, Run, write_tokenizer
from safetensors.torch import save_file

from slime.config.flags.table import FlagSpec, spellings
from slime.config.parse import UsageError, load_args

PAGE = Path(__file__).parent / "page_arrays.sh"
LAUNCH = """
--actor-num-nodes --actor-num-gpus-per-node --rollout-num-gpus --colocate --over-sampling-batch-size
--dynamic-sampling-filter-path --partial-rollout --buffer-filter-path --custom-rm-path --sglang-mem-fraction-static
"""
"""The page's flags in its text and launch commands, outside the arrays."""


def _flags_of(text: str) -> list[str]:
    words = [line.split("#")[0] for line in text.splitlines()]
    return list(dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]+", "\n".join(words))))


MODEL_FLAGS = _flags_of((ROOT / "scripts/models/glm4-9B.sh").read_text())
FLAGS = [*_flags_of(LAUNCH + PAGE.read_text()), *MODEL_FLAGS]


def spec_of(flag: str) -> FlagSpec:
    return spellings()[flag][0]


def errors(words: list[str]) -> list[str]:
    try:
        load_args(words)
    except UsageError as error:
        return [str(problem) for problem in error.problems]
    return []


# --- misspelled -------------------------------------------------------------------------------------------------


def misspelt(flag: str) -> str:
    """Return the flag with two adjacent letters swapped near the middle."""
    letters = list(flag)
    at = next(
        i
        for i in range(len(flag) // 2, len(flag) - 1)
        if letters[i] != letters[i + 1] and "-" not in letters[i : i + 2]
    )
    letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


@pytest.mark.parametrize("flag", FLAGS)
def test_misspelt(run: Run, flag: str) -> None:
    wrong = misspelt(flag)
    found = run.errors(wrong, "1")
    assert found == [f"{wrong}: unknown flag; did you mean {flag}?"]


# --- wrong type -------------------------------------------------------------------------------------------------


def wrong_type(spec: FlagSpec) -> tuple[list[str], str]:
    """Return words that are not a value of the flag, and the error about them."""
    if spec.kind == "bool":
        return ["7"], "takes no value"
    if spec.num_values is not None:
        return [], "or more values"
    if spec.kind == "str":
        return [], "one value"
    return ["warm"], "number"


@pytest.mark.parametrize("flag", FLAGS)
def test_wrong_type(run: Run, flag: str) -> None:
    words, rule = wrong_type(spec_of(flag))
    error = run.error(flag, *words)
    assert error.startswith(" ".join([flag, *words]))
    assert rule in error


# --- out of range -----------------------------------------------------------------------------------------------


def out_of_range(spec: FlagSpec) -> str | None:
    """Return a value just beyond a bound, or outside the choices; None if every value of the type is valid."""
    if spec.choices:
        return "nonsense"
    for bound, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
        if bound in spec.bounds:
            value = spec.bounds[bound] + step
            return f"{value:g}"
    return None


BOUNDED = [flag for flag in FLAGS if out_of_range(spec_of(flag)) is not None]
UNBOUNDED = {
    *("--hf-checkpoint", "--ref-load", "--load", "--save", "--prompt-data", "--eval-prompt-data"),  # paths
    *("--input-key", "--label-key", "--normalization", "--position-embedding-type", "--rm-type"),  # names
    *("--dynamic-sampling-filter-path", "--buffer-filter-path", "--custom-rm-path"),  # dotted paths
    "--sglang-mem-fraction-static",  # SGLang checks it
}
"""Flags whose values have no bounds; `CONTRADICTED` tests paths and names."""


def test_every_number_of_the_page_has_bounds() -> None:
    switches = {flag for flag in FLAGS if spec_of(flag).kind == "bool"}
    assert set(FLAGS) - set(BOUNDED) - switches == UNBOUNDED


@pytest.mark.parametrize("flag", BOUNDED)
def test_out_of_range(run: Run, flag: str) -> None:
    value = out_of_range(spec_of(flag))
    assert value is not None
    error = run.error(flag, value)
    assert error.startswith(f"{flag} {value}: must be ")


# --- contradicted -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """Words that are added to the base command line, and the beginning of the message about them."""

    words: str
    message: str
    warns: bool = False
    """Whether the message is a warning about a flag without effect."""


def no_effect(words: str, message: str) -> Wrong:
    return Wrong(words, message, warns=True)


EVAL = "--eval-prompt-data TRAIN"
CONTRADICTED: dict[str, Wrong] = {
    # placement
    "--actor-num-nodes": Wrong(
        "--actor-num-nodes 3 --tensor-model-parallel-size 2", "--tensor-model-parallel-size 2: TP 2 x PP 1 x CP 1 = 2"
    ),
    "--actor-num-gpus-per-node": Wrong(
        "--actor-num-gpus-per-node 3 --tensor-model-parallel-size 2",
        "--tensor-model-parallel-size 2: TP 2 x PP 1 x CP 1 = 2 does not divide the 3",
    ),
    "--rollout-num-gpus": Wrong("--rollout-num-gpus 0", "--rollout-num-gpus 0: no engine, but rollouts are generated"),
    "--rollout-num-gpus-per-engine": Wrong(
        "--rollout-num-gpus-per-engine 3", "--rollout-num-gpus 2: is not a multiple of --rollout-num-gpus-per-engine 3"
    ),
    "--colocate": Wrong("--colocate --dry-run", "--rollout-num-gpus 2: --colocate shares the 1 training GPUs"),
    "--sglang-mem-fraction-static": no_effect(
        "--sglang-mem-fraction-static 0.5", "--sglang-mem-fraction-static: no effect"
    ),
    # checkpoints
    "--hf-checkpoint": Wrong("--hf-checkpoint NOWHERE", "--hf-checkpoint NOWHERE: there is no config.json"),
    "--ref-load": Wrong("--ref-load NOWHERE", "--ref-load NOWHERE: there is no such directory"),
    "--load": Wrong("--load FILE", "--load FILE: is a file, not a directory"),
    "--save": Wrong("--save FILE", "--save FILE: is a file, not a directory"),
    "--save-interval": no_effect("--save-interval 2 --debug-rollout-only", "--save-interval 2: no effect"),
    # rollout
    "--prompt-data": Wrong("--prompt-data NOWHERE", "--prompt-data NOWHERE: there is no file NOWHERE"),
    "--input-key": Wrong("--input-key question", "TRAIN:1: "),
    "--label-key": Wrong("--label-key answer", "TRAIN:1: "),
    "--apply-chat-template": Wrong("--no-apply-chat-template", "TRAIN:1: 'prompt' is not text"),
    "--rollout-shuffle": no_effect(f"--rollout-shuffle --num-rollout 0 {EVAL}", "--rollout-shuffle: no effect"),
    "--rm-type": Wrong("--rm-type deepscalar", "--rm-type deepscalar: unknown reward type"),
    "--custom-rm-path": no_effect("--custom-rm-path HOOK", "--rm-type deepscaler: no effect: --custom-rm-path judges"),
    "--num-rollout": Wrong("--num-epoch 2", "--num-rollout 3: cannot be combined with --num-epoch 2"),
    "--rollout-batch-size": Wrong("--rollout-batch-size 5 --global-batch-size 4", "--global-batch-size 4: does not"),
    "--n-samples-per-prompt": Wrong("--n-samples-per-prompt 1", "--n-samples-per-prompt 1: grpo compares"),
    "--rollout-max-response-len": no_effect(
        "--rollout-max-response-len 128", "--rollout-max-response-len 128: the model's"
    ),
    "--rollout-temperature": no_effect("--rollout-temperature 0", "--rollout-temperature 0: greedy"),
    "--num-steps-per-rollout": Wrong("--num-steps-per-rollout 3", "--num-steps-per-rollout 3: 4 prompts x 2 samples"),
    "--balance-data": no_effect("--balance-data", "--balance-data: no effect: there is only one data-parallel rank"),
    "--over-sampling-batch-size": Wrong("--over-sampling-batch-size 3", "--over-sampling-batch-size 3: less than"),
    "--dynamic-sampling-filter-path": Wrong(
        "--dynamic-sampling-filter-path slime.rollout.no_such.filter", "--dynamic-sampling-filter-path slime."
    ),
    "--partial-rollout": no_effect(
        "--partial-rollout --dry-run", "--partial-rollout: no effect: no additional prompts are"
    ),
    "--buffer-filter-path": Wrong(
        "--buffer-filter-path slime.core.packing.plan_steps", "--buffer-filter-path slime.core.packing.plan_steps: "
    ),
    # evaluation
    "--eval-interval": Wrong("--eval-interval 2", "--eval-interval 2: nothing to evaluate on"),
    "--eval-prompt-data": Wrong("--eval-prompt-data a b c", "--eval-prompt-data a b c: 3 words"),
    "--n-samples-per-eval-prompt": no_effect(
        "--n-samples-per-eval-prompt 4", "--n-samples-per-eval-prompt 4: no effect"
    ),
    "--eval-max-response-len": no_effect(
        f"{EVAL} --eval-max-response-len 200", "--eval-max-response-len 200: the model's"
    ),
    "--eval-top-p": no_effect("--eval-top-p 0.7", "--eval-top-p 0.7: no effect: nothing is evaluated"),
    # parallel sizes and micro-batches
    "--tensor-model-parallel-size": Wrong(
        "--tensor-model-parallel-size 4 --actor-num-gpus-per-node 4", "--tensor-model-parallel-size 4: does not divide"
    ),
    "--sequence-parallel": no_effect("--sequence-parallel", "--sequence-parallel: no effect"),
    "--pipeline-model-parallel-size": Wrong(
        "--pipeline-model-parallel-size 3 --actor-num-gpus-per-node 3 --dry-run",
        "--pipeline-model-parallel-size 3: does not divide 4 layers",
    ),
    "--context-parallel-size": Wrong("--context-parallel-size 2 --dry-run", "--tensor-model-parallel-size 1: TP 1 x"),
    "--expert-model-parallel-size": Wrong(
        "--expert-model-parallel-size 2 --dry-run", "--expert-model-parallel-size 2: the model has no experts"
    ),
    "--expert-tensor-parallel-size": Wrong(
        "--expert-tensor-parallel-size 2 --dry-run", "--expert-tensor-parallel-size 2: the model has no experts"
    ),
    "--recompute-granularity": Wrong("--recompute-granularity full", "--recompute-granularity full: full needs"),
    "--recompute-method": Wrong(
        "--recompute-granularity selective --recompute-method uniform", "--recompute-method uniform: selective"
    ),
    "--recompute-num-layers": no_effect("--recompute-num-layers 1", "--recompute-num-layers 1: no effect"),
    "--use-dynamic-batch-size": Wrong("--use-dynamic-batch-size", "--use-dynamic-batch-size: has no token budget"),
    "--max-tokens-per-gpu": no_effect("--max-tokens-per-gpu 64", "--max-tokens-per-gpu 64: no effect"),
    # algorithm
    "--advantage-estimator": Wrong("--advantage-estimator grpo --n-samples-per-prompt 1", "--n-samples-per-prompt 1:"),
    "--use-kl-loss": no_effect("--use-kl-loss --kl-loss-coef 0", "--use-kl-loss: no effect at --kl-loss-coef 0"),
    "--kl-loss-coef": no_effect("--kl-loss-coef 0.1", "--kl-loss-coef 0.1: no effect"),
    "--kl-loss-type": no_effect("--kl-loss-type k1", "--kl-loss-type k1: no effect"),
    "--entropy-coef": no_effect(
        "--loss-type sft_loss --rollout-function-path slime.rollout.sft_rollout.generate_rollout --entropy-coef 0.1",
        "--entropy-coef 0.1: no effect",
    ),
    "--eps-clip": no_effect("--eps-clip 0.3 --eps-clip-high 0.2", "--eps-clip-high 0.2: less than --eps-clip 0.3"),
    "--eps-clip-high": no_effect("--eps-clip-high 0.1", "--eps-clip-high 0.1: less than --eps-clip 0.2"),
    # optimizer
    "--optimizer": no_effect("--optimizer sgd --dry-run --adam-eps 1e-8", "--adam-eps 1e-08: no effect"),
    "--lr": no_effect("--lr 0", "--lr 0: no effect: no weight ever changes"),
    "--lr-decay-style": Wrong("--lr-decay-style WSD", "--lr-decay-style WSD: WSD needs a decay length"),
    "--weight-decay": no_effect("--lr 0 --weight-decay 0.1", "--weight-decay 0.1: no effect"),
    "--adam-beta1": no_effect("--optimizer sgd --dry-run --adam-beta1 0.9", "--adam-beta1 0.9: no effect"),
    "--adam-beta2": no_effect("--optimizer sgd --dry-run --adam-beta2 0.9", "--adam-beta2 0.9: no effect"),
    # MODEL_ARGS that config.json does not have; `test_hf_config_against_model_args` tests the others
    "--swiglu": Wrong("--no-swiglu", "--no-swiglu: an MLP without SwiGLU"),
    "--disable-bias-linear": Wrong("--no-disable-bias-linear", "--no-disable-bias-linear: biases in linear layers"),
    "--normalization": Wrong("--normalization LayerNorm", "--normalization LayerNorm: a norm other"),
    "--position-embedding-type": Wrong(
        "--position-embedding-type mrope", "--position-embedding-type mrope: a position"
    ),
    "--group-query-attention": Wrong("--no-group-query-attention", "--no-group-query-attention: HF/config.json has"),
}
IN_CONFIG: dict[str, tuple[str, ...]] = {
    "--num-layers": ("5",),
    "--hidden-size": ("256",),
    "--ffn-hidden-size": ("1024",),
    "--num-attention-heads": ("8",),
    "--num-query-groups": ("4",),
    "--kv-channels": ("64",),
    "--vocab-size": ("256",),
    "--norm-epsilon": ("1e-06",),
    "--add-qkv-bias": (),
    "--post-self-attn-layernorm": (),
    "--post-mlp-layernorm": (),
    "--untie-embeddings-and-output-weights": (),
    "--rotary-base": ("500000",),
    "--rotary-percent": ("1",),
    "--rotary-interleaved": (),
}
"""MODEL_ARGS that contradict config.json; a switch is given as --no-x."""


ALWAYS_SO = {"--no-rope-fusion"}
"""Flags that no other flag contradicts."""


def test_every_flag_of_the_page_is_contradicted() -> None:
    assert set(CONTRADICTED) | set(IN_CONFIG) | ALWAYS_SO == set(FLAGS)


def _filled(text: str, run: Run) -> str:
    file = run.directory / "file"
    file.touch()
    hook = "slime.rollout.rewards.deepscaler.deepscaler"
    places = {"HF": run.hf, "TRAIN": run.data, "NOWHERE": run.directory / "nowhere", "FILE": file, "HOOK": hook}
    for name, value in places.items():
        text = re.sub(rf"\b{name}\b", str(value), text)
    return text


@pytest.mark.parametrize("flag", CONTRADICTED)
def test_contradicted(run: Run, flag: str) -> None:
    wrong = CONTRADICTED[flag]
    words = _filled(wrong.words, run).split()
    reported = run.warnings(*words) if wrong.warns else run.errors(*words)
    expected = _filled(wrong.message, run)
    assert any(text.startswith(expected) for text in reported), reported
    if not wrong.warns:
        assert len(reported) == 1, "one mistake, one error"


@pytest.mark.parametrize("flag", IN_CONFIG)
def test_hf_config_against_model_args(run: Run, flag: str) -> None:
    """The error names both values, and disappears if --override-hf-config names the flag."""
    values = IN_CONFIG[flag]
    words = [flag, *values] if values else [spec_of(flag).off[0]]
    [error] = [text for text in run.errors(*words) if "config.json has --" in text]
    assert error.startswith(" ".join(words))
    assert f"{run.hf}/config.json has {flag}" in error
    overridden = run.errors(*words, "--override-hf-config", flag.removeprefix("--"))
    assert not any("config.json has --" in text for text in overridden)


def test_all_at_once(run: Run) -> None:
    """Five mistakes of five kinds give five errors at once."""
    words = "--rolout-seed 4 --rollout-temperature warm --eps-clip 2 --num-steps-per-rollout 3 --rotary-base 1"
    found = run.errors(*words.split())
    starts = ("--rolout-seed:", "--rollout-temperature warm:", "--eps-clip 2:", "--num-steps", "--rotary-base 1:")
    assert len(found) == len(starts)
    for start in starts:
        assert any(text.startswith(start) for text in found), start


# --- the tokenizer ----------------------------------------------------------------------------------------------


def test_a_tokenizer_that_fits(run: Run) -> None:
    write_tokenizer(run.hf, largest_id=GLM4_TINY["vocab_size"] - 1)
    assert run.errors() == []
    assert run.warnings() == []


def test_a_tokenizer_of_another_model(run: Run) -> None:
    write_tokenizer(run.hf, largest_id=GLM4_TINY["vocab_size"])
    error = run.error()
    assert error.startswith(f"--hf-checkpoint {run.hf}: tokenizer.json has token 128 ('<|end|>'), but the model's")


def test_a_tokenizer_without_a_chat_template(run: Run) -> None:
    write_tokenizer(run.hf, largest_id=20, template=False)
    assert run.error().startswith(f"--apply-chat-template: there is no chat template in {run.hf}")
    (run.hf / "chat_template.jinja").write_text("{{ messages }}")
    assert run.errors() == []


def test_a_tokenizer_that_ends_with_another_token(run: Run) -> None:
    config = {**GLM4_TINY, "eos_token_id": [3, 4]}
    (run.hf / "config.json").write_text(json.dumps(config))
    write_tokenizer(run.hf, largest_id=20)
    [warning] = run.warnings()
    assert warning.startswith(f"--hf-checkpoint {run.hf}: the tokenizer's end-of-text token is 20 ('<|end|>')")
    (run.hf / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 20]}))
    assert run.warnings() == []


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer(run: Run, text: str) -> None:
    write_tokenizer(run.hf, largest_id=20)
    (run.hf / "tokenizer.json").write_text(text)
    assert run.error().startswith(f"--hf-checkpoint {run.hf}: tokenizer.json cannot be read")


# --- wrong with train_async.py only -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--colocate", "--colocate: train_async.py generates while it trains, so engines and trainers need devices"),
        ("--max-staleness 0", "--max-staleness 0: train_async.py trains on tokens of the previous policy"),
        ("--update-weight-pause in_place", "--update-weight-pause in_place: train_async.py has requests in flight"),
        ("--update-weight-pause retract", "--update-weight-pause retract: train_async.py has requests in flight"),
        ("--update-weight-pause abort --deterministic", "--update-weight-pause abort: with --deterministic"),
    ],
)
def test_wrong_with_a_rollout_in_flight(run: Run, words: str, message: str) -> None:
    ahead = replace(run, rollouts_ahead=1)
    assert any(error.startswith(message) for error in ahead.errors(*words.split(), "--dry-run"))
    assert not any(error.startswith(message) for error in run.errors(*words.split(), "--dry-run"))


@pytest.mark.parametrize(
    "words",
    [
        "--max-staleness 1",
        "--update-weight-pause abort",
        "--deterministic",
        "--num-rollout 0 --eval-prompt-data TRAIN",
        "--debug-rollout-only",
        "--debug-train-only --load-debug-rollout-data TRAIN.dump",
    ],
)
def test_right_with_a_rollout_in_flight(run: Run, words: str) -> None:
    ahead = replace(run, rollouts_ahead=1)
    assert ahead.errors(*words.replace("TRAIN", str(run.data)).split(), "--dry-run") == []


# --- mixtures of experts -----------------------------------------------------------------------------------------


def test_routing_replay_of_a_dense_model_is_refused(run: Run) -> None:
    [error] = run.errors("--use-routing-replay", "--dry-run")
    assert error == "--use-routing-replay: glm4 is a dense family without MoE routers; leave it out"


# --- partial rollouts -------------------------------------------------------------------------------------------

PARTIAL = "--partial-rollout --over-sampling-batch-size 8"


def test_deterministic_partial_rollouts_need_a_token_limit(run: Run) -> None:
    [error] = run.errors(*f"{PARTIAL} --deterministic --dry-run".split())
    assert error.startswith("--partial-rollout: with --deterministic")
    assert "add --partial-rollout-max-tokens" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--partial-rollout-max-tokens 16", "--partial-rollout-max-tokens 16: no effect: it belongs to"),
        ("--mask-offpolicy-in-partial-rollout", "--mask-offpolicy-in-partial-rollout: no effect: it belongs to"),
        ("--partial-rollout", "--partial-rollout: no effect: no additional prompts are"),
        (f"{PARTIAL} --partial-rollout-max-tokens 999999", "--partial-rollout-max-tokens 999999: no effect: --rollout"),
        (
            f"{PARTIAL} --rollout-function-path examples.hooks.rollouts.count_right",
            "--partial-rollout: no effect: --rollout-function-path",
        ),
        ("--max-staleness 2", "--max-staleness 2: no effect: every token is from the current"),
    ],
)
def test_flags_without_effect_with_partial_rollout(run: Run, words: str, message: str) -> None:
    assert [warning for warning in run.warnings(*words.split(), "--dry-run") if warning.startswith(message)]


@pytest.mark.parametrize(
    "words",
    [
        PARTIAL,
        f"{PARTIAL} --max-staleness 0 --mask-offpolicy-in-partial-rollout",
        f"{PARTIAL} --deterministic --partial-rollout-max-tokens 16",
        "--partial-rollout --partial-rollout-max-tokens 16",
    ],
)
def test_valid_flags_with_partial_rollout(run: Run, words: str) -> None:
    """The flags are neither refused nor warned about in a real run."""
    assert run.errors(*words.split()) == []
    reported = [text for text in run.warnings(*words.split()) if "partial" in text or "staleness" in text]
    assert reported == []


# --- wrong with --deterministic ---------------------------------------------------------------------------------

ON_SGLANG = "--bf16 --rollout-engine sglang --dry-run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{ON_SGLANG} --sglang-attention-backend torch_native", "--sglang-attention-backend torch_native: with"),
        (f"{ON_SGLANG} --sglang-decode-attention-backend flashmla", "--sglang-decode-attention-backend flashmla: wit"),
        (f"{ON_SGLANG} --sglang-speculative-algorithm EAGLE", "--sglang-speculative-algorithm EAGLE: with"),
    ],
)
def test_wrong_with_deterministic(run: Run, words: str, message: str) -> None:
    [error] = run.errors("--deterministic", *words.split())
    assert error.startswith(message)
    assert run.errors(*words.split()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--rm-type remote_rm --rm-url http://10.0.0.7:80/",
            "--deterministic: slime cannot make the answers",
        ),
        (ON_SGLANG, "--deterministic: bit for bit on a CPU only"),
    ],
)
def test_warnings_about_deterministic(run: Run, words: str, message: str) -> None:
    assert any(warning.startswith(message) for warning in run.warnings("--deterministic", *words.split()))
    assert not any(warning.startswith(message) for warning in run.warnings(*words.split()))


def test_right_with_deterministic(run: Run) -> None:
    """The engine's own flag is accepted, and the number of cores does not change the rounding of sums."""
    args, warnings = run.load("--deterministic", "--sglang-enable-deterministic-inference")
    assert (args.cpu_threads_per_process, warnings) == (1, [])
    assert run.args("--deterministic", "--cpu-threads-per-process", "3").cpu_threads_per_process == 3


# --- weight files -----------------------------------------------------------------------------------------------


def write_weights(run: Run) -> Path:
    path = run.hf / "model.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3)}, path)
    return path


def test_complete_weight_files_pass(run: Run) -> None:
    write_weights(run)
    assert run.errors() == []


def test_a_truncated_weight_file(run: Run) -> None:
    path = write_weights(run)
    path.write_bytes(path.read_bytes()[:-1])
    size = path.stat().st_size
    error = run.error()  # --ref-load names the same directory, which is reported once
    assert error.startswith(f"--hf-checkpoint {run.hf}: model.safetensors has {size} bytes, but its header implies")
    assert error.endswith(f"{size + 1}; download or export it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.safetensors is not a safetensors file"),
        (b"\xff" * 100, "model.safetensors is truncated: its header alone has"),
        (b"\x02" + b"\0" * 7 + b"[]", "model.safetensors is not a safetensors file"),
    ],
)
def test_files_that_are_no_weights_are_refused(run: Run, content: bytes, message: str) -> None:
    write_weights(run).write_bytes(content)
    assert message in run.error()


def test_a_missing_shard(run: Run) -> None:
    write_weights(run)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (run.hf / "model.safetensors.index.json").write_text(json.dumps(index))
    error = run.errors()[0]
    assert "model-00002-of-00002.safetensors is missing, but model.safetensors.index.json lists it" in error


@pytest.mark.parametrize("flag", ["--hf-checkpoint", "--ref-load", "--load"])
def test_pickled_weights_are_never_read(run: Run, flag: str) -> None:
    """A plan does not read them either, and code that config.json names is never run."""
    folder, marker = run.directory / "pickled", run.directory / "marker"
    shutil.copytree(run.hf, folder)
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(X\x0c\x00\x00\x00touch markertR.")
    (folder / "custom.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "custom.Config"}}))
    message = "pytorch_model.bin is a pickle, which may run code and is never read, and there are no safetensors"
    for words in ([], ["--dry-run"]):
        errors = run.errors(*words, flag, str(folder))
        assert [error for error in errors if message in error] == [
            f"{flag} {folder}: {message}; convert it to safetensors, or download safetensors"
        ]
    assert not marker.exists() and not Path("marker").exists()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert run.errors(flag, str(folder)) == [], "control: with safetensors the other file does not matter"
