"""What an attacker who knows the clients' defenses compares by."""

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
    """The clients' defenses that an attacker takes into account; with a warning where there are some that it does not.

    Raises:
        ValueError: an adaptive attacker who can't know one, see :func:`known_defenses`, or one that such clients can't
            have used.
    """
    told = victim.protocol.defenses
    known, ignored = [], [each["name"] for each in told]
    if not adaptive and victim.draws:
        rank_zero_warn(
            f"The clients' network draws random numbers in {sorted(victim.draws)}, and this attack takes it as it is "
            "in evaluation mode: what it does not find, one that searches for them may."
        )
    if adaptive:
        every, ignored = known_defenses(told), []
        for place, defense in enumerate(every):
            defense.check(victim, every)
            seen = defense.is_simulated and defense.can_be_seen_after(every[place + 1 :])
            if seen or defense.averages_out:
                known.append(defense)
            else:
                ignored.append(type(defense).__name__)
    if ignored:
        rank_zero_warn(
            f"The clients defend their gradients by {ignored}, and this attack matches them as if they did not: what "
            "it does not find, one that knows the defense may."
        )
    return tuple(known)


def as_known(defenses: Sequence[Defense], shared: SharedGradient, victim: Victim) -> tuple[SharedGradient, Victim]:
    """What was shared and by whom, with those defenses alone that an attacker takes into account."""
    known, told = {type(defense).__name__ for defense in defenses}, victim.protocol.defenses
    if known.issuperset(each["name"] for each in told):
        return shared, victim
    protocol = replace(victim.protocol, defenses=tuple(each for each in told if each["name"] in known))
    victim = copy.copy(victim)
    victim.protocol = protocol
    return replace(shared, protocol=protocol), victim


class Simulation:
    """The defenses of the clients, as the attack does them to the gradients of the dummies.

    Attributes:
        changes: whether it changes any.
        per_image: whether it begins from the gradients of single images.
    """

    def __init__(self, defenses: Sequence[Defense], victim: Victim) -> None:
        self.defenses = [each for each in defenses if each.is_simulated and not each.averages_out]
        norms = [defense.example_norm for defense in defenses if defense.example_norm is not None]
        self._norm = norms[0] if norms else None
        if self._norm is not None and victim.protocol.num_images == 1:
            self.defenses.insert(0, Clip(self._norm))  # the same, and cheaper
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
        """What one client would have shared of its gradients.

        Args:
            gradients: of the dummies.
            shared: what the client shared.
            rate: what is kept of a learning rate that is searched for: both are an update as an average step then.
            state: weights and buffers.
            images: the dummies.
            targets: their class probabilities.
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
        """The same for V victims of one step, and what takes derivatives by the result to those by ``gradients``."""
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
