"""Which victims are waiting, and how an attack asks for the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leakage.datamodules.base import VictimDataModule


class Queue:
    """The victims of this process that no lane has had yet, by their places in the data.

    An attack has room when victims leave, but Lightning fetches batches one ahead of the step that uses them. So it
    asks, and the victims come two steps later; steps in between are given ``()``.

    ::

                 ask()               Lightning fetches           admit()
        waiting ───────▶ asked ──────────────────────▶ fetched ───────────▶ in a lane ───▶ done
           ▲               │                              │                     │
           │               └── resumed from a checkpoint: asked for again ──────┤
           └───────────────── put_back(): there was no memory for them ─────────┘

    A victim is asked for at most once at a time: ``asked`` is empty or is being fetched. A checkpoint has both lists
    and the step ``asked_at`` after which the asking was done. When a run is resumed it asks again: before the first
    batch is fetched; but if it had asked right after the last step before the checkpoint, only after the first batch.
    Then victims enter at the very step at which they would have entered, and the run goes on bit for bit.

    Attributes:
        waiting: victims that have not been asked for.
        asked: those that have, and that no lane has had yet.
        asked_at: after which iteration, -1 for before the first.

    Args:
        waiting: the victims of this process.
    """

    def __init__(self, waiting: Sequence[int] = ()) -> None:
        self.waiting, self.asked, self.asked_at = list(waiting), list[int](), -1

    def __len__(self) -> int:
        return len(self.waiting)

    def ask(self, datamodule: VictimDataModule, victims: int, iteration: int) -> None:
        """Ask for the next victims."""
        self.asked, self.waiting = self.waiting[:victims], self.waiting[victims:]
        self.asked_at = iteration
        datamodule.wanted = self.asked

    def admit(self) -> list[int]:
        """The victims that have come: they are in lanes from now on."""
        admitted, self.asked = self.asked, []
        return admitted

    def put_back(self, victims: Sequence[int]) -> None:
        """Victims leave their lanes without being done, and are the next."""
        self.waiting = [*victims, *self.waiting]

    def before_first_fetch(self, datamodule: VictimDataModule, iteration: int) -> None:
        """Ask again, unless it is too early."""
        datamodule.wanted = self.asked if self.asked and self.asked_at != iteration else None

    def after_first_fetch(self, datamodule: VictimDataModule, iteration: int) -> None:
        """Ask again, if it was too early."""
        if self.asked and self.asked_at == iteration:
            datamodule.wanted = self.asked

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"waiting": self.waiting, "asked": self.asked, "asked_at": self.asked_at}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Queue:
        """From one."""
        queue = cls(state["waiting"])
        queue.asked, queue.asked_at = state["asked"], state["asked_at"]
        return queue
