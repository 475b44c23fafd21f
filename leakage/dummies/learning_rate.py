"""The unknown learning rate of clients that keep it secret."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap
from torch.linalg import vector_norm

from leakage.clients.local_steps import Secrets
from leakage.clients.protocol import UNKNOWN, Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.dummies.dummy import Dummy
from leakage.pieces import State

# Simulated clients whose steps are measured, and victims' networks processed at once.
_MADE_UP, _AT_ONCE = 4, 8
# The scale s of the logarithm, which suits solvers that move this unknown as far as pixels. Of values from 0.03 to 1,
# it is the one with which Levenberg-Marquardt takes the fewest evaluations; other solvers hardly depend on it.
_SCALE = 0.3


class LearningRate(Dummy):
    r"""The learning rate of clients that keep it secret, as another unknown of each victim.

    Such a client shares its update :math:`\theta_0 - \theta_T`. An attack simulates the average of the T local
    steps, :math:`\bar v(x, \eta)`, which depends on the rate; the update is :math:`\eta T` times this average. The
    search is for the logarithm of the rate,

    .. math:: \eta = \eta_0 \, e^{s u}, \qquad
        \eta_0 = \frac{\lVert \theta_0 - \theta_T \rVert}{T \, \lVert \bar v(\text{noise}, 0) \rVert}, \qquad s = 0.3

    It starts at :math:`\eta_0`, the rate at which clients that hold noise would make an update of this length. Restarts
    begin around it, with a standard deviation of 1 for the logarithm. Attacks use this class automatically, whatever
    their pieces are. The update is divided by :math:`\eta_0 T`, so that objectives mean the same as for clients that
    reveal their rate, and compared with :math:`\frac{\eta}{\eta_0} \bar v(x, \eta)`. With one local step, the rate is
    only a factor of the gradient.

    Example:
        >>> LearningRate().shape(Protocol((1, 28, 28), 10, local_steps=4, learning_rate="unknown"))
        (1,)
        >>> LearningRate().shape(Protocol((1, 28, 28), 10, local_steps=4, learning_rate=0.1)) is None
        True
    """

    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """Return ``(1,)`` if the rate is unknown, else None."""
        return (1,) if protocol.learning_rate == UNKNOWN else None

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the rate, a scalar."""
        assert unknown is not None
        return kept["start"] * (_SCALE * unknown[0]).exp()

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Return the first start at the rate estimated by :meth:`begin`, and later starts around it."""
        return torch.where(restarts.to(noise.device)[:, None] > 0, noise / _SCALE, 0.0)

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """Return an empty ``start``, the rate of the first start, if the rate is unknown."""
        return {} if self.shape(protocol) is None else {"start": torch.empty(0, dtype=dtype)}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """Return ``start``, estimated from the length of the updates, if the rate is unknown."""
        protocol = victim.protocol
        if self.shape(protocol) is None:
            return {}
        update = _lengths(shared.gradients)
        generator = torch.Generator().manual_seed(0)
        size = _MADE_UP, protocol.num_images
        images = torch.rand(*size, *protocol.image_shape, generator=generator).to(update)
        labels = torch.randint(protocol.num_classes, size, generator=generator).to(update.device)
        targets = protocol.targets(labels, update.dtype)

        def mean_length(state: State) -> Tensor:
            """Return the mean length of the average step of simulated clients with learning rate 0."""
            steps = vmap(lambda *held: victim.evaluate(state, *held, secrets=Secrets(0.0))[0])(images, targets)
            lengths: Tensor = _lengths(steps)
            return lengths.mean()

        with torch.no_grad():
            of_all = vmap(mean_length, chunk_size=_AT_ONCE) if shared.own_weights else mean_length
            length: Tensor = of_all(shared.state)
        start = update / (protocol.local_steps * length)
        # A victim whose update is zero has no rate and is not attacked.
        return {"start": torch.where(torch.isfinite(start) & (start > 0), start, 1.0)}


def _lengths(tensors: State) -> Tensor:
    """Return the norm of each victim's tensors, taken as one long vector, ``(V,)``."""
    norms: Tensor = vector_norm(
        torch.stack([vector_norm(tensor.flatten(1), dim=1) for tensor in tensors.values()]), dim=0
    )
    return norms
