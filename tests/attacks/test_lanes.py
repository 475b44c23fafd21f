"""How many victims are attacked at once, and what happens when the memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from leakage.attacks import IDLGAttack
from leakage.inversion import memory as lanes_module
from leakage.inversion.memory import choose_lanes, is_out_of_memory, peak_memory

CPU = torch.device("cpu")


def evaluation(bytes_per_lane: int) -> Callable[[int], None]:
    return lambda lanes: torch.empty(lanes, bytes_per_lane, dtype=torch.uint8).fill_(0).__len__()


@pytest.mark.parametrize(
    ("free", "most", "expected"),
    [
        (10**9, 5, 5),  # all victims
        (10**9, 1000, 256),  # no more on a CPU
        (2 * 20 * 3000, 1000, 16),  # half of the memory holds 20
        (2 * 20 * 3000, 18, 18),
        (3000, 1000, 1),  # one fits, with nothing to spare
    ],
)
def test_as_many_lanes_as_there_are_victims_and_memory_for(
    monkeypatch: pytest.MonkeyPatch, free: int, most: int, expected: int
) -> None:
    monkeypatch.setattr(lanes_module, "free_memory", lambda device: free)
    assert choose_lanes(evaluation(2000), 1000, most=most, device=CPU) == expected


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "free_memory", lambda device: 2 * 20 * 3000)
    assert choose_lanes(evaluation(2000), 1000, most=1000, device=CPU, processes=2) == 8


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_lanes_evaluated_in_pieces_find_the_same(kit: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, at_once = [], []
    for pieces in (False, True):
        if pieces:
            monkeypatch.setattr(engine, "_BYTES_AT_ONCE", 1)
        attack = IDLGAttack(distance="cosine", max_evaluations=4, restarts=0)
        found.append(kit.fit(attack, kit.victims(victims=3, lanes=3, weights=weights)).finished)
        at_once.append(attack._at_once)
    assert at_once[0] > 3
    assert at_once[1] == 1
    assert not torch.equal(found[0].images, torch.zeros_like(found[0].images))
    torch.testing.assert_close(found[0].images, found[1].images, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[0].loss, found[1].loss)


def test_one_victim_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "free_memory", lambda device: 2999)
    with pytest.raises(MemoryError, match=r"Expected 3,000 bytes of memory for one victim, but got 2,999 bytes"):
        choose_lanes(evaluation(2000), 1000, most=8, device=CPU)

    def fails(lanes: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MemoryError, match="Take fewer images"):
        choose_lanes(fails, 1000, most=8, device=CPU)


def test_one_lane_where_trying_two_fails() -> None:
    def fails(lanes: int) -> None:
        if lanes > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert choose_lanes(fails, 1000, most=8, device=CPU) == 1


def test_other_errors_of_the_evaluation_pass_through() -> None:
    def fails(lanes: int) -> None:
        raise RuntimeError("The size of tensor a must match")

    with pytest.raises(RuntimeError, match="must match"):
        choose_lanes(fails, 1000, most=8, device=CPU)


def test_peak_memory_counts_what_lives_at_once() -> None:
    def run() -> None:
        for _ in range(3):  # freed each time
            first = torch.zeros(1000)
            second = first + 1  # both live
            second.view(10, 100).add_(1)  # no memory of its own
            del first, second
        torch.zeros(500)

    assert peak_memory(run, CPU) == 2 * 4000


def test_recognises_what_an_allocator_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


class Cramped(IDLGAttack):
    """Has memory for ``room`` lanes from the evaluation ``after`` on."""

    def __init__(self, room: int, after: int, **options: Any) -> None:
        super().__init__(**options)
        self.room, self.after, self.calls = room, after, 0

    def _evaluate(self) -> Any:
        self.calls += 1
        if self.calls > self.after and len(self._lanes["place"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super()._evaluate()


# Before the first evaluation; when nothing is done and the progress is told; when some victims are done.
@pytest.mark.parametrize(("room", "after"), [(4, 0), (4, 11), (3, 20), (1, 30)])
def test_half_of_the_lanes_go_on_and_nothing_is_lost(kit: Any, room: int, after: int) -> None:
    usual = kit.fit(IDLGAttack(), kit.victims(victims=10, lanes=8))
    attack = Cramped(room, after)
    with pytest.warns(UserWarning, match=r"8 lanes are more than the memory holds .*goes on with 4"):
        kit.fit(attack, kit.victims(victims=10, lanes=8), profiler="simple")  # which counts begins and ends
    kit.assert_successful(attack, 10)  # each victim exactly once
    assert torch.equal(attack.finished.labels, usual.finished.labels)
    torch.testing.assert_close(attack.finished.images, usual.finished.images, rtol=0, atol=0.1)
    # As in a run that had so few lanes from the beginning: they began anew at the same starts.
    few = kit.fit(IDLGAttack(), kit.victims(victims=10, lanes=room))
    assert all(attack.scores[victim].success == few.scores[victim].success for victim in range(10))


@pytest.mark.filterwarnings("ignore:. lanes are more than")
def test_no_memory_for_one_victim_is_told(kit: Any) -> None:
    with pytest.raises(MemoryError, match="Expected memory for one victim at least, but got none: take fewer images"):
        kit.fit(Cramped(0, 5), kit.victims(victims=4, lanes=4))


def test_another_error_ends_the_run(kit: Any) -> None:
    class Broken(IDLGAttack):
        def _evaluate(self) -> Any:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kit.fit(Broken(), kit.victims(victims=2))


class Settles(IDLGAttack):
    """An optimizer that settles a lane in the step that finds no memory."""

    def _advance(self) -> None:
        if self.iteration == 5 and not self.settled:
            self.settled = True
            self.before = self.num_running
            optimizer, move = self._optimizer, self._optimizer._move

            def fails(*arguments: Any) -> Any:
                optimizer.lanes["status"][:2] = 3
                optimizer._move = move  # type: ignore[method-assign]
                raise torch.OutOfMemoryError("CUDA out of memory.")

            optimizer._move = fails  # type: ignore[method-assign]
        super()._advance()

    settled = False


@pytest.mark.filterwarnings("ignore:. lanes are more than")
def test_what_the_failing_step_settled_begins_anew_too(kit: Any) -> None:
    attack = Settles()
    kit.fit(attack, kit.victims(victims=4, lanes=4))
    assert attack.before == 4
    kit.assert_successful(attack, 4)


def test_labels_are_told_of_victims_that_diverge_at_once(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(attack: IDLGAttack) -> torch.Tensor:
        attack.dummy_images.grad = torch.zeros_like(attack.dummy_images)
        return torch.full((len(attack.dummy_images),), torch.nan)

    monkeypatch.setattr(IDLGAttack, "_evaluate", evaluate)
    attack = kit.fit(IDLGAttack(restarts=0), kit.victims(victims=6, lanes=6))
    assert all(score.label_accuracy == 1 for score in attack.scores.values())
    assert attack.finished.labels.unique().numel() > 1


def test_labels_are_inferred_ahead_of_no_more_than_so_many(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idlg, "_INFERRED_AT_ONCE", 3)
    seen: list[int] = []
    infer = IDLGAttack._infer
    monkeypatch.setattr(IDLGAttack, "_infer", lambda attack, shared: seen.append(len(shared)) or infer(attack, shared))
    victims = kit.victims(victims=9, lanes=5, images=2, weights="shared")
    kit.fit(IDLGAttack(max_evaluations=2, restarts=0), victims)
    assert max(seen) == 5, "the lanes, and no more"
