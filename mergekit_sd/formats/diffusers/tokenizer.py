"""The files of CLIP's tokenizer, made of the vocabulary that OpenAI's package `openai-clip` brings along.

Owns their contents. The package is not imported: only its data file is read.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json

PACKAGE = "openai-clip"
END = "<|endoftext|>"  # SD1 pads with it
BANG = "!"  # OpenCLIP's encoders are padded with what has the id 0

_VOCABULARY = "clip/bpe_simple_vocab_16e6.txt.gz"
_START = "<|startoftext|>"
_MERGES = 49152 - 256 - 2  # of the lines in the file, those that CLIP uses


def tokenizer_files(pad: str) -> dict[str, str] | None:
    """The files by name, padding with `pad`; None where the package is not installed."""
    merges = _merges()
    if merges is None:
        return None
    settings = {
        "add_prefix_space": False,
        "bos_token": _START,
        "do_lower_case": True,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    special = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {
        "vocab.json": json.dumps(_vocabulary(merges), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }


def _merges() -> list[str] | None:
    try:
        path = importlib.metadata.distribution(PACKAGE).locate_file(_VOCABULARY)
        with gzip.open(str(path), "rt", encoding="utf-8") as file:
            return file.read().split("\n")[1 : _MERGES + 1]
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Every token's id: the bytes, the bytes at a word's end, the merged pairs, the two special ones."""
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    return {token: number for number, token in enumerate([*tokens, _START, END])}


def _byte_letters() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of their ids (GPT-2's): printable ones first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
