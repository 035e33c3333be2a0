"""What a file really is, told from its first bytes.

Owns the signatures and the words for people. Must not know paths, suffixes, or how any of these
formats is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergekit_sd.formats.header import LENGTH_BYTES, MAX_HEADER

HEAD_BYTES = 512  # enough for every signature; that of tar lies at 257
PICKLE_PROTOCOLS = range(2, 6)  # older ones have no mark at the beginning

_AGAIN = "download it again"
_UNPACK = "unpack it, and name the model in it"
_NO_MODEL = "name a model file"


@dataclass(frozen=True, slots=True)
class Content:
    """`kind` is for programs, `words` ("an HTML page") and `hint` (what to do) for people."""

    kind: str
    words: str
    hint: str


SAFETENSORS = Content("safetensors", "a safetensors file", "")
EMPTY = Content("empty", "an empty file", _AGAIN)
UNKNOWN = Content("unknown", "of a format that is not known here", f"check where it came from, or {_AGAIN}")
ZEROS = Content("zeros", "a file that begins with nothing but zeros", f"the download never finished: {_AGAIN}")
TORCH_ZIP = Content("torch-zip", "a PyTorch checkpoint (a zip holding a pickle, as .ckpt and .pt are)", "")
TORCH_PICKLE = Content("torch-pickle", "a PyTorch checkpoint of the old kind (a bare pickle)", "")
TAR = Content(
    "tar",
    "a tar archive (or a PyTorch file from before 2018)",
    f"{_UNPACK}; a PyTorch file: load it with torch.load, and save it again with torch.save",
)

_HTML = Content("html", "an HTML page", f"the download failed or needs a login; {_AGAIN}")
_XML = Content("xml", "an XML text", f"probably a server's error message; {_AGAIN}")
_LFS = Content("git-lfs", "a git-lfs pointer, not the file itself", "fetch the file with: git lfs pull")
_JSON = Content("json", "a JSON text", f"{_NO_MODEL}; if this was a download, it holds the server's error message")
_TOML = Content("toml", "a TOML text, perhaps a recipe", _NO_MODEL)
_TEXT = Content("text", "a plain text", f"{_NO_MODEL}; if this was a download, it holds the server's error message")
ZIP = Content("zip", "a zip archive", _UNPACK)

_SIGNATURES: tuple[tuple[bytes, Content], ...] = (
    (b"GGUF", Content("gguf", "a GGUF file", "get the model as .safetensors: quantised GGUF is not read here")),
    (b"7z\xbc\xaf\x27\x1c", Content("7z", "a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Content("rar", "a RAR archive", _UNPACK)),
    (b"\x1f\x8b", Content("gzip", "a gzip file", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Content("zstd", "a zstd file", _UNPACK)),
    (b"\xfd7zXZ\0", Content("xz", "an xz file", _UNPACK)),
    (b"\x89PNG\r\n\x1a\n", Content("png", "a PNG image", _NO_MODEL)),
    (b"\xff\xd8\xff", Content("jpeg", "a JPEG image", _NO_MODEL)),
    (b"RIFF", Content("riff", "a WebP image or another RIFF file", _NO_MODEL)),
    (b"%PDF-", Content("pdf", "a PDF document", _NO_MODEL)),
    (b"\x89HDF\r\n\x1a\n", Content("hdf5", "an HDF5 file (Keras)", "get the model as .safetensors")),
    (b"\x93NUMPY", Content("npy", "a NumPy array", _NO_MODEL)),
    (b"PK\x05\x06", ZIP),
)

_TEXTS: tuple[tuple[re.Pattern[str], Content], ...] = (
    (re.compile(r"version https://git-lfs"), _LFS),
    (re.compile(r"<(!doctype html|html|head|body|!--)", re.IGNORECASE), _HTML),
    (re.compile(r"<\?xml|<[A-Za-z]"), _XML),
    (re.compile(r"\{|\[\s*[\[{\"\d\]]"), _JSON),
    (re.compile(r"(#[^\n]*\n\s*)*(\[\[?[\w.\"-]+\]\]?|[\w.-]+\s*=)"), _TOML),
)


def sniff(head: bytes) -> Content:
    """What the file is whose first HEAD_BYTES bytes (or all of it) are `head`."""
    if not head:
        return EMPTY
    if looks_like_safetensors(head):  # first: its length may begin with any two bytes of another signature
        return SAFETENSORS
    if head.startswith(b"PK\x03\x04"):
        return TORCH_ZIP if _is_torch_zip(head) else ZIP
    for signature, content in _SIGNATURES:
        if head.startswith(signature):
            return content
    if head[257:262] == b"ustar":
        return TAR
    if len(head) > LENGTH_BYTES and not any(head):
        return ZEROS
    if head[0] == 0x80 and len(head) > 2 and head[1] in PICKLE_PROTOCOLS:
        return TORCH_PICKLE
    return _sniff_text(head)


def looks_like_safetensors(head: bytes) -> bool:
    """A sane header length, then the brace that opens the header."""
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and 0 < length <= MAX_HEADER


def _is_torch_zip(head: bytes) -> bool:
    """Torch writes `<name>/data.pkl` (or its version marks) first; the name's length is at byte 26."""
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    return first.endswith((b"/data.pkl", b"/version", b"/.format_version", b"/byteorder", b"/.storage_alignment"))


def _sniff_text(head: bytes) -> Content:
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) - error.start > 3 or len(head) < HEAD_BYTES:  # not just a character cut in two at the end
            return UNKNOWN
        text = head[: error.start].decode("utf-8-sig")
    if any(not (c.isprintable() or c.isspace()) for c in text):
        return UNKNOWN
    stripped = text.lstrip()
    for pattern, content in _TEXTS:
        if pattern.match(stripped):
            return content
    return _TEXT
