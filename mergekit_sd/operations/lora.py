"""Operations on LoRA files and their relatives: what they take is declared here, the plan carries them out.

Annotations are evaluated (no `from __future__ import annotations` here): they are the schema.
"""

from mergekit_sd.operations.registry import operation
from mergekit_sd.operations.types import Loras, Out, Weight


@operation(
    "LoRA and its relatives",
    "W + Σ strength·ΔW",
    planned=True,
    also=("Merge LoRA into checkpoint (supermerger)", "bake LoRA", "LoraLoader (ComfyUI)"),
)
def inject_lora(model: Weight, loras: Loras, *, out: Out = None) -> Weight:
    """Puts LoRA files into a model, each at its strength: as if they stood in every prompt.

    Any of LoRA, LoCon, LoHa, LoKr, IA3, GLoRA, OFT, BOFT, full differences and DoRA, under the names of any
    trainer. An entry is a name, a prompt's "<lora:style:0.8>" (text encoder and UNet apart:
    "<lora:style:0.5:0.8>"), or a table { lora, strength, text_encoder, blocks }. One after the other; those that only
    add may come in any order, and a negative strength takes out what the positive put in.
    """
    raise NotImplementedError("planned")
