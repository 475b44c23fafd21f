"""The defenses of `tradeoff.py` by name, each with its strengths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from leakage.defenses import (
    ATS,
    DPSGD,
    PRECODE,
    Clip,
    Defense,
    GaussianNoise,
    HalfPrecision,
    LaplaceNoise,
    MixUp,
    Quantise,
    RandomPruning,
    Sign,
    Soteria,
    TopK,
)

# The norm of DP-SGD, whose strength is the noise multiplier.
DP_NORM = 1.0


@dataclass(frozen=True)
class Kind:
    """A defense with its strengths.

    Attributes:
        make: creates the defenses of a client for a strength.
        strengths: strengths to try, from the weakest to the strongest.
        written: name in tables and pictures.
        label: format of a strength, with the strength s, its inverse i and its percentage p; or a text for each
            strength.
        aggregates: whether the strength is a number of clients of whom only the mean is visible.
        images: least number of images of a client.
        network: creates the network that clients train, from the network without the defense and a strength; by default
            the network does not change.
    """

    make: Callable[[float], list[Defense]]
    strengths: tuple[float, ...]
    written: str
    label: str | dict[float, str]
    aggregates: bool = False
    images: int = 1
    network: Callable[[nn.Module, float], nn.Module] | None = None

    def named(self, strength: float) -> str:
        """Return the name of the defense with its strength."""
        words = self.short(strength)
        return f"{self.written}, {words}" if words else self.written

    def short(self, strength: float) -> str:
        """Return the name of a strength."""
        if isinstance(self.label, dict):
            return self.label.get(strength, f"{strength:g}")
        return self.label.format(s=strength, i=1 / strength if strength else 0, p=100 * strength)


def _pruned(kind: Callable[[float], Defense], share: float) -> list[Defense]:
    return [kind(round(1 - share, 12))]


def _last_linear(network: nn.Module) -> str:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def _with_dropout(network: nn.Module, share: float) -> nn.Module:
    """Return a copy of a network with dropout before the last linear layer."""
    changed, name = copy.deepcopy(network), _last_linear(network)
    changed.set_submodule(name, nn.Sequential(nn.Dropout(share), changed.get_submodule(name)))
    return changed


# Policies of the paper, for ResNet-20 and CIFAR-100; the default is both together.
_POLICIES = {1.0: ATS().policies[0], 2.0: ATS().policies[1]}

DEFENSES: dict[str, Kind] = {
    "none": Kind(lambda strength: [], (0.0,), "nothing", ""),
    "gaussian_noise": Kind(
        lambda strength: [GaussianNoise(strength, relative=True)], (0.01, 0.1, 1.0), "Gaussian noise", "std {s:g} rms"
    ),
    "laplace_noise": Kind(
        lambda strength: [LaplaceNoise(strength, relative=True)], (0.01, 0.1, 1.0), "Laplace noise", "std {s:g} rms"
    ),
    "clip": Kind(lambda strength: [Clip(1 / strength)], (0.1, 1.0, 10.0), "clipping", "norm {i:g}"),
    "dp_sgd": Kind(lambda strength: [DPSGD(strength, DP_NORM)], (0.01, 0.1, 1.0), "DP-SGD", "multiplier {s:g}"),
    "top_k": Kind(partial(_pruned, TopK), (0.5, 0.9, 0.99), "top-k", "{p:g} % left out"),
    "random_pruning": Kind(partial(_pruned, RandomPruning), (0.5, 0.9, 0.99), "random pruning", "{p:g} % left out"),
    "quantise": Kind(
        lambda strength: [Quantise(round(1 / strength))], (1 / 8, 1 / 4, 1 / 2), "quantising", "{i:g} bits"
    ),
    "quantise_stochastic": Kind(
        lambda strength: [Quantise(round(1 / strength), stochastic=True)],
        (1 / 8, 1 / 4, 1 / 2),
        "stochastic quantising",
        "{i:g} bits",
    ),
    "half_precision": Kind(
        lambda strength: [HalfPrecision("bfloat16" if strength > 1 else "float16")], (1.0, 2.0), "half precision",
        {1.0: "float16", 2.0: "bfloat16"},
    ),
    "sign": Kind(lambda strength: [Sign(scaled=strength < 1)], (0.5, 1.0), "signs", {0.5: "with size", 1.0: "alone"}),
    "aggregation": Kind(lambda strength: [], (2.0, 4.0, 8.0), "secure aggregation", "{s:g} clients", aggregates=True),
    "dropout": Kind(
        lambda strength: [], (0.1, 0.3, 0.5), "dropout", "{p:g} % of the features", network=_with_dropout
    ),
    "mixup": Kind(lambda strength: [MixUp(strength)], (0.2, 1.0, 5.0), "MixUp", "Beta({s:g}, {s:g})", images=2),
    "precode": Kind(
        lambda strength: [], (1 / 256, 1 / 32, 1 / 8), "PRECODE", "{i:g} numbers",
        network=lambda network, strength: PRECODE(network, round(1 / strength)),
    ),
    "ats": Kind(
        lambda strength: [ATS(_POLICIES.get(strength, ATS().policies))], (1.0, 2.0, 3.0), "ATS",
        {1.0: "policy 3-1-7", 2.0: "policy 43-18-18", 3.0: "both policies"},
    ),
    "soteria": Kind(lambda strength: [Soteria(strength)], (0.4, 0.8, 0.95), "Soteria", "{p:g} % of the features"),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A defense at one of its strengths."""

    name: str
    strength: float
    defenses: list[Defense]

    @property
    def key(self) -> str:
        """The name of its folder."""
        return f"{self.name}_{self.strength:g}"

    @property
    def clients(self) -> int:
        """The number of clients whose gradients are aggregated."""
        return round(self.strength) if DEFENSES[self.name].aggregates else 1

    @property
    def can_be_known(self) -> bool:
        """Whether an adaptive attacker acts differently from a naive one."""
        return bool(self.defenses) or DEFENSES[self.name].network is not None

    def on(self, network: nn.Module) -> list[Defense]:
        """Return the defenses of clients with this network, whose last linear layer Soteria prunes."""
        return [
            Soteria(defense.share, layer=_last_linear(network)) if isinstance(defense, Soteria) else defense
            for defense in self.defenses
        ]

    def network(self, model: nn.Module) -> nn.Module:
        """Return the network that clients train, given the model without the defense."""
        change = DEFENSES[self.name].network
        if change is None:
            return model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same weights at every call
            return change(model, self.strength)
