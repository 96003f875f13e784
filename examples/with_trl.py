"""F-SAM with LoRA in TRL's trainer of language models: ``python examples/with_trl.py``.

Model and tokenizer are made here, so that nothing is downloaded. The language is a circle of words.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from fastsam import FriendlySAM
from fastsam.integrations.transformers import SAMTrainer

WORDS = "sun moon earth mars venus saturn".split()


class SAMSFTTrainer(SAMTrainer, SFTTrainer):
    """TRL's, with the steps of fastsam."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", "<unk>", *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


def texts(count: int) -> Dataset:
    return Dataset.from_dict({"text": [" ".join(WORDS[(i + j) % 6] for j in range(6 + i % 5)) for i in range(count)]})


def network() -> LlamaForCausalLM:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=64, **heads, eos_token_id=0))


def accuracy(model: torch.nn.Module) -> float:
    """The share of right next words."""
    ids = torch.tensor([[2 + i % 6 for i in range(12)]])
    with torch.no_grad():
        guesses = model.eval()(input_ids=ids).logits.argmax(dim=-1)
    return (guesses[:, :-1] == ids[:, 1:]).float().mean().item()


def main() -> None:
    set_seed(0)
    recipe = (FriendlySAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 2e-2})
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, num_train_epochs=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_length=32,
            packing=True, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=5,
        )  # fmt: skip
        trainer = SAMSFTTrainer(
            network(), arguments, train_dataset=texts(200), processing_class=tokenizer(), peft_config=lora,
            optimizer_cls_and_kwargs=recipe,
        )  # fmt: skip
        trainer.train()
    print(f"test accuracy {accuracy(trainer.model):.3f}")


if __name__ == "__main__":
    main()
