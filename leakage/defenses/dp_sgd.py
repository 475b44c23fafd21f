"""DP-SGD: clip the gradient of each image, and add noise to their sum."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leakage.clients.examples import clipped_examples, shortened
from leakage.clients.local_steps import Secrets
from leakage.defenses.base import Client, Defense, Gradients
from leakage.errors import check_not_negative, check_positive

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim


class DPSGD(Defense):
    r"""DP-SGD: clips the gradient of each image to norm C, and adds noise to their sum.

    .. math:: \tilde g = \frac{1}{N} \Bigl( \sum_n g_n \min\bigl(1, C / \lVert g_n \rVert_2\bigr) +
        \sigma C \, \epsilon \Bigr), \qquad \epsilon \sim N(0, I)

    If the client's loss is a sum, there is no division by N. With local steps, every step does this with its own images
    and new noise. DPSGD must be the first of a client's defenses, because it starts from the images.

    An attacker who knows the defense clips in the same way, in each step. The noise protects only as long as the seed
    of :meth:`leakage.Victim.share` is secret and each round has a different seed.

    Args:
        noise_multiplier: :math:`\sigma`, at least 0; 0 clips without noise.
        norm: C, positive.

    Raises:
        ValueError: an argument is out of its range, or the client has a secret learning rate, BatchNorm that mixes
            images, modules that draw random numbers, or another defense before this one.

    References:
        Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, https://arxiv.org/abs/1607.00133.

    Example:
        >>> from leakage import LeNet, Victim
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), num_images=4, defenses=[DPSGD(0.0, norm=1.0)])
        >>> shared = victim.share(torch.rand(1, 4, 1, 28, 28), torch.tensor([[3, 1, 4, 1]]))
        >>> torch.cat([tensor.flatten() for tensor in shared.gradients.values()]).norm() <= 1
        tensor(True)
    """

    averages_out = True
    shortens = True

    def __init__(self, noise_multiplier: float, norm: float) -> None:
        check_not_negative(noise_multiplier=noise_multiplier)
        check_positive(norm=norm)
        self.noise_multiplier = noise_multiplier
        self.norm = norm
        self._client: Client | None = None

    def check(self, victim: Victim, defenses: Sequence[Defense]) -> None:
        """Raise a ``ValueError`` unless clients have independent images, with DPSGD as first defense."""
        protocol = victim.protocol
        if isinstance(protocol.learning_rate, str):
            raise ValueError(
                "Expected clients that share a gradient for DPSGD, as its noise has the units of a gradient, but got "
                "reveal_learning_rate=False, with which they share an update."
            )
        if victim.mixes_images and protocol.step_size > 1:
            raise ValueError(
                "Expected a network that treats each image independently for DPSGD, but got BatchNorm that normalises "
                "by the client's own batch: there is no gradient of a single image. Call `model.eval()`, or use "
                "another norm."
            )
        if victim.draws:
            raise ValueError(
                "Expected a network without modules that draw random numbers for DPSGD, but got "
                f"{sorted(victim.draws)}. Call `model.eval()`."
            )
        if defenses[0] is not self or any(isinstance(other, DPSGD) for other in defenses[1:]):
            raise ValueError(
                "Expected DPSGD once, as the first of `defenses`, because it starts from the images, but got "
                f"{list(defenses)}."
            )

    def for_client(self, client: Client) -> Defense:
        """Return a copy that holds the client's images."""
        own = copy.copy(self)
        own._client = client
        return own

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the clipped and noisy gradients; without a client, ``gradients`` count as those of one image."""
        client, std, images = self._client, self.noise_multiplier * self.norm, 1
        if client is None:
            gradients = shortened(gradients, self.norm)
        else:
            protocol = client.victim.protocol
            images = protocol.step_size if protocol.reduction == "mean" else 1
            if protocol.local_steps > 1:
                return self._in_steps(client, gradients, std / images, generator)
            if len(client.images) == 1:  # the gradient is that of its image
                gradients = shortened(gradients, self.norm)
            else:
                gradients = clipped_examples(client.victim, client.state, client.images, client.targets, self.norm)
        return {
            name: tensor + std / images * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in gradients.items()
        }

    def _in_steps(self, client: Client, like: Gradients, std: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the average of the client's local steps, each clipped for each image and with new noise."""
        steps = client.victim.protocol.local_steps
        noise = {
            name: std * torch.randn(steps, *tensor.shape, generator=generator).to(tensor)
            for name, tensor in like.items()
        }
        secrets, private = Secrets(order=client.order, noise=noise), client.victim.clipping(self.norm)
        return private.evaluate(client.state, client.images, client.targets, secrets=secrets)[0]

    def noise_variance(self, shared: Gradients, images: float) -> Tensor | float:
        """Return the variance of the noise on the mean over the images."""
        return (self.noise_multiplier * self.norm / images) ** 2

    @property
    def example_norm(self) -> float:
        """C, the norm to which the attacker clips the gradient of each dummy image."""
        return self.norm

    def epsilon(self, steps: int, sample_rate: float, delta: float, accountant: str = "prv") -> float:
        r"""Return :math:`\varepsilon` of training with such steps, computed by an accountant of Opacus.

        A client that takes T local steps on batches of B of its N images uses each image T B / N times. Its update has
        the :math:`\varepsilon` of ``steps=T * B // N`` with ``sample_rate=1.0``.

        Args:
            steps: number of training steps.
            sample_rate: probability that an image is in a step, above 0 and at most 1.
            delta: :math:`\delta`, above 0 and below 1.
            accountant: ``"prv"`` or ``"rdp"``.

        Raises:
            ValueError: an argument is out of its range, or there is no noise.
            ImportError: Opacus is not installed, and ``sample_rate`` is below 1.
        """
        from leakage.defenses.accounting import epsilon  # imported here: SciPy is slow to import

        return epsilon(self.noise_multiplier, steps, sample_rate, delta, accountant)
