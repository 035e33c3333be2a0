"""How the tensors of one component are named whatever file they lie in.

Owns the cutting of prefixes: a VAE baked into a checkpoint and a bare VAE file meet by these names.
"""

from __future__ import annotations

from mergekit_sd.architectures import Layout


def bare_name(layout: Layout, stored: str) -> tuple[str | None, str]:
    """The component of a stored name, and its LDM name without the component's prefix.

    What belongs to no component keeps its whole name.
    """
    canonical = layout.canonical[stored]
    component = layout.places[canonical].component
    if component is None:
        return None, canonical
    return component, canonical.removeprefix(layout.prefix_of(component) or "")
