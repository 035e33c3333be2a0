"""What Stable Diffusion models are made of: names, shapes, components, blocks; and telling files apart.

The data is in `data/*.toml`. This room must not know bytes, tensors' values, recipes or the run;
it imports no torch.
"""

from mergekit_sd.architectures.catalog import get, names
from mergekit_sd.architectures.detect import detect, prediction_hint
from mergekit_sd.architectures.layout import Kind, Layout, Place, Role, ema_name, is_ema
from mergekit_sd.architectures.spec import Architecture, Prediction, TensorSpec

__all__ = [
    "Architecture",
    "Kind",
    "Layout",
    "Place",
    "Prediction",
    "Role",
    "TensorSpec",
    "detect",
    "ema_name",
    "get",
    "is_ema",
    "names",
    "prediction_hint",
]
