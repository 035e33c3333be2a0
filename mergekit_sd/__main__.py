"""The entry point: `mergekit-sd` and `python -m mergekit_sd`. Ctrl-C while importing ends quietly."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; never shows a traceback for Ctrl-C."""
    try:
        from mergekit_sd.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
