from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import vmap

from leakage.clients.victim import Victim
from leakage.models import LeNet
from leakage.solvers import ImageSpectrum, normal_equations
from leakage.solvers.normal_equations import (
    cholesky_steps,
    conjugate_gradients,
    damping_scale,
    dense_bytes,
    dense_jacobian,
)
from leakage.solvers.solver import Equations

SHAPE = (1, 8, 8)
SPECTRUM = ImageSpectrum(1, SHAPE)
spectra = pytest.mark.parametrize("spectrum", [None, SPECTRUM], ids=["plain", "spectrum"])


def gradient_equations(dtype: torch.dtype = torch.float64, victims: int = 3) -> tuple[Equations, Tensor]:
    """586 gradient equations of a small LeNet, another one per victim, in 64 pixels; and points to stand at."""
    generator = torch.Generator().manual_seed(0)
    victim = Victim(LeNet(1, 8, num_classes=4, width=3).to(dtype), image_shape=SHAPE)
    states = {name: state.to(dtype) for name, state in victim.fresh_states(list(range(victims))).items()}
    images = torch.rand(victims, 1, *SHAPE, generator=generator).to(dtype)
    shared = victim.share(images, torch.arange(victims)[:, None] % 4, states=states)
    targets = torch.eye(4, dtype=dtype)[torch.arange(victims) % 4]

    def residuals(point: Tensor, state: dict[str, Tensor], target: Tensor, goal: dict[str, Tensor]) -> Tensor:
        found = victim.gradients(state, point.view(1, *SHAPE), target[None])
        return torch.cat([(found[name] - goal[name]).flatten() for name in goal])

    def equations(points: Tensor, lanes: Tensor) -> Tensor:
        state, goal = ({name: t[lanes] for name, t in ts.items()} for ts in (states, shared.gradients))
        return vmap(residuals)(points, state, targets[lanes], goal)

    return equations, images.flatten(1) + 0.1 * torch.randn(victims, 64, generator=generator).to(dtype)


def linear(matrices: Tensor, right: Tensor) -> Equations:
    return lambda points, lanes: torch.einsum("vij,vj->vi", matrices[lanes], points) - right[lanes]


def by_autograd(equations: Equations, point: Tensor, lane: int, *, vectorize: bool = True) -> Tensor:
    lanes = torch.tensor([lane])
    matrix: Tensor = jacobian(lambda x: equations(x[None], lanes)[0], point, vectorize=vectorize)
    return matrix


def by_hand(equations: Equations, point: Tensor, lane: int, added: float, spectrum: ImageSpectrum | None) -> Tensor:
    """The damped step of one lane by explicit matrices: ``added`` times the inverse of P joins the normal matrix."""
    lanes = torch.tensor([lane])
    whole = by_autograd(equations, point, lane)
    eye = torch.eye(len(point), dtype=point.dtype)
    inverse = eye if spectrum is None else torch.linalg.inv(spectrum(eye))
    step: Tensor = torch.linalg.solve(whole.mT @ whole + added * inverse, -whole.mT @ equations(point[None], lanes)[0])
    return step


def model_decrease(equations: Equations, point: Tensor, lane: int, step: Tensor) -> Tensor:
    """What the loss of the linear equations falls by along ``step``."""
    lanes = torch.tensor([lane])
    residual = equations(point[None], lanes)[0]
    whole = by_autograd(equations, point, lane)
    return residual.square().sum() - (residual + whole @ step).square().sum()


