"""DP-SGD: the gradient of each image is clipped, and their sum is noisy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leakage.clients.examples import clipped_examples, shortened
from leakage.defenses.base import Client, Defense, Gradients
from leakage.errors import check_not_negative, check_positive

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim


class DPSGD(Defense):
    r"""One step of DP-SGD: gradients of single images of norm C at most, and noise on their sum.

    .. math:: \tilde g = \frac{1}{N} \Bigl( \sum_n g_n \min\bigl(1, C / \lVert g_n \rVert_2\bigr) +
        \sigma C \, \epsilon \Bigr), \qquad \epsilon \sim N(0, I)

    without the division where the client's loss is a sum. It is the first of a client's defenses, as it begins from the
    images.

    An attacker who knows of it clips in the same way. What the noise hides stays hidden as long as nobody knows the
    seed of :meth:`leakage.Victim.share`, and each round has another.

    Args:
        noise_multiplier: :math:`\sigma`; 0 for clipping alone.
        norm: C, positive.

    Raises:
        ValueError: an argument out of its range; for a client, several local steps, a learning rate that it keeps to
            itself, BatchNorm that mixes images, modules that draw random numbers, or another defense before it.

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
        """One step, images that do not see one another, and nothing before it."""
        protocol = victim.protocol
        if protocol.local_steps > 1:
            raise ValueError(f"Expected clients of one step for DPSGD, but got local_steps={protocol.local_steps}.")
        if protocol.learning_rate is not None:
            raise ValueError(
                "Expected clients that share a gradient for DPSGD, whose noise is in its units, but got "
                "reveal_learning_rate=False, with which they share an update."
            )
        if victim.mixes_images and protocol.num_images > 1:
            raise ValueError(
                "Expected a network whose images do not see one another for DPSGD, but got BatchNorm that normalises "
                "by the client's own batch: there is no gradient of a single image. Call `model.eval()`, or use "
                "another norm."
            )
        if victim.draws:
            raise ValueError(
                f"Expected a network that draws nothing for DPSGD, but got {sorted(victim.draws)}: call `model.eval()`."
            )
        if defenses[0] is not self or any(isinstance(other, DPSGD) for other in defenses[1:]):
            raise ValueError(
                f"Expected DPSGD once, as the first of `defenses`, as it begins from the images, but got "
                f"{list(defenses)}."
            )

    def for_client(self, client: Client) -> Defense:
        """With its images at hand."""
        own = copy.copy(self)
        own._client = client
        return own

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Clipped and noisy; gradients alone are those of one image."""
        client, std, images = self._client, self.noise_multiplier * self.norm, 1
        if client is None:
            gradients = shortened(gradients, self.norm)
        else:
            protocol = client.victim.protocol
            gradients = clipped_examples(client.victim, client.state, client.images, client.targets, self.norm)
            images = protocol.num_images if protocol.reduction == "mean" else 1
        return {
            name: tensor + std / images * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in gradients.items()
        }

    def noise_variance(self, shared: Gradients, images: int) -> Tensor | float:
        """That on the mean of the images."""
        return (self.noise_multiplier * self.norm / images) ** 2

    @property
    def example_norm(self) -> float:
        """C, to which the attacker's own images are clipped one by one."""
        return self.norm

    def epsilon(self, steps: int, sample_rate: float, delta: float, accountant: str = "prv") -> float:
        r""":math:`\varepsilon` of training with such steps, by an accountant of Opacus.

        Args:
            steps: of training.
            sample_rate: the probability with which an image is in a step, above 0 and at most 1.
            delta: :math:`\delta`, above 0 and below 1.
            accountant: ``"prv"`` or ``"rdp"``.

        Raises:
            ValueError: an argument out of its range, or no noise.
            ImportError: Opacus is not installed.
        """
        from leakage.defenses.accounting import epsilon  # which takes SciPy, and time

        return epsilon(self.noise_multiplier, steps, sample_rate, delta, accountant)
