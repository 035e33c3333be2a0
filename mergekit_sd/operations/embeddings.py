"""Operations on textual inversions and hypernetworks: what they take is declared here; the plan knows their forms.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from mergekit_sd.lazy import torch
from mergekit_sd.operations.averages import blend
from mergekit_sd.operations.registry import OPERATIONS, operation
from mergekit_sd.operations.types import ChoiceKind, Out, PerModel, Tensor, Weight, Weights

STYLES = ("auto", "a1111", "diffusers")


@operation(
    "textual inversions and hypernetworks",
    "Σ weightᵢ·vectorsᵢ, or each file's vectors, times its weight, one after the other",
    planned=True,
    also=("embedding-merge", "merge textual inversions", "concat embeddings"),
)
def merge_embeddings(
    embeddings: Weights,
    *,
    weights: PerModel,
    mode: Annotated[str, ChoiceKind(("blend", "concat"))] = "blend",
    style: Annotated[str, ChoiceKind(STYLES)] = "auto",
    out: Out = None,
) -> Weight:
    """One textual inversion out of several.

    "blend" adds up the vectors, the first with the first and so on; where a file has fewer, zeros stand for the
    missing ones, as in the WebUI's embedding-merge: 'cat'*0.5 + 'dog'*0.5. "concat" takes as many tokens of a
    prompt as all of them together. Weights are taken as they are, a number each: their sum need not be 1. `style` as in
    `convert`.
    """
    raise NotImplementedError("planned")


@operation(
    "textual inversions and hypernetworks",
    "layers Σ weightᵢ·layerᵢ / Σ weightᵢ; the last one times Σ weightᵢ",
    planned=True,
    also=("scale hypernetwork", "hypernetwork strength"),
)
def merge_hypernetworks(hypernetworks: Weights, *, weights: PerModel, out: Out = None) -> Weight:
    """The weighted mean of hypernetworks of one structure, at the strength that the weights add up to.

    Of one file it is that file at a strength: `x + net(x)·multiplier` with the multiplier inside, which needs a
    last layer without an activation after it. A mean of networks does not do what the networks do one after the other,
    nor half of each: it is useful for networks that were trained from one beginning. A number for each file.
    """
    raise NotImplementedError("planned")


def join_vectors(models: Sequence[Tensor], *, weights: Sequence[float], mode: str, out: Out = None) -> Tensor:
    """Vectors (n, width) or (width,), each times its weight, added up or one after the other."""
    parts = [model.reshape(-1, model.shape[-1]) * weight for model, weight in zip(models, weights, strict=True)]
    if mode == "concat":
        return torch.cat(parts)
    total = parts[0].new_zeros(max(map(len, parts)), parts[0].shape[-1])
    for part in parts:
        total[: len(part)] += part
    return total


def mean_layer(models: Sequence[Tensor], *, shares: Sequence[float], strength: float, out: Out = None) -> Tensor:
    """The mean by shares that add up to 1, times a strength."""
    return torch.mul(blend(models, shares, None), strength, out=out)


VECTORS = replace(OPERATIONS["merge_embeddings"], function=join_vectors, planned=False, by="tensor")
LAYER = replace(OPERATIONS["merge_hypernetworks"], function=mean_layer, planned=False)
