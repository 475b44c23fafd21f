"""Processes that tests start. Each begins at once: it is forked from one that has imported what all of them need."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A server of its own, and not this process, is forked: it has no threads, and nothing that other tests left behind.
STARTS = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    STARTS.set_forkserver_preload(["lightning", "leakage.attacks", "leakage.callbacks", "leakage.datamodules"])


@dataclass(frozen=True)
class Ended:
    """How a process has ended, and all that it wrote to its standard output and error."""

    returncode: int
    said: str


class Running:
    """A process that calls a function of a module, which pickle can find, with arguments; its output goes to a file.

    ``environment`` has changes to the variables, ``None`` for those that go.
    """

    def __init__(
        self, log: Path, function: Callable[..., None], *arguments: Any, environment: Mapping[str, str | None] = {}
    ) -> None:
        self.log = log
        self.process = STARTS.Process(target=_call, args=(log, environment, function, arguments))
        self.process.start()

    def end(self, timeout: float = 240) -> Ended:
        """Wait for it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        assert code is not None
        self.process.close()
        return Ended(code, self.log.read_text(encoding="utf-8") if self.log.exists() else "")


def run(log: Path, function: Callable[..., None], *arguments: Any, environment: Mapping[str, str | None] = {}) -> Ended:
    """Call a function in a process of its own, to its end."""
    return Running(log, function, *arguments, environment=environment).end()


def _call(
    log: Path, environment: Mapping[str, str | None], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    with log.open("ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    function(*arguments)
