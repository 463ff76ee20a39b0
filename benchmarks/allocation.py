"""Peak bytes that PyTorch's CPU allocator hands out while a call runs, as the allocator's own events tell them.

    peak = max over time of Σ allocated − Σ freed since the call began

What the call returns counts until it is dropped; what existed before does not. No estimate is involved: the events
come from the allocator by way of ``torch.profiler``, inside registered operations as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of allocated bytes over those allocated when ``call`` begins."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    tree = recorded.profiler.kineto_results.experimental_event_tree()
    return max(accumulate(_own(sorted(_changes(tree))), initial=0))


def _own(changes: Iterable[tuple[int, int, int]]) -> Iterator[int]:
    """Yield the signed bytes of changes (time, place, signed bytes), without releases of what was there before."""
    held: dict[int, int] = {}
    for _, place, size in changes:
        if size > 0:
            held[place] = size
            yield size
        elif place in held:
            yield -held.pop(place)


def _changes(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield (time, place, signed bytes) of every allocation and release below the given events."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _changes(event.children)
