"""Simulation of the clients' defenses, for an adaptive attacker."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.func import vmap

from leakage.clients.examples import clipped_examples
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.defenses.base import Defense, known_defenses, simulate
from leakage.defenses.clip import Clip
from leakage.pieces import State

Gradients = Mapping[str, Tensor]


def known_to(adaptive: bool, victim: Victim) -> tuple[Defense, ...]:
    """Return the clients' defenses that an attacker takes into account, and warn about all others.

    Raises:
        ValueError: with ``adaptive``, if a defense is unknown, see :func:`known_defenses`, or if clients with this
            network and protocol cannot have used it.
    """
    described = victim.protocol.defenses
    known, ignored = [], [each["name"] for each in described]
    if not adaptive and victim.draws:
        rank_zero_warn(
            f"The clients' network draws random numbers in {sorted(victim.draws)}, and this attack uses it in "
            "evaluation mode. An attack that also searches for these numbers may recover more."
        )
    if adaptive:
        every, ignored = known_defenses(described), []
        for place, defense in enumerate(every):
            defense.check(victim, every)
            seen = defense.is_simulated and defense.can_be_seen_after(every[place + 1 :])
            if seen or defense.averages_out:
                known.append(defense)
            else:
                ignored.append(type(defense).__name__)
    if ignored:
        rank_zero_warn(
            f"The clients defend their gradients with {ignored}, and this attack matches them as if they were "
            "undefended. An attack that takes the defense into account may recover more."
        )
    return tuple(known)


def as_known(defenses: Sequence[Defense], shared: SharedGradient, victim: Victim) -> tuple[SharedGradient, Victim]:
    """Return shared gradient and victim with only those defenses that the attacker takes into account."""
    known, described = {type(defense).__name__ for defense in defenses}, victim.protocol.defenses
    if known.issuperset(each["name"] for each in described):
        return shared, victim
    protocol = replace(victim.protocol, defenses=tuple(each for each in described if each["name"] in known))
    victim = copy.copy(victim)
    victim.protocol = protocol
    return replace(shared, protocol=protocol), victim


def stepping(victim: Victim, defenses: Sequence[Defense]) -> Victim:
    """Return the victim as an attacker simulates it, who knows what the defenses change inside of local steps."""
    for defense in defenses:
        if defense.example_norm is not None and victim.protocol.local_steps > 1:
            return victim.clipping(defense.example_norm)
    return victim


class Simulation:
    """The clients' defenses, applied to the gradients of the dummies.

    Attributes:
        changes: whether the simulation changes gradients.
        per_image: whether it needs the gradients of single images.
    """

    def __init__(self, defenses: Sequence[Defense], victim: Victim) -> None:
        self.defenses = [each for each in defenses if each.is_simulated and not each.averages_out]
        norms = [defense.example_norm for defense in defenses if defense.example_norm is not None]
        self._norm = norms[0] if norms else None
        if self._norm is not None and victim.protocol.local_steps > 1:
            self._norm = None  # clipped in each step, see `stepping`
        elif self._norm is not None and victim.protocol.num_images == 1:
            self.defenses.insert(0, Clip(self._norm))  # equivalent for one image, and cheaper
            self._norm = None
        self.per_image = self._norm is not None
        self.changes = bool(self.defenses) or self.per_image
        self._victim = victim

    def __call__(
        self,
        gradients: dict[str, Tensor],
        shared: Gradients,
        rate: State,
        state: Mapping[str, Tensor],
        images: Tensor,
        targets: Tensor,
    ) -> dict[str, Tensor]:
        """Return what one client would have shared if its gradients were those of the dummies.

        Args:
            gradients: gradients of the dummies.
            shared: the gradients that the client shared.
            rate: entries of the learning rate if it is searched for. Then both gradients are average steps of an
                update.
            state: weights and buffers.
            images: dummy images.
            targets: class probabilities of the dummies.
        """
        if self._norm is not None:
            gradients = clipped_examples(self._victim, state, images, targets, self._norm)
        if not self.defenses:
            return gradients
        length = self._victim.protocol.local_steps * rate["start"] if rate else None
        if length is None:
            return dict(simulate(self.defenses, gradients, shared))
        sent, wanted = ({name: length * part for name, part in side.items()} for side in (gradients, shared))
        return {name: part / length for name, part in simulate(self.defenses, sent, wanted).items()}

    def for_all(self, gradients: Gradients, shared: Gradients) -> tuple[Gradients, Callable[[Gradients], Gradients]]:
        """Apply the defenses for V victims with a single local step.

        Returns:
            The defended gradients, and a function from derivatives with respect to these to derivatives with respect
            to ``gradients``.
        """
        if not self.defenses:
            return gradients, lambda slopes: slopes
        with torch.enable_grad():
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in gradients.items()}
            found = vmap(partial(simulate, self.defenses))(leaves, dict(shared))

        def pull_back(slopes: Gradients) -> Gradients:
            names = [name for name in slopes if found[name].requires_grad]
            if not names:
                return {}
            outputs, by = [found[name] for name in names], [slopes[name] for name in names]
            pulled = torch.autograd.grad(outputs, list(leaves.values()), by, materialize_grads=True)
            return dict(zip(leaves, pulled, strict=True))

        return {name: tensor.detach() for name, tensor in found.items()}, pull_back
