from __future__ import annotations

import warnings

import pytest
import torch

from so8t_torch import SO8TConfig, load_adapter
from so8t_torch.adapter import GeneratorCastWarning

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_supervised_fine_tuning_moves_gates_and_low_rank_updates(load_base, saved_base, ids, tmp_path, kind) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=16,
    )
    data = Dataset.from_dict({"text": ["the gate turns eight channels", "no more than that", "eight at a time"] * 2})
    trainer = SFTTrainer(
        load_base(kind),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(saved_base),
        peft_config=SO8TConfig(r=2, lora_target_modules=["qkv_proj"], task_type="CAUSAL_LM"),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    promoted = [w for w in caught if issubclass(w.category, GeneratorCastWarning)]
    assert bool(promoted) == (kind == "nf4"), "TRL casts trainable parameters to bfloat16 on a 4-bit base"

    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trained} == {"so8t_safe", "so8t_lora_A", "so8t_lora_B"}
    for name, parameter in trained.items():
        assert parameter.isfinite().all()
        if "so8t_safe" in name:
            assert parameter.dtype == torch.float32
            # Adam moves each number by about the learning rate a step; bfloat16 would keep three digits of it
            assert (parameter != parameter.bfloat16().float()).any()
        assert parameter.any()
    frozen = [p for n, p in trainer.model.named_parameters() if "so8t_cmd" in n]
    assert not any(p.any() for p in frozen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    trainer.save_model(str(tmp_path / "adapter"))
    trainer.model.eval()
    for name, parameter in trainer.model.named_parameters():
        if "so8t_lora" in name:
            # on a 4-bit base TRL keeps LoRA in bfloat16; PEFT widens it to float32 when it loads an adapter
            parameter.data = parameter.data.float()
    again = load_adapter(tmp_path / "adapter", load_base(kind))
    assert torch.equal(again(ids).logits, trainer.model(ids).logits)
