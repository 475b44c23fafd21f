"""Infer the labels of a whole batch from what its client shared."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_choice, check_count
from leakage.labels.auxiliary import Auxiliary
from leakage.labels.completion import complete, leave_out
from leakage.labels.counts import LabelCounts
from leakage.labels.last_layer import last_layer
from leakage.labels.length import noise_of_shortened, restore_length
from leakage.labels.posterior import LabelPosterior
from leakage.labels.rules import INSTEAD, RULES, Knowledge, check_needs, needs_met, usable_rules
from leakage.labels.simulation import draw_images, simulate
from leakage.pieces import digest
from leakage.precision import full_precision
from leakage.seeds import derive_seed

# Victims with their own networks that are processed at once; this limits the memory and does not change the result.
_NETWORKS_AT_ONCE = 64
# Where victims have their own networks, `auto` takes the first usable rule of these. `geng` is always usable if the
# learning rate is known.
_WITHOUT_SIMULATION = ("mean_feature", "geng", "row_minimum")
# The order in which `auto` tries rules; of equally good ones it takes the first. `rlg` is left out, because its linear
# programs take long.
_PREFERRED = ("mean_feature", "ilrg", "geng", "row_minimum", "llg", "llg_star", "llg_plus", "rlu")
# For `auto`: number of simulated clients, and the share of the auxiliary images that they hold.
_TRIED_ON, _HELD_OUT = 400, 1 / 4
# A recall that counts as perfect, the number of rules that must reach it for the posterior to be skipped (all, if fewer
# are usable), and the bonus for the posterior where the images are noise.
_GOOD_ENOUGH, _AGREEING, _MARGIN = 0.99, 3, 0.03


class LabelReader:
    r"""Infer from gradients how many images of each class a batch holds.

    With cross-entropy, the gradient of the last layer is the mean of :math:`(p_i - y_i) h_i^\top` over the
    images i, with h the layer's inputs, p the predictions and y the one-hot labels. All rules
    start from this. No rule sees the victims' images or labels.

    ================ ==================================================== ===============================
    rule             finds                                                needs
    ================ ==================================================== ===============================
    ``idlg``         the label of one image, exactly                      one image
    ``row_minimum``  distinct labels (GradInversion)                      weight gradient, N ≤ K
    ``llg``          counts from sums of rows                             non-negative inputs of the layer
    ``llg_star``     as ``llg``, calibrated on black, white and noise     non-negative inputs of the layer
    ``llg_plus``     as ``llg``, calibrated on auxiliary images           as ``llg``, auxiliary images
    ``rlg``          the set of classes, by linear programs               weight gradient, N ≤ K - 2
    ``ilrg``         counts from features of each class                   both gradients
    ``geng``         counts from mean predictions on noise                nothing
    ``mean_feature`` counts from the batch's mean feature                 both gradients
    ``rlu``          counts from their expected update of the bias        auxiliary images, shared weights
    ``posterior``    counts from their learnt posterior                   weight gradient, shared weights
    ``auto``         the best of these rules, see below                   nothing
    ================ ==================================================== ===============================

    ``auto`` takes ``idlg`` for one image. If victims share their weights, it simulates clients that hold a
    quarter of the auxiliary images, and takes the rule that finds most of their labels. Without auxiliary
    images, these clients hold noise with the spectrum of natural images, labelled by the network's predictions. This is
    enough to distinguish an untrained network from a trained one, but on a trained network auxiliary images give much
    better results. If victims have their own networks, nothing is simulated: ``auto`` takes ``mean_feature``, or
    ``geng`` if a gradient is missing. After local steps that change predictions a lot, another rule may find more, such
    as ``row_minimum`` for few images.

    After local steps, the average gradient is treated as a single gradient. ``ilrg`` and ``mean_feature`` take it at
    the weights half-way through the steps, the other rules at the initial weights. ``rlu`` and ``posterior`` simulate
    the last layer's steps. The effects of momentum and weight decay are removed first
    (:func:`leakage.labels.last_layer.mean_gradient`). If the learning rate is unknown, so is the length of the average
    gradient, and only ``idlg``, ``row_minimum`` and ``rlg`` can be used.

    Label smoothing and class weights are taken into account by ``idlg``, ``geng``, ``mean_feature`` and ``posterior``,
    and rule out the other rules.

    If clients are known to shorten their gradients (:class:`~leakage.defenses.Clip`,
    :class:`~leakage.defenses.DPSGD`) and share both gradients of the last layer, the gradients are first scaled to the
    length at which the label counts become whole numbers (:func:`leakage.labels.length.restore_length`). Entries known
    to be left out (:class:`~leakage.defenses.TopK`, :class:`~leakage.defenses.RandomPruning`) are filled
    in (:func:`leakage.labels.completion.complete`).

    The reader keeps what ``auto`` chose and what ``posterior`` learnt, and uses it for all victims with the same
    network, protocol and number of images. It learns again only for another network, so the result for a victim does
    not depend on the victims before it. :meth:`state_dict` returns all that was learnt, for a checkpoint.

    Args:
        rule: name of a rule in the table.
        auxiliary: the attacker's own images, of the same kind as the victims' images but disjoint from them.
        seed: seed of dummy images and simulated clients.

    Raises:
        ValueError: the rule is unknown, the seed is not a valid whole number, or ``auxiliary`` has another type.

    References:
        See the docstrings of the rules in :mod:`leakage.labels.from_gradients`, :mod:`.calibrated` and
        :mod:`.posterior`.

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
                "Expected `auxiliary` to be a leakage.labels.Auxiliary (checkpoints do not hold it, so pass it again), "
                f"but got {type(auxiliary).__name__}."
            )
        self.rule, self.auxiliary, self.seed = rule, auxiliary, seed
        self._forget()

    def _forget(self, network: str = "") -> None:
        self._network = network  # the network that the attributes below belong to
        self._chosen = ""
        self._posterior: LabelPosterior | None = None

    def check(self, victim: Victim, *, own_weights: bool = False) -> None:
        """Raise a ``ValueError`` if this rule can't infer labels from such victims.

        Args:
            victim: the victims' model and protocol.
            own_weights: whether each victim has its own network.

        Raises:
            ValueError: labels are not classes, the loss is not cross-entropy, the logits are not the output of a linear
                layer, the last layer shares no gradient, the auxiliary images do not fit, or a need of the rule is not
                met; the message says what to use instead.
        """
        check_needs(self.rule, self._needs_met(victim, own_weights))

    def _needs_met(self, victim: Victim, own_weights: bool) -> dict[str, str | None]:
        """Check what every rule needs, then return which further needs are met."""
        protocol, layer = victim.protocol, victim.classifier
        if protocol.label_kind != "classes":
            raise ValueError(f"Expected a victim whose labels are classes, but got {protocol.label_kind!r}. {INSTEAD}")
        if protocol.loss != "cross_entropy":
            raise ValueError(
                "Expected a victim with loss 'cross_entropy', whose gradient is negative only for the true class, "
                f"but got loss {protocol.loss!r}. {INSTEAD}"
            )
        if not layer:  # "" is a model that is itself a single layer of a custom class, since images are not vectors
            raise ValueError(
                "Expected logits that are the output of an nn.Linear layer, whose gradient reveals the labels, "
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
        """Infer counts, scores and labels of every victim, on the device of the gradients.

        Args:
            shared: gradients of V victims.
            victim: the victims' model and protocol.

        Raises:
            ValueError: the gradients do not fit the victim, or :meth:`check` fails.
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
        elif rule == "auto" and shared.own_weights:  # there is no single network to simulate
            rule = next(name for name in _WITHOUT_SIMULATION if name in usable)
        by_length = rule == "auto" or not RULES[rule].by_direction
        if met["weight"] is None and leave_out(shared.protocol):
            known.layer = complete(layer, known.features)
        noise = noise_of_shortened(shared) if by_length and met["weight"] is None and met["bias"] is None else None
        if noise is not None:
            known.layer = restore_length(known.layer, known.features, noise)
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
        """Forget what was learnt, unless network, images and seed are still the same."""
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
        """Return what was learnt, as tensors, numbers and strings for a checkpoint, without the auxiliary images."""
        posterior = None if self._posterior is None else self._posterior.state_dict()
        return {"network": self._network, "chosen": self._chosen, "posterior": posterior}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what another reader learnt; it is used only if auxiliary images and seed are the same."""
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
    """Infer how many images of each class are behind each gradient.

    This creates a :class:`LabelReader` and uses it once.

    Args:
        shared: gradients of V victims.
        victim: the victims' model and protocol.
        rule, auxiliary, seed: see :class:`LabelReader`.

    Raises:
        ValueError: an argument is invalid, or the rule can't be used; see :class:`LabelReader`.
    """
    return LabelReader(rule, auxiliary=auxiliary, seed=seed)(shared, victim)


def _choose(known: Knowledge, usable: list[str]) -> str:
    """Choose the rule for ``auto``, by a test on simulated clients that hold images no rule learns from."""
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
    # The posterior takes longest. It is not learnt if several other rules are already nearly perfect, as they are on an
    # untrained network.
    agreeing = sum(recall >= _GOOD_ENOUGH for recall in recalls.values())
    if agreeing < min(_AGREEING, len(recalls)) and "posterior" in usable:
        try_out("posterior")
        # Victims do not hold noise, so prefer the rule that assumes least unless another is clearly better.
        recalls["posterior"] += _MARGIN if known.auxiliary is None else 0
    return max(recalls, key=lambda name: recalls[name])
