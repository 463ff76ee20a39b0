"""Two steps of TRL's trainer on rows of one text each, and on packed ones."""

import pytest
import torch

from so8t_torch.models.factory import create_phase1_model, create_phase2_model

pytest.importorskip("trl")
SMALL = {"d_model": 16, "n_layers": 1, "n_seq": 16, "dropout": 0.0}
TEXTS = ["the gate turns eight channels", "no more than that", "eight at a time", "and again"] * 2


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("phase", [1, 2])
def test_both_models_train(phase, packing, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    vocab = {"vocab_size": len(tokenizer), "seed": 0}
    if phase == 1:
        model = create_phase1_model(**SMALL, **vocab, htt_rank=3, ar_ssm_max_rank=4)
    else:
        model = create_phase2_model(**SMALL, **vocab, num_heads=2, head_dim=4, memory_chunk=8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=True,
        max_length=16,
        packing=packing,
        packing_strategy="bfd",
        padding_free=packing,
    )
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    if packing:
        seen = []
        model.model.layers[0].register_forward_pre_hook(
            lambda _, __, given: seen.append(given["segment_ids"]), with_kwargs=True
        )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(before)
    if packing:
        assert all(int(documents.max()) > 0 for documents in seen)
