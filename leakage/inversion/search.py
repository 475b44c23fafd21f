"""The course of a search: victims wait, enter lanes, start again or leave, and what they gave away is kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import VictimDataModule
from leakage.inversion.evaluator import Evaluator
from leakage.inversion.lanes import Lanes, restored_lanes
from leakage.inversion.memory import choose_lanes, peak_memory, shared_bytes
from leakage.inversion.reconstruction import Reconstruction
from leakage.pieces import State
from leakage.solvers.solver import CONVERGED, UNINFORMATIVE

# Finished victims leave the lanes, or give them to others, when they are this share of them: both move much memory.
_LEAVING_SHARE = 1 / 8
# Victims on whom the number of lanes is tried.
_SAMPLE = 8


@dataclass
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
    """

    waiting: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    asked_at: int = -1

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


class Search:
    """The victims of this process: those that wait, those in lanes and those that are done.

    Attributes:
        iteration: evaluations so far, each for all victims in the lanes.
        queue: the victims that wait.
        most_lanes: how many victims may be in the lanes; 0 until it is found.
        finished: what those that have left the lanes gave away, in the order in which they left.
        places: of the finished, in the data.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue, self.iteration, self.most_lanes = queue, 0, 0
        self.finished: list[Reconstruction] = []
        self.places: list[int] = []
        self._lanes: Lanes | None = None
        self._restored: tuple[SharedGradient | None, State] = None, {}

    @property
    def lanes(self) -> Lanes:
        """The victims that are searched for at present."""
        if self._lanes is None:
            raise RuntimeError("Expected the attack to be inside `Trainer.fit`, but got no lanes yet.")
        return self._lanes

    def put_lanes(self, lanes: Lanes) -> None:
        """Take lanes, empty yet."""
        self._lanes = lanes

    def move(self, evaluator: Evaluator) -> None:
        """Go where the evaluator is; a checkpoint is read before the Trainer moves what it trains to its device."""
        lanes = self.lanes
        shared, kept = self._restored
        lanes.evaluator = evaluator
        lanes.shared = None if shared is None else shared.to(device=lanes.device, dtype=lanes.dtype)
        lanes.kept = {name: tensor.to(lanes.device) for name, tensor in kept.items()}
        self._restored = None, {}

    def victims(self) -> list[int]:
        """All of this process, by their places."""
        in_lanes = self.lanes.kept["place"].tolist() if len(self.lanes) else []
        return sorted({*self.places, *in_lanes, *self.queue.asked, *self.queue.waiting})

    @property
    def num_running(self) -> int:
        """Victims in the lanes that are still searched for."""
        return int(self._lanes.optimizer.running.sum()) if self._lanes else 0

    @property
    def num_done(self) -> int:
        """Victims whose search has ended."""
        return sum(map(len, self.finished)) + (len(self.lanes) - self.num_running if self._lanes else 0)

    @property
    def num_converged(self) -> int:
        """Victims whose search has ended below the solver's tolerance."""
        ended = [part.status for part in self.finished] + ([self._lanes.optimizer.status] if self._lanes else [])
        return sum(int((status == CONVERGED).sum()) for status in ended)

    def losses(self) -> Tensor | None:
        """The lowest objectives of the victims in the lanes, else of those that left last; None before any."""
        if self._lanes:
            return self._lanes.best_losses()
        return self.finished[-1].loss if self.finished else None

    def in_lanes(self, *, running: bool) -> list[Reconstruction]:
        """The best iterates so far of the victims in the lanes that are still searched for, or of the others."""
        if not self._lanes:
            return []
        return [self._lanes.collect((self._lanes.optimizer.running == running).nonzero().squeeze(1))]

    def begin(self, datamodule: VictimDataModule, *, processes: int) -> None:
        """Find how many lanes there shall be, and ask for the first victims, or again for those that were asked for."""
        if not self.most_lanes and self.queue:
            self.most_lanes = self._find_lanes(datamodule, processes)
            self.queue.ask(datamodule, self.most_lanes, iteration=-1)
        self.queue.before_first_fetch(datamodule, self.iteration)

    def admit(self, shared: SharedGradient) -> None:
        """Put the victims that have come into lanes."""
        free = self.lanes.free(len(shared))
        if len(free):
            self._hand_out(free)
        self.lanes.admit(shared, self.queue.admit(), free)

    def retire(self, datamodule: VictimDataModule, *, restarts: int, above: float) -> None:
        """Start victims that ended above some objective again, let finished ones go, ask for the next."""
        lanes = self.lanes
        if not len(lanes):
            return
        ended = ~lanes.optimizer.running
        poor = (lanes.best_losses() > above) & (lanes.optimizer.status != UNINFORMATIVE)
        again = (ended & poor & (lanes.kept["restarts"] < restarts)).nonzero().squeeze(1)
        if len(again):
            lanes.restart(again)
            ended = ~lanes.optimizer.running
        left = int(ended.sum())
        room = self.most_lanes - (len(ended) - left)
        if self.queue and not self.queue.asked and room >= max(1, _LEAVING_SHARE * self.most_lanes):
            self.queue.ask(datamodule, room, self.iteration)
        waiting = bool(self.queue.asked or self.queue)
        spare = min(left, len(ended) - self.most_lanes) if waiting else left
        if spare > 0 and (left == len(ended) or spare > _LEAVING_SHARE * len(ended)):
            leaving = ended.nonzero().squeeze(1)[-spare:]
            self._hand_out(leaving)
            lanes.keep(torch.ones_like(ended).index_fill(0, leaving, False))

    def hand_out_all(self) -> None:
        """Let all go that are done."""
        if not self._lanes:
            return
        running = self._lanes.optimizer.running
        if not bool(running.all()):
            self._hand_out((~running).nonzero().squeeze(1))
        self._lanes.keep(running)

    def _hand_out(self, lanes: Tensor) -> None:
        """Note what the lanes at these indices have found."""
        self.finished.append(self.lanes.collect(lanes))
        self.places += self.lanes.kept["place"][lanes].tolist()

    # Memory.

    def _find_lanes(self, datamodule: VictimDataModule, processes: int) -> int:
        """How many victims shall be in the lanes at most."""
        lanes, most = self.lanes, len(self.queue)
        if datamodule.lanes != "auto":
            return min(cast(int, datamodule.lanes), most)
        sample = datamodule.share(self.queue.waiting[:_SAMPLE]).to(device=lanes.device, dtype=lanes.dtype)
        # Any labels will do, and none need be inferred.
        sample.labels = torch.zeros(len(sample), sample.protocol.num_images, dtype=torch.long, device=lanes.device)

        kept: State = {}

        def begin() -> None:
            kept.update(lanes.evaluator.begin(sample))

        # Gradients, and weights of their own, are there twice while they are captured and put together.
        to_begin = 2 * shared_bytes(sample) + peak_memory(begin, lanes.device)
        shared = lanes.evaluator.reduced(sample, kept)

        def evaluate(number: int) -> None:
            # Lanes of their own, so that what they hold is counted too.
            chosen = torch.arange(number) % len(shared)
            own = {name: tensor[chosen.to(tensor.device)] for name, tensor in kept.items()}
            values = {name: unknown.new_zeros(number, *unknown.shape[1:]) for name, unknown in lanes.unknowns.items()}
            lanes.evaluator(shared.select(chosen), own, values)
            lanes.evaluator.forget()

        return choose_lanes(
            evaluate,
            lanes.optimizer.bytes_per_lane,
            most=most,
            device=lanes.device,
            processes=processes,
            bytes_to_begin=to_begin // len(sample),
        )

    def begin_anew_with_fewer_lanes(self, running: Tensor, datamodule: VictimDataModule, error: RuntimeError) -> None:
        """Use half of the lanes: the victims in them go back to the queue, and begin anew where they began.

        Raises:
            MemoryError: there is one lane.
        """
        lanes, number = self.lanes, len(self.lanes)
        if number == 1:
            raise MemoryError(
                "Expected memory for one victim at least, but got none: take fewer images, or another precision, "
                f"`history_size` or device. ({error})"
            ) from error
        ended = (~running).nonzero().squeeze(1)
        if len(ended):
            self._hand_out(ended)
        self.queue.put_back(lanes.kept["place"][running].tolist())
        lanes.keep(torch.zeros_like(running))
        lanes.evaluator.forget()
        self.most_lanes = max(1, number // 2)
        warnings.warn(
            f"{number} lanes are more than the memory holds ({error}). The attack goes on with {self.most_lanes}, in "
            "which the victims that were searched for begin anew.",
            stacklevel=1,
        )
        if not self.queue.asked:
            self.queue.ask(datamodule, self.most_lanes, self.iteration)

    # Checkpoints.

    def saved(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "iteration": self.iteration,
            "queue": vars(self.queue),
            "most_lanes": self.most_lanes,
            "lanes": self.lanes.saved(),
            "finished": [vars(part) for part in self.finished],
            "places": self.places,
        }

    @classmethod
    def restored(cls, saved: dict[str, Any], victim: Victim, declared: State) -> Search:
        """From one; ``declared`` are the entries that lanes have, as tensors without a victim."""
        search = cls(Queue(**saved["queue"]))
        search.iteration, search.most_lanes, search.places = saved["iteration"], saved["most_lanes"], saved["places"]
        search.finished = [Reconstruction(**part) for part in saved["finished"]]
        search._restored = restored_lanes(saved["lanes"], victim, declared)
        return search
