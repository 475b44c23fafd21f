"""How many victims are attacked at once, and what happens when the memory does not suffice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Callback

from leakage.attacks import IDLGAttack, RGAPAttack
from leakage.inversion import memory as lanes_module
from leakage.inversion.lanes import Lanes
from leakage.inversion.memory import choose_lanes, is_out_of_memory, peak_memory
from leakage.solvers import LBFGS, STATUS
from tests.kit import SmallVictims, fit

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


def test_what_victims_need_to_begin_counts_if_it_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "free_memory", lambda device: 2 * 20 * 3000)
    assert choose_lanes(evaluation(2000), 1000, most=1000, device=CPU, bytes_to_begin=2000) == 16
    assert choose_lanes(evaluation(2000), 1000, most=1000, device=CPU, bytes_to_begin=7000) == 8
    assert choose_lanes(evaluation(2000), 1000, most=1000, device=CPU, bytes_to_begin=10**9) == 1


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_a_closed_form_tells_what_it_needs_to_begin(kit: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def choose(*given: Any, bytes_to_begin: int, **options: Any) -> int:
        told.append(bytes_to_begin)
        return choose_lanes(*given, bytes_to_begin=bytes_to_begin, **options)

    monkeypatch.setattr("leakage.inversion.search.choose_lanes", choose)
    attack = kit.fit(RGAPAttack(), kit.victims(victims=3, weights=weights))
    network = 4 * sum(parameter.numel() for parameter in attack.victim.model.parameters())
    captured = 2 * network * (2 if weights == "own" else 1)
    assert captured < told[0] < captured + 10 * network


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "free_memory", lambda device: 2 * 20 * 3000)
    assert choose_lanes(evaluation(2000), 1000, most=1000, device=CPU, processes=2) == 8


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_lanes_evaluated_in_pieces_find_the_same(kit: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, at_once = [], []
    for pieces in (False, True):
        if pieces:
            monkeypatch.setattr("leakage.inversion.evaluator._BYTES_AT_ONCE", 1)
        attack = IDLGAttack(distance="cosine", max_evaluations=4, restarts=0)
        found.append(kit.fit(attack, kit.victims(victims=3, lanes=3, weights=weights)).finished)
        at_once.append(attack.lanes.evaluator.at_once)
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

    with pytest.raises(MemoryError, match="Use fewer images"):
        choose_lanes(fails, 1000, most=8, device=CPU)


def test_one_lane_where_trying_two_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "free_memory", lambda device: 10_000)  # else two are not tried

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


def test_peak_memory_does_not_count_what_was_there_before() -> None:
    before = torch.zeros(1000)
    assert peak_memory(lambda: before.view(10, 100)[:5].T.exp(), CPU) == 2000


def test_recognises_what_an_allocator_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def without_memory(monkeypatch: pytest.MonkeyPatch, room: int, after: int) -> None:
    """There is memory for ``room`` lanes from the evaluation ``after`` on."""
    calls, evaluate = [0], Lanes.evaluate

    def cramped(lanes: Lanes) -> Any:
        calls[0] += 1
        if calls[0] > after and len(lanes) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return evaluate(lanes)

    monkeypatch.setattr(Lanes, "evaluate", cramped)


class Counts(Callback):
    """Compares the number of converged victims with the reconstructions that are handed out, at every step."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def on_train_batch_end(self, trainer: Any, attack: Any, *_: Any) -> None:
        assert attack.num_converged == int((attack.finished.status == STATUS.index("converged")).sum())
        self.seen.add(attack.num_converged)


def test_converged_victims_are_counted_as_they_end(kit: Any) -> None:
    counts = Counts()
    run = kit.fit(IDLGAttack(max_evaluations=90, restarts=0), kit.victims(victims=6, lanes=2), callbacks=[counts])
    assert 0 in counts.seen
    assert len(counts.seen) > 2
    assert max(counts.seen) == run.num_converged


@pytest.fixture(scope="module")
def with_lanes() -> Callable[[int], Any]:
    """The usual run with so many lanes, made once."""
    return functools.cache(lambda lanes: fit(IDLGAttack(), SmallVictims(victims=6, lanes=lanes)))


# Before the first evaluation; when nothing is done and the progress is told; when some victims are done.
@pytest.mark.slow
@pytest.mark.parametrize(("room", "after"), [(2, 0), (2, 11), (1, 30)])
def test_half_of_the_lanes_go_on_and_nothing_is_lost(
    kit: Any, room: int, after: int, with_lanes: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, few = with_lanes(4), with_lanes(room)
    attack = IDLGAttack()
    without_memory(monkeypatch, room, after)
    with pytest.warns(UserWarning, match=r"4 lanes do not fit into memory .*continues with at most 2"):
        kit.fit(attack, kit.victims(victims=6, lanes=4), profiler="simple")  # which counts begins and ends
    kit.assert_successful(attack, 6)  # each victim exactly once
    assert torch.equal(attack.finished.labels, usual.finished.labels)
    torch.testing.assert_close(attack.finished.images, usual.finished.images, rtol=0, atol=0.1)
    # As in a run that had so few lanes from the beginning: they began anew at the same starts.
    assert all(attack.scores[victim].success == few.scores[victim].success for victim in range(6))


@pytest.mark.filterwarnings("ignore:. lanes do not fit into")
def test_no_memory_for_one_victim_is_told(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without_memory(monkeypatch, 0, 5)
    with pytest.raises(
        MemoryError, match=r"Expected enough memory for one victim, but got too little\. Use fewer images"
    ):
        kit.fit(IDLGAttack(), kit.victims(victims=4, lanes=4))


def test_another_error_ends_the_run(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(lanes: Lanes) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Lanes, "evaluate", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kit.fit(IDLGAttack(), kit.victims(victims=2))


@pytest.mark.filterwarnings("ignore:. lanes do not fit into")
def test_what_the_failing_step_settled_begins_anew_too(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may settle lanes before it finds no memory."""
    calls, move = [0], LBFGS.move

    def settles(solver: LBFGS, lanes: Any, at: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            lanes["status"][:2] = STATUS.index("diverged")
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return move(solver, lanes, at)

    monkeypatch.setattr(LBFGS, "move", settles)
    attack = kit.fit(IDLGAttack(), kit.victims(victims=4, lanes=4))
    assert calls[0] > 6
    kit.assert_successful(attack, 4)


def test_labels_are_told_of_victims_that_diverge_at_once(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lanes, "evaluate", lambda lanes: torch.full_like(lanes.rest(), torch.nan))
    attack = kit.fit(IDLGAttack(restarts=0), kit.victims(victims=6, lanes=6))
    assert all(score.label_accuracy == 1 for score in attack.scores.values())
    assert attack.finished.labels.unique().numel() > 1
