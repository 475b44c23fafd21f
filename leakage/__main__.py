"""Entry point of the command line: ``python -m leakage`` and the script ``leakage``."""

from __future__ import annotations

from leakage.cli.main import main

if __name__ == "__main__":
    main()
