"""Every refusal is one of these: what is wrong, where, and what to do about it.

This module owns the error types and their exit codes. It must not know how an error is shown;
the command line does that in one place (`mergekit_sd.cli.main`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class MergekitError(Exception):
    """Base of all errors that a user can cause or mend.

    `message` says what is wrong in one sentence; `file`, `key`, `line` and `column` say where
    (line and column count from 1); `hint` says what to do; `details` lists what a sentence
    cannot hold (tensor names, one per entry, in full).
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        key: str | None = None,
        line: int | None = None,
        column: int | None = None,
        hint: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.key = key
        self.line = line
        self.column = column
        self.hint = hint
        self.details = tuple(details)

    def as_json(self) -> dict[str, object]:
        """The error as the object that `--json` reports under "error"; absent places are left out."""
        place = {"file": self.file, "key": self.key, "line": self.line, "column": self.column, "hint": self.hint}
        return {
            "type": type(self).__name__,
            "message": self.message,
            "exit_code": self.exit_code,
            **{name: value for name, value in place.items() if value is not None},
            **({"details": list(self.details)} if self.details else {}),
        }


# --- exit code 2: the recipe or the command line -------------------------------------------------


class RecipeError(MergekitError):
    """The recipe says something that cannot be meant (exit 2)."""

    exit_code = 2


class UsageError(MergekitError):
    """The command line or a Python call asks for something impossible (exit 2)."""

    exit_code = 2


class OutputExists(UsageError):
    """The target is there already and `--force` was not given (exit 2)."""


class OutputIsInput(UsageError):
    """A target is one of the inputs, through whatever path or link (exit 2)."""


# --- exit code 3: the input files ----------------------------------------------------------------


class InputError(MergekitError):
    """An input file is missing, unreadable, malformed, or of the wrong family or shape (exit 3)."""

    exit_code = 3


class MissingInput(InputError):
    """No file under that name, next to the recipe or under the model roots."""


class UnreadableInput(InputError):
    """The file is there but cannot be read: permission, a folder, a FIFO, a loop of links."""


class MalformedFile(InputError):
    """The bytes are not what the format allows."""


class ForbiddenCall(InputError):
    """A pickle wants something called that weights do not need; the message names it, and nothing ran."""


class WrongFormat(InputError):
    """The bytes are of another format than the name or the command wants; the message names it."""


class ChecksFailed(InputError):
    """Pictures were made, and with --strict a failed check is an error."""


class FamilyMismatch(InputError):
    """Operands of different families (SD1, SD2, SDXL)."""


class ShapeMismatch(InputError):
    """Two operands' tensors of one name do not fit each other."""


class MissingTensors(InputError):
    """A component that was asked for is not in the file."""


class NonFiniteResult(InputError):
    """NaN or Inf in what was computed; `details` lists every tensor."""


class DtypeOverflow(InputError):
    """Finite values that the output's dtype cannot hold; `details` lists tensors and largest values."""


class InputChanged(InputError):
    """An input was replaced, truncated or written to while it was being read."""


class PinMismatch(InputError):
    """A pinned hash, a lock or a file under `verify` differs from what was found."""


# --- exit code 4: the environment ----------------------------------------------------------------


class EnvironmentFault(MergekitError):
    """Disk, permission, lock: nothing is wrong with the recipe or the inputs (exit 4)."""

    exit_code = 4


class DiskFull(EnvironmentFault):
    """Not enough room for the output; the message gives needed and free bytes."""


class NotWritable(EnvironmentFault):
    """The target's folder cannot be written to, or the disk failed while writing."""


class TargetLocked(EnvironmentFault):
    """Another run is writing the same target."""


class TargetBusy(EnvironmentFault):
    """Another program holds the target open (Windows); the finished file stays under a told name."""


# --- exit code 130 -------------------------------------------------------------------------------


class Cancelled(MergekitError):
    """The run was cancelled (Ctrl-C, or a caller's token); nothing is left behind (exit 130)."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("Cancelled; of the output under way nothing was left behind.")
