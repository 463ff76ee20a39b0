"""Unlabelled reading exercises: the telling of a state, and the facts in it as notes.

A base model learns from them to find the attributes of a sentence. Notes hold no label and no rule. With
``covers="seen"`` the exercises leave out the states and frames that the triage data holds out, so that nothing the
held-out split shows was ever read before; ``"all"`` reads every state and frame.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from so8t_torch.data.scenarios import (
    Novelty,
    ScenarioSection,
    State,
    frames,
    held_out_states,
    notes,
    novelty_of,
    states,
    tell,
)
from so8t_torch.data.wording import READING, READING_ONE, Language


@dataclass(frozen=True)
class Exercise:
    """A request to read, the notes expected, and what of it the triage training split does not show."""

    request: str
    notes: str
    novelty: Novelty


def exercises(
    section: ScenarioSection,
    *,
    covers: Literal["seen", "all"],
    tellings: int,
    single: float,
    seed: int,
) -> list[Exercise]:
    """Return reading exercises in a fixed order.

    Args:
        section: which states and frames the triage data holds out.
        covers: leave those out, or read everything.
        tellings: of each state in each frame.
        single: share of exercises that ask for one fact only, in [0, 1].
        seed: draws wordings, places and questions.
    """
    source = random.Random(f"reading {seed}")
    hidden = held_out_states(section)
    return [
        _exercise(state, language, text, new, single, source)
        for state in states()
        for language, frame in frames(state.scenario)
        for new in [novelty_of(section, hidden, state, language, frame)]
        if covers == "all" or new == "none"
        for text in tell(state, language, frame, tellings, source)
    ]


def _exercise(
    state: State, language: Language, text: str, new: Novelty, single: float, source: random.Random
) -> Exercise:
    if source.random() >= single:
        return Exercise(f"{text}\n{READING[language]}", notes(state), new)
    name, value = source.choice(state.values)
    question = READING_ONE[language].format(attribute=name.replace("_", " "))
    return Exercise(f"{text}\n{question}", f"{value}.", new)
