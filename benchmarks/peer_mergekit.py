"""mergekit 0.1.5 (mergekit-pytorch, linear) on the same weighted sum. A B OUTFOLDER."""

import os
import subprocess
import sys
from pathlib import Path

a, b, out = sys.argv[1:]
recipe = Path(out).with_suffix(".yml")
recipe.write_text(
    "merge_method: linear\nmodels:\n"
    f"  - model: {a}\n    parameters: {{weight: 0.7}}\n  - model: {b}\n    parameters: {{weight: 0.3}}\n"
    "dtype: float32\nout_dtype: float16\n"
)
subprocess.run([str(Path(sys.executable).parent / "mergekit-pytorch"), str(recipe), out], check=True)
for path in Path(out).glob("*.safetensors"):
    os.fsync(os.open(path, os.O_RDONLY))
