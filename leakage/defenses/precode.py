"""PRECODE: a network with a variational bottleneck."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from leakage.errors import check_count, check_not_negative
from leakage.models.draw import reset
from leakage.models.drawing import Drawing


class VariationalBottleneck(Drawing):
    r"""Encodes features into a few noisy numbers and decodes them again; see :class:`PRECODE`.

    Args:
        features: D, number of features of one image.
        size: k, width of the bottleneck.
        weight: :math:`\beta`, weight of the KL divergence in the loss.
    """

    first_layer = "encoder"

    def __init__(self, features: int, size: int, weight: float) -> None:
        super().__init__((size,))
        self.weight = weight
        self.encoder, self.decoder = nn.Linear(features, 2 * size), nn.Linear(size, features)

    def forward(self, features: Tensor) -> Tensor:
        """Return the decoded features ``(N, D)`` of ``features`` ``(N, D)``."""
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

    Here h is the input of the last linear layer, E and D are linear layers with biases, and
    :math:`\beta \, \mathrm{KL}(N(\mu, \sigma^2) \, \Vert \, N(0, I))` is added to the loss of each image. In evaluation
    mode :math:`z = \mu`.

    PRECODE is part of the model, not one of the client's ``defenses``: ``Victims(model=PRECODE(LeNet()))``. A
    :class:`leakage.Victim` draws the noise. An attacker who knows the defense searches for the noise together with the
    images (:class:`leakage.dummies.Drawn`); one who does not (``adaptive=False``) assumes that it is 0. The gradient of
    E alone gives the features h of a single image away, whatever the noise, and the layers before E the image
    (:func:`leakage.closed_form.images_by_layers`).

    Shapes: inputs and outputs are those of ``network``.

    Args:
        network: a network with at least one linear layer; the bottleneck goes before the last one. It is copied.
        size: k, width of the bottleneck.
        weight: :math:`\beta`, at least 0.

    Raises:
        ValueError: the network has no linear layer, or an argument is out of its range.

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
        """Return the logits of a batch of images."""
        logits: Tensor = self.network(images)
        return logits

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights of the bottleneck anew; ``model.apply`` resets those of the network before."""
        for module in self.modules():
            if isinstance(module, VariationalBottleneck):
                module.apply(reset)
