"""The trainer: its step against a plain AdamW loop, its reference, its schedule, its hooks and its errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from runs import difference
from worker_pool import WorkerPool

from slime.algo.losses import LossInputs, LossOptions
from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.trainer import Trainer
from slime.models.hf_files import HFReader

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "glm4")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of the same architecture with other weights."""
    return tiny.hf_dir(tmp_path_factory.mktemp("other"), "glm4", seed=1)


def _with_trainer(
    rank: int, world_size: int, init_method: str, args: Args, work: Callable[..., Any], *rest: Any
) -> Any:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        return work(trainer, *rest)
    finally:
        trainer.close()


def _response_log_probs(model: torch.nn.Module, batch: TrainBatch, temperature: float) -> torch.Tensor:
    rows = []
    for row, length in zip(batch.rows("tokens"), batch.response_lengths_N.tolist(), strict=True):
        tokens = torch.from_numpy(row)
        log_probs = (model(tokens[None]).logits[0].float() / temperature).log_softmax(-1)
        rows.append(log_probs[:-1].gather(1, tokens[1:, None])[-length:, 0])
    return torch.cat(rows)


def _plain_training(batch: TrainBatch, args: Args, loss_type: str) -> tuple[dict[str, np.ndarray], float]:
    """Return weights after one step, and the loss, by transformers, torch's AdamW and the papers' formulas alone."""
    model = tiny.hf_model("glm4")
    plain = [p for p in model.parameters() if p.dim() == 1]  # Megatron does not decay biases and norms
    decayed = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
    )
    temperature = 1.0 if loss_type == "sft_loss" else args.rollout_temperature
    log_probs = _response_log_probs(model, batch, temperature)
    lengths = batch.response_lengths_N.tolist()
    losses = []
    for row, (chosen, mask) in enumerate(
        zip(log_probs.split(lengths), map(torch.from_numpy, batch.rows("loss_mask")), strict=True)
    ):
        rewards = batch.columns["rewards"][batch.columns["group_indices"] == batch.columns["group_indices"][row]]
        advantage = (batch.columns["rewards"][row] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        ratio = (chosen - chosen.detach()).exp()
        per_token = -chosen if loss_type == "sft_loss" else -ratio * float(advantage)
        losses.append((per_token * mask).sum() / mask.sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}, loss.item()


@pytest.mark.parametrize("loss_type", ["policy_loss", "sft_loss"])
def test_one_step_is_a_plain_adamw_step(loss_type: str, workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, loss_type=loss_type, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.5, adam_beta2=0.95)
    batch = tiny.random_batch()
    expected, loss = _plain_training(batch, args, loss_type)
    [outcome] = workers.run(1, runs.train, args, [batch])
    before = {name: p.detach().numpy() for name, p in tiny.hf_model("glm4").named_parameters()}
    # a policy-gradient loss is near 0, its terms are not
    assert outcome.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert difference(outcome.weights, expected) < 1e-5
    moved = {name: outcome.weights[name] - before[name] for name in before}
    assert difference(moved, {name: expected[name] - before[name] for name in before}) < 1e-2
    [undecayed] = workers.run(1, runs.train, replace(args, weight_decay=0.0), [batch])  # control
    assert difference(undecayed.weights, expected) > 2e-5


def _no_leak(trainer: Trainer, batch: TrainBatch) -> dict[str, Any]:
    result = trainer.load()
    start = runs.weights(trainer)
    actor, reference = trainer.log_probs(batch), trainer.log_probs(batch, model="ref")
    after_forward = runs.weights(trainer)
    with pytest.raises(ZeroDivisionError), trainer._snapshots.holding("ref"):
        raise ZeroDivisionError
    after_error = runs.weights(trainer)
    trainer.train(0, batch)
    return {
        "source": result.source,
        "same": difference(after_forward, start) == 0 and difference(after_error, start) == 0,
        "start": start,
        "actor": actor,
        "reference": reference,
        "reference_after": trainer.log_probs(batch, model="ref"),
        "actor_after": trainer.log_probs(batch),
    }


def test_the_reference_never_leaks_into_the_actor(workers: WorkerPool, hf: Path, other: Path) -> None:
    args = tiny.make_args(hf, load=str(hf), ref_load=str(other), use_kl_loss=True, kl_loss_coef=0.1)
    batch = tiny.random_batch()
    found, _ = workers.run(2, _with_trainer, args, _no_leak, batch)
    assert found["same"] and found["source"] == str(hf)
    expected = {name: p.detach().numpy() for name, p in tiny.hf_model("glm4").named_parameters()}
    assert difference(found["start"], expected) == 0
    for name, seed in (("actor", 0), ("reference", 1)):
        plain = _response_log_probs(tiny.hf_model("glm4", seed=seed), batch, args.rollout_temperature)
        assert np.abs(found[name] - plain.detach().numpy()).max() < 2e-5
    assert np.array_equal(found["reference_after"], found["reference"])
    assert np.abs(found["actor_after"] - found["actor"]).max() > 1e-3


def _no_reference(trainer: Trainer, batch: TrainBatch) -> tuple[bool, str]:
    trainer.load()
    with pytest.raises(ValueError) as raised:
        trainer.log_probs(batch, model="ref")
    return "train/kl_loss" in trainer.train(0, batch), str(raised.value)


def test_no_reference_forward_at_coefficient_0(workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, use_kl_loss=True, kl_loss_coef=0.0)
    [(has_kl, message)] = workers.run(1, _with_trainer, args, _no_reference, tiny.random_batch())
    assert not has_kl and "--log-ref-kl" in message
    [outcome] = workers.run(1, runs.train, replace(args, log_ref_kl=True), [tiny.random_batch()])
    assert outcome.metrics[0]["train/kl_loss"] == pytest.approx(0.0, abs=1e-9)


def _learning_rates(trainer: Trainer, batch: TrainBatch, rollouts: int) -> list[float]:
    trainer.load()
    return [trainer.train(number, batch)["train/lr"] for number in range(rollouts)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"lr_warmup_iters": 2}, [0.0, 0.5, 1.0, 1.0, 1.0]),
        ({"lr_decay_style": "linear", "min_lr": 1e-4}, [1.0, 0.82, 0.64, 0.46, 0.28]),
        ({"lr_decay_style": "cosine", "lr_decay_iters": 4}, [1.0, 0.853553, 0.5, 0.146447, 0.0]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2}, [1.0, 1.0, 1.0, 1.0, 0.5]),
    ],
    ids=str,
)
def test_learning_rate_schedule(flags: dict[str, Any], expected: list[float], workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, num_rollout=5, **flags)
    [rates] = workers.run(1, _with_trainer, args, _learning_rates, tiny.random_batch(2, group=2), 5)
    assert rates == pytest.approx([1e-3 * rate for rate in expected], abs=1e-9)


