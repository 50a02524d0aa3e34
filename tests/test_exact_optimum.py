"""Off-policy, to the optimum: on the log of a uniform policy, TBRM ends at π*, known in closed form."""

from __future__ import annotations

import pytest
import torch
from common import trees
from common.trees import Tree, enumerate_policy, optimum, total_variation
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tbrm_trl import TBRMConfig, TBRMTrainer

BETAS = (0.5, 0.1)
TREE = Tree()
REWARDS = TREE.random_rewards()


def test_the_model_is_the_table(tmp_path):
    """Padding on either side changes nothing, <pad> and <bos> have probability 0, and trajectories sum to 1."""
    model = AutoModelForCausalLM.from_pretrained(TREE.save(tmp_path))
    policy = enumerate_policy(model, TREE)
    torch.testing.assert_close(policy.probs.sum(dim=1), torch.ones(len(TREE.prompts), dtype=torch.float64))

    width = max(map(len, TREE.prompt_ids)) + TREE.depth + 1
    for p, n in TREE.trajectories:
        prompt, completion = TREE.prompt_ids[p], TREE.completions[n]
        ids = torch.tensor([*prompt, *completion])
        pads = torch.full((width - len(ids),), trees.PAD)
        for padded, start in ((torch.cat([ids, pads]), 0), (torch.cat([pads, ids]), len(pads))):
            with torch.no_grad():
                logits = model(padded[None], (padded != trees.PAD).long()[None]).logits[0]  # (T, vocabulary)
            acting = logits[start + len(prompt) - 1 : start + len(ids) - 1]  # (C, vocabulary)
            log_probs = acting.log_softmax(dim=-1)[range(len(completion)), completion]  # (C,)
            assert acting.softmax(dim=-1)[:, [trees.PAD, trees.BOS]].eq(0).all()
            assert log_probs.sum().item() == pytest.approx(policy.log_probs[p, n].item(), abs=1e-4)
            assert acting[0].logsumexp(dim=-1).item() == pytest.approx(policy.soft_value[p].item(), abs=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("soft_value", ["policy", "calibrated"])
def test_a_log_of_a_uniform_policy_leads_to_the_optimum(soft_value, beta, tmp_path):
    """2,048 trajectories sampled uniformly, none of them from the policy: total variation to π* below 0.01.

    Of 80 trajectories the rarest come up 16 times on average; the minimiser is π* however often each comes up. The
    value term ends at log Z: β V_θ(s_1), or when calibrated β (V_θ − V_ref)(s_1), within 0.002 of β log E_ref exp(R/β).
    """
    trainer = TBRMTrainer(
        model=TREE.save(tmp_path / "model"),
        args=TBRMConfig(
            output_dir=str(tmp_path / "out"), beta=beta, soft_value=soft_value, learning_rate=1.0, max_steps=200,
            lr_scheduler_type="linear", max_grad_norm=0.0, per_device_train_batch_size=128,
            gradient_checkpointing=False, bf16=False,
            use_cpu=True, save_strategy="no", report_to="none", logging_steps=50, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(TREE.sampled_log(REWARDS, TREE.uniform, 2048)),
    )  # fmt: skip
    reference = enumerate_policy(trainer.model, TREE)
    optimal = {b: optimum(reference, REWARDS, b) for b in BETAS}
    # The start is far from π*, and the other β has another π*.
    assert total_variation(reference, optimal[beta]) > 0.1
    assert total_variation(optimal[BETAS[0]], optimal[BETAS[1]]) > 0.1

    trainer.train()

    trained = enumerate_policy(trainer.model, TREE)
    distance = total_variation(trained, optimal[beta])
    soft_value_learned = trained.soft_value - (reference.soft_value if soft_value == "calibrated" else 0.0)  # (P,)
    error = beta * (soft_value_learned - optimal[beta].soft_value).abs().max().item()
    print(f"total variation {distance:.1e}, β V off by {error:.1e}")
    assert distance < 0.01
    assert error < 0.002
