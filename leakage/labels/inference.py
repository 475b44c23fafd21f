"""The labels of a whole batch, read off what its client shared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.clients.protocol import check_local_steps
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_choice, check_count
from leakage.labels.auxiliary import Auxiliary, KnownFeatures, known_features
from leakage.labels.calibrated import geng, llg_plus, llg_star, rlu
from leakage.labels.from_gradients import Found, idlg, ilrg, llg, row_minimum
from leakage.labels.last_layer import LastLayer, has_non_negative_features, last_layer
from leakage.labels.mean_feature import mean_feature
from leakage.labels.posterior import LabelPosterior
from leakage.labels.separation import rlg
from leakage.labels.simulation import draw_images, simulate
from leakage.seeds import derive_seed

# Victims with networks of their own that are looked at together; bounds the memory, not the result.
_NETWORKS_AT_ONCE = 64
# For `auto`: simulated clients, and the share of the auxiliary images that they hold.
_TRIED_ON, _HELD_OUT = 400, 1 / 4
# A recall that is as good as all, how many rules must reach it to be believed, and what is added to the posterior's
# where the images are noise.
_GOOD_ENOUGH, _AGREEING, _MARGIN = 0.99, 3, 0.03


@dataclass
class InferredLabels:
    """The labels of V victims as a rule found them.

    Attributes:
        counts: ``(V, K)`` int64, images of each class; each row sums to N.
        scores: ``(V, K)``, the higher the more of that class; for rules that count, images before rounding.
        present: ``(V, K)`` bool, the classes that the rule holds to be there. A rule that finds the set of
            classes only spreads the N images over them in ``counts``.
        rule: the rule's name; of ``"auto"`` the one that it chose.
    """

    counts: Tensor
    scores: Tensor
    present: Tensor
    rule: str

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def labels(self) -> Tensor:
        """``(V, N)`` class indices, sorted."""
        victims, classes = self.counts.shape
        every = torch.arange(classes, device=self.counts.device).repeat(victims)
        return every.repeat_interleave(self.counts.flatten()).view(victims, -1)


@dataclass(frozen=True)
class Rule:
    """A rule, and what it needs: some of the keys of :data:`NEEDS`."""

    find: Callable[[LastLayer, Callable[[], KnownFeatures], int], Found]
    needs: tuple[str, ...] = ()


#: What rules may need, in words that follow "Expected".
NEEDS = {
    "weight": "the last layer's weights to share their gradient",
    "bias": "the last layer's bias to share its gradient",
    "one image": "one image per gradient",
    "distinct": "at most as many images as classes",
    "fewer": "at least two images fewer than classes",
    "non-negative": "inputs of the last layer that can't be negative, as behind a ReLU or a sigmoid",
    "auxiliary": "`auxiliary` images",
    "shared weights": "victims that share their weights",
}

#: Rules by name, each with its paper in its docstring; ``mean_feature`` and ``posterior`` are this library's own.
RULES: dict[str, Rule] = {
    "idlg": Rule(lambda layer, known, seed: idlg(layer), ("one image",)),
    "row_minimum": Rule(lambda layer, known, seed: row_minimum(layer), ("weight", "distinct")),
    "llg": Rule(lambda layer, known, seed: llg(layer), ("weight", "non-negative")),
    "llg_star": Rule(lambda layer, known, seed: llg_star(layer, seed), ("weight", "non-negative")),
    "rlg": Rule(lambda layer, known, seed: rlg(layer), ("weight", "fewer")),
    "ilrg": Rule(lambda layer, known, seed: ilrg(layer), ("weight", "bias")),
    "geng": Rule(lambda layer, known, seed: geng(layer, seed)),
    "mean_feature": Rule(lambda layer, known, seed: mean_feature(layer, known()), ("weight", "bias")),
    "llg_plus": Rule(lambda layer, known, seed: llg_plus(layer, known()), ("weight", "non-negative", "auxiliary")),
    "rlu": Rule(
        lambda layer, known, seed: rlu(layer, known().with_labels(seed), seed),
        ("bias", "auxiliary", "shared weights"),
    ),
    "posterior": Rule(
        lambda layer, known, seed: LabelPosterior(layer, known().with_labels(seed), seed)(layer),
        ("weight", "shared weights"),
    ),
}
# Where victims have networks of their own, `auto` takes the first of these that can be used; `geng` always can.
_WITHOUT_SIMULATION = ("mean_feature", "geng")
# The order in which `auto` tries rules, and takes the first of equals; not `rlg`, whose linear programmes take long.
_PREFERRED = ("mean_feature", "ilrg", "geng", "row_minimum", "llg", "llg_star", "llg_plus", "rlu")


def check_label_rule(
    victim: Victim,
    rule: str = "auto",
    *,
    auxiliary: Auxiliary | None = None,
    num_images: int | None = None,
    own_weights: bool = False,
) -> None:
    """Raise a ``ValueError`` unless labels can be read off the last layer's gradient by this rule.

    Args:
        victim: model and protocol.
        rule: a key of :data:`RULES` or ``"auto"``.
        auxiliary: the attacker's own images, if there are any.
        num_images: N, by default the protocol's.
        own_weights: whether each victim has a network of its own.

    Raises:
        ValueError: an unknown rule, a loss other than cross-entropy, logits that are not the output of a linear
            layer, a last layer without gradients, or something that the rule needs is not there; the message
            names what to use instead.
    """
    count = _check_victim(victim, rule, auxiliary, num_images)
    _check_needs(rule, _met(victim, auxiliary, count, own_weights=own_weights))


def _check_victim(victim: Victim, rule: str, auxiliary: Auxiliary | None, num_images: int | None) -> int:
    """What no rule can do without; returns N."""
    check_choice("rule", rule, (*RULES, "auto"))
    protocol = victim.protocol
    count = protocol.num_images if num_images is None else num_images
    check_count(num_images=count)
    check_local_steps(count, protocol.local_steps, protocol.learning_rate, protocol.local_batch_size)
    instead = "Use DLGAttack, which recovers labels by optimisation, or reveal the labels (reveal_labels=True)."
    if victim.protocol.loss != "cross_entropy":
        raise ValueError(
            "Expected a victim with loss 'cross_entropy', whose gradient is negative only for the true class, "
            f"but got loss {victim.protocol.loss!r}. {instead}"
        )
    if not victim.classifier:  # "" is a model that is one layer, of a kind of its own: images are no vectors
        raise ValueError(
            "Expected logits that are the output of an nn.Linear layer, whose gradient tells the labels, "
            f"but got logits from {victim.logits_from}. {instead}"
        )
    if not {f"{victim.classifier}.weight", f"{victim.classifier}.bias"} & {*victim.trainable}:
        raise ValueError(
            f"Expected the last layer {victim.classifier!r} to share its gradient, but got frozen weights. {instead}"
        )
    if auxiliary is not None:
        if not isinstance(auxiliary, Auxiliary):
            raise ValueError(
                f"Expected `auxiliary` to be a leakage.labels.Auxiliary, but got {type(auxiliary).__name__}."
            )
        auxiliary.check(protocol)
    return count


def _met(
    victim: Victim, auxiliary: Auxiliary | None, num_images: int, *, own_weights: bool = False
) -> dict[str, str | None]:
    """For every need None if it is met, else what there is instead."""
    weight, bias = (f"{victim.classifier}.{name}" in victim.trainable for name in ("weight", "bias"))
    classes = victim.protocol.num_classes
    images = f"{num_images} images and {classes} classes"
    return {
        "weight": None if weight else "frozen ones",
        "bias": None if bias else "none",
        "one image": None if num_images == 1 else f"{num_images}",
        "distinct": None if num_images <= classes else images,
        "fewer": None if num_images <= classes - 2 else images,
        "non-negative": None if has_non_negative_features(victim) else "negative ones",
        "auxiliary": None if auxiliary is not None else "none",
        "shared weights": "a network for each" if own_weights else None,
    }


def _check_needs(rule: str, met: dict[str, str | None]) -> None:
    if rule == "auto":
        return
    missing = [need for need in RULES[rule].needs if met[need] is not None]
    if missing:
        working = ["auto", *_usable(met)]
        raise ValueError(
            f"Expected {NEEDS[missing[0]]} for rule={rule!r}, but got {met[missing[0]]}. "
            f"Rules that would work: {', '.join(map(repr, working))}."
        )


def _usable(met: dict[str, str | None]) -> list[str]:
    return [name for name, rule in RULES.items() if all(met[need] is None for need in rule.needs)]


@torch.no_grad()
def infer_labels(
    shared: SharedGradient,
    victim: Victim,
    *,
    rule: str = "auto",
    num_images: int | None = None,
    auxiliary: Auxiliary | None = None,
    seed: int = 0,
) -> InferredLabels:
    r"""Infer how many images of each class are behind each gradient.

    With cross-entropy the gradient of the last layer is a mean of :math:`(p_i - y_i) h_i^\top` over the
    images i, with h the layer's inputs, p the predictions and y the one-hot labels: all rules
    start from there. No rule sees the victims' images or labels.

    ================ ==================================================== ===============================
    rule             finds                                                needs
    ================ ==================================================== ===============================
    ``idlg``         the label of one image, exactly                      one image
    ``row_minimum``  distinct labels (GradInversion)                      weights' gradient, N ≤ K
    ``llg``          counts from sums of rows                             non-negative inputs of the layer
    ``llg_star``     the same, calibrated on black, white and noise       the same
    ``llg_plus``     the same, calibrated on auxiliary images             the same, auxiliary images
    ``rlg``          the set of classes, by linear programmes             weights' gradient, N ≤ K - 2
    ``ilrg``         counts from features of each class                   both gradients
    ``geng``         counts from mean predictions on noise                nothing
    ``mean_feature`` counts from the batch's mean feature                 both gradients
    ``rlu``          counts by their expected update of the bias          auxiliary images, shared weights
    ``posterior``    counts by their learnt posterior                     weights' gradient, shared weights
    ``auto``         the best of them, see below                          nothing
    ================ ==================================================== ===============================

    ``auto`` takes ``idlg`` for one image. Where victims share their weights, it simulates clients that hold a
    quarter of the auxiliary images, and takes the rule that finds most of their labels. Without auxiliary
    images they hold noise with the spectrum of natural images, labelled as the network predicts: good enough
    to tell an untrained network from a trained one, but on a trained one auxiliary images are worth far more. Where
    victims have networks of their own, it takes ``mean_feature``, or ``geng`` where a gradient is missing, untried:
    after local steps that change predictions much another may find more, as ``row_minimum`` for few images.

    After local steps the average gradient is taken for a gradient: by ``ilrg`` and ``mean_feature`` at the weights
    half-way, by the others at those that were given. ``rlu`` and ``posterior`` simulate the last layer's steps.

    Args:
        shared: gradients of V victims.
        victim: their model and protocol.
        rule: a name of the table.
        num_images: N, by default the protocol's.
        auxiliary: images of the attacker's own, of the same kind as the victims' but never theirs.
        seed: of dummy images and simulated clients.

    Returns:
        Counts, scores and labels of every victim, on the device of the gradients.

    Raises:
        ValueError: see :func:`check_label_rule`; gradients that don't fit the victim; weights of their own for a
            rule that learns about one network.

    References:
        Each rule's function names its paper; :mod:`leakage.labels.from_gradients`, :mod:`.calibrated`,
        :mod:`.separation`, :mod:`.mean_feature`, :mod:`.posterior`.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), num_images=4)
        >>> labels = torch.tensor([[7, 0, 3, 3], [1, 1, 1, 9]])
        >>> inferred = infer_labels(victim.share(torch.rand(2, 4, 1, 28, 28), labels), victim)
        >>> inferred.labels
        tensor([[0, 3, 3, 7],
                [1, 1, 1, 9]])
        >>> inferred.rule
        'mean_feature'
    """
    check_count(0, seed=seed)
    count = _check_victim(victim, rule, auxiliary, num_images)
    victim.check(shared)
    if shared.gradients[victim.trainable[0]].dtype in (torch.float16, torch.bfloat16):
        shared = shared.to(torch.float32)
    met = _met(victim, auxiliary, count, own_weights=shared.own_weights)
    _check_needs(rule, met)
    parts = torch.split(torch.arange(len(shared)), _NETWORKS_AT_ONCE if shared.own_weights else len(shared))
    found = [_infer(shared.select(part), victim, rule, count, auxiliary, seed, met) for part in parts]
    counts, scores, present = (
        torch.cat([getattr(labels, name) for labels in found]) for name in ("counts", "scores", "present")
    )
    return InferredLabels(counts, scores, present, found[0].rule)


def _infer(
    shared: SharedGradient,
    victim: Victim,
    rule: str,
    num_images: int,
    auxiliary: Auxiliary | None,
    seed: int,
    met: dict[str, str | None],
) -> InferredLabels:
    layer = last_layer(shared, victim, num_images)

    @functools.cache  # not every rule needs them
    def known() -> KnownFeatures:
        return known_features(layer, auxiliary, seed)

    if rule == "auto":
        rule = _choose(layer, known, auxiliary, _usable(met), seed)
    counts, scores, present = RULES[rule].find(layer, known, seed)
    return InferredLabels(counts, scores, counts > 0 if present is None else present, rule)


def _choose(
    layer: LastLayer, known: Callable[[], KnownFeatures], auxiliary: Auxiliary | None, usable: list[str], seed: int
) -> str:
    """The rule for ``auto``: tried on simulated clients, who hold images that no rule learns from."""
    if "idlg" in usable:
        return "idlg"
    if layer.own_weights:  # there is no one network to simulate
        return next(name for name in _WITHOUT_SIMULATION if name in usable)
    held_out, learnt_from = known().split(_HELD_OUT, seed)
    tried_on = held_out.with_labels(seed)
    drawn, truth = draw_images(tried_on.labels, layer, _TRIED_ON, derive_seed(seed, 0, "clients to try on"))
    clients = simulate(layer, tried_on, drawn)
    recalls: dict[str, float] = {}

    def try_out(name: str) -> None:
        counts, _, _ = RULES[name].find(clients, lambda: learnt_from, seed)
        recalls[name] = torch.minimum(counts, truth.to(counts)).sum().item() / truth.sum().item()

    for name in (name for name in _PREFERRED if name in usable):
        try_out(name)
    # The posterior takes longest. Where several rules agree that nothing is to be gained, as on an untrained network,
    # it isn't learnt.
    agreeing = sum(recall >= _GOOD_ENOUGH for recall in recalls.values())
    if agreeing < _AGREEING and "posterior" in usable:
        try_out("posterior")
        # Noise is not what victims hold: the rule that assumes least is taken unless it is clearly beaten.
        recalls["posterior"] += _MARGIN if auxiliary is None else 0
    return max(recalls, key=lambda name: recalls[name])
