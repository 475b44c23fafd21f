"""The course of a search: victims wait, enter lanes, restart or leave, and their results are kept."""

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

# Finished victims leave or are replaced once they are this share of the lanes, because both copy much memory.
_LEAVING_SHARE = 1 / 8
# Number of victims on which memory is measured to choose the number of lanes.
_SAMPLE = 8


@dataclass
class Queue:
    """The victims of this process that have not entered a lane yet, by their places in the data.

    Lanes become free when victims leave, but Lightning fetches each batch one step before it is used. So the queue asks
    for victims, and these arrive two steps later; the steps in between receive ``()``.

    ::

                 ask()               Lightning fetches           admit()
        waiting ───────▶ asked ──────────────────────▶ fetched ───────────▶ in a lane ───▶ done
           ▲               │                              │                     │
           │               └── resumed from a checkpoint: asked for again ──────┤
           └───────────────── put_back(): the memory did not suffice ───────────┘

    There is at most one request at a time: ``asked`` is empty or is being fetched. A checkpoint contains both lists and
    the iteration ``asked_at`` of the request. A resumed run repeats the request before the first batch is fetched, or
    after the first batch if the request was made right after the last step before the checkpoint. So victims enter at
    the same step as in an uninterrupted run, and the results are identical bit for bit.

    Attributes:
        waiting: victims that have not been asked for.
        asked: victims that have been asked for and have not entered a lane yet.
        asked_at: the iteration after which they were asked for; -1 for before the first.
    """

    waiting: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    asked_at: int = -1

    def __len__(self) -> int:
        return len(self.waiting)

    def ask(self, datamodule: VictimDataModule, victims: int, iteration: int) -> None:
        """Ask for the next ``victims`` victims."""
        self.asked, self.waiting = self.waiting[:victims], self.waiting[victims:]
        self.asked_at = iteration
        datamodule.wanted = self.asked

    def admit(self) -> list[int]:
        """Return the victims that were asked for, which now enter lanes."""
        admitted, self.asked = self.asked, []
        return admitted

    def put_back(self, victims: Sequence[int]) -> None:
        """Put unfinished victims back at the front of the queue."""
        self.waiting = [*victims, *self.waiting]

    def before_first_fetch(self, datamodule: VictimDataModule, iteration: int) -> None:
        """Repeat the request of a resumed run, unless it is too early."""
        datamodule.wanted = self.asked if self.asked and self.asked_at != iteration else None

    def after_first_fetch(self, datamodule: VictimDataModule, iteration: int) -> None:
        """Repeat the request of a resumed run if it was too early before the first fetch."""
        if self.asked and self.asked_at == iteration:
            datamodule.wanted = self.asked


