from __future__ import annotations

from collections import deque

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakage.optim.history import forget, fresh_history, grow, push_and_direct

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
    state = fresh_history(victims, D, size, torch.zeros(0, dtype=torch.float64))
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
    state = fresh_history(3, D, 4, torch.zeros(0, dtype=torch.float64))
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
    state = fresh_history(2, D, 100, torch.zeros(0, dtype=torch.float64))
    everyone, nobody = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    for _ in range(5):
        s, y = pairs_of_a_bowl(2, generator)
        push_and_direct(state, 100, everyone, s, y, y)
    before = push_and_direct(state, 100, nobody, s, y, y)
    assert state["s"].shape[1] == 16
    grow(state, 64)
    assert state["s"].shape[1] == state["sy"].shape[2] == 64
    assert torch.equal(push_and_direct(state, 100, nobody, s, y, y), before)
    grow(state, 32)  # never shrinks
    assert state["s"].shape[1] == 64
