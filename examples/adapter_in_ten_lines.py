"""Gate a small Phi-3, train two steps, fold the gates. Run: python examples/adapter_in_ten_lines.py"""

import torch
from peft import get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from so8t_torch import SO8TConfig, so8t_param_groups

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = Phi3ForCausalLM(Phi3Config(vocab_size=96, pad_token_id=0, **sizes))
ids = torch.randint(1, 96, (4, 16))

model = get_peft_model(base, SO8TConfig(r=4, lora_target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW(so8t_param_groups(model, lr=1e-3, gate_lr=1e-2))
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.eval()
gated = model(ids).logits
for name, gate in model.gate_summary().items():
    print(f"{name}: largest angle {gate.max_angle:.4f} rad, orthogonality error {gate.orthogonality_error:.1e}")
plain = model.merge_and_unload()
error = float((plain(ids).logits - gated).abs().max().detach())
print(f"folded into {type(plain).__name__}: max |Δlogit| = {error:.1e}")