def test_old_log_probs_come_before_the_first_step(workers: WorkerPool, hf: Path) -> None:
    batch = tiny.random_batch(12)
    model = tiny.hf_model("glm4")
    args = tiny.make_args(hf, num_steps_per_rollout=3, lr=1e-2)
    gap = _response_log_probs(model, batch, args.rollout_temperature).detach().numpy()
    gap = np.abs(gap - batch.columns["rollout_log_probs"])[batch.columns["loss_mask"] > 0]
    [outcome] = workers.run(1, runs.train, args, [batch])
    metrics = outcome.metrics[0]
    assert metrics["train/logprob_gap_max"] == pytest.approx(gap.max(), rel=1e-5)
    assert metrics["train/ppo_kl"] != 0 and metrics["train/clip_fraction"] > 0  # later steps are off-policy
    [single] = workers.run(1, runs.train, replace(args, num_steps_per_rollout=1), [batch])
    assert single.metrics[0]["train/logprob_gap_mean"] == pytest.approx(gap.mean(), rel=1e-5)
    assert single.metrics[0]["train/ppo_kl"] == 0


def test_failed_rewards_leave_the_loss(workers: WorkerPool, hf: Path) -> None:
    batch = tiny.random_batch(8)
    broken = batch.columns["rewards"].copy()
    broken[[4, 5, 6]] = np.nan  # the second group keeps one reward, which has nothing to be compared with
    args = tiny.make_args(hf, adam_eps=1e-3)
    [outcome] = workers.run(1, runs.train, args, [batch.with_column("rewards", broken)])
    [expected] = workers.run(1, runs.train, args, [batch.select(range(4))])
    assert outcome.metrics[0]["train/dropped_samples"] == 4
    assert outcome.metrics[0]["train/loss"] == pytest.approx(expected.metrics[0]["train/loss"], abs=1e-6)
    assert difference(outcome.weights, expected.weights) < 1e-5


