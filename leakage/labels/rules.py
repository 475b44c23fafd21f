"""The rules by name, what each needs, and what the attacker knows about the victims' network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from leakage.clients.protocol import UNKNOWN
from leakage.clients.victim import Victim
from leakage.labels.auxiliary import Auxiliary, KnownFeatures, LabelledFeatures, known_features
from leakage.labels.calibrated import geng, llg_plus, llg_star, mean_feature, rlu
from leakage.labels.from_gradients import Found, idlg, ilrg, llg, rlg, row_minimum
from leakage.labels.last_layer import LastLayer, has_non_negative_features
from leakage.labels.posterior import LabelPosterior

# The advice where no rule can infer labels.
INSTEAD = "Use DLGAttack, which recovers labels by optimisation, or reveal the labels (reveal_labels=True)."


class Knowledge:
    """What the attacker knows about the victims' network, computed on demand because not every rule needs it."""

    def __init__(self, layer: LastLayer, auxiliary: Auxiliary | None, seed: int) -> None:
        self.layer, self.auxiliary, self.seed = layer, auxiliary, seed

    @cached_property
    def features(self) -> KnownFeatures:
        """The last layer's inputs for the attacker's images."""
        return known_features(self.layer, self.auxiliary, self.seed)

    @cached_property
    def labelled(self) -> LabelledFeatures:
        """The last layer's inputs for the attacker's images, with labels."""
        return self.features.with_labels(self.seed)

    @cached_property
    def posterior(self) -> LabelPosterior:
        """The posterior that is learnt from simulated clients."""
        return LabelPosterior.learn(self.layer, self.labelled, self.seed)


@dataclass(frozen=True)
class Rule:
    """A rule, and its needs as keys of :data:`NEEDS`."""

    find: Callable[[LastLayer, Knowledge], Found]
    needs: tuple[str, ...] = ()
    learns: bool = False  # whether it learns something to keep for further victims of the same network
    by_direction: bool = False  # whether it ignores the length of a gradient, and so needs no learning rate

    def missing(self, met: dict[str, str | None]) -> list[str]:
        """Return the needs that are not met."""
        needs = self.needs if self.by_direction else (*self.needs, "learning rate")
        return [need for need in needs if met[need] is not None]


#: What rules may need, as text that follows "Expected".
NEEDS = {
    "weight": "the last layer's weights to share their gradient",
    "bias": "the last layer's bias to share its gradient",
    "one image": "one image per gradient",
    "distinct": "at most as many images as classes",
    "fewer": "at least two images fewer than classes",
    "non-negative": "inputs of the last layer that can't be negative, as after a ReLU or a sigmoid",
    "auxiliary": "`auxiliary` images",
    "shared weights": "victims that share their weights",
    "learning rate": "clients that reveal their learning rate",
    "plain": "a loss without label smoothing and class weights",
    "signs": "a loss without label smoothing, or both gradients of the last layer and a known learning rate",
}

#: Rules by name. Their docstrings cite the papers; ``mean_feature`` and ``posterior`` were developed for this library.
RULES: dict[str, Rule] = {
    "idlg": Rule(lambda layer, known: idlg(layer), ("one image", "signs"), by_direction=True),
    "row_minimum": Rule(lambda layer, known: row_minimum(layer), ("weight", "distinct", "plain"), by_direction=True),
    "llg": Rule(lambda layer, known: llg(layer), ("weight", "non-negative", "plain")),
    "llg_star": Rule(lambda layer, known: llg_star(layer, known.seed), ("weight", "non-negative", "plain")),
    "rlg": Rule(lambda layer, known: rlg(layer), ("weight", "fewer", "plain"), by_direction=True),
    "ilrg": Rule(lambda layer, known: ilrg(layer), ("weight", "bias", "plain")),
    "geng": Rule(lambda layer, known: geng(layer, known.seed)),
    "mean_feature": Rule(lambda layer, known: mean_feature(layer, known.features), ("weight", "bias")),
    "llg_plus": Rule(
        lambda layer, known: llg_plus(layer, known.features), ("weight", "non-negative", "auxiliary", "plain")
    ),
    "rlu": Rule(
        lambda layer, known: rlu(layer, known.labelled, known.seed), ("bias", "auxiliary", "shared weights", "plain")
    ),
    "posterior": Rule(lambda layer, known: known.posterior(layer), ("weight", "shared weights"), learns=True),
}


def needs_met(victim: Victim, auxiliary: Auxiliary | None, *, own_weights: bool) -> dict[str, str | None]:
    """Return for every need None if it is met, else the text that follows "but got"."""
    weight, bias = (f"{victim.classifier}.{name}" in victim.trainable for name in ("weight", "bias"))
    protocol = victim.protocol
    count, classes = protocol.num_images, protocol.num_classes
    unknown = repr(UNKNOWN) if protocol.learning_rate == UNKNOWN else None
    soft = f"label_smoothing={protocol.label_smoothing:g}" if protocol.label_smoothing else "class weights"
    images = f"{count} images and {classes} classes"
    return {
        "weight": None if weight else "frozen ones",
        "bias": None if bias else "none",
        "one image": None if count == 1 else f"{count}",
        "distinct": None if count <= classes else images,
        "fewer": None if count <= classes - 2 else images,
        "non-negative": None if has_non_negative_features(victim) else "negative ones",
        "auxiliary": None if auxiliary is not None else "none",
        "shared weights": "a network for each" if own_weights else None,
        "learning rate": unknown,
        "plain": None if protocol.plain_labels else soft,
        "signs": soft if protocol.label_smoothing and not (weight and bias and unknown is None) else None,
    }


def usable_rules(met: dict[str, str | None]) -> list[str]:
    """Return the names of the rules whose needs are all met."""
    return [name for name, rule in RULES.items() if not rule.missing(met)]


def check_needs(rule: str, met: dict[str, str | None]) -> None:
    """Raise a ``ValueError`` that names usable rules if this rule, or for ``"auto"`` every rule, is unusable."""
    working = usable_rules(met)
    missing = [] if rule == "auto" else RULES[rule].missing(met)
    if rule == "auto" and not working:  # `geng` needs nothing else
        missing = ["learning rate"]
    if missing:
        instead = f"Rules that would work: {', '.join(map(repr, ['auto', *working]))}." if working else INSTEAD
        raise ValueError(f"Expected {NEEDS[missing[0]]} for rule={rule!r}, but got {met[missing[0]]}. {instead}")
