"""The WebUI's prompt language: from what a user writes to what a UNet is told at each step."""

from mergekit_sd.sampling.prompts.embeddings import find_embeddings
from mergekit_sd.sampling.prompts.encode import encode
from mergekit_sd.sampling.prompts.tags import HypernetTag, Tags, take_tags

__all__ = ["HypernetTag", "Tags", "encode", "find_embeddings", "take_tags"]