def constant_advantages(args: Args, batch: TrainBatch) -> np.ndarray:
    return np.full(int(batch.response_lengths_N.sum()), 2.0)


def doubled_likelihood(inputs: LossInputs, options: LossOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -inputs.advantages_R * inputs.log_probs_R, {"mine": inputs.advantages_R}


def test_hooks(workers: WorkerPool, hf: Path) -> None:
    batch = tiny.random_batch()
    here = "test_trainer"
    args = tiny.make_args(
        hf,
        loss_type="custom_loss",
        custom_loss_function_path=f"{here}.doubled_likelihood",
        custom_advantage_function_path=f"{here}.constant_advantages",
        rollout_temperature=1.0,  # SFT's temperature
    )
    [found] = workers.run(1, runs.train, args, [batch])
    [sft] = workers.run(1, runs.train, tiny.make_args(hf, loss_type="sft_loss"), [batch])
    assert found.metrics[0]["train/mine"] == pytest.approx(2.0)
    assert found.metrics[0]["train/loss"] == pytest.approx(2 * sft.metrics[0]["train/loss"], rel=1e-5)


def mean_reference_advantages(args: Args, batch: TrainBatch) -> np.ndarray:
    reference_R = batch.columns["ref_log_probs"]
    return np.full(len(reference_R), reference_R.mean(dtype=np.float64))


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_advantage_hook_sees_the_whole_batch(world_size: int, workers: WorkerPool, hf: Path, other: Path) -> None:
    batch = tiny.random_batch()
    args = tiny.make_args(
        hf,
        load=str(hf),
        ref_load=str(other),
        log_ref_kl=True,
        loss_type="custom_loss",
        custom_loss_function_path="test_trainer.doubled_likelihood",
        custom_advantage_function_path="test_trainer.mean_reference_advantages",
    )
    outcomes = workers.run(world_size, runs.train, args, [batch])
    plain = _response_log_probs(tiny.hf_model("glm4", seed=1), batch, args.rollout_temperature).mean().item()
    assert [outcome.metrics[0]["train/mine"] for outcome in outcomes] == pytest.approx([plain] * world_size, rel=1e-5)


def infinite_advantages(args: Args, batch: TrainBatch) -> np.ndarray:
    return np.full(int(batch.response_lengths_N.sum()), np.inf)


def _error_of_training(trainer: Trainer, batch: TrainBatch) -> str:
    trainer.load()
    with pytest.raises((RuntimeError, ValueError)) as raised:
        trainer.train(3, batch)
    return f"{type(raised.value).__name__}: {raised.value}"


def steep(inputs: LossInputs, options: LossOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is 0 everywhere, and whose slope at 0 is infinite."""
    return (inputs.log_probs_R - inputs.log_probs_R.detach()).abs().sqrt(), {}


def _weights_after_an_error(trainer: Trainer, batch: TrainBatch) -> tuple[runs.Arrays, runs.Arrays, bool]:
    trainer.load()
    before = runs.weights(trainer)
    with pytest.raises(RuntimeError, match="gradient norm"):
        trainer.train(0, batch)
    masters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return before, runs.weights(trainer), all(bool(torch.isfinite(master).all()) for master in masters)


@pytest.mark.parametrize(
    "flags", [{}, {"bf16": True}, {"clip_grad": 0.0}, {"pipeline_model_parallel_size": 2}], ids=str
)
def test_a_nonfinite_gradient_changes_no_weight(flags: dict[str, Any], workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, loss_type="custom_loss", custom_loss_function_path="test_trainer.steep", **flags)
    for before, after, finite in workers.run(2, _with_trainer, args, _weights_after_an_error, tiny.random_batch()):
        assert finite and difference(after, before) == 0


def test_errors_name_the_place_and_the_problem(workers: WorkerPool, hf: Path) -> None:
    def error(batch: TrainBatch, **flags: Any) -> str:
        return workers.run(1, _with_trainer, tiny.make_args(hf, **flags), _error_of_training, batch)[0]

    batch = tiny.random_batch()
    message = error(batch, custom_advantage_function_path="test_trainer.infinite_advantages")
    assert message.startswith("RuntimeError: rollout 3: advantages (advantage of each response token) that are not fin")
    message = error(batch, loss_type="custom_loss", custom_loss_function_path="test_trainer.steep")
    assert message.startswith("BadStepError: rollout 3, step 0: the gradient norm is nan at a loss of 0")
    assert "--num-steps-per-rollout 3" in error(batch, num_steps_per_rollout=3)
    no_prompt = TrainBatch(
        batch.response_lengths_N,
        batch.response_lengths_N,
        dict(batch.columns) | {"tokens": batch.columns["tokens"][: int(batch.response_lengths_N.sum())]},
    )
    assert "sample" in error(no_prompt) and "has no prompt" in error(no_prompt)


def _error_of_loading(trainer: Trainer) -> str:
    with pytest.raises(ValueError) as raised:
        trainer.load()
    return str(raised.value)


def test_nothing_to_load(workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    args = tiny.make_args(hf, ref_load=None, hf_checkpoint=None, load=str(tmp_path))
    [message] = workers.run(1, _with_trainer, args, _error_of_loading)
    assert str(tmp_path) in message and "--ref-load" in message


@pytest.mark.parametrize("leftover", [None, ".tmp_release"])
@pytest.mark.parametrize("flags", [{"use_kl_loss": True, "kl_loss_coef": 0.1}, {}], ids=["reference", "actor"])
def test_a_named_reference_is_not_replaced(
    leftover: str | None, flags: dict[str, Any], workers: WorkerPool, hf: Path, tmp_path: Path
) -> None:
    if leftover is not None:
        (tmp_path / leftover).mkdir()
    args = tiny.make_args(hf, ref_load=str(tmp_path), **flags)
    [message] = workers.run(1, _with_trainer, args, _error_of_loading)
    assert message.startswith(f"--ref-load {tmp_path}: no checkpoint there")
    [result] = workers.run(1, _with_trainer, replace(args, ref_load=None), Trainer.load)
    assert result.source.startswith(str(hf))  # without --ref-load: --hf-checkpoint


def test_a_killed_run_starts_again_with_its_dumps(workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "dumps").mkdir()
    (tmp_path / "hf_0").mkdir()
    args = tiny.make_args(
        hf,
        load=str(tmp_path),
        save=str(tmp_path),
        save_debug_rollout_data=str(tmp_path / "dumps" / "{rollout_id}.json"),
        save_hf=str(tmp_path / "hf_{rollout_id}"),
    )
    [result] = workers.run(1, _with_trainer, args, Trainer.load)
    assert result.next_rollout_id == 0 and "has no checkpoint" in result.source
    [message] = workers.run(1, _with_trainer, replace(args, save_hf=None), _error_of_loading)
    assert "other files (hf_0)" in message


def _save_at(trainer: Trainer, rollout_ids: list[int]) -> None:
    trainer.load()
    for rollout_id in rollout_ids:
        trainer.save(rollout_id, {})


def test_a_run_refuses_checkpoints_of_later_rollouts(workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    args = tiny.make_args(hf, save=str(tmp_path / "save"))
    workers.run(2, _with_trainer, args, _save_at, [1, 9])
    load = replace(args, load=args.save)
    for earlier in (replace(load, ckpt_step=1), replace(load, finetune=True), args):
        first, second = workers.run(2, _with_trainer, earlier, _error_of_loading)
        assert first == second and "iter_0000009" in first and "an abandoned branch" in first
        elsewhere = replace(earlier, save=str(tmp_path / "elsewhere"))
        assert [result.next_rollout_id for result in workers.run(1, _with_trainer, elsewhere, Trainer.load)] == [
            2 if earlier.ckpt_step == 1 else 0
        ]
    assert workers.run(1, _with_trainer, load, Trainer.load)[0].next_rollout_id == 10
    only_evaluates = replace(load, ckpt_step=1, num_rollout=0)
    assert workers.run(1, _with_trainer, only_evaluates, Trainer.load)[0].next_rollout_id == 2
    (tmp_path / "save" / "iter_0000009" / "common.pt").unlink()  # damaged: the run may write it again
    assert workers.run(1, _with_trainer, load, Trainer.load)[0].next_rollout_id == 2


def test_a_checkpoint_without_optimizer_is_refused(workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    args = tiny.make_args(hf, save=str(tmp_path), load=str(tmp_path), no_save_optim=True)
    workers.run(1, _with_trainer, args, _save_at, [3])
    [message] = workers.run(1, _with_trainer, args, _error_of_loading)
    assert "iter_0000003 was saved with --no-save-optim" in message and "--no-load-optim" in message
    [result] = workers.run(1, _with_trainer, replace(args, no_load_optim=True), Trainer.load)
    assert result.next_rollout_id == 4


def test_a_resume_with_other_model_files_is_refused(workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hf, tmp_path / "hf"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    save = str(tmp_path / "save")
    args = tiny.make_args(source, save=save, load=save)
    workers.run(1, _with_trainer, args, _save_at, [3])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "dtype": "x"}, indent=7))
    [result] = workers.run(1, _with_trainer, args, Trainer.load)
    assert result.next_rollout_id == 4 and "hf_files" not in result.state
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    (source / "chat_template.jinja").write_text("{{ other }}")
    [message] = workers.run(1, _with_trainer, args, _error_of_loading)
    assert (
        f"--hf-checkpoint {source}: not what {save}/iter_0000003 was trained with (another chat template; " in message
    )
    assert "config.json: eos_token_id" in message and "5 now)" in message and "--finetune" in message
    [result] = workers.run(1, _with_trainer, replace(args, finetune=True, save=None), Trainer.load)
    assert result.next_rollout_id == 0


def _export(trainer: Trainer, paths: dict[str, Path]) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
    trainer.load()
    for name, path in paths.items():
        trainer.save_hf(path, dtype=trainer.params_dtype if name == "own" else None)
    return trainer.params_dtype, dict(trainer.iter_hf_tensors())


@pytest.mark.parametrize("bf16", [False, True])
def test_an_export_in_the_models_dtype_loses_nothing(bf16: bool, workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    """Export a bf16 directory that was trained in fp32, and an fp32 directory that was trained in bf16."""
    source = tmp_path / "source"
    tiny.hf_model("glm4").to(torch.float32 if bf16 else torch.bfloat16).save_pretrained(source)
    paths = {"own": tmp_path / "own", "source": tmp_path / "of the source"}
    args = tiny.make_args(source, ref_load=str(hf), bf16=bf16)
    [(dtype, weights)] = workers.run(1, _with_trainer, args, _export, paths)
    assert dtype == (torch.bfloat16 if bf16 else torch.float32)
    own = HFReader(paths["own"])
    assert own.dtypes() == {dtype} and all(torch.equal(own.get(name), weights[name]) for name in weights)
    assert HFReader(paths["source"]).dtypes() == {torch.float32 if bf16 else torch.bfloat16}  # control


def _train_and_save(trainer: Trainer, batches: list[TrainBatch], first: int) -> tuple[Any, ...]:
    result = trainer.load()
    assert result.next_rollout_id == first, result
    metrics = [trainer.train(first + number, batch) for number, batch in enumerate(batches)]
    trainer.save(first + len(batches) - 1, {"cursor": first + len(batches)})
    return runs.weights(trainer), [entry["train/lr"] for entry in metrics], result.state


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "bf16": True},
        {"context_parallel_size": 2, "use_distributed_optimizer": True},
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_unbroken_one(
    flags: dict[str, Any], workers: WorkerPool, hf: Path, other: Path, tmp_path: Path
) -> None:
    batches = [tiny.random_batch(seed=seed) for seed in range(3)]
    args = tiny.make_args(
        hf,
        **flags,
        ref_load=str(other),
        load=str(hf),
        save=str(tmp_path / "unbroken"),
        use_kl_loss=True,
        kl_loss_coef=0.1,
        lr_decay_style="linear",
    )
    unbroken, rates, _ = workers.run(2, _with_trainer, args, _train_and_save, batches, 0)[0]
    broken = replace(args, save=str(tmp_path / "broken"))
    workers.run(2, _with_trainer, broken, _train_and_save, batches[:2], 0)
    resumed = replace(broken, load=broken.save)
    weights, last_rates, state = workers.run(2, _with_trainer, resumed, _train_and_save, batches[2:], 2)[0]
    assert difference(weights, unbroken) == 0
    assert last_rates == rates[2:] and state == {"cursor": 2}
    # control: without the optimizer the next steps differ
    restarted = replace(resumed, no_load_optim=True, save=str(tmp_path / "restarted"), ckpt_step=1)
    weights, _, _ = workers.run(2, _with_trainer, restarted, _train_and_save, batches[2:], 2)[0]
    assert difference(weights, unbroken) > 1e-4


def _rounded_bf16_training(batch: TrainBatch, args: Args, steps: int) -> dict[str, np.ndarray]:
    """SFT with weights that exist in bf16 only."""
    model = tiny.hf_model("glm4").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=args.adam_eps, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (-_response_log_probs(model, batch, 1.0).mean()).backward()
        optimizer.step()
    return {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}


def test_bf16_trains_on_fp32_master_weights(workers: WorkerPool, hf: Path) -> None:
    """Each step is smaller than half of a weight's last bit: without fp32 copies no weight ever moves."""
    steps, batch = 40, tiny.random_batch()
    args = tiny.make_args(hf, bf16=True, lr=5e-5, weight_decay=0.0, loss_type="sft_loss", num_rollout=steps)
    [found] = workers.run(1, runs.train, args, [batch] * steps)
    [single] = workers.run(1, runs.train, replace(args, bf16=False), [batch] * steps)
    rounded = _rounded_bf16_training(batch, args, steps)
    start = {name: p.detach().numpy() for name, p in tiny.hf_model("glm4").named_parameters()}
    start_bf16 = {name: p.detach().float().numpy() for name, p in tiny.hf_model("glm4").bfloat16().named_parameters()}

    def moved(weights: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> float:
        """Sum over the weights in [1/32, 1/8]: half of the last bit is 1.2e-4 or more, and 40 steps exceed it."""
        chosen = {name: (np.abs(start_bf16[name]) >= 1 / 32) & (np.abs(start_bf16[name]) <= 1 / 8) for name in start}
        return float(sum(np.abs(weights[name] - start[name])[chosen[name]].sum() for name in start))

    expected = moved(single.weights, start)
    assert moved(found.weights, start_bf16) == pytest.approx(expected, rel=0.1)
    assert moved(rounded, start_bf16) < 0.01 * expected  # control
    first, last = (found.metrics[number]["train/loss"] for number in (0, -1))
    expected_first, expected_last = (single.metrics[number]["train/loss"] for number in (0, -1))
    assert first == pytest.approx(expected_first, abs=1e-2)
    assert first - last == pytest.approx(expected_first - expected_last, rel=0.1)
