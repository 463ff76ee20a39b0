"""Triage scenarios by rule: 36 states of a warehouse, a laboratory and a finance desk, told in English and Japanese.

A state is one value for each of three attributes; a rule maps it to ALLOW (17 states), ESCALATE (12) or REFUSE (7).
A record is one telling of one state: a frame (sentence with slots), a wording for each value, a place.

Two things are held out *whole*: states (no telling of them is ever trained on) and frames (no state is ever told in
them during training). A state is held out only if the seen states still determine its label, see
``held_out_states``, so that the rule can be learned and a wrong answer is a failure to generalise.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from so8t_torch.core.config import Section
from so8t_torch.core.errors import ConfigError
from so8t_torch.data.labels import Label
from so8t_torch.data.records import Message, Record
from so8t_torch.data.wording import FRAMES, PLACES, QUESTION, WORDINGS, Language

Split = Literal["train", "held_out"]
Novelty = Literal["none", "state", "frame", "both"]


@dataclass(frozen=True)
class State:
    """One value for each attribute of a scenario."""

    scenario: str
    values: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The state as text, e.g. ``warehouse/heavy/yes/no``; records carry it as their group."""
        return "/".join([self.scenario, *(value for _, value in self.values)])


class ScenarioSection(Section):
    """Which states and frames are held out, and how many tellings are drawn."""

    seed: int = Field(default=0, description="Draws the held-out states, the wordings and the places.")
    held_out_share: float = Field(default=0.25, gt=0, lt=1, description="Of each label in each scenario.")
    held_out_frames: int = Field(default=1, ge=1, le=5, description="From the end of each list of frames.")
    train_tellings: int = Field(default=12, ge=1, description="Tellings of each seen state in each seen frame.")
    held_out_tellings: int = Field(default=2, ge=1, description="The same in the held-out split.")


def _warehouse(state: dict[str, str]) -> tuple[Label, tuple[str, ...]]:
    if state["human_near"] == "yes" and state["arm_load"] == "heavy":
        return Label.REFUSE, ("arm_load", "human_near")
    if state["human_near"] == "yes" and state["fragile"] == "yes":
        return Label.ESCALATE, ("fragile", "human_near")
    return Label.ALLOW, ()


def _lab(state: dict[str, str]) -> tuple[Label, tuple[str, ...]]:
    if state["temp"] == "high":
        if state["human_near"] == "yes":
            return Label.REFUSE, ("temp", "human_near")
        return Label.ESCALATE, ("temp",)
    if state["pressure"] == "elevated":
        return Label.ESCALATE, ("pressure",)
    return Label.ALLOW, ()


def _finance(state: dict[str, str]) -> tuple[Label, tuple[str, ...]]:
    if state["audit_flag"] == "yes":
        return (Label.REFUSE if state["dual_auth"] == "no" else Label.ESCALATE), ("audit_flag", "dual_auth")
    if state["amount"] == "large" and state["dual_auth"] == "no":
        return Label.ESCALATE, ("amount", "dual_auth")
    return Label.ALLOW, ()


RULES: dict[str, Callable[[dict[str, str]], tuple[Label, tuple[str, ...]]]] = {
    "warehouse": _warehouse,
    "lab": _lab,
    "finance": _finance,
}
RISK: dict[str, dict[str, tuple[str, ...]]] = {
    "warehouse": {"arm_load": ("light", "medium", "heavy"), "fragile": ("no", "yes"), "human_near": ("no", "yes")},
    "lab": {"temp": ("low", "nominal", "high"), "pressure": ("stable", "elevated"), "human_near": ("no", "yes")},
    "finance": {"audit_flag": ("no", "yes"), "amount": ("small", "medium", "large"), "dual_auth": ("yes", "no")},
}
"""The values of every attribute by rising risk."""

LANGUAGES: tuple[Language, ...] = ("en", "ja")


@functools.cache
def states() -> tuple[State, ...]:
    """Return the 36 states in a fixed order."""
    return tuple(
        State(scenario, tuple(zip(attributes, values, strict=True)))
        for scenario in RULES
        for attributes in [RISK[scenario]]
        for values in itertools.product(*attributes.values())
    )


def decide(state: State) -> tuple[Label, str]:
    """Apply the scenario's rule.

    Returns:
        the label, and its reason: the facts that decided; all facts where none speaks against ALLOW.
    """
    label, names = RULES[state.scenario](dict(state.values))
    return label, notes(state, names or None)


def notes(state: State, names: Iterable[str] | None = None) -> str:
    """Write the facts of a state in the fixed vocabulary, e.g. ``arm load: heavy; human near: no.``

    Args:
        state: the state.
        names: the attributes to write; default: all.
    """
    chosen = dict(state.values)
    return "; ".join(f"{name.replace('_', ' ')}: {chosen[name]}" for name in names or chosen) + "."


