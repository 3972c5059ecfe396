"""The one-page GRPO: its mathematics is the package's, and it learns."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from examples.minimal import grpo
from slime.algo.advantages.grpo import grpo_advantages
from slime.algo.losses import LossInputs, LossOptions, policy_loss
from slime.algo.reducers import loss_weights
from slime.core.sample import Sample

LEARNED = 0.8
VOCABULARY = 11
OPTIONS = LossOptions(
    surrogate="token",
    eps_clip=grpo.CLIP_LOW,
    eps_clip_high=grpo.CLIP_HIGH,
    eps_clip_c=None,
    kl_loss_coef=0.0,
    kl_loss_type="k1",
    entropy_coef=0.0,
    offpolicy_correction="none",
    tis_clip=2.0,
    tis_clip_low=0.0,
)


def samples_of(generator: torch.Generator) -> list[Sample]:
    """Return sixteen samples with prompts of 2 to 5 tokens and responses of 1 to 9."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    samples: list[Sample] = []
    for index in range(16):
        prompt, response = number(2, 6), number(1, 10)
        tokens = torch.randint(VOCABULARY, (prompt + response,), generator=generator).tolist()
        old = (-3 * torch.rand(response, generator=generator)).tolist()
        samples.append(
            Sample(
                index=index,
                tokens=tokens,
                prompt_length=prompt,
                response_length=response,
                rollout_log_probs=old,
            )
        )
    return samples


def test_advantages_equal_those_of_the_package() -> None:
    rewards_N = torch.rand(4 * grpo.G, generator=torch.Generator().manual_seed(0))
    groups_N = torch.arange(4).repeat_interleave(grpo.G)
    torch.testing.assert_close(grpo.grpo_advantages(rewards_N), grpo_advantages(rewards_N, groups_N))


def test_loss_and_gradient_equal_the_packages() -> None:
    generator = torch.Generator().manual_seed(1)
    samples = samples_of(generator)
    advantages_N = torch.randn(len(samples), generator=generator)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, requires_grad=True)

    def bigrams(tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=table[tokens])

    loss = grpo.grpo_loss(bigrams, samples, advantages_N)
    (gradient,) = torch.autograd.grad(loss, table)

    log_probs = table.log_softmax(-1)
    new_R = torch.cat([log_probs[s.tokens[s.prompt_length - 1 : -1], s.tokens[s.prompt_length :]] for s in samples])
    old_R = torch.tensor([value for s in samples for value in s.rollout_log_probs or ()])
    lengths_N = torch.tensor([s.response_length for s in samples])
    inputs = LossInputs(new_R, old_R, advantages_N.repeat_interleave(lengths_N))
    loss_R, metrics = policy_loss(inputs, OPTIONS)
    weights_R = loss_weights(
        torch.ones(len(new_R)), lengths_N, torch.ones(len(samples), dtype=torch.bool), per_token=False
    )
    expected = (loss_R * weights_R).sum()
    (expected_gradient,) = torch.autograd.grad(expected, table)

    assert 0 < metrics["clip_fraction"].mean() < 1  # both sides of the minimum are taken
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_readme_shows_its_loop() -> None:
    page = Path(grpo.__file__)
    readme = (page.parents[2] / "README.md").read_text()
    loop = readme.split("```python\n")[1].split("\n```")[0]
    assert loop.startswith("for rollout_id in")
    assert textwrap.indent(loop, "    ") in page.read_text()


def test_the_page_learns_the_sums() -> None:
    page = Path(grpo.__file__)
    assert len(page.read_text().splitlines()) <= 170
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two would wait for each other while other tests run
    command = [sys.executable, str(page), "--num-rollouts", "15"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    start, *_, last = [line for line in done.stdout.splitlines() if "reward" in line or "held-out sums are" in line]
    assert float(start.split("reward ")[1].split()[0]) < 0.6, start
    assert float(last.split()[0]) >= LEARNED, last
