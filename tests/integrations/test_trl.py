"""``SAMTrainer`` as a mixin before TRL's trainer of language models: LoRA, packing, accumulation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from peft import LoraConfig  # noqa: E402
from transformers import set_seed  # noqa: E402
from with_trl import SAMSFTTrainer, network, texts, tokenizer  # noqa: E402

from fastsam import SAM  # noqa: E402


def trained(tmp_path, cls, base, **more):
    set_seed(0)
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_length=32,
        packing=True, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
        lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    made = cls(
        network(), arguments, train_dataset=texts(100), processing_class=tokenizer(), peft_config=lora,
        optimizer_cls_and_kwargs=base, **more,
    )  # fmt: skip
    made.train()
    weights = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    logs = [log for log in made.state.log_history if "loss" in log]
    return weights, logs


SGD = torch.optim.SGD


def test_lora_packing_and_accumulation_are_those_of_trl(tmp_path):
    """At radius 0 the weights are TRL's own, and so is what it logs; at a radius only adapters and head differ."""
    plain, expected = trained(tmp_path, trl.SFTTrainer, (SGD, {"lr": 0.5}))
    still, logs = trained(tmp_path, SAMSFTTrainer, (SAM, {"base_optimizer": SGD, "rho": 0.0, "lr": 0.5}))
    for name, p in plain.items():
        torch.testing.assert_close(still[name], p, rtol=1e-5, atol=1e-7)
    sharp, logs = trained(tmp_path, SAMSFTTrainer, (SAM, {"base_optimizer": SGD, "rho": 0.5, "lr": 0.5}))
    moved = {name for name in plain if not torch.equal(sharp[name], plain[name])}
    assert moved and all("lora" in name or "modules_to_save" in name for name in moved)
    assert [log["num_tokens"] for log in logs] == [log["num_tokens"] for log in expected], "each token is counted once"
    for key in ("loss", "mean_token_accuracy", "entropy"):
        assert logs[0][key] == pytest.approx(expected[0][key], rel=1e-5), "of the first pass"


def test_a_share_of_the_batch_is_refused_where_packing_leaves_one_row(tmp_path):
    """A packed batch is one row, of which no part can be taken."""
    with pytest.raises(ValueError, match="share"):
        trained(tmp_path, SAMSFTTrainer, (SAM, {"base_optimizer": SGD, "lr": 0.5}), ascent_share=0.5)