def held_out_states(section: ScenarioSection) -> frozenset[State]:
    """Draw the states that training never sees, so that the seen ones still determine each of their labels.

    Every rule here is monotone: a riskier value never lowers the decision (values are listed by rising risk). A
    state is held out only while seen states below and above it pin its label. From each scenario and label at most
    the share is drawn, at least one state where any can be pinned.

    Raises:
        ConfigError: no draw leaves every label and scenario in the held-out part.
    """
    return _draw(section.seed, section.held_out_share)


@functools.cache
def _draw(seed: int, share: float) -> frozenset[State]:
    order = list(states())
    random.Random(f"states {seed}").shuffle(order)
    sizes = Counter((state.scenario, decide(state)[0]) for state in order)
    room = {cell: max(1, round(share * size)) for cell, size in sizes.items()}
    held: set[State] = set()
    for state in order:
        cell = state.scenario, decide(state)[0]
        if room[cell] and _determined(held | {state}):
            held.add(state)
            room[cell] -= 1
    if {decide(s)[0] for s in held} != set(Label) or {s.scenario for s in held} != set(RULES):
        raise ConfigError(f"Seed {seed} holds out no state of some label or scenario; choose another seed.")
    return frozenset(held)


def _determined(held: set[State]) -> bool:
    seen = [state for state in states() if state not in held]
    return all(_pinned(state, seen) for state in held)


def _pinned(state: State, seen: list[State]) -> bool:
    below = [decide(s)[0] for s in seen if _at_most(s, state)]
    above = [decide(s)[0] for s in seen if _at_most(state, s)]
    return max(below, default=Label.ALLOW) == min(above, default=Label.REFUSE)


def _at_most(a: State, b: State) -> bool:
    """Whether no value of ``a`` is riskier than the same attribute's value of ``b``."""
    return a.scenario == b.scenario and all(
        levels.index(x) <= levels.index(y)
        for (name, x), (_, y) in zip(a.values, b.values, strict=True)
        for levels in [RISK[a.scenario][name]]
    )


def scenario_records(section: ScenarioSection, split: Split) -> list[Record]:
    """Return the tellings of a split with the rule's answer.

    The training split tells seen states in seen frames. The held-out split tells everything that is new in state,
    frame or both; ``novelty`` says which. ``group`` is the state, ``source`` the frame.

    Args:
        section: seed and sizes.
        split: ``"train"`` or ``"held_out"``.
    """
    hidden = held_out_states(section)
    source = random.Random(f"{split} {section.seed}")
    tellings = section.train_tellings if split == "train" else section.held_out_tellings
    return [
        _record(state, language, frame, text)
        for state in states()
        for language, frame in frames(state.scenario)
        if (split == "train") == (novelty_of(section, hidden, state, language, frame) == "none")
        for text in tell(state, language, frame, tellings, source)
    ]


def novelty(section: ScenarioSection, record: Record) -> Novelty:
    """Say what a record of ``scenario_records`` shows that training did not: its state, its frame, both or none."""
    state = next(state for state in states() if state.name == record.group)
    scenario, language, frame = record.source.split(".")
    assert scenario == state.scenario, "group and source of a record name one scenario"
    return novelty_of(section, held_out_states(section), state, "ja" if language == "ja" else "en", int(frame))


def novelty_of(
    section: ScenarioSection, hidden: Collection[State], state: State, language: Language, frame: int
) -> Novelty:
    """Say what is new about a state told in a frame, given the states held out."""
    new_frame = frame >= len(FRAMES[state.scenario, language]) - section.held_out_frames
    if state in hidden:
        return "both" if new_frame else "state"
    return "frame" if new_frame else "none"


def frames(scenario: str) -> Iterator[tuple[Language, int]]:
    """Yield language and number of every frame of a scenario."""
    for language in LANGUAGES:
        for frame in range(len(FRAMES[scenario, language])):
            yield language, frame


def tell(state: State, language: Language, frame: int, count: int, source: random.Random) -> list[str]:
    """Draw ``count`` different tellings of a state in one frame."""
    slots = {name: WORDINGS[state.scenario, language][name][value] for name, value in state.values}
    slots["place"] = PLACES[state.scenario, language]
    choices = list(itertools.product(*slots.values()))
    template = FRAMES[state.scenario, language][frame]
    return [
        template.format(**dict(zip(slots, choice, strict=True)))
        for choice in source.sample(choices, min(count, len(choices)))
    ]


def _record(state: State, language: Language, frame: int, text: str) -> Record:
    label, reason = decide(state)
    return Record(
        messages=(
            Message("user", f"{text}\n{QUESTION[language]}"),
            Message("assistant", f"{label}. {reason}"),
        ),
        label=label,
        group=state.name,
        source=f"{state.scenario}.{language}.{frame}",
    )
