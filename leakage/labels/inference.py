"""The labels of a whole batch, read off what its client shared."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_choice, check_count
from leakage.labels.auxiliary import Auxiliary
from leakage.labels.counts import LabelCounts
from leakage.labels.last_layer import last_layer
from leakage.labels.length import noise_of_shortened, restore_length
from leakage.labels.posterior import LabelPosterior
from leakage.labels.rules import INSTEAD, RULES, Knowledge, check_needs, needs_met, usable_rules
from leakage.labels.simulation import draw_images, simulate
from leakage.pieces import digest
from leakage.precision import full_precision
from leakage.seeds import derive_seed

# Victims with networks of their own that are looked at together; bounds the memory, not the result.
_NETWORKS_AT_ONCE = 64
# Where victims have networks of their own, `auto` takes the first of these that can be used; `geng` always can where
# the attacker is told the learning rate.
_WITHOUT_SIMULATION = ("mean_feature", "geng", "row_minimum")
# The order in which `auto` tries rules, and takes the first of equals; not `rlg`, whose linear programmes take long.
_PREFERRED = ("mean_feature", "ilrg", "geng", "row_minimum", "llg", "llg_star", "llg_plus", "rlu")
# For `auto`: simulated clients, and the share of the auxiliary images that they hold.
_TRIED_ON, _HELD_OUT = 400, 1 / 4
# A recall that is as good as all, how many rules must reach it to be believed, and what is added to the posterior's
# where the images are noise.
_GOOD_ENOUGH, _AGREEING, _MARGIN = 0.99, 3, 0.03


class LabelReader:
    r"""Reads off gradients how many images of each class are behind them, and keeps what it has learnt.

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
    half-way, by the others at those that were given. ``rlu`` and ``posterior`` simulate the last layer's steps. Of
    momentum and weight decay it is freed first (:func:`leakage.labels.last_layer.mean_gradient`). Where the attacker is
    not told their learning rate, and so not how long the average is, only ``idlg``, ``row_minimum`` and ``rlg`` serve.

    Where clients are known to shorten their gradients (:class:`~leakage.defenses.Clip`,
    :class:`~leakage.defenses.DPSGD`) and both gradients of the last layer are shared, rules are given them as long as
    they must have been for the labels to be whole numbers (:func:`leakage.labels.length.restore_length`).

    What ``auto`` chose and ``posterior`` learnt serves for all victims of one network, of the same protocol and number
    of images: only another network is learnt about anew. So what is found about a victim does not depend on
    which victims were read before. :meth:`state_dict` has all of it, for a checkpoint.

    Args:
        rule: a name of the table.
        auxiliary: images of the attacker's own, of the same kind as the victims' but never theirs.
        seed: of dummy images and simulated clients.

    Raises:
        ValueError: an unknown rule, a seed that is no such number, ``auxiliary`` of another type.

    References:
        Those of the rules, in :mod:`leakage.labels.from_gradients`, :mod:`.calibrated` and :mod:`.posterior`.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), num_images=4)
        >>> labels = torch.tensor([[7, 0, 3, 3], [1, 1, 1, 9]])
        >>> reader = LabelReader()
        >>> counts = reader(victim.share(torch.rand(2, 4, 1, 28, 28), labels), victim)
        >>> counts.labels
        tensor([[0, 3, 3, 7],
                [1, 1, 1, 9]])
        >>> counts.rule
        'mean_feature'
    """

    def __init__(self, rule: str = "auto", *, auxiliary: Auxiliary | None = None, seed: int = 0) -> None:
        check_choice("rule", rule, (*RULES, "auto"))
        check_count(0, seed=seed)
        if auxiliary is not None and not isinstance(auxiliary, Auxiliary):
            raise ValueError(
                "Expected `auxiliary` to be a leakage.labels.Auxiliary (which no checkpoint holds: give it again), "
                f"but got {type(auxiliary).__name__}."
            )
        self.rule, self.auxiliary, self.seed = rule, auxiliary, seed
        self._forget()

    def _forget(self, network: str = "") -> None:
        self._network = network  # that the following are about
        self._chosen = ""
        self._posterior: LabelPosterior | None = None

    def check(self, victim: Victim, *, own_weights: bool = False) -> None:
        """Raise a ``ValueError`` unless labels can be read off the last layer's gradient by this rule.

        Args:
            victim: model and protocol.
            own_weights: whether each victim has a network of its own.

        Raises:
            ValueError: a loss other than cross-entropy, logits that are not the output of a linear layer, a last
                layer without gradients, auxiliary images that don't fit, or something that the rule needs is not
                there; the message names what to use instead.
        """
        check_needs(self.rule, self._needs_met(victim, own_weights))

    def _needs_met(self, victim: Victim, own_weights: bool) -> dict[str, str | None]:
        """Those of the rules, where there is what all of them need."""
        protocol, layer = victim.protocol, victim.classifier
        if protocol.loss != "cross_entropy":
            raise ValueError(
                "Expected a victim with loss 'cross_entropy', whose gradient is negative only for the true class, "
                f"but got loss {protocol.loss!r}. {INSTEAD}"
            )
        if not layer:  # "" is a model that is one layer, of a kind of its own: images are no vectors
            raise ValueError(
                "Expected logits that are the output of an nn.Linear layer, whose gradient tells the labels, "
                f"but got logits from {victim.logits_from}. {INSTEAD}"
            )
        if not {f"{layer}.weight", f"{layer}.bias"} & {*victim.trainable}:
            raise ValueError(
                f"Expected the last layer {layer!r} to share its gradient, but got frozen weights. {INSTEAD}"
            )
        if self.auxiliary is not None:
            self.auxiliary.check(protocol)
        return needs_met(victim, self.auxiliary, own_weights=own_weights)

    @torch.no_grad()
    @full_precision()
    def __call__(self, shared: SharedGradient, victim: Victim) -> LabelCounts:
        """Counts, scores and labels of every victim, on the device of the gradients.

        Args:
            shared: gradients of V victims.
            victim: their model and protocol.

        Raises:
            ValueError: see :meth:`check`; gradients that don't fit the victim.
        """
        met = self._needs_met(victim, shared.own_weights)
        check_needs(self.rule, met)
        victim.check(shared)
        if shared.gradients[victim.trainable[0]].dtype in (torch.float16, torch.bfloat16):
            shared = shared.to(torch.float32)
        parts = torch.split(torch.arange(len(shared)), _NETWORKS_AT_ONCE) if shared.own_weights else ()
        groups = [shared.select(part) for part in parts] or [shared]
        return LabelCounts.cat([self._read(group, victim, met) for group in groups])

    def _read(self, shared: SharedGradient, victim: Victim, met: dict[str, str | None]) -> LabelCounts:
        layer = last_layer(shared, victim, non_negative=met["non-negative"] is None)
        known = Knowledge(layer, self.auxiliary, self.seed)
        usable = usable_rules(met)
        rule = self.rule
        if rule == "auto" and "idlg" in usable:
            rule = "idlg"
        elif rule == "auto" and shared.own_weights:  # there is no one network to simulate
            rule = next(name for name in _WITHOUT_SIMULATION if name in usable)
        by_length = rule == "auto" or not RULES[rule].by_direction
        noise = noise_of_shortened(shared) if by_length and met["weight"] is None and met["bias"] is None else None
        if noise is not None:
            known.layer = restore_length(layer, known.features, noise)
        learns = rule == "auto" or RULES[rule].learns
        if learns:
            self._recognise(shared, victim, met)
            if self._posterior is not None:
                known.posterior = self._posterior.to(known.layer.weight.device)
            if rule == "auto":
                rule = self._chosen = self._chosen or _choose(known, usable)
        counts, scores, present = RULES[rule].find(known.layer, known)
        if learns and "posterior" in vars(known):
            self._posterior = known.posterior
        return LabelCounts(counts, scores, counts > 0 if present is None else present, rule)

    def _recognise(self, shared: SharedGradient, victim: Victim, met: dict[str, str | None]) -> None:
        """Forget what was learnt unless it was learnt about this network, from the same images and seed."""
        state = digest(dict(sorted(shared.state.items())))
        known = state, victim.fingerprint(), victim.protocol.num_images, met, self._digest_of_images, self.seed
        network = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
        if network != self._network:
            self._forget(network)

    @cached_property
    def _digest_of_images(self) -> str:
        given = {} if self.auxiliary is None else vars(self.auxiliary)
        return digest({name: tensor for name, tensor in given.items() if tensor is not None})

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as tensors, numbers and words that a checkpoint may hold; the auxiliary images are not."""
        posterior = None if self._posterior is None else self._posterior.state_dict()
        return {"network": self._network, "chosen": self._chosen, "posterior": posterior}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another reader learnt; it serves if that had the same auxiliary images and seed."""
        self._forget(state["network"])
        self._chosen = state["chosen"]
        if state["posterior"] is not None:
            self._posterior = LabelPosterior.from_state_dict(state["posterior"])


def infer_labels(
    shared: SharedGradient,
    victim: Victim,
    *,
    rule: str = "auto",
    auxiliary: Auxiliary | None = None,
    seed: int = 0,
) -> LabelCounts:
    """How many images of each class are behind each gradient: a :class:`LabelReader` that is used once.

    Args:
        shared: gradients of V victims.
        victim: their model and protocol.
        rule, auxiliary, seed: see :class:`LabelReader`.

    Raises:
        ValueError: see :class:`LabelReader` and its call.
    """
    return LabelReader(rule, auxiliary=auxiliary, seed=seed)(shared, victim)


def _choose(known: Knowledge, usable: list[str]) -> str:
    """The rule for ``auto``: tried on simulated clients, who hold images that no rule learns from."""
    seed = known.seed
    held_out, learnt_from = known.features.split(_HELD_OUT, seed)
    tried_on = held_out.with_labels(seed)
    drawn, truth = draw_images(tried_on.labels, known.layer, _TRIED_ON, derive_seed(seed, 0, "clients to try on"))
    clients = simulate(known.layer, tried_on, drawn)
    without_held_out = Knowledge(clients, known.auxiliary, seed)
    without_held_out.features = learnt_from
    recalls: dict[str, float] = {}

    def try_out(name: str) -> None:
        counts, _, _ = RULES[name].find(clients, without_held_out)
        recalls[name] = torch.minimum(counts, truth.to(counts)).sum().item() / truth.sum().item()

    for name in (name for name in _PREFERRED if name in usable):
        try_out(name)
    # The posterior takes longest. Where several rules agree that nothing is to be gained, as on an untrained network,
    # it isn't learnt.
    agreeing = sum(recall >= _GOOD_ENOUGH for recall in recalls.values())
    if agreeing < _AGREEING and "posterior" in usable:
        try_out("posterior")
        # Noise is not what victims hold: the rule that assumes least is taken unless it is clearly beaten.
        recalls["posterior"] += _MARGIN if known.auxiliary is None else 0
    return max(recalls, key=lambda name: recalls[name])
