"""Prompts as a UNet takes them: text encoders run over chunks, emphasis put on what they say.

Owns which layer of which text encoder counts, and what emphasis does to it. Must not know how pictures are denoised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mergekit_sd.errors import UsageError
from mergekit_sd.lazy import torch
from mergekit_sd.sampling.conditions import Condition, Guidance
from mergekit_sd.sampling.prompts.embeddings import Embeddings
from mergekit_sd.sampling.prompts.parse import parse
from mergekit_sd.sampling.prompts.schedule import parts_of, steps_of
from mergekit_sd.sampling.prompts.tokens import EOS, ZERO, Chunk, chunks_of
from mergekit_sd.text import count

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_sd.sampling.networks import Networks

PADS = {"sd1": (EOS,), "sd2": (ZERO,), "sdxl": (EOS, ZERO)}
"""What each family's text encoders are padded with."""
_ROWS = 32  # the most chunks of one call of a text encoder

_Key: TypeAlias = tuple[tuple[int, ...], tuple[tuple[int, str], ...]]  # a chunk without its weights


class _Encoded(NamedTuple):
    """A chunk: (77, width) by each text encoder, and (width,) of the pooled text, SDXL's."""

    states: tuple[Tensor, ...]
    pooled: Tensor | None


def encode(
    networks: Networks,
    positive: str,
    negative: str,
    steps: int,
    *,
    clip_skip: int | None = None,
    embeddings: Mapping[str, Path] | None = None,
) -> Guidance:
    """The conditions of a picture of `steps` steps, of prompts without network tags (`take_tags`).

    `clip_skip`: SD1's layer, counted from the last one, 1; as in the WebUI, SD2 and SDXL have a fixed one.
    `embeddings`: files by the words that name them (`find_embeddings`). As in the WebUI AND joins only parts of the
    positive prompt, and SDXL's empty negative prompt is encoded like any other: diffusers takes zeros for it.
    All contexts are as long as the longest: empty chunks are added. Each text is encoded once.

    Raises RecipeError for weights that are no numbers, UsageError for a clip skip beyond the first layer, and what
    `load_embedding` raises.
    """
    _check_clip_skip(networks, clip_skip)
    wanted = [(steps_of(text, steps), weight) for text, weight in parts_of(positive)]
    against = steps_of(negative, steps)
    texts = {text for scheduled in (*(each for each, _ in wanted), against) for _, text in scheduled}
    conditions = _Encoder(networks, clip_skip, embeddings or {}).conditions(sorted(texts))

    def at(step: int, scheduled: Sequence[tuple[int, str]]) -> Condition:
        return conditions[next((text for last, text in scheduled if step < last), scheduled[-1][1])]

    return Guidance(
        positive=lambda step: [(at(step, scheduled), weight) for scheduled, weight in wanted],
        negative=lambda step: at(step, against),
    )


def emphasized(states: Tensor, weights: Sequence[float]) -> Tensor:
    """What a text encoder says of one chunk, (tokens, width), each token times its weight; the mean stays.

    z·w·mean(z)/mean(z·w), over the whole chunk: the WebUI's "original" emphasis. Without weights it is z, to the bit.
    """
    if all(weight == 1 for weight in weights):
        return states
    wide = states.float()
    made = wide * torch.tensor(weights, device=states.device)[:, None]
    after = made.mean()
    return (made * (wide.mean() / after) if after else made).to(states.dtype)


def _check_clip_skip(networks: Networks, clip_skip: int | None) -> None:
    layers = networks.text_encoders[0].config.num_hidden_layers
    if clip_skip is not None and not 1 <= clip_skip <= layers:
        raise UsageError(f"Clip skip {clip_skip}: the text encoder has {count(layers, 'layer')}.", hint="1 is the last")


class _Encoder:
    """The text encoders of a model, with what was asked of them."""

    def __init__(self, networks: Networks, clip_skip: int | None, embeddings: Mapping[str, Path]) -> None:
        self._modules: Sequence[Any] = networks.text_encoders
        self._family = networks.family
        self._device = networks.device
        self._clip_skip = clip_skip or 1
        self._embeddings = Embeddings(embeddings, [module.config.hidden_size for module in self._modules])

    def conditions(self, texts: Iterable[str]) -> dict[str, Condition]:
        """Each text's condition; all are as long as the longest."""
        chunks = {text: chunks_of(parse(text), self._embeddings.find) for text in texts}
        most = max(map(len, chunks.values()))
        chunks = {text: (*each, *[Chunk()] * (most - len(each))) for text, each in chunks.items()}
        keys = list(dict.fromkeys(_key(chunk) for each in chunks.values() for chunk in each))
        encoded: dict[_Key, _Encoded] = {}
        with torch.no_grad():
            for start in range(0, len(keys), _ROWS):
                encoded |= self._encoded(keys[start : start + _ROWS])
            return {text: _condition(each, encoded) for text, each in chunks.items()}

    def _encoded(self, keys: Sequence[_Key]) -> dict[_Key, _Encoded]:
        states: list[Tensor] = []
        pooled: Tensor | None = None
        for number, (module, pad) in enumerate(zip(self._modules, PADS[self._family], strict=True)):
            rows = [Chunk(ids).row(pad) for ids, _ in keys]
            hook = module.get_input_embeddings().register_forward_hook(self._with_vectors(keys, number))
            try:
                said = module(torch.tensor(rows, device=self._device), output_hidden_states=True)
            finally:
                hook.remove()
            states.append(self._layer(module, said))
            pooled = said.text_embeds if self._family == "sdxl" and number else None
        return {
            key: _Encoded(tuple(each[row] for each in states), None if pooled is None else pooled[row])
            for row, key in enumerate(keys)
        }

    def _layer(self, module: Any, said: Any) -> Tensor:
        """(chunks, 77, width) of the layer that counts. SD2's last one is left out of its file, so the last is it."""
        state: Tensor = said.last_hidden_state
        if self._family == "sdxl":
            state = said.hidden_states[-2]
        elif self._family == "sd1" and self._clip_skip > 1:
            state = module.final_layer_norm(said.hidden_states[-self._clip_skip])
        return state

    def _with_vectors(self, keys: Sequence[_Key], encoder: int) -> Any:
        """A hook that puts textual inversions' vectors in their places."""

        def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            for row, (_, words) in enumerate(keys):
                for place, name in words:
                    vectors = self._embeddings.loaded[name]
                    assert vectors is not None
                    output[row, place + 1 : place + 1 + len(vectors[encoder])] = vectors[encoder].to(output)
            return output

        return hook


def _key(chunk: Chunk) -> _Key:
    return chunk.ids, chunk.words


def _condition(chunks: Sequence[Chunk], encoded: Mapping[_Key, _Encoded]) -> Condition:
    """The chunks one after the other, each text encoder's beside the others'; pooled is the first chunk's."""
    rows = []
    for chunk in chunks:
        weights = chunk.row_weights()
        rows.append(torch.cat([emphasized(each, weights) for each in encoded[_key(chunk)].states], dim=1))
    pooled = encoded[_key(chunks[0])].pooled
    return Condition(torch.cat(rows)[None], None if pooled is None else pooled[None])
