"""Reports made of drawn pictures, with names and prompts from strangers."""

from __future__ import annotations

import numpy as np

from mergekit_sd.sampling.values import Chart, Check, Picture, SamplingReport, Settings

HOSTILE = '<script>alert("model")</script>\x1b[31m\u202e&amp;'
PROMPT = "a red circle,\n</script><img src=x onerror=alert(1)> 'on' \"white\""


def pixels(seed=0, width=8, height=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture(model="base", seed=0, settings=None, width=8, height=8, model_hash=None):
    number = seed + sum(model.encode("utf-8", "replace")) + len(settings.prompt if settings else "")
    return Picture(model, settings or Settings("a red circle"), seed, pixels(number, width, height), model_hash)


def report(models=("base", "night", "mix"), prompts=("a red circle", "a blue square"), seeds=(0, 7), **more):
    every = [Settings(prompt, "blurry", tuple(seeds)) for prompt in prompts]
    pictures = tuple(
        picture(model, seed, settings, model_hash="0123456789" if model == "base" else None)
        for settings in every
        for model in models
        for seed in seeds
    )
    known = {"title": "A merge", "recipe": '[recipe]\nname = "mix"\n', "parents": models[:2]}
    return SamplingReport(**(known | {"models": models, "pictures": pictures} | more))


def hostile():
    """Every text of the report is one that wants to be more than text."""
    return report(
        models=("base", HOSTILE),
        prompts=(PROMPT, "plain"),
        title=HOSTILE,
        recipe=f"# {PROMPT}\n",
        parents=("base",),
        checks=(Check(HOSTILE, "looks", "failed", HOSTILE, PROMPT, {HOSTILE: float("nan"), "of": 24}),),
        charts=(
            Chart(HOSTILE, PROMPT, {HOSTILE: {HOSTILE: 0.5, "OUT00": float("inf")}, "base": {"OUT00": -0.25}}),
            Chart("many", "", {f"model {n}": {"IN00": n - 3.0, HOSTILE: 0.0} for n in range(6)}),
        ),
        notes=(PROMPT,),
        made={HOSTILE: PROMPT},
        machine={HOSTILE: HOSTILE, "peak_memory_bytes": 3 << 20, "list": [1, {"a": None}], "cuda": False},
    )
