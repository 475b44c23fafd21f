"""Clients with defenses: what they share, what they tell of it, and what must not matter."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from leakage import Protocol, SharedGradient, Victim
from leakage.defenses import Clip, Defense, GaussianNoise, TopK
from leakage.seeds import derive_seed
from tests.clients.networks import CLASSES, IMAGE_SHAPE, network, private
from tests.clients.shared import rewrite

ALL = [TopK(0.3), Clip(0.05), GaussianNoise(0.1, relative=True), GaussianNoise(1e-3)]
TOLD = ({"name": "Clip", "norm": 0.05}, {"name": "GaussianNoise", "std": 1e-3, "relative": False})


def client(*defenses: Defense, model: nn.Module | None = None, **options: Any) -> Victim:
    return Victim(model or network("mlp", bias=True), image_shape=IMAGE_SHAPE, defenses=defenses, **options)


class Returns(Defense):
    """Whatever it is told to."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def describe(self) -> dict[str, Any]:
        return {"name": "Returns"}

    def __call__(self, gradients: Any, generator: torch.Generator) -> Any:
        return self.change(gradients)


@given(
    order=st.permutations(ALL),
    count=st.integers(0, 4),
    options=st.sampled_from([{}, {"local_steps": 4, "learning_rate": 0.3, "local_batch_size": 1}]),
    own=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_defenses_act_one_after_the_other_on_each_client(order, count, options, own, seed):
    """With local steps on the average that the client would share."""
    defenses, model = order[:count], network("mlp", bias=True)
    victim = client(*defenses, model=model, num_images=2, **options)
    images, labels = private(3, 2)
    ids = torch.tensor([4, 0, 2**40])
    states = victim.fresh_states([1, 2, 3]) if own else None
    shared = victim.share(images, labels, ids=ids, states=states, seed=seed)
    plain = client(model=model, num_images=2, **options).share(images, labels, ids=ids, states=states)
    for row, number in enumerate(ids.tolist()):
        expected = {name: tensor[row] for name, tensor in plain.gradients.items()}
        for place, defense in enumerate(defenses):
            generator = torch.Generator().manual_seed(derive_seed(seed, number, f"defense {place}"))
            expected = defense(expected, generator)
        for name, tensor in expected.items():
            assert torch.equal(shared.gradients[name][row], tensor), name
    victim.check(shared)


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_what_a_client_shares_depends_on_no_other(sizes, random):
    victim = client(*ALL, model=network("conv", bias=True))
    count = sum(sizes)
    images, labels = private(count)
    whole = victim.share(images, labels, ids=torch.arange(count), seed=5)
    order = list(range(count))
    random.shuffle(order)
    for group in torch.tensor(order).split(sizes):
        part = victim.share(images[group], labels[group], ids=group, seed=5)
        for name, tensor in part.gradients.items():
            torch.testing.assert_close(tensor, whole.gradients[name][group], rtol=1e-9, atol=0)


def noise_of(shared: SharedGradient, plain: SharedGradient) -> Tensor:
    return torch.cat([(shared.gradients[name] - plain.gradients[name]).flatten(1) for name in plain.gradients], 1)


def test_noise_is_by_seed_client_and_place_in_any_precision():
    model = network("mlp", bias=True)
    images, labels = private(2)
    plain = client(model=model).share(images, labels)
    noise = noise_of(client(GaussianNoise(1.0), model=model).share(images, labels), plain)
    again = noise_of(client(GaussianNoise(1.0), model=model).share(images, labels, seed=0), plain)
    assert torch.equal(noise, again)
    others = [
        noise.flip(0),
        noise_of(client(GaussianNoise(1.0), model=model).share(images, labels, seed=1), plain),
        noise_of(client(Clip(1e9), GaussianNoise(1.0), model=model).share(images, labels), plain),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.15
    nothing = Returns(lambda gradients: {name: torch.zeros_like(tensor) for name, tensor in gradients.items()})
    double, single = (
        client(nothing, GaussianNoise(1.0), model=model.to(dtype)).share(images.to(dtype), labels).gradients
        for dtype in (torch.float64, torch.float32)
    )
    for name, tensor in double.items():
        assert torch.equal(tensor, single[name].double())


def test_order_matters():
    model, (images, labels) = network("mlp", bias=True), private(2)
    noise, clip = GaussianNoise(1.0), Clip(0.1)
    clipped_last, noisy_last = (
        client(*defenses, model=model).share(images, labels) for defenses in ([noise, clip], [clip, noise])
    )
    for shared, short in ((clipped_last, True), (noisy_last, False)):
        norms = torch.cat([tensor.flatten(1) for tensor in shared.gradients.values()], 1).norm(dim=1)
        assert bool((norms <= 0.1 + 1e-9).all()) is short
    assert clipped_last.protocol != noisy_last.protocol


def test_the_global_random_state_stays():
    victim = client(*ALL)
    before = torch.random.get_rng_state()
    victim.share(*private(2))
    assert torch.equal(torch.random.get_rng_state(), before)


# -- what the attacker knows


def test_descriptions_are_part_of_the_protocol():
    victims = [
        client(),
        client(Clip(1.0)),
        client(Clip(2.0)),
        client(Clip(1.0), TopK(0.5)),
        client(TopK(0.5), Clip(1.0)),
    ]
    assert len({victim.fingerprint() for victim in victims}) == len(victims)
    assert victims[3].protocol.defenses == ({"name": "Clip", "norm": 1.0}, {"name": "TopK", "share": 0.5})
    with pytest.raises(ValueError, match=r"protocol, with defenses=\(\), but got defenses=.*'norm': 1.0"):
        victims[0].check(victims[1].share(*private(2)))


def test_a_defense_may_withhold_what_it_does():
    class Secret(GaussianNoise):
        def describe(self) -> dict[str, Any]:
            return {"name": "noise of some size"}

    shared = client(Secret(0.1)).share(*private(2))
    assert shared.protocol.defenses == ({"name": "noise of some size"},)


def test_header_round_trip(tmp_path):
    class Odd(Defense):
        def __init__(self, levels: Any, text: str, nothing: None, nested: dict[str, Any]) -> None:
            self.levels, self.text, self.nothing, self.nested = levels, text, nothing, nested

        def __call__(self, gradients: Any, generator: torch.Generator) -> Any:
            return dict(gradients)

    victim = client(Odd((1, 2.5), "größer", None, {"a": [True]}), *ALL, num_images=2)
    shared = victim.share(*private(3, 2))
    shared.save(tmp_path / "client.safetensors")
    loaded = SharedGradient.load(tmp_path / "client.safetensors")
    assert loaded.protocol == shared.protocol
    assert loaded.protocol.defenses[0] == {
        "name": "Odd",
        "levels": [1, 2.5],
        "text": "größer",
        "nothing": None,
        "nested": {"a": [True]},
    }
    attacker = Victim.of(network("mlp", bias=True), loaded.protocol)
    attacker.check(loaded)
    assert attacker.fingerprint() == victim.fingerprint()


OPTIONS = {"num_images": 4, "loss": "mean_squared_error", "reduction": "sum"}


@pytest.mark.parametrize("told", [(), TOLD])
def test_a_victim_of_a_protocol(told):
    protocol = Protocol(
        IMAGE_SHAPE, CLASSES, **OPTIONS, local_steps=2, learning_rate=0.5, local_batch_size=2, defenses=told
    )
    victim = Victim.of(network("mlp", bias=True), protocol)
    assert victim.protocol == protocol
    if told:
        message = (
            r"with defense objects .* only describes \['Clip', 'GaussianNoise'\]\. Create it by Victim\(model, \.\.\."
        )
        with pytest.raises(ValueError, match=message):
            victim.share(*private(2, 4))
    else:
        victim.check(victim.share(*private(2, 4)))
    assert protocol.defenses == told


def test_a_protocol_of_another_number_of_classes():
    with pytest.raises(ValueError, match="`model` for the protocol with num_classes=5, but got one with num_classes=4"):
        Victim.of(network("mlp", bias=True), Protocol(IMAGE_SHAPE, 5))


@pytest.mark.parametrize(
    "defenses",
    [
        "Clip",
        {"name": "Clip"},
        [1],
        ["Clip"],
        [{}],
        [{"name": 3}],
        [{"name": "Clip", "norm": float("nan")}],
        [{"name": "Clip", "norm": torch.ones(1)}],
        [{"name": "Clip", "norm": {1, 2}}],
        [{"name": "x" * 10_000}],
        [{"name": "Clip"}] * 1_000,
        None,
    ],
)
def test_descriptions_that_no_file_holds(defenses):
    with pytest.raises(ValueError, match=r"^Expected `defenses` as descriptions such as \[\{'name': .*, but got "):
        Protocol(IMAGE_SHAPE, CLASSES, defenses=defenses)


def test_hostile_headers(tmp_path):
    path, shared = tmp_path / "client.safetensors", client().share(*private(2))
    nested: Any = []
    for _ in range(500):
        nested = [nested]
    for defenses in (3, [3], [{"norm": 1}], [{"name": "Clip", "norm": float("inf")}], [{"name": "x" * 10**6}], nested):
        shared.save(path)
        rewrite(path, protocol=json.dumps(dataclasses.asdict(shared.protocol) | {"defenses": defenses}))
        with pytest.raises(
            ValueError, match=r"a protocol in the header of '.*', but got: Expected `defenses`"
        ) as error:
            SharedGradient.load(path)
        assert len(str(error.value)) < 1000


# -- errors


def test_defenses_that_are_none():
    for defenses, got in (
        (Clip(1.0), r"Clip\(norm=1\.0\)\."),
        ([Clip], "<class .*Clip'> in it"),
        (["Clip"], "'Clip' in"),
    ):
        with pytest.raises(ValueError, match=rf"^Expected `defenses` as a list of Defense objects, .* but got {got}"):
            Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE, defenses=defenses)


def test_arguments_that_are_not_kept():
    class Forgetful(Clip):
        def __init__(self, norm: float, words: str) -> None:
            super().__init__(norm)

    message = r"Expected Forgetful to keep the arguments .* no attribute for \['words'\]\. Assign them"
    with pytest.raises(ValueError, match=message):
        client(Forgetful(1.0, "a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gradients: None, r"tensors named \['1\.bias', .*\], but got NoneType\."),
        (lambda gradients: {"a": torch.zeros(1)}, r"tensors named \['1\.bias', .*\], but got \['a'\]\."),
        (lambda gradients: dict(gradients) | {"3.bias": 1.0}, r"a tensor of shape \(4,\) for '3\.bias', but got float"),
        (
            lambda gradients: dict(gradients) | {"3.bias": torch.zeros(3)},
            r"a tensor of shape \(4,\) for '3\.bias', but got \(3,\)\.",
        ),
        (
            lambda gradients: {name: tensor / 0 for name, tensor in gradients.items()},
            r"finite numbers for '1\.weight', but got NaN or inf \(victim 7\)",
        ),
    ],
)
def test_what_a_defense_must_return(change, message):
    with pytest.raises(ValueError, match=f"^Expected Returns to return {message}"):
        client(Returns(change)).share(*private(1), ids=torch.tensor([7]))


def test_gradients_that_are_not_finite_are_not_blamed_on_a_defense():
    victim = client(Clip(1.0))
    states = victim.fresh_states([0, 1])
    states["3.bias"][1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite numbers in the gradient of .*\(victims \[1\]\)"):
        victim.share(*private(2), states=states)


def test_another_precision_is_taken_back():
    victim = client(Returns(lambda gradients: {name: tensor.half() for name, tensor in gradients.items()}))
    shared = victim.share(*private(2))
    assert {tensor.dtype for tensor in shared.gradients.values()} == {torch.float64}


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_wrong_seed(seed):
    with pytest.raises(ValueError, match="`seed` to be a whole number of at least 0"):
        client().share(*private(1), seed=seed)
