"""A sampling run's folder: every picture, the sheet, the report for people and the one for programs.

It appears whole or not at all; one that is replaced must be such a folder itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from mergekit_sd.formats.folders import OutputFolder, check_new_folder
from mergekit_sd.sampling.files import file_names
from mergekit_sd.sampling.folder import PAGE, REPORT
from mergekit_sd.sampling.html import as_html
from mergekit_sd.sampling.json_report import sampling_as_json
from mergekit_sd.sampling.parameters import image_bytes, png
from mergekit_sd.sampling.sheet import sheet
from mergekit_sd.sampling.values import SamplingReport

SHEET = "sheet.png"


def check_samples_folder(folder: Path, *, force: bool) -> None:
    """Raises OutputExists or UsageError where `write_samples` would."""
    check_new_folder(folder, force=force, marks=(REPORT,))


def write_samples(report: SamplingReport, folder: str | Path, *, force: bool = False) -> tuple[Path, ...]:
    """Write a report's pictures, `sheet.png`, `report.html` and `report.json`; returns their paths.

    Raises OutputExists where the folder is there and not `force`, UsageError where it holds something else.
    """
    folder = Path(folder)
    with OutputFolder(folder, force=force, marks=(REPORT,)) as target:
        files: dict[str, str | bytes] = {
            name: png(picture) for name, picture in zip(file_names(report.pictures), report.pictures, strict=True)
        }
        files |= {
            SHEET: image_bytes(sheet(report)),
            PAGE: as_html(report),
            REPORT: json.dumps(sampling_as_json(report), indent=2, ensure_ascii=False) + "\n",
        }
        for name, content in files.items():
            target.write(name, content)
        target.commit()
    return tuple(folder / name for name in files)
