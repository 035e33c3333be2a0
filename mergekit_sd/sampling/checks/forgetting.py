"""Whether a model still answers the words its parents answer, and what it adds to a prompt that asks nothing.

An answer is how a prompt changes the prediction: eps(prompt) − eps(""), over all probes. Owns these verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mergekit_sd.sampling.checks import thresholds as t
from mergekit_sd.sampling.checks.measuring import Measured
from mergekit_sd.sampling.values import Chart, Check
from mergekit_sd.text import listed, shown

Vector = NDArray[np.float64]


def answer(measured: Measured, prompt: str) -> Vector:
    """The prompt's answer, flat."""
    predictions = measured.predictions
    return (predictions[prompt].astype(np.float64) - predictions[""]).ravel()


def cosine(a: Vector, b: Vector) -> float:
    """Of two answers; 0 where one is nothing."""
    sizes = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / sizes if sizes else 0.0


def answered(measured: Measured, prompt: str) -> bool:
    """Whether the prompt changes the prediction at all."""
    whole = float(np.linalg.norm(measured.predictions[""]))
    return float(np.linalg.norm(answer(measured, prompt))) > t.ANSWERED * whole


def kept(child: Measured, parents: Mapping[str, Measured], prompt: str) -> float:
    """The part of the strongest parent's answer that the child gives in the direction of one of them, 0 and up.

    max over parents p of (‖c‖ cos(c, p)) / max ‖p‖; never below 0.
    """
    mine = answer(child, prompt)
    theirs = [answer(each, prompt) for each in parents.values()]
    strongest = max(float(np.linalg.norm(each)) for each in theirs)
    along = max(cosine(mine, each) for each in theirs)
    return max(0.0, float(np.linalg.norm(mine)) * along / strongest) if strongest else 1.0


def taken_for(child: Measured, parents: Mapping[str, Measured], concepts: Mapping[str, str], word: str) -> str | None:
    """The concept that the child takes a word for: its answer is more like every parent's to that one.

    By t.MISTAKEN at least, cosine against cosine; of parents that answer both.
    """
    mine = answer(child, concepts[word])
    knowing = [each for each in parents.values() if answered(each, concepts[word])]
    own = [cosine(mine, answer(each, concepts[word])) for each in knowing]
    others: dict[str, float] = {}
    for other, prompt in concepts.items():
        if other != word and all(answered(each, prompt) for each in knowing):
            pairs = zip(own, knowing, strict=True)
            others[other] = min(cosine(mine, answer(each, prompt)) - like for like, each in pairs)
    found = max(others, key=lambda other: others[other], default=None)
    return found if found is not None and others[found] > t.MISTAKEN else None


def _mistaken(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{shown(word)} for {shown(other)}" for word, other in pairs.items())


def check_forgetting(
    model: str, child: Measured, parents: Mapping[str, Measured]
) -> tuple[tuple[Check, ...], tuple[Chart, ...]]:
    """A check of the concepts that a parent answers, and a chart of how much of that answer is left."""
    concepts = {
        word: prompt
        for word, prompt in child.probes.concepts.items()
        if any(answered(each, prompt) for each in parents.values())
    }
    name = shown(model)
    if not concepts:
        return (), ()
    parts = {word: kept(child, parents, prompt) for word, prompt in concepts.items()}
    lost = [word for word in parts if parts[word] < t.FORGOTTEN]
    left = [word for word in parts if word not in lost]
    mistaken = {word: other for word in left if (other := taken_for(child, parents, concepts, word)) is not None}
    chart = Chart(
        f"What {name} still answers",
        "The part of the strongest parent's answer to each concept; 1 is as strong and the same way, 0 is forgotten.",
        {model: {word: round(part, 3) for word, part in parts.items()}},
    )
    figures = {word: round(part, 4) for word, part in parts.items()}
    if not lost and not mistaken:
        message = f"{name} answers to every concept that its parents answer to."
        return (Check("forgetting", "prompt", "ok", model, message, figures),), (chart,)
    if not lost:
        message = f"{name} takes {_mistaken(mistaken)}, which its parents tell apart."
    elif not left:
        message = f"{name} has forgotten every concept it was asked for: {listed(lost, 12)}."
    elif len(left) <= t.ONLY and len(parts) >= 2 * t.ONLY:
        message = f"{name} answers to {' and '.join(map(shown, left))} only; it has forgotten {listed(lost, 12)}."
    else:
        worst = ", ".join(f"{shown(word)} ({parts[word]:.0%} of the answer left)" for word in lost)
        message = f"{name} has forgotten {worst}."
    if mistaken and lost:
        message += f" It takes {_mistaken(mistaken)}."
    return (Check("forgetting", "prompt", "warning", model, message, figures),), (chart,)


def check_unasked(model: str, child: Measured, parents: Mapping[str, Measured]) -> tuple[Check, ...]:
    """Which concepts the child adds to neutral prompts that no parent adds.

    How far a neutral prompt's prediction moved from the parent's, along the parent's answer to a concept, as a
    part of that answer. Of several parents the least counts: what one of them does is inherited.
    """
    if not parents:
        return ()
    name = shown(model)
    added: dict[str, float] = {}
    for word, prompt in child.probes.concepts.items():
        for neutral in child.probes.neutral:
            part = min(_moved_towards(child, each, neutral, prompt) for each in parents.values())
            added[word] = max(added.get(word, 0.0), part)
    figures = {word: round(part, 4) for word, part in added.items()}
    found = sorted((word for word in added if added[word] > t.UNASKED), key=lambda word: -added[word])
    if not found:
        message = f"{name} adds nothing to prompts that ask for next to nothing."
        return (Check("unasked", "unasked", "ok", model, message, figures),)
    words = ", ".join(f"{shown(word)} ({added[word]:.0%} of asking for it)" for word in found)
    message = f"{name} adds what nobody asked for, to empty and plain prompts: {words}."
    return (Check("unasked", "unasked", "warning", model, message, figures),)


def _moved_towards(child: Measured, parent: Measured, neutral: str, prompt: str) -> float:
    """The part of the parent's answer that the neutral prediction moved by; 0 where it moved another way."""
    if not answered(parent, prompt):
        return 0.0
    direction = answer(parent, prompt)
    moved = (child.predictions[neutral].astype(np.float64) - parent.predictions[neutral]).ravel()
    if cosine(moved, direction) < t.UNASKED_COSINE:
        return 0.0
    return float(moved @ direction) / float(direction @ direction)
