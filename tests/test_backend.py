"""Choice of an implementation: preference, refusal, and the reasons given."""

import pytest
import torch

from so8t_torch.core import backend
from so8t_torch.core.backend import Candidate, choose
from so8t_torch.core.errors import BackendError

FAST = Candidate("fast", ("no device",))
PLAIN = Candidate("plain")


def test_auto_takes_the_first_that_can_run():
    assert choose("op", "auto", [FAST, PLAIN]) == "plain"
    assert choose("op", "auto", [Candidate("fast"), PLAIN]) == "fast"


def test_a_named_backend_that_cannot_run_is_an_error_with_every_reason():
    with pytest.raises(BackendError, match=r"(?s)op: backend 'fast' cannot run.*fast: no device.*plain: can run"):
        choose("op", "fast", [FAST, PLAIN])


def test_nothing_can_run():
    with pytest.raises(BackendError, match="no backend can run"):
        choose("op", "auto", [FAST])


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(BackendError, match="expected one of auto, fast, plain"):
        choose("op", "quick", [FAST, PLAIN])


def test_triton_gives_its_reason_on_a_cpu_tensor(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    assert "cpu" in backend.triton_reasons(torch.zeros(1))[0]
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    assert backend.triton_reasons(torch.zeros(1)) == ()
