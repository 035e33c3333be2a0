"""Looking at model files: what they are, how two differ, and whether they are the same.

Nothing here writes a file or knows a terminal. Torch is imported only where values are computed on.
"""

from mergekit_sd.inspection.adapters import Adapter
from mergekit_sd.inspection.controlnets import ControlNet
from mergekit_sd.inspection.diff import Diff, GroupDiff, TensorDiff, diff_files
from mergekit_sd.inspection.embeddings import Embedding
from mergekit_sd.inspection.hypernetworks import Hypernetwork
from mergekit_sd.inspection.identity import Identity, identify, weights_hash, weights_hashes
from mergekit_sd.inspection.inspect import Inspection, Share, bytes_to_read, inspect_file
from mergekit_sd.inspection.position_ids import PositionIds
from mergekit_sd.inspection.statistics import TensorStatistics, tensor_statistics
from mergekit_sd.inspection.training import About

__all__ = [
    "About",
    "Adapter",
    "ControlNet",
    "Diff",
    "Embedding",
    "GroupDiff",
    "Hypernetwork",
    "Identity",
    "Inspection",
    "PositionIds",
    "Share",
    "TensorDiff",
    "TensorStatistics",
    "bytes_to_read",
    "diff_files",
    "identify",
    "inspect_file",
    "tensor_statistics",
    "weights_hash",
    "weights_hashes",
]
