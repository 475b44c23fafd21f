"""The learning rate of clients that keep it to themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap
from torch.linalg import vector_norm
from torch.nn import functional as F

from leakage.clients.local_steps import Secrets
from leakage.clients.protocol import UNKNOWN, Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.dummies.dummy import Dummy
from leakage.pieces import State

# Made-up clients whose steps are measured, and networks of victims at a time.
_MADE_UP, _AT_ONCE = 4, 8
# s: with it solvers that move unknowns as far as pixels move the rate as fast as suits them. Of 0.03 to 1 the one with
# which Levenberg-Marquardt takes the fewest evaluations; the others make little of it.
_SCALE = 0.3


class LearningRate(Dummy):
    r"""The clients' learning rate, where they keep it to themselves: one more unknown of each victim.

    What such a client shares is its update :math:`\theta_0 - \theta_T`. Of T local steps an attack simulates the
    average step :math:`\bar v(x, \eta)`, which depends on the rate, and :math:`\eta T` times which is the update. The
    rate is searched for by its logarithm,

    .. math:: \eta = \eta_0 \, e^{s u}, \qquad
        \eta_0 = \frac{\lVert \theta_0 - \theta_T \rVert}{T \, \lVert \bar v(\text{noise}, 0) \rVert}, \qquad s = 0.3

    from :math:`\eta_0` on, at which clients that hold noise would come as far; restarts begin around it, the logarithm
    with a standard deviation of 1. Attacks make use of it by themselves, whatever their pieces are: the update is
    divided by :math:`\eta_0 T`, so that objectives mean the same as for clients that tell their rate, and matched by
    :math:`\frac{\eta}{\eta_0} \bar v(x, \eta)`. With one local step the rate is a factor of the gradient, no more.

    Example:
        >>> LearningRate().shape(Protocol((1, 28, 28), 10, local_steps=4, learning_rate="unknown"))
        (1,)
        >>> LearningRate().shape(Protocol((1, 28, 28), 10, local_steps=4, learning_rate=0.1)) is None
        True
    """

    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """One number, where the rate is not told."""
        return (1,) if protocol.learning_rate == UNKNOWN else None

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The rate, a scalar."""
        assert unknown is not None
        return kept["start"] * (_SCALE * unknown[0]).exp()

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """The first at the rate that :meth:`begin` finds, the others around it."""
        return torch.where(restarts.to(noise.device)[:, None] > 0, noise / _SCALE, 0.0)

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """``start``, the rate of the first start."""
        return {} if self.shape(protocol) is None else {"start": torch.empty(0, dtype=dtype)}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """By the length of the updates."""
        protocol = victim.protocol
        if self.shape(protocol) is None:
            return {}
        update = _lengths(shared.gradients)
        generator = torch.Generator().manual_seed(0)
        size = _MADE_UP, protocol.num_images
        images = torch.rand(*size, *protocol.image_shape, generator=generator).to(update)
        labels = torch.randint(protocol.num_classes, size, generator=generator).to(update.device)
        targets = F.one_hot(labels, protocol.num_classes).to(update)

        def mean_length(state: State) -> Tensor:
            """Of the average step of made-up clients whose steps change nothing."""
            steps = vmap(lambda *held: victim.evaluate(state, *held, secrets=Secrets(0.0))[0])(images, targets)
            lengths: Tensor = _lengths(steps)
            return lengths.mean()

        with torch.no_grad():
            of_all = vmap(mean_length, chunk_size=_AT_ONCE) if shared.own_weights else mean_length
            length: Tensor = of_all(shared.state)
        start = update / (protocol.local_steps * length)
        # Whose update is zero has no rate, and is not searched for.
        return {"start": torch.where(torch.isfinite(start) & (start > 0), start, 1.0)}


def _lengths(tensors: State) -> Tensor:
    """``(V,)``, of each victim's tensors taken as one long vector."""
    norms: Tensor = vector_norm(
        torch.stack([vector_norm(tensor.flatten(1), dim=1) for tensor in tensors.values()]), dim=0
    )
    return norms
