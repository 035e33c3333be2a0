"""Files that prompts name: LoRAs, hypernetworks, textual inversions, by the name of the file.

Owns where they are looked for: what the user names, first, then the folders of the models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mergekit_sd.errors import MissingInput
from mergekit_sd.recipe.positions import Where
from mergekit_sd.sampling.prompts import find_embeddings
from mergekit_sd.text import did_you_mean, shown

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")


class Extras:
    """The files and folders to look in. Folders that the user names are searched with all that is below them."""

    def __init__(self, named: Iterable[Path], models: Iterable[Path]) -> None:
        named = list(named)
        missing = next((path for path in named if not path.exists()), None)
        if missing:
            raise MissingInput("There is no such file or folder.", file=missing, hint="it was named for prompts")
        self._files = [path for path in named if path.is_file()]
        self._folders = [path for path in named if path.is_dir()]
        self._models = list(dict.fromkeys(path.absolute() for path in models))

    def embeddings(self) -> dict[str, Path]:
        """Files that may be textual inversions, by the word that names each."""
        files = {path.stem: path for path in self._files if path.suffix.lower() in SUFFIXES}
        return {**find_embeddings(self._folders, self._models), **files}

    def find(self, name: str, what: str, where: Where) -> Path:
        """The file that a tag names, with or without its suffix. Raises RecipeError where there is none."""
        known: dict[str, Path] = {}
        for path in self._candidates():
            known.setdefault(path.stem, path)
            if name in (path.stem, path.name):
                return path
        hint = "name its file or folder: --extras, or extras in the recipe's sample"
        close = did_you_mean(name, known)
        raise where.error(
            f'There is no {what} "{shown(name)}" among the files that prompts may name.',
            hint=f"{close} Else {hint}" if close and close.endswith("?") else hint,
        )

    def _candidates(self) -> Iterator[Path]:
        yield from self._files
        for folder in self._folders:
            yield from sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        for folder in dict.fromkeys(path.parent for path in self._models):
            beside = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
            yield from sorted(path for path in beside if path.absolute() not in self._models)
