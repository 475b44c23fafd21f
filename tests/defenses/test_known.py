"""How an attacker knows the clients' defenses again, and how much is sent after them."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import leakage.defenses
from leakage import LeNet, Protocol, Victim
from leakage.attacks import IDLGAttack
from leakage.datamodules import SharedGradients
from leakage.defenses import (
    ATS,
    DPSGD,
    Clip,
    Defense,
    Encoding,
    GaussianNoise,
    HalfPrecision,
    InstaHide,
    LaplaceNoise,
    MixUp,
    Quantise,
    RandomPruning,
    Sign,
    Size,
    Soteria,
    TopK,
    known_defenses,
    size_sent,
)
from leakage.inversion.simulation import known_to
from tests.clients.networks import CLASSES, IMAGE_SHAPE, network
from tests.kit import fit

STOCK = [
    DPSGD(0.5, norm=2.0),
    ATS("rotate 20, invert"),
    Clip(1.0),
    GaussianNoise(0.1, relative=True),
    HalfPrecision("float16"),
    InstaHide(private=4, largest=0.5),
    LaplaceNoise(0.2),
    MixUp(2.0),
    Quantise(5, stochastic=True),
    RandomPruning(0.3),
    Sign(scaled=True),
    Soteria(0.6, layer="3"),
    TopK(0.1),
]


def test_all_stock_defenses_are_known_again_from_what_is_told_of_them():
    kinds = [value for value in vars(leakage.defenses).values() if isinstance(value, type)]
    bases = {Defense, Encoding}
    assert {type(defense) for defense in STOCK} == {kind for kind in kinds if issubclass(kind, Defense)} - bases
    found = known_defenses([defense.describe() for defense in STOCK])
    assert [*map(repr, found)] == [*map(repr, STOCK)]
    assert [*map(type, found)] == [*map(type, STOCK)]
    assert known_defenses([]) == ()


def test_a_defense_of_ones_own_is_known_once_it_is_defined():
    told = [Clip(1.0).describe(), {"name": "HalfOfIt", "factor": 0.5}]
    with pytest.raises(ValueError, match=r"^Expected a defense of the protocol to be one of \['.*, but got 'HalfOfIt'"):
        known_defenses(told)

    class HalfOfIt(Clip):
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, gradients: Any, generator: torch.Generator) -> Any:
            return {name: self.factor * tensor for name, tensor in gradients.items()}

    found = known_defenses(told)
    assert [type(defense) for defense in found] == [Clip, HalfOfIt]
    assert found[1].factor == 0.5


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"name": "noise of some size"}, r"one of \[.*'Clip', .*, but got 'noise of some size'\. Import its"),
        ({"name": "Defense"}, "but got 'Defense'"),
        ({"name": "Clip"}, "the arguments of Clip, but got {}: .*missing"),
        ({"name": "Clip", "norm": 1.0, "more": 2}, "the arguments of Clip, but got {'norm': 1.0, 'more': 2}: .*more"),
        ({"name": "Clip", "norm": -1.0}, "the arguments of Clip, but got {'norm': -1.0}: Expected `norm` to be"),
        ({"name": "Noise", "std": 1.0}, "Noise"),
    ],
)
def test_defenses_that_nobody_knows(told, message):
    with pytest.raises(ValueError, match=f"^Expected .*{message}") as error:
        known_defenses([{"name": "TopK", "share": 0.5}, told])
    assert "adaptive=False" in str(error.value)


def protocol(*defenses: Any) -> Protocol:
    told = [defense if isinstance(defense, dict) else defense.describe() for defense in defenses]
    return Protocol(IMAGE_SHAPE, CLASSES, defenses=tuple(told))


class Unsimulated(Clip):
    """As if it did nothing, to an attacker."""

    simulate = Defense.simulate


@pytest.mark.parametrize(
    ("adaptive", "defenses", "taken", "ignored"),
    [
        (True, [], [], None),
        (False, [], [], None),
        *[(True, [defense], [0], None) for defense in STOCK if not isinstance(defense, Encoding)],
        (True, [Clip(1.0), TopK(0.5), Quantise(8)], [0, 1, 2], None),
        (True, [TopK(0.5), GaussianNoise(0.1)], [1], r"\['TopK'\]"),
        (True, [Quantise(8), Clip(1.0)], [0, 1], None),
        (True, [Quantise(4), Clip(1.0)], [1], r"\['Quantise'\]"),
        (True, [Unsimulated(1.0), GaussianNoise(0.1)], [1], r"\['Unsimulated'\]"),
        (False, [Clip(1.0), GaussianNoise(0.1)], [], r"\['Clip', 'GaussianNoise'\]"),
        (False, [{"name": "Secret"}], [], r"\['Secret'\]"),
    ],
)
def test_an_attacker_is_told_which_defenses_it_ignores(adaptive, defenses, taken, ignored):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = known_to(adaptive, Victim.of(network("mlp", bias=True), protocol(*defenses)))
    assert [*map(repr, found)] == [repr(defenses[place]) for place in taken]
    assert len(caught) == (ignored is not None)
    for warning in caught:
        message = f"The clients defend their gradients with {ignored}, and this attack matches them as if"
        assert re.match(message, str(warning.message))


def test_an_attack_on_a_defense_that_it_does_not_know():
    class Secret(Clip):
        def describe(self) -> dict[str, Any]:
            return {"name": "clipping"}

    model = LeNet(2, 8, 4)
    images, labels = torch.rand(2, 1, 2, 8, 8), torch.tensor([[1], [3]])
    shared = Victim(model, image_shape=(2, 8, 8), defenses=[Secret(1.0)]).share(images, labels)
    victim = Victim.of(model, shared.protocol)
    attack = IDLGAttack(max_evaluations=2, restarts=0)
    with pytest.raises(ValueError, match=r"a defense of the protocol to be one of .* but got 'clipping'"):
        fit(attack, SharedGradients(shared, victim))
    with pytest.warns(UserWarning, match=r"defend their gradients with \['clipping'\], and this attack matches them"):
        naive = fit(IDLGAttack(max_evaluations=2, restarts=0, adaptive=False), SharedGradients(shared, victim))
    assert len(naive.finished) == 2
    with pytest.raises(ValueError, match="`adaptive` to be True or False, but got 'yes'"):
        IDLGAttack(adaptive="yes")


# -- what is sent


def flat(gradients: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in gradients.values()])


GIVEN = {"weight": torch.zeros(10, 100), "bias": torch.zeros(20)}


@pytest.mark.parametrize(
    ("defenses", "size", "count"),
    [
        ([], Size(1020, 32, 0), 4080),
        ([Clip(1.0)], Size(1020, 32, 0), 4080),
        ([GaussianNoise(0.1)], Size(1020, 32, 0), 4080),
        ([LaplaceNoise(0.1)], Size(1020, 32, 0), 4080),
        ([DPSGD(1.0, 1.0)], Size(1020, 32, 0), 4080),
        ([Soteria(0.8)], Size(1020, 32, 0), 4080),
        # A place of 32 bits for each of 10, or a bit for each of 1020.
        ([TopK(0.01)], Size(10, 32, 320), 80),
        ([TopK(0.1)], Size(102, 32, 1020), 536),  # 535.5
        ([TopK(1e-9)], Size(1, 32, 32), 8),
        ([RandomPruning(0.1)], Size(102, 32, 64), 416),
        # 32 bits for the largest of each tensor.
        ([Quantise(1)], Size(1020, 1, 64), 136),  # 135.5
        ([Quantise(8, stochastic=True)], Size(1020, 8, 64), 1028),
        ([Sign()], Size(1020, 1, 0), 128),  # 127.5
        ([Sign(scaled=True)], Size(1020, 1, 64), 136),
        ([HalfPrecision()], Size(1020, 16, 0), 2040),
        ([HalfPrecision("float16")], Size(1020, 16, 0), 2040),
        ([Clip(1.0), TopK(0.1), HalfPrecision()], Size(102, 16, 1020), 332),  # 331.5
        ([TopK(0.01), Quantise(4)], Size(10, 4, 384), 53),
        ([RandomPruning(0.5), Sign(scaled=True)], Size(510, 1, 128), 80),  # 79.75
        ([RandomPruning(0.5), RandomPruning(0.5)], Size(255, 32, 128), 1036),
        ([Quantise(8), TopK(0.01)], Size(10, 8, 64 + 320), 58),
        ([GaussianNoise(0.1), Quantise(2)], Size(1020, 2, 64), 263),
    ],
    ids=repr,
)
def test_what_is_sent_by_hand(defenses, size, count):
    found = size_sent(defenses, GIVEN)
    assert found == size
    assert found.bytes == count


@pytest.mark.parametrize("defenses", [[TopK(0.1), GaussianNoise(0.1)], [Quantise(8), LaplaceNoise(0.1)]], ids=repr)
def test_after_noise_no_entry_is_zero_and_none_on_a_grid(defenses):
    noisy = {name: torch.randn(tensor.shape) for name, tensor in GIVEN.items()}
    for defense in defenses:
        noisy = defense(noisy, torch.Generator())
    assert len(flat(noisy).unique()) > 1000
    assert size_sent(defenses, noisy) == Size(1020, 32, 0)


@pytest.mark.parametrize("defense", [Quantise(4), Sign(), TopK(0.1), RandomPruning(0.1), HalfPrecision()], ids=repr)
def test_no_less_is_said_to_be_sent_than_there_is_to_tell(defense):
    """Entries that are not zero, of so many different values."""
    given = {name: torch.randn(tensor.shape) for name, tensor in GIVEN.items()}
    sent, size = flat(defense(given, torch.Generator())), size_sent([defense], given)
    assert int((sent != 0).sum()) <= size.numbers
    assert len(sent[sent != 0].unique()) <= 2 * 2**size.bits


# -- protocols from elsewhere


@pytest.mark.parametrize(
    ("defenses", "options", "message"),
    [
        ([Soteria(0.5, layer="nowhere")], {}, r"`layer` of Soteria .* one of \['1', '3'\], but got 'nowhere'"),
        ([DPSGD(0.1, 1.0)], {"learning_rate": "unknown"}, "clients that share a gradient for DPSGD"),
        ([Clip(1.0), DPSGD(0.1, 1.0)], {}, "DPSGD once, as the first"),
    ],
)
def test_defenses_that_such_clients_can_not_have_used(defenses, options, message):
    told = Protocol(IMAGE_SHAPE, CLASSES, defenses=tuple(each.describe() for each in defenses), **options)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        known_to(True, Victim.of(network("mlp", bias=True), told))


def test_a_class_of_ones_own_replaces_none_of_the_package():
    own = type("Clip", (TopK,), {})
    assert own.__name__ == "Clip"
    (found,) = known_defenses([{"name": "Clip", "norm": 1.0}])
    assert type(found) is Clip


def test_an_argument_by_the_word_that_tells_the_class():
    class Named(Clip):
        def __init__(self, name: str) -> None:
            super().__init__(1.0)
            self.name = name

    with pytest.raises(ValueError, match="no argument `name` of Named"):
        Named("a").describe()
