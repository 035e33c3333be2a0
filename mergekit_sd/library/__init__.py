"""The library: an index of the user's models, and what can be told from it.

Only `scan_library` reads models; the rest answers from the index. It is a cache: what it holds, a scan finds again.
"""

from mergekit_sd.library.duplicates import DuplicateGroup, Duplicates, also_in, find_duplicates
from mergekit_sd.library.entry import LibraryEntry
from mergekit_sd.library.events import FileGone, FileHashed, FileRead, HashingProgressed, HashingStarted, ScanReport
from mergekit_sd.library.finding import find_by_hash, find_by_name
from mergekit_sd.library.folders import ModelFolder, model_folders
from mergekit_sd.library.index import Library
from mergekit_sd.library.listing import list_library, look_up
from mergekit_sd.library.published import published_name
from mergekit_sd.library.renaming import rename_model, sidecars
from mergekit_sd.library.scan import scan_library
from mergekit_sd.library.store import data_folder, library_file

__all__ = [
    "DuplicateGroup",
    "Duplicates",
    "FileGone",
    "FileHashed",
    "FileRead",
    "HashingProgressed",
    "HashingStarted",
    "Library",
    "LibraryEntry",
    "ModelFolder",
    "ScanReport",
    "also_in",
    "data_folder",
    "find_by_hash",
    "find_by_name",
    "find_duplicates",
    "library_file",
    "list_library",
    "look_up",
    "model_folders",
    "published_name",
    "rename_model",
    "scan_library",
    "sidecars",
]
