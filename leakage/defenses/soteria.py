"""Soteria: pruning of features in the gradient of a linear layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from leakage.clients.activations import recorded
from leakage.clients.inspection import trial_inputs, with_targets
from leakage.defenses.base import Client, Defense, Gradients, Sparse
from leakage.errors import check_share

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim

# Number of features that are differentiated at once.
_AT_ONCE = 128


class Soteria(Sparse):
    r"""Zeroes columns of one linear layer's gradient, so that images that match the rest are far from the true ones.

    It prunes the share :math:`\rho` of the features r of the images x for which

    .. math:: \sum_n \frac{|r_i(x_n)|}{\lVert \nabla_x r_i(x_n) \rVert_2}

    is largest. To first order, this is how far an image must move to make up for the loss of the feature.

    An attacker who knows the defense compares all columns but those that are zero. This breaks it (Balunović et al.).

    Args:
        share: :math:`\rho`, share of the features to prune, above 0 and below 1.
        layer: name of the linear layer, as in ``model.named_modules()``.

    Raises:
        ValueError: ``share`` is out of its range, or the client has no such linear layer of features, several local
            steps, or BatchNorm that mixes images.

    References:
        Sun et al., *Soteria: Provable Defense against Privacy Leakage in Federated Learning from Representation
        Perspective*, CVPR 2021, https://arxiv.org/abs/2012.06043; broken: Balunović et al., *Bayesian Framework for
        Gradient Leakage*, ICLR 2022, https://arxiv.org/abs/2111.04706.

    Example:
        >>> from leakage import LeNet, Victim
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), defenses=[Soteria(0.5)])
        >>> shared = victim.share(torch.rand(1, 1, 1, 28, 28), torch.tensor([[3]]))
        >>> float((shared.gradients["classifier.weight"][0] == 0).all(0).double().mean())
        0.5
    """

    def __init__(self, share: float = 0.8, layer: str = "classifier") -> None:
        check_share(share=share)
        self.share = share
        self.layer = layer
        self._columns: Tensor | None = None

    def check(self, victim: Victim, defenses: Sequence[Defense]) -> None:
        """Raise a ``ValueError`` unless clients take one step on independent images, and have the linear layer."""
        protocol = victim.protocol
        if protocol.local_steps > 1:
            raise ValueError(f"Expected clients of one step for Soteria, but got local_steps={protocol.local_steps}.")
        if victim.mixes_images and protocol.num_images > 1:
            raise ValueError(
                "Expected a network that treats each image independently for Soteria, but got BatchNorm that "
                "normalises by the client's own batch. Call `model.eval()`, or use another norm."
            )
        layers = {name: module for name, module in victim.model.named_modules() if isinstance(module, nn.Linear)}
        if self.layer not in layers or f"{self.layer}.weight" not in victim.trainable:
            raise ValueError(
                f"Expected `layer` of Soteria to be a linear layer that shares its gradient, one of {sorted(layers)}, "
                f"but got {self.layer!r}."
            )
        with torch.no_grad(), recorded(victim.model, [self.layer]) as seen:
            victim.model(*trial_inputs(victim.model, protocol))
        if seen[self.layer].inputs.ndim != 2:
            raise ValueError(
                f"Expected `layer` of Soteria to take features of shape (N, D), but got {self.layer!r}, which takes "
                f"{tuple(seen[self.layer].inputs.shape)}."
            )

    def for_client(self, client: Client) -> Defense:
        """Return a copy that holds the columns to prune for this client's images."""
        model = client.victim.model
        smallest = torch.finfo(client.images.dtype).tiny

        def features(image: Tensor) -> tuple[Tensor, Tensor]:
            with recorded(model, [self.layer]) as seen:
                functional_call(model, dict(client.state), with_targets(image[None], client.victim.protocol))
            found = seen[self.layer].inputs.flatten()
            return found, found

        total = torch.zeros((), dtype=client.images.dtype, device=client.images.device)
        for image in client.images:
            slopes, found = jacrev(features, has_aux=True, chunk_size=_AT_ONCE)(image)
            total = total + found.abs() / slopes.flatten(1).norm(dim=1).clamp(min=smallest)
        own = copy.copy(self)
        own._columns = total.topk(round(self.share * len(total))).indices
        return own

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradients, with the pruned columns of the layer set to zero."""
        if self._columns is None:
            raise ValueError(
                "Expected Soteria to see a client's images, as `Victim.share` shows them, but got gradients alone."
            )
        name = f"{self.layer}.weight"
        return {**gradients, name: gradients[name].index_fill(1, self._columns, 0)}

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """Return the gradients with zeros in the columns that are zero in ``shared``."""
        name = f"{self.layer}.weight"
        pruned = (shared[name] == 0).all(0)
        return {**gradients, name: torch.where(pruned, 0, gradients[name])}
