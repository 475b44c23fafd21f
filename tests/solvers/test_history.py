from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakage.solvers import history as module
from leakage.solvers.history import (
    State,
    begin_anew,
    forget,
    fresh_history,
    fresh_products,
    grow,
    keep,
    push_and_direct,
)

D = 48


def two_loops(pairs: deque[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """The textbook's recursion for one victim (Nocedal and Wright, algorithm 7.4)."""
    q = gradient.clone()
    alphas = []
    for s, y in reversed(pairs):
        alphas.append(s.dot(q) / s.dot(y))
        q -= alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        q *= s.dot(y) / y.dot(y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q += (alpha - y.dot(q) / s.dot(y)) * s
    return -q


def history(victims: int, size: int) -> State:
    state = fresh_history(victims, D, size, torch.zeros(0, dtype=torch.float64))
    return state | fresh_products(state)


def pairs_of_a_bowl(victims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Steps, and differences of gradients with a positive curvature along them."""
    s = torch.randn(victims, D, generator=generator, dtype=torch.float64)
    curvature = 0.3 + torch.rand(victims, D, generator=generator, dtype=torch.float64)
    return s, s * curvature


@given(
    seed=st.integers(0, 2**16),
    victims=st.integers(1, 5),
    size=st.sampled_from([1, 2, 3, 7, 16, 17, 33]),
    rounds=st.integers(1, 40),
    share=st.sampled_from([0.3, 0.8, 1.0]),
)
def test_direction_is_that_of_the_two_loop_recursion(
    seed: int, victims: int, size: int, rounds: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = history(victims, size)
    expected: list[deque[tuple[Tensor, Tensor]]] = [deque(maxlen=size) for _ in range(victims)]
    # Each victim pushes on its own: lengths differ, and rings go round at different times.
    for _ in range(rounds):
        s, y = pairs_of_a_bowl(victims, generator)
        gradient = torch.randn(victims, D, generator=generator, dtype=torch.float64)
        pushed = torch.rand(victims, generator=generator) < share
        direction = push_and_direct(state, size, pushed, s, y, gradient)
        for victim in pushed.nonzero().flatten().tolist():
            expected[victim].append((s[victim], y[victim]))
        for victim in range(victims):
            reference = two_loops(expected[victim], gradient[victim])
            torch.testing.assert_close(direction[victim], reference, rtol=1e-8, atol=1e-8)
    assert state["s"].shape[1] <= size


def test_direction_after_forgetting_is_the_steepest_descent_of_that_victim_alone(
    generator: torch.Generator,
) -> None:
    state = history(3, 4)
    everyone = torch.ones(3, dtype=torch.bool)
    pairs: list[deque[tuple[Tensor, Tensor]]] = [deque(maxlen=4) for _ in range(3)]

    def push() -> None:
        s, y = pairs_of_a_bowl(3, generator)
        push_and_direct(state, 4, everyone, s, y, y)
        for victim in range(3):
            pairs[victim].append((s[victim], y[victim]))

    for _ in range(6):
        push()
    forget(state, torch.tensor([False, True, False]))
    pairs[1].clear()
    gradient = torch.randn(3, D, generator=generator, dtype=torch.float64)
    nobody = torch.zeros(3, dtype=torch.bool)
    direction = push_and_direct(state, 4, nobody, gradient, gradient, gradient)
    assert torch.equal(direction[1], -gradient[1])
    for _ in range(3):  # the victim that began anew has three pairs, the others' rings have gone round
        push()
    direction = push_and_direct(state, 4, nobody, gradient, gradient, gradient)
    for victim in range(3):
        reference = two_loops(pairs[victim], gradient[victim])
        torch.testing.assert_close(direction[victim], reference, rtol=1e-9, atol=1e-9)


def test_growing_changes_no_direction(generator: torch.Generator) -> None:
    state = history(2, 100)
    everyone, nobody = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    for _ in range(5):
        s, y = pairs_of_a_bowl(2, generator)
        push_and_direct(state, 100, everyone, s, y, y)
    before = push_and_direct(state, 100, nobody, s, y, y)
    assert state["s"].shape[1] == 16
    grow(state, 64)
    assert state["s"].shape[1] == state["inverse"].shape[2] == 64
    assert torch.equal(push_and_direct(state, 100, nobody, s, y, y), before)
    grow(state, 32)  # never shrinks
    assert state["s"].shape[1] == 64


@pytest.mark.parametrize("pairs_at_once", [1, 12, 10_000])
def test_directions_while_victims_come_and_go(
    pairs_at_once: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE_ON_A_CPU", pairs_at_once * 2 * D * 8)
    state, size = history(7, 18), 18
    expected: list[deque[tuple[Tensor, Tensor]]] = [deque(maxlen=size) for _ in range(7)]

    def push(rounds: int) -> None:
        for _ in range(rounds):
            victims = len(expected)
            s, y = pairs_of_a_bowl(victims, generator)
            gradient = torch.randn(victims, D, generator=generator, dtype=torch.float64)
            pushed = torch.rand(victims, generator=generator) < 0.8
            direction = push_and_direct(state, size, pushed, s, y, gradient)
            for victim in range(victims):
                if pushed[victim]:
                    expected[victim].append((s[victim], y[victim]))
                reference = two_loops(expected[victim], gradient[victim])
                torch.testing.assert_close(direction[victim], reference, rtol=1e-8, atol=1e-8)

    push(12)
    for anew in ([4, 1], [0, 6, 1], [2], [3, 2]):
        begin_anew(state, torch.tensor(anew))
        assert state["row"].sort().values.tolist() == list(range(7))
        assert state["row"][anew].tolist() == list(range(7 - len(anew), 7))  # the youngest behind
        assert not state["inverse"][state["row"][anew]].any()
        for victim in anew:
            expected[victim].clear()
        push(7)
    for kept in ([5, 0, 1, 6, 2], [2, 0, 4, 3], [1], []):
        state = keep(state, torch.tensor(kept, dtype=torch.long))
        expected = [expected[victim] for victim in kept]
        assert len(state["s"]) == len(state["inverse"]) == len(kept)
        push(4)


def test_what_remains_of_another_victim_counts_for_nothing(generator: torch.Generator) -> None:
    directions = []
    for remains in (0.0, 1e150):
        state = history(2, 5)
        state["s"].fill_(remains)
        state["y"].fill_(remains)
        steps = torch.Generator().manual_seed(4)
        for pushed in ([True, False], [True, True], [True, False]):
            s, y = pairs_of_a_bowl(2, steps)
            direction = push_and_direct(state, 5, torch.tensor(pushed), s, y, y)
        directions.append(direction)
    assert torch.equal(*directions)
