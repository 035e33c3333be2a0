"""What pictures miss: `measure` a model while it is loaded, then `compare` it with its parents."""

from mergekit_sd.sampling.checks.measuring import Measured, measure
from mergekit_sd.sampling.checks.pictures import check_pictures
from mergekit_sd.sampling.checks.probes import Probes, load_probes
from mergekit_sd.sampling.checks.run import compare
from mergekit_sd.sampling.checks.soundness import Seen

__all__ = ["Measured", "Probes", "Seen", "check_pictures", "compare", "load_probes", "measure"]
