"""The process of the command line: ``python -m leakage``, and what the script ``leakage`` starts."""

from __future__ import annotations

from leakage.cli.main import main

if __name__ == "__main__":
    main()
