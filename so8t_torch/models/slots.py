"""Slots for sequences that are written side by side: each joins, takes its tokens and leaves when it wants to.

    join: prompt alone → state of a free slot        step: states of some slots + a token each → logits, states after
    bytes of a slot = those of a sequence's state, whatever its length

A sequence's state has a fixed size, so a slot is one row of a few tensors, and nothing is ever computed again because
another sequence came or went. A call that fails changes no slot: rows are written where all blocks have run.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.models.language_model import RecurrentForCausalLM
from so8t_torch.models.states import RecurrentCache, read_positions, read_states, write_positions, write_states

__all__ = ["Parked", "SlotPool"]


@dataclass(frozen=True)
class Parked:
    """A sequence outside the pool: its state, and the model that it belongs to."""

    rows: tuple[Tensor, ...]
    model: weakref.ReferenceType[RecurrentForCausalLM]

    @property
    def bytes(self) -> int:
        """Bytes of the state."""
        return sum(row.numel() * row.element_size() for row in self.rows)


class SlotPool:
    """A fixed number of slots for sequences of one model.

    ``print(pool)`` tells how many are taken and the bytes of each.

    Args:
        model: a language model in evaluation mode; states lie on its device.
        slots: how many sequences there can be at once, at least 1.

    Raises:
        ConfigError: it is none of this package's language models, reads ahead, or slots is below 1.
    """

    def __init__(self, model: RecurrentForCausalLM, slots: int) -> None:
        if not isinstance(model, RecurrentForCausalLM):
            raise ConfigError(
                "SlotPool: expected a language model with a state of fixed size (Phase1ForCausalLM, "
                f"Phase2ForCausalLM), got {type(model).__name__}."
            )
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ConfigError(f"SlotPool: expected at least 1 slot, got {slots!r}.")
        if getattr(model.config, "bk_mode", "causal") == "full":
            raise ConfigError("SlotPool: expected bk_mode 'causal'; a model that reads the whole row has no state.")
        self.model, self.slots = model, slots
        self._blocks: tuple[Any, ...] = tuple(model.model.layers)
        self._names = [tuple(block.state_names) for block in self._blocks]
        kind = model.model.norm.weight
        drawn = [block.initial_state(slots, kind.device, kind.dtype) for block in self._blocks]
        self._rows = [torch.zeros(slots, dtype=torch.int64, device=kind.device)]
        self._rows += [state[name] for state, names in zip(drawn, self._names, strict=True) for name in names]
        self._live: dict[int, None] = {}

    @property
    def live(self) -> tuple[int, ...]:
        """Slots that are taken, in the order of joining."""
        return tuple(self._live)

    @property
    def free(self) -> tuple[int, ...]:
        """Slots that are not, least first."""
        return tuple(slot for slot in range(self.slots) if slot not in self._live)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that a sequence carries from token to token, however long it is."""
        return sum(rows[0].numel() * rows.element_size() for rows in self._rows)

    def __str__(self) -> str:
        held = self.slots * self.bytes_per_slot
        return f"{len(self._live)} of {self.slots} slots, {self.bytes_per_slot:,} bytes each, {held:,} in all"

    @torch.no_grad()
    def join(self, prompt: Int[Tensor, " n"] | Sequence[int], *, piece: int | None = None) -> tuple[int, Tensor]:
        """Read a prompt into a free slot, the other slots untouched.

        Args:
            prompt: ids of at least one token.
            piece: tokens that are read at a time, which bounds the memory for a long prompt; all by default.

        Returns:
            The slot, and the logits (V,) of the token after the prompt.

        Raises:
            ConfigError: no slot is free, the model is in training mode, or piece is below 1.
            ShapeError: the prompt is empty or no row.
            DomainError: ids that are no ids.
        """
        slot = self._free_slot()
        self._check_mode()
        if piece is not None and piece < 1:
            raise ConfigError(f"SlotPool: expected pieces of at least 1 token, got {piece}.")
        ids = torch.as_tensor(prompt, device=self._rows[0].device)
        if ids.ndim != 1 or not len(ids):
            raise ShapeError(f"SlotPool: expected the ids (N,) of a prompt, N ≥ 1, got {tuple(ids.shape)}.")
        cache = RecurrentCache(self.model.config)
        for part in ids[None].split(piece or len(ids), 1):
            logits = self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self._write([slot], self._read_cache(cache, 1))
        self._live[slot] = None
        return slot, logits[0, -1]

    @torch.no_grad()
    def step(self, slots: Sequence[int], tokens: Int[Tensor, " n"] | Sequence[int]) -> Float[Tensor, "n v"]:
        """Give some slots a token each, in one batch; the others wait.

        Args:
            slots: that are live, each once, at least one; ``pool.live`` for all.
            tokens: one id for each.

        Returns:
            The logits of the tokens after them, in the order of slots.

        Raises:
            ConfigError: a slot is not live or named twice, none is named, or the model is in training mode.
            ShapeError: there are not as many tokens as slots.
            DomainError: ids that are no ids.
        """
        slots = self._checked(slots)
        self._check_mode()
        ids = torch.as_tensor(tokens, device=self._rows[0].device)
        if ids.shape != (len(slots),):
            raise ShapeError(f"SlotPool: expected one token for each of {len(slots)} slots, got {tuple(ids.shape)}.")
        cache = self._cache(slots)
        logits = self.model(ids[:, None], past_key_values=cache, use_cache=True).logits
        self._write(slots, self._read_cache(cache, len(slots)))
        return logits[:, -1]

    def leave(self, slot: int) -> None:
        """Free a slot; its sequence is forgotten.

        Args:
            slot: that is live.

        Raises:
            ConfigError: it is not.
        """
        (slot,) = self._checked([slot])
        del self._live[slot]

    def evict(self, slot: int) -> Parked:
        """Free a slot and return its sequence, to be resumed later, in this pool or another one of the same model.

        Args:
            slot: that is live.

        Raises:
            ConfigError: it is not.
        """
        (slot,) = self._checked([slot])
        parked = Parked(tuple(rows[slot].clone() for rows in self._rows), weakref.ref(self.model))
        del self._live[slot]
        return parked

    @torch.no_grad()
    def resume(self, parked: Parked) -> int:
        """Put a sequence that was evicted into a free slot, which is returned; it can be resumed more than once.

        Args:
            parked: what ``evict`` returned.

        Raises:
            ConfigError: no slot is free, or the sequence belongs to another model.
        """
        slot = self._free_slot()
        if not isinstance(parked, Parked):
            raise ConfigError(f"SlotPool: expected what evict returned, got {type(parked).__name__}.")
        if parked.model() is not self.model:
            raise ConfigError(
                "SlotPool: expected a sequence of this pool's model, got one of another model, to which its state "
                "means nothing; join with the tokens instead."
            )
        self._write([slot], [row[None] for row in parked.rows])
        self._live[slot] = None
        return slot

    @torch.no_grad()
    def reorder(self, sources: Mapping[int, int]) -> None:
        """Let slots continue the sequences of other slots, as beams do; all at once, so that slots can be exchanged.

        Args:
            sources: for each slot that changes, live or free, the live slot whose sequence it continues.

        Raises:
            ConfigError: a source is not live, or a slot is none of the pool's.
        """
        if not sources:
            return
        taken = self._checked(sorted(set(sources.values())))
        unknown = [slot for slot in sources if not self._is_slot(slot)]
        if unknown:
            raise ConfigError(f"SlotPool: expected slots in [0, {self.slots}), got {_shown(unknown)}.")
        places = [taken.index(source) for source in sources.values()]
        self._write(list(sources), [rows[taken][places] for rows in self._rows])
        self._live |= dict.fromkeys(sources)

    def _cache(self, slots: list[int]) -> RecurrentCache:
        """Return a cache with copies of rows, so that a call that fails on its way leaves the pool as it was."""
        index = torch.tensor(slots, device=self._rows[0].device)
        cache = RecurrentCache(self.model.config)
        positions, *rows = (held.index_select(0, index) for held in self._rows)
        write_positions(cache, positions, 0)
        left = iter(rows)
        for number, names in enumerate(self._names):
            write_states(cache, number, {name: next(left) for name in names})
        return cache

    def _read_cache(self, cache: RecurrentCache, count: int) -> list[Tensor]:
        """Return the rows of a cache in the order in which they are kept here."""
        positions = read_positions(cache, count)
        assert positions is not None
        found = [positions]
        for number, names in enumerate(self._names):
            state = read_states(cache, number, names, count)
            assert state is not None
            found += [state[name] for name in names]
        return found

    def _write(self, slots: list[int], rows: Sequence[Tensor]) -> None:
        index = torch.tensor(slots, device=self._rows[0].device)
        for held, row in zip(self._rows, rows, strict=True):
            held.index_copy_(0, index, row.to(held.dtype))

    def _free_slot(self) -> int:
        free = self.free
        if not free:
            raise ConfigError(f"SlotPool: expected a free slot, got all {self.slots} taken; leave or evict one first.")
        return free[0]

    def _is_slot(self, slot: object) -> bool:
        return isinstance(slot, int) and not isinstance(slot, bool) and 0 <= slot < self.slots

    def _checked(self, slots: Sequence[int]) -> list[int]:
        """Return slots that are all live and different."""
        found = list(slots)
        unknown = [slot for slot in found if slot not in self._live]
        if unknown or not found:
            got = _shown(unknown) or "none"
            raise ConfigError(f"SlotPool: expected live slots ({_shown(self.live) or 'there are none'}), got {got}.")
        if len(set(found)) < len(found):
            raise ConfigError(f"SlotPool: expected each slot once, got {_shown(found)}.")
        return found

    def _check_mode(self) -> None:
        if self.model.training:
            raise ConfigError("SlotPool: expected a model in evaluation mode; call model.eval().")


def _shown(slots: Sequence[object]) -> str:
    return ", ".join(map(str, slots))
