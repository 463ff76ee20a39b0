"""When the host may look at entries."""

import torch
from torch._subclasses import FakeTensorMode

from so8t_torch.core.readable import readable
from so8t_torch.models import rows
from so8t_torch.models.rows import lay_out


def test_numbers_of_the_cpu_are_looked_at_and_tensors_without_data_are_not():
    assert readable(torch.ones(2))
    assert readable(torch.ones(2), waiting=True)
    assert not readable(torch.ones(2, device="meta"), waiting=True)


def test_another_device_is_looked_at_by_who_waits_unless_its_work_is_captured(monkeypatch):
    with FakeTensorMode():
        there = torch.empty(2, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert readable(there, waiting=True)
    assert not readable(there)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not readable(there, waiting=True)


def test_rows_that_cannot_be_looked_at_take_the_longer_way(monkeypatch):
    numbers, asked = torch.zeros(2, 5, dtype=torch.int64), []
    found = lay_out((2, 5), numbers.device, segment_ids=numbers, attention_mask=torch.ones_like(numbers))
    assert (found.documents, found.real) == (None, None)
    monkeypatch.setattr(rows, "readable", lambda *_, waiting: asked.append(waiting))
    found = lay_out((2, 5), numbers.device, segment_ids=numbers, attention_mask=torch.ones_like(numbers))
    assert torch.equal(found.documents, numbers)
    assert found.real.all()
    assert asked == [True, True]


def doubled_if_readable(x):
    return x * (2.0 if readable(x, waiting=True) else 1.0)


def test_traces_and_transforms_are_not_looked_at():
    x = torch.ones(2, 3)
    assert torch.equal(doubled_if_readable(x), 2.0 * x)
    for run in (torch.compile(doubled_if_readable, backend="eager", fullgraph=True), torch.vmap(doubled_if_readable)):
        assert torch.equal(run(x), x)
