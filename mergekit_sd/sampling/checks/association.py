"""Which word drags another along: the answer to A along the answer to B, beside the parents'.

Owns this verdict. Directions are a parent's, one ruler for both models.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_sd.sampling.checks import thresholds as t
from mergekit_sd.sampling.checks.forgetting import answer, answered, cosine
from mergekit_sd.sampling.checks.measuring import Measured
from mergekit_sd.sampling.values import Check
from mergekit_sd.text import shown


def rises(child: Measured, parents: Mapping[str, Measured]) -> dict[tuple[str, str], float]:
    """By pair (A, B): how much more the child's answer to A points along B than the parent's own answer does.

    The difference of cosines to the parent's answer to B, the least over the parents: what one does is inherited.
    Pairs of which a parent does not answer both words are left out.
    """
    concepts = child.probes.concepts
    found = {}
    for first, second in child.probes.pairs:
        a, b = concepts[first], concepts[second]
        knowing = [each for each in parents.values() if answered(each, a) and answered(each, b)]
        if knowing and answered(child, a):
            found[first, second] = min(
                cosine(answer(child, a), answer(each, b)) - cosine(answer(each, a), answer(each, b)) for each in knowing
            )
    return found


def check_association(model: str, child: Measured, parents: Mapping[str, Measured]) -> tuple[Check, ...]:
    """A check that names the pairs in which the first word brings the second."""
    found = rises(child, parents)
    if not found:
        return ()
    figures = {f"{first} → {second}": round(rise, 4) for (first, second), rise in found.items()}
    risen = sorted((pair for pair in found if found[pair] > t.BROUGHT), key=lambda pair: -found[pair])
    if not risen:
        message = f"In {shown(model)} no word brings another along more than in its parents."
        return (Check("association", "prompt", "ok", model, message, figures),)
    words = ", ".join(f"{shown(first)} brings {shown(second)}" for first, second in risen)
    message = f"In {shown(model)} a word brings another along, more than in its parents: {words}."
    return (Check("association", "prompt", "warning", model, message, figures),)
