"""sd-mecha 1.1.8 on the same merge, its finite checks off. METHOD A B C OUT."""

import os
import sys

import sd_mecha

method, *paths, out = sys.argv[1:]
a, b, c = (sd_mecha.model(path, config="sd1-ldm") for path in paths)
if method == "weighted_sum":
    recipe = sd_mecha.weighted_sum(a, b, alpha=0.3)
else:
    recipe = sd_mecha.add_difference(a, b, c, alpha=0.7)
sd_mecha.merge(recipe, output=out, threads=2, check_finite_output=False, omit_non_finite_inputs=False)
descriptor = os.open(out, os.O_RDONLY)
os.fsync(descriptor)
