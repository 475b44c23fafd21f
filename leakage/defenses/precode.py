"""PRECODE: a variational bottleneck in the network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from leakage.errors import check_count, check_not_negative
from leakage.models.draw import reset
from leakage.models.drawing import Drawing


class VariationalBottleneck(Drawing):
    r"""Features, squeezed into few noisy numbers and made features again; see :class:`PRECODE`.

    Args:
        features: D, numbers of one image.
        size: k.
        weight: :math:`\beta`.
    """

    def __init__(self, features: int, size: int, weight: float) -> None:
        super().__init__((size,))
        self.weight = weight
        self.encoder, self.decoder = nn.Linear(features, 2 * size), nn.Linear(size, features)

    def forward(self, features: Tensor) -> Tensor:
        """``(N, D)`` of ``(N, D)``."""
        mean, log_variance = self.encoder(features).chunk(2, dim=1)
        code = mean
        if self.training and self.drawn.numel():
            code = mean + (log_variance / 2).exp() * self.drawn
            self.penalties = self.weight * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        decoded: Tensor = self.decoder(code)
        return decoded


class PRECODE(nn.Module):
    r"""A network with a variational bottleneck before its last layer, so that its gradient depends on noise.

    .. math:: (\mu, \log \sigma^2) = E h, \qquad z = \mu + \sigma \epsilon, \quad \epsilon \sim N(0, I), \qquad
        \hat h = D z

    with h the input of the last linear layer, E and D linear with biases, and
    :math:`\beta \, \mathrm{KL}(N(\mu, \sigma^2) \, \Vert \, N(0, I))` added to the loss of each image. In evaluation
    mode :math:`z = \mu`.

    It is part of the model that clients train, not of what they do to its gradient:
    ``Victims(model=PRECODE(LeNet()))``. A :class:`leakage.Victim` draws the noise; an attacker who knows of it searches
    for it together with the images (:class:`leakage.dummies.Drawn`), and one who does not (``adaptive=False``) takes it
    to be 0.

    Shapes: what the network takes and gives.

    Args:
        network: one with a linear layer, before the last one of which the bottleneck is put. It is copied.
        size: k, numbers in the bottleneck.
        weight: :math:`\beta`, at least 0.

    Raises:
        ValueError: a network without a linear layer, or an argument out of its range.

    References:
        Scheliga, Mäder and Seeland, *PRECODE: A Generic Model Extension to Prevent Deep Gradient Leakage*, WACV 2022,
        https://arxiv.org/abs/2108.04725.

    Example:
        >>> from leakage import LeNet, Victim
        >>> victim = Victim(PRECODE(LeNet(), size=32), image_shape=(1, 28, 28))
        >>> images, labels = torch.rand(1, 1, 1, 28, 28).expand(2, -1, -1, -1, -1), torch.tensor([[3], [3]])
        >>> first, second = victim.share(images, labels).gradients["network.features.0.weight"]
        >>> torch.equal(first, second)
        False
    """

    def __init__(self, network: nn.Module, size: int = 256, weight: float = 1e-3) -> None:
        super().__init__()
        check_count(size=size)
        check_not_negative(weight=weight)
        linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        if not linear:
            raise ValueError(f"Expected `network` with a linear layer, but got {type(network).__name__} without one.")
        name, last = [*linear.items()][-1]
        bottleneck = VariationalBottleneck(last.in_features, size, weight).to(last.weight)
        if not name:
            self.network: nn.Module = nn.Sequential(bottleneck, copy.deepcopy(network))
        else:
            self.network = copy.deepcopy(network)
            self.network.set_submodule(name, nn.Sequential(bottleneck, self.network.get_submodule(name)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.network(images)
        return logits

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the bottleneck's weights anew, as those of linear layers are; the network's own are drawn before."""
        for module in self.modules():
            if isinstance(module, VariationalBottleneck):
                module.apply(reset)