class Search:
    """The victims of this process: those waiting, those in lanes and those done.

    Attributes:
        iteration: evaluations so far, each for all victims in the lanes.
        queue: the victims that wait.
        most_lanes: the maximum number of lanes; 0 until it has been chosen.
        finished: reconstructions of the victims that have left the lanes, in the order in which they left.
        places: places of these victims in the data.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue, self.iteration, self.most_lanes = queue, 0, 0
        self.finished: list[Reconstruction] = []
        self.places: list[int] = []
        self._lanes: Lanes | None = None
        self._restored: tuple[SharedGradient | None, State] = None, {}

    @property
    def lanes(self) -> Lanes:
        """The victims currently in the lanes."""
        if self._lanes is None:
            raise RuntimeError("Expected the attack to be inside `Trainer.fit`, but got no lanes yet.")
        return self._lanes

    def put_lanes(self, lanes: Lanes) -> None:
        """Set the lanes, which are still empty."""
        self._lanes = lanes

    def move(self, evaluator: Evaluator) -> None:
        """Move to the evaluator's device; checkpoints are read before the Trainer moves parameters there."""
        lanes = self.lanes
        shared, kept = self._restored
        lanes.evaluator = evaluator
        lanes.shared = None if shared is None else shared.to(device=lanes.device, dtype=lanes.dtype)
        lanes.kept = {name: tensor.to(lanes.device) for name, tensor in kept.items()}
        self._restored = None, {}

    def victims(self) -> list[int]:
        """Return all victims of this process, by their places."""
        in_lanes = self.lanes.kept["place"].tolist() if len(self.lanes) else []
        return sorted({*self.places, *in_lanes, *self.queue.asked, *self.queue.waiting})

    @property
    def num_running(self) -> int:
        """Number of victims in the lanes whose search is still running."""
        return int(self._lanes.optimizer.running.sum()) if self._lanes else 0

    @property
    def num_done(self) -> int:
        """Number of victims whose search has ended."""
        return sum(map(len, self.finished)) + (len(self.lanes) - self.num_running if self._lanes else 0)

    @property
    def num_converged(self) -> int:
        """Number of victims whose search has ended below the solver's tolerance."""
        ended = [part.status for part in self.finished] + ([self._lanes.optimizer.status] if self._lanes else [])
        return sum(int((status == CONVERGED).sum()) for status in ended)

    def losses(self) -> Tensor | None:
        """Return the lowest objectives of the victims in the lanes, or if empty, of those that left last."""
        if self._lanes:
            return self._lanes.best_losses()
        return self.finished[-1].loss if self.finished else None

    def in_lanes(self, *, running: bool) -> list[Reconstruction]:
        """Return the best iterates so far of the running (or, if not ``running``, the ended) victims in the lanes."""
        if not self._lanes:
            return []
        return [self._lanes.collect((self._lanes.optimizer.running == running).nonzero().squeeze(1))]

    def begin(self, datamodule: VictimDataModule, *, processes: int) -> None:
        """Choose the number of lanes and ask for the first victims; when resumed, repeat the open request."""
        if not self.most_lanes and self.queue:
            self.most_lanes = self._find_lanes(datamodule, processes)
            self.queue.ask(datamodule, self.most_lanes, iteration=-1)
        self.queue.before_first_fetch(datamodule, self.iteration)

    def admit(self, shared: SharedGradient) -> None:
        """Put the victims that have arrived into lanes."""
        free = self.lanes.free(len(shared))
        if len(free):
            self._hand_out(free)
        self.lanes.admit(shared, self.queue.admit(), free)

    def retire(self, datamodule: VictimDataModule, *, restarts: int, above: float) -> None:
        """Restart victims that ended above an objective, remove finished ones, and ask for the next."""
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
        """Remove all victims that are done from the lanes, and keep their results."""
        if not self._lanes:
            return
        running = self._lanes.optimizer.running
        if not bool(running.all()):
            self._hand_out((~running).nonzero().squeeze(1))
        self._lanes.keep(running)

    def _hand_out(self, lanes: Tensor) -> None:
        """Keep the results of the lanes at these indices."""
        self.finished.append(self.lanes.collect(lanes))
        self.places += self.lanes.kept["place"][lanes].tolist()

    # Memory.

    def _find_lanes(self, datamodule: VictimDataModule, processes: int) -> int:
        """Return the maximum number of lanes."""
        lanes, most = self.lanes, len(self.queue)
        if datamodule.lanes != "auto":
            return min(cast(int, datamodule.lanes), most)
        sample = datamodule.share(self.queue.waiting[:_SAMPLE]).to(device=lanes.device, dtype=lanes.dtype)
        # The values of labels do not matter here, so none are inferred.
        sample.labels = sample.protocol.blank_labels(len(sample)).to(lanes.device)
        kept: State = {}

        def begin() -> None:
            kept.update(lanes.evaluator.begin(sample))

        # Gradients and the victims' own weights exist twice while they are captured and concatenated.
        to_begin = 2 * shared_bytes(sample) + peak_memory(begin, lanes.device)
        shared = lanes.evaluator.reduced(sample, kept)

        def evaluate(number: int) -> None:
            # Copies, so that the memory of the lanes is measured too.
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
        """Halve the number of lanes and put the victims in progress back into the queue, to start over.

        Raises:
            MemoryError: if there is only one lane.
        """
        lanes, number = self.lanes, len(self.lanes)
        if number == 1:
            raise MemoryError(
                "Expected enough memory for one victim, but got too little. Use fewer images, or another precision, "
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
            f"{number} lanes do not fit into memory ({error}). The attack continues with at most {self.most_lanes}; "
            "the victims in progress start over.",
            stacklevel=1,
        )
        if not self.queue.asked:
            self.queue.ask(datamodule, self.most_lanes, self.iteration)

    # Checkpoints.

    def saved(self) -> dict[str, Any]:
        """Return the state of the search, for a checkpoint."""
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
        """Restore a search from a checkpoint; ``declared`` are the entries of lanes, as empty tensors ``(0, ...)``."""
        search = cls(Queue(**saved["queue"]))
        search.iteration, search.most_lanes, search.places = saved["iteration"], saved["most_lanes"], saved["places"]
        search.finished = [Reconstruction(**part) for part in saved["finished"]]
        search._restored = restored_lanes(saved["lanes"], victim, declared)
        return search
