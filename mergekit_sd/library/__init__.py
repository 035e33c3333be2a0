"""The library: an index of the user's models, and what can be told from it.

Only `scan_library` reads models; the rest answers from the index. It is a cache: what it holds, a scan finds again.
"""

from mergekit_sd.library.dedupe import DedupeGroup, DedupeReport, Skipped, dedupe_vaes
from mergekit_sd.library.duplicates import DuplicateGroup, Duplicates, also_in, find_duplicates
from mergekit_sd.library.entry import LibraryEntry
from mergekit_sd.library.events import FileGone, FileHashed, FileRead, HashingProgressed, HashingStarted, ScanReport
from mergekit_sd.library.family import Child, FamilyTree, family_tree
from mergekit_sd.library.finding import find_by_hash, find_by_name
from mergekit_sd.library.folders import ModelFolder, model_folders
from mergekit_sd.library.index import Library
from mergekit_sd.library.journal import DedupeRun, dedupe_runs
from mergekit_sd.library.known import known_identity
from mergekit_sd.library.lineage import Ancestor, read_lineage
from mergekit_sd.library.listing import list_library, look_up
from mergekit_sd.library.published import published_name
from mergekit_sd.library.renaming import rename_model, sidecars
from mergekit_sd.library.scan import scan_library
from mergekit_sd.library.similar import ModelCompared, Similarity, SimilarModel, find_similar
from mergekit_sd.library.store import data_folder, library_file
from mergekit_sd.library.undo import UndoReport, undo_dedupe
from mergekit_sd.library.vaes import VaeGroup, VaeList, list_vaes

__all__ = [
    "Ancestor",
    "Child",
    "DedupeGroup",
    "DedupeReport",
    "DedupeRun",
    "DuplicateGroup",
    "Duplicates",
    "FamilyTree",
    "FileGone",
    "FileHashed",
    "FileRead",
    "HashingProgressed",
    "HashingStarted",
    "Library",
    "LibraryEntry",
    "ModelCompared",
    "ModelFolder",
    "ScanReport",
    "SimilarModel",
    "Similarity",
    "Skipped",
    "UndoReport",
    "VaeGroup",
    "VaeList",
    "also_in",
    "data_folder",
    "dedupe_runs",
    "dedupe_vaes",
    "family_tree",
    "find_by_hash",
    "find_by_name",
    "find_duplicates",
    "find_similar",
    "known_identity",
    "library_file",
    "list_library",
    "list_vaes",
    "look_up",
    "model_folders",
    "published_name",
    "read_lineage",
    "rename_model",
    "scan_library",
    "sidecars",
    "undo_dedupe",
]
