"""The samplers that a recipe can name, as data.

Owns their names and which scheduler of diffusers, with which settings, each stands for. Must not
import diffusers: the sampling code looks the class up when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampler:
    """A sampler: its name in recipes, its name in the WebUI, and diffusers' class and settings."""

    name: str
    label: str
    scheduler: str
    settings: Mapping[str, str | bool | int] = field(default_factory=dict)


_DPM = "DPMSolverMultistepScheduler"
_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
# diffusers' own spacing, "leading", starts at the wrong sigma for few steps.
_LINSPACE = {"timestep_spacing": "linspace"}
_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("dpmpp_2m", "DPM++ 2M", _DPM),
        Sampler("dpmpp_2m_karras", "DPM++ 2M Karras", _DPM, _KARRAS),
        Sampler("dpmpp_2m_sde", "DPM++ 2M SDE", _DPM, _SDE),
        Sampler("dpmpp_2m_sde_karras", "DPM++ 2M SDE Karras", _DPM, {**_SDE, **_KARRAS}),
        Sampler("euler", "Euler", "EulerDiscreteScheduler", _LINSPACE),
        Sampler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler", _LINSPACE),
        Sampler("ddim", "DDIM", "DDIMScheduler", _DDIM),
        Sampler("unipc", "UniPC", "UniPCMultistepScheduler"),
        Sampler("lcm", "LCM", "LCMScheduler"),
        Sampler("heun", "Heun", "HeunDiscreteScheduler", _LINSPACE),
    )
}

DEFAULT_SAMPLER = "dpmpp_2m_karras"
