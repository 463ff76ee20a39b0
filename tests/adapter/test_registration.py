from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from so8t_torch import SO8TConfig, SO8TModel
from so8t_torch.adapter.registration import add_member, register
from so8t_torch.core.errors import AdapterError


def test_the_member_behaves_like_any_member_of_the_enumeration() -> None:
    member = PeftType.SO8T
    assert member is PeftType("SO8T") is PeftType["SO8T"]
    assert member == "SO8T"
    assert member.value == member.name == "SO8T"
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert isinstance(member, PeftType)


def test_the_method_is_in_every_table_of_peft() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SO8T] is SO8TConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SO8T] is SO8TModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SO8T] == "so8t_"


def test_registering_twice_changes_nothing() -> None:
    members = list(PeftType)
    assert add_member() is PeftType.SO8T
    register(SO8TConfig, SO8TModel)
    assert list(PeftType) == members


def test_another_package_under_the_same_name_is_refused() -> None:
    class Impostor:
        prefix = "so8t_"

    with pytest.raises(AdapterError, match="already has one from so8t_torch"):
        register(SO8TConfig, Impostor)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM
torch.set_num_threads(1)
folder, logits = sys.argv[1:]
try:
    AutoPeftModelForCausalLM.from_pretrained(folder)
except KeyError as error:
    assert "SO8T" in str(error), error
else:
    raise AssertionError("peft knew the method before it was imported")
from so8t_torch import load_adapter
expected = torch.load(logits)
ids = torch.arange(3, 23).reshape(2, 10)
with torch.no_grad():
    difference = (load_adapter(folder)(ids).logits - expected).abs().max()
    assert difference == 0, difference
"""


@pytest.mark.slow
def test_a_fresh_process_loads_through_load_adapter_with_no_difference(load_base, shake, tmp_path) -> None:
    import torch

    model = shake(get_peft_model(load_base(), SO8TConfig(r=2, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.save(model(torch.arange(3, 23).reshape(2, 10)).logits, tmp_path / "logits.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_importing_the_package_does_not_import_the_model_libraries() -> None:
    code = "import sys, so8t_torch; print([m for m in ('transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