@spectra
@pytest.mark.parametrize("lane", [0, 2])
def test_the_jacobian_is_that_of_autograd(
    lane: int, spectrum: ImageSpectrum | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    equations, points = gradient_equations()
    lanes = torch.tensor([lane])
    expected = by_autograd(equations, points[lane], lane, vectorize=False)
    if spectrum is not None:
        expected = expected @ spectrum.root(torch.eye(64, dtype=torch.float64)).mT
    for at_once in (256, 24):  # all columns in one pass, or three passes, the last of them shorter
        monkeypatch.setattr(normal_equations, "_DIRECTIONS_AT_ONCE", at_once)
        found = dense_jacobian(equations, points[lane : lane + 1], lanes, spectrum)
        torch.testing.assert_close(found.mT, expected, rtol=1e-9, atol=1e-12)


@spectra
def test_the_jacobian_is_that_of_finite_differences(spectrum: ImageSpectrum | None) -> None:
    equations, points = gradient_equations(victims=1)
    lanes, change = torch.tensor([0]), 1e-5
    found = dense_jacobian(equations, points, lanes, spectrum)
    eye = torch.eye(64, dtype=torch.float64)
    for unknown in range(0, 64, 5):
        direction = eye[unknown : unknown + 1]
        direction = change * (direction if spectrum is None else spectrum.root(direction))
        difference = equations(points + direction, lanes) - equations(points - direction, lanes)
        torch.testing.assert_close(found[unknown], difference[0] / (2 * change), rtol=1e-5, atol=1e-7)


@spectra
def test_conjugate_gradients_solve_each_lanes_own_equations(spectrum: ImageSpectrum | None) -> None:
    equations, points = gradient_equations()
    lanes, damping = torch.arange(3), torch.tensor([1.0, 1e-1, 1e-2], dtype=torch.float64)
    found = conjugate_gradients(
        equations,
        points,
        lanes,
        damping,
        forcing=torch.full((3,), 1e-9, dtype=torch.float64),
        max_products=1000,
        max_step=math.inf,
        spectrum=spectrum,
    )
    assert found.solved.all()
    added = damping * damping_scale(equations, points, lanes, spectrum)
    for lane in range(3):
        expected = by_hand(equations, points[lane], lane, float(added[lane]), spectrum)
        torch.testing.assert_close(found.step[lane], expected, rtol=1e-6, atol=1e-8)
        decrease = model_decrease(equations, points[lane], lane, found.step[lane])
        torch.testing.assert_close(found.promised[lane], decrease, rtol=1e-8, atol=0)


@spectra
def test_cholesky_takes_the_step_of_conjugate_gradients(spectrum: ImageSpectrum | None) -> None:
    equations, points = gradient_equations()
    for lane in range(3):
        lanes, point = torch.tensor([lane]), points[lane : lane + 1]
        damping = torch.tensor([3e-2], dtype=torch.float64)
        found = cholesky_steps(equations, point, lanes, damping, max_step=math.inf, spectrum=spectrum, max_chords=0)
        assert found.solved.tolist() == [True]
        assert found.products.tolist() == [64]
        added = damping * dense_jacobian(equations, point, lanes, spectrum).square().sum() / 64
        expected = by_hand(equations, point[0], lane, float(added), spectrum)
        torch.testing.assert_close(found.step[0], expected, rtol=1e-7, atol=1e-9)
        decrease = model_decrease(equations, point[0], lane, found.step[0])
        torch.testing.assert_close(found.promised[0], decrease, rtol=1e-7, atol=0)
        # The same multiple of the identity: the two measure it differently.
        other = conjugate_gradients(
            equations,
            point,
            lanes,
            added / damping_scale(equations, point, lanes, spectrum),
            forcing=torch.tensor([1e-9], dtype=torch.float64),
            max_products=1000,
            max_step=math.inf,
            spectrum=spectrum,
        )
        torch.testing.assert_close(other.step, found.step, rtol=1e-6, atol=1e-8)


def test_lanes_that_end_early_leave_and_change_nothing_for_the_others() -> None:
    equations, points = gradient_equations(victims=6)
    lanes = torch.tensor([3, 0, 5, 1, 4, 2])
    # Dampings large enough that rounding stays rounding: otherwise each product multiplies it by ten.
    forcing = torch.tensor([0.5, 1e-9, 0.3, 1e-3, 1e-7, 0.2], dtype=torch.float64)
    damping = torch.tensor([1e-2, 1.0, 1e-1, 1.0, 3.0, 1.0], dtype=torch.float64)

    sizes = []

    def watched(points: Tensor, lanes: Tensor) -> Tensor:
        sizes.append(len(points))
        return equations(points, lanes)

    def steps(chosen: Tensor, equations: Equations) -> normal_equations.Step:
        return conjugate_gradients(
            equations,
            points[lanes[chosen]],
            lanes[chosen],
            damping[chosen],
            forcing=forcing[chosen],
            max_products=400,
            max_step=math.inf,
            spectrum=SPECTRUM,
        )

    together = steps(torch.arange(6), watched)
    assert together.solved.all()
    assert len(set(together.products.tolist())) >= 4
    assert {6, 1} <= set(sizes), "those that were done did not leave"
    for place in range(6):
        alone = steps(torch.tensor([place]), equations)
        assert int(alone.products) == int(together.products[place])
        torch.testing.assert_close(alone.step[0], together.step[place], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(alone.promised[0], together.promised[place], rtol=1e-8, atol=0)


def test_a_lane_that_needs_more_products_is_not_solved_and_still_descends() -> None:
    equations, points = gradient_equations(victims=2)
    found = conjugate_gradients(
        equations,
        points,
        torch.arange(2),
        torch.tensor([1e-6, 1e-6], dtype=torch.float64),
        forcing=torch.tensor([1e-8, 0.9], dtype=torch.float64),
        max_products=5,
        max_step=math.inf,
        spectrum=None,
    )
    assert found.solved.tolist() == [False, True]
    assert int(found.products[0]) == 5 > int(found.products[1])
    before = equations(points, torch.arange(2)).square().sum(1)
    assert bool((found.promised > 0).all())
    assert bool((found.promised < before).all())


def test_the_clamped_step_promises_what_the_linear_equations_do() -> None:
    equations, points = gradient_equations(victims=2)
    found = conjugate_gradients(
        equations,
        points,
        torch.arange(2),
        torch.tensor([1e-2, 1e-2], dtype=torch.float64),
        forcing=torch.tensor([1e-2, 1e-2], dtype=torch.float64),
        max_products=400,
        max_step=0.02,
        spectrum=None,
    )
    assert float(found.step.abs().max()) == 0.02
    for lane in range(2):
        decrease = model_decrease(equations, points[lane], lane, found.step[lane])
        torch.testing.assert_close(found.promised[lane], decrease, rtol=1e-8, atol=1e-14)


def test_chords_serve_as_long_as_each_leaves_a_quarter_of_the_loss() -> None:
    """Against a loop with the Jacobian of autograd and a residual of its own for each chord."""
    equations, points = gradient_equations(victims=1)
    point, lanes, damping = points[:1], torch.tensor([0]), torch.tensor([1e-6], dtype=torch.float64)
    whole = by_autograd(equations, point[0], 0)
    normal = whole.mT @ whole
    normal = normal + damping * normal.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    found = {
        chords: cholesky_steps(equations, point, lanes, damping, max_step=math.inf, spectrum=None, max_chords=chords)
        for chords in range(5)
    }
    at, loss, stopped = point[0], equations(point, lanes).square().sum(), False
    for chords in range(5):
        trial = at - torch.linalg.solve(normal, whole.mT @ equations(at[None], lanes)[0])
        fresh = equations(trial[None], lanes).square().sum()
        if not stopped and (chords == 0 or fresh < loss):
            stopped = bool(fresh > 0.25 * loss)
            at, loss = trial, fresh
        torch.testing.assert_close(found[chords].step[0], at - point[0], rtol=1e-6, atol=1e-9)
        # The promise is that of the first step, as it decides over the damping.
        assert torch.equal(found[chords].promised, found[0].promised)
        assert int(found[chords].products) == 64
    assert float(loss) < 1e-2 * float(equations(point + found[0].step, lanes).square().sum()), "chords paid nothing"


def test_a_chord_that_makes_it_worse_is_not_taken() -> None:
    # From 0 with a slope of -1 to 1, where 0.4 is left; the chord leads on to 1.4, where the residual is -3.
    def equations(points: Tensor, lanes: Tensor) -> Tensor:
        return 1 - points + (0.4 + 4.316327) * points.square() - 4.316327 * points.pow(3)

    point, lanes, damping = torch.zeros(1, 1), torch.tensor([0]), torch.tensor([1e-6])
    found = cholesky_steps(equations, point, lanes, damping, max_step=math.inf, spectrum=None, max_chords=4)
    torch.testing.assert_close(found.step, torch.ones(1, 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["repeated", "missing", "graded", "fewer", "large", "small"])
def test_bad_jacobians_still_give_finite_steps_that_descend(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(1, 20, 12, generator=generator, dtype=torch.float64)
    if kind == "repeated":
        matrix = matrix[..., :1].expand_as(matrix)
    elif kind == "missing":
        matrix[..., 3:] = 0
    elif kind == "graded":
        matrix = matrix * torch.logspace(0, -12, 12, dtype=torch.float64)
    elif kind == "fewer":
        matrix = matrix[:, :4]
    elif kind == "large":
        matrix = matrix * 1e4
    elif kind == "small":
        matrix = matrix * 1e-4
    matrix = matrix.to(dtype)
    solution = torch.ones(1, 12, dtype=dtype)
    equations = linear(matrix, torch.einsum("vij,vj->vi", matrix, solution))
    point, lanes, damping = torch.zeros(1, 12, dtype=dtype), torch.tensor([0]), torch.tensor([1e-30], dtype=dtype)
    before = equations(point, lanes).square().sum()
    dense = cholesky_steps(equations, point, lanes, damping, max_step=math.inf, spectrum=None, max_chords=4)
    free = conjugate_gradients(
        equations,
        point,
        lanes,
        damping,
        forcing=torch.tensor([1e-3], dtype=dtype),
        max_products=50,
        max_step=math.inf,
        spectrum=None,
    )
    for found in (dense, free):
        assert bool(torch.isfinite(found.step).all())
        after = equations(point + found.step, lanes).square().sum()
        assert float(after) < 0.1 * float(before)
        assert 0 < float(found.promised) <= float(before) * (1 + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_indefinite_matrix_is_damped_until_it_has_a_factor(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    rounding = 1e3 * torch.finfo(dtype).eps
    normal = (turn * torch.tensor([3.0, 2, 1, 1e-3, 0, -rounding], dtype=torch.float64) @ turn.mT).to(dtype)
    before = normal.clone()
    factor, damping = normal_equations._factorise(normal, torch.tensor([1e-20], dtype=dtype))
    assert torch.equal(normal, before)
    assert float(damping) > 1e-20
    added = factor @ factor.mT - normal
    # A multiple of the identity, and not much more than it takes.
    assert 0.99 * rounding <= float(added.diagonal().mean()) < 20 * rounding
    identity = torch.eye(6, dtype=dtype)
    torch.testing.assert_close(added, added.diagonal().mean() * identity, rtol=0, atol=0.02 * rounding)


def test_where_nothing_is_left_to_solve_nothing_moves() -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    solution = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    equations = linear(matrices, torch.einsum("vij,vj->vi", matrices, solution))
    damping = torch.tensor([1e-2, 1e-2], dtype=torch.float64)
    start = torch.stack([solution[0], torch.zeros(3, dtype=torch.float64)])
    free = conjugate_gradients(
        equations,
        start,
        torch.arange(2),
        damping,
        forcing=torch.full((2,), 1e-12, dtype=torch.float64),
        max_products=20,
        max_step=math.inf,
        spectrum=None,
    )
    assert free.solved.all()
    assert not free.step[0].any()
    assert free.step[1].any()
    dense = cholesky_steps(
        equations, start[:1], torch.tensor([0]), damping[:1], max_step=math.inf, spectrum=None, max_chords=4
    )
    assert not dense.step.any()
    assert not dense.promised.any()


@pytest.mark.parametrize("what", ["cg", "cholesky"])
def test_a_lane_that_is_not_finite_ends(what: str) -> None:
    broken = linear(torch.full((1, 4, 3), torch.nan), torch.ones(1, 4))
    point, lanes, damping = torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1e-2])
    if what == "cg":
        found = conjugate_gradients(
            broken,
            point,
            lanes,
            damping,
            forcing=torch.tensor([0.1]),
            max_products=50,
            max_step=1.0,
            spectrum=None,
        )
        assert int(found.products) == 0
    else:
        found = cholesky_steps(broken, point, lanes, damping, max_step=1.0, spectrum=None, max_chords=4)
    assert bool(torch.isnan(found.promised).all())


def test_the_damping_is_measured_by_the_mean_eigenvalue() -> None:
    # Orthogonal columns: random signs then give the mean exactly, whatever the signs.
    generator = torch.Generator().manual_seed(4)
    turns = torch.linalg.qr(torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)).Q
    scales = torch.tensor([[1.0, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 7]], dtype=torch.float64)
    equations = linear(turns * scales[:, None], torch.zeros(2, 9, dtype=torch.float64))
    found = damping_scale(equations, torch.zeros(2, 6, dtype=torch.float64), torch.arange(2), None)
    torch.testing.assert_close(found, scales.square().mean(1))


@spectra
def test_the_damping_is_about_the_same_with_and_without_the_jacobian(spectrum: ImageSpectrum | None) -> None:
    equations, points = gradient_equations()
    found = damping_scale(equations, points, torch.arange(3), spectrum)
    for lane in range(3):
        whole = dense_jacobian(equations, points[lane : lane + 1], torch.tensor([lane]), spectrum)
        assert 1 / 4 < float(found[lane] / (whole.square().sum() / 64)) < 4


def test_draws_its_signs_without_the_global_random_state() -> None:
    equations, points = gradient_equations(victims=1)
    state = torch.random.get_rng_state()
    one = damping_scale(equations, points, torch.tensor([0]), None)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(one, damping_scale(equations, points, torch.tensor([0]), None))
    torch.random.set_rng_state(state)


def test_counts_the_bytes_of_the_dense_step() -> None:
    count: Callable[[int, int, int], int] = dense_bytes
    assert count(15_826, 3_072, 4) == 4 * (15_826 * 3_072 + 3 * 3_072**2)


def test_a_lane_that_overflows_is_not_solved_whoever_is_beside_it() -> None:
    starts = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    sizes = torch.tensor([1e25, 1.0])

    def equations(points: Tensor, lanes: Tensor) -> Tensor:
        return sizes[lanes, None] * points

    def solved(lanes: list[int]) -> list[bool]:
        found = normal_equations.conjugate_gradients(
            equations,
            starts[lanes],
            torch.tensor(lanes),
            torch.full((len(lanes),), 1e-6),
            forcing=torch.full((len(lanes),), 1e-3),
            max_products=10,
            max_step=1.0,
            spectrum=None,
        )
        assert bool(found.step.isfinite().all())
        return found.solved.tolist()

    assert solved([0]) == [False]
    assert solved([0, 1]) == [False, True]
