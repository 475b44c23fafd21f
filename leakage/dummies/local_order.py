"""The unknown order in which clients that shuffle use their images."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from leakage.clients.protocol import Protocol
from leakage.dummies.dummy import Dummy, Target, widen
from leakage.pieces import State

# Standard deviation of the initial logits: shares are nearly equal, with just enough noise to distinguish the steps.
_STD = 0.1


class LocalOrder(Dummy):
    r"""The images that each local step uses if clients shuffle them, as another unknown of each victim.

    A client that shuffles uses each of its N images in one of the N / b steps of each epoch, and does not share in
    which one. An attack assumes that each step uses a share of every image, and searches for the logits of the shares,

    .. math:: w_{e,s,n} = \frac{e^{u_{e,s,n}}}{\sum_{s'} e^{u_{e,s',n}}}, \qquad
        L_{e,s} = \frac{1}{b} \sum_n w_{e,s,n} \, \ell(f_\theta(x_n), y_n)

    together with the images. The search starts from nearly equal shares. Equal shares mean that the order is unknown,
    and then the order of the images makes no difference. Shares of 0 and 1 are the client's actual steps, up to the
    order of the images in the reconstruction. Attacks use this class automatically, whatever their pieces are. An
    evaluation costs N / b times as much as with a known order.

    Raises:
        ValueError: in ``fit``, the network has BatchNorm that normalises by the images of a step.

    References:
        Dimitrov et al., *Data Leakage in Federated Averaging*, TMLR 2022, https://arxiv.org/abs/2206.12395, who search
        for separate images of each epoch, with a prior that keeps them equal.

    Example:
        >>> protocol = Protocol((1, 28, 28), 10, num_images=4, local_steps=6, learning_rate=0.1, local_batch_size=2,
        ...                     shuffle=True)
        >>> LocalOrder().shape(protocol)
        (3, 2, 4)
    """

    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """Return ``(epochs, N / b, N)`` if clients shuffle, else None."""
        if not protocol.shuffle or protocol.local_batch_size is None:
            return None
        steps = protocol.num_images // protocol.local_batch_size
        return protocol.local_steps // steps, steps, protocol.num_images

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the share of each image in each step, ``(steps, N)``; its shares in an epoch add up to 1."""
        assert unknown is not None
        return unknown.softmax(1).flatten(0, 1)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Return logits of nearly equal shares, three times as uneven for each restart."""
        return widen(noise, _STD, restarts)

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if BatchNorm makes the gradient of an image depend on the others in its step."""
        if self.shape(target.victim.protocol) is None:
            return
        for name, module in target.victim.model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"Expected BatchNorm in evaluation mode for clients that shuffle their images, but got {name!r}, "
                    "which normalises by the images of a step; an attack does not know them. Call `model.eval()`, or "
                    "leave `shuffle` out."
                )
