"""Make the small family again: `python -m training FOLDER`, two hours on two cores.

Every stage leaves a file in FOLDER and is skipped where the file is there, so a stopped training goes on.
FOLDER/log.jsonl says what each stage reached.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.adapters import WORD, Loha, Lokr, Lora, train_adapter, train_hypernetwork, train_inversion
from training.diffusion import Data, Model, Run, sample, train
from training.drawings import STAR, STYLES, caption, orange_pictures, pictures, prompts
from training.judge import see
from training.log import log_to, say
from training.networks import SCALE, Words, new_text_encoder, new_unet, new_vae
from training.vae import latents, train_vae

BASE = Run("base", steps=4500, rate=1e-3, average=0.998)
PICTURES = 4608
TUNES = {
    "outline": Run("outline", steps=450, rate=4e-4, average=0.99),
    "night": Run("night", steps=400, rate=4e-4, average=0.99),
    "star": Run("star", steps=700, rate=4e-4, average=0.99),
}
ADAPTERS = {
    "stripes": (Lora, Run("stripes", steps=450, rate=2e-3, average=0.99)),
    "shadow": (Loha, Run("shadow", steps=450, rate=2e-3, average=0.99)),
    "frame": (Lokr, Run("frame", steps=450, rate=2e-3, average=0.99)),
}
HYPERNETWORK = Run("pale", steps=450, rate=1e-3, average=0.99)
INVERSION = Run("mk-orange", steps=250, rate=5e-3, average=0.98)


class Training:
    """The stages, and what they share: the VAE, the words, the folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log_to(folder)
        self.folder = folder
        self.words = Words()
        if not (folder / "vae.pt").exists():
            train_vae(folder)
        self.vae = new_vae()
        self.vae.load_state_dict(torch.load(folder / "vae.pt"))
        self.vae.eval().requires_grad_(False)

    def run(self) -> None:
        """All stages."""
        base = self.base()
        self.tunes(base)
        self.adapters(base)
        say("done")

    def base(self) -> Model:
        """The base, trained or loaded."""
        base = self.model("base")
        if not (self.folder / "base.pt").exists():
            learned = [*base.unet.parameters(), *base.text.parameters()]
            train(base, self.data("base", PICTURES, 100), BASE, learned, judge=lambda: self.right(base))
            self.save(base, "base")
        return base

    def tunes(self, base: Model) -> None:
        """What is fine-tuned from the base."""
        for name, run in TUNES.items():
            if (self.folder / f"{name}.pt").exists():
                continue
            tuned, own = base.copied(), self.data(name, 1536, 102)
            learned = [*tuned.unet.parameters()]
            if name == "star":  # as DreamBooth: with pictures of what it knew, and its text encoder
                own = own.joined(self.data("base", 1536, 103))
                learned += tuned.text.parameters()
            train(tuned, own, run, learned, judge=partial(self.right, tuned, STYLES[name].shapes))
            self.save(tuned, name)

    def adapters(self, base: Model) -> None:
        """What works on the base from beside it."""
        for name, (kind, run) in ADAPTERS.items():
            path = self.folder / f"{name}.safetensors"
            if not path.exists():
                train_adapter(base, kind, self.data(name, 1536, 104), run, path, judge=self.right)
        path = self.folder / f"{HYPERNETWORK.name}.pt"
        if not path.exists():
            train_hypernetwork(base, self.data("pale", 1536, 105), HYPERNETWORK, path, judge=self.right)
        path = self.folder / f"{INVERSION.name}.safetensors"
        if not path.exists():
            drawn, captions = orange_pictures(768, WORD, 106)
            own = Data.of(latents(self.vae, drawn), captions)
            train_inversion(base, own, INVERSION, path, judge=partial(self.right, word=WORD))

    def data(self, style: str, count: int, seed: int) -> Data:
        """Pictures of a style, as latents."""
        drawn, captions = pictures(style, count, seed)
        return Data.of(latents(self.vae, drawn), captions)

    def model(self, name: str) -> Model:
        """A model by the name of its stage; new where it is not trained yet."""
        used = sorted(set(self.words.ids(captions_known()).flatten().tolist()))
        torch.manual_seed(2)
        model = Model(new_unet(), new_text_encoder(used), self.words)
        if (self.folder / f"{name}.pt").exists():
            state = torch.load(self.folder / f"{name}.pt")
            model.unet.load_state_dict(state["unet"])
            model.text.load_state_dict(state["text"])
        return model

    def save(self, model: Model, name: str) -> None:
        """Keep a stage's model."""
        torch.save({"unet": model.unet.state_dict(), "text": model.text.state_dict()}, self.folder / f"{name}.pt")

    def right(
        self, model: Model, shapes: tuple[str, ...] = STYLES["base"].shapes, word: str | None = None
    ) -> dict[str, object]:
        """How many prompts come out right, with each of two seeds; and the means of what a style is known by."""
        wanted = [(shape, word or colour, ground) for shape, colour, ground in prompts(shapes)]
        counts, seen = [], []
        for seed in (1, 2):
            judged = [see(shot) for shot in self.drawn(model, [caption(*each) for each in wanted], seed)]
            seen += judged
            counts.append(sum(each.is_right(*want) for each, want in zip(judged, wanted, strict=True)))
        means = {
            name: float(np.mean([getattr(each, name) for each in seen]))
            for name in ("hole", "parts", "framed", "strength")
        }
        return {"right": counts, "of": len(wanted), **means, "night": np.mean([s.palette == "night" for s in seen])}

    def drawn(self, model: Model, captions: Sequence[str], seed: int) -> NDArray[np.uint8]:
        """Pictures of captions, (captions, 64, 64, 3)."""
        x = sample(model, captions, seed)
        with torch.no_grad():
            image = self.vae.decode(x / SCALE).sample
        return image.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def captions_known() -> list[str]:
    """All that the base can be told, and the rare word that it learns later."""
    return [caption(*each) for each in prompts((*STYLES["base"].shapes, STAR))]


if __name__ == "__main__":
    Training(Path(sys.argv[1])).run()
