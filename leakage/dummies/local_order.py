"""The order in which clients take their images, where they shuffle them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from leakage.clients.protocol import Protocol
from leakage.dummies.dummy import Dummy, Target, widen
from leakage.pieces import State

# Of the start of the logits: equal shares, but for what tells two steps apart.
_STD = 0.1


class LocalOrder(Dummy):
    r"""Which images each local step takes, where clients shuffle them: one more unknown of each victim.

    A client that shuffles takes each of its N images in one of the N / b steps of each epoch, and keeps to itself in
    which. An attack supposes that each step takes all images, each to a share, and searches for the shares by their
    logits,

    .. math:: w_{e,s,n} = \frac{e^{u_{e,s,n}}}{\sum_{s'} e^{u_{e,s',n}}}, \qquad
        L_{e,s} = \frac{1}{b} \sum_n w_{e,s,n} \, \ell(f_\theta(x_n), y_n)

    together with the images, from nearly equal shares on. Equal ones stand for an order that is not known: the order of
    the images makes no difference then. Shares of 0 and 1 are the client's own steps, up to the order of the images in
    the reconstruction. Attacks make use of it by themselves, whatever their pieces are. An evaluation costs N / b times
    as much as with a known order.

    Raises:
        ValueError: in ``fit``, BatchNorm that normalises by the images of a step.

    References:
        Dimitrov et al., *Data Leakage in Federated Averaging*, TMLR 2022, https://arxiv.org/abs/2206.12395, who search
        for images of each epoch with a prior that keeps them the same.

    Example:
        >>> protocol = Protocol((1, 28, 28), 10, num_images=4, local_steps=6, learning_rate=0.1, local_batch_size=2,
        ...                     shuffle=True)
        >>> LocalOrder().shape(protocol)
        (3, 2, 4)
    """

    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """``(epochs, N / b, N)``, where clients shuffle."""
        if not protocol.shuffle or protocol.local_batch_size is None:
            return None
        steps = protocol.num_images // protocol.local_batch_size
        return protocol.local_steps // steps, steps, protocol.num_images

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """``(steps, N)``, the share of each image in each step; those in the steps of an epoch add up to 1."""
        assert unknown is not None
        return unknown.softmax(1).flatten(0, 1)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Nearly equal shares, three times as uneven for each restart."""
        return widen(noise, _STD, restarts)

    def check(self, target: Target) -> None:
        """No image of a step may change the others' gradients."""
        if self.shape(target.victim.protocol) is None:
            return
        for name, module in target.victim.model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"Expected BatchNorm in evaluation mode for clients that shuffle their images, but got {name!r} "
                    "that normalises by those of a step, which an attack does not know. Call `model.eval()`, or leave "
                    "`shuffle` out."
                )
