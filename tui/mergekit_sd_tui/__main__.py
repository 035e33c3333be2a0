"""`python -m mergekit_sd_tui`, and what `mergekit-sd tui` calls."""

from __future__ import annotations

import sys
from pathlib import Path

from mergekit_sd_tui.app import Workbench
from mergekit_sd_tui.pictures import ask_terminal


def main(start: Path | None = None) -> int:
    """Run the workbench until the user leaves it; the exit code. `start`: a recipe, a folder or a model."""
    ask_terminal()
    app = Workbench(start)
    app.run()
    if app.last_words:
        print(app.last_words, file=sys.stderr)
    return app.return_code or 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if sys.argv[1:] else None))
