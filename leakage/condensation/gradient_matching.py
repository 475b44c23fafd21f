"""Dataset condensation with gradient matching: a few images whose gradient stands for that of a training set."""

from __future__ import annotations

from typing import Any

from leakage.condensation.condensation import Condensation
from leakage.condensation.matching import Gradients, matched_parameters
from leakage.condensation.networks import batch_norms
from leakage.condensation.protocols import condensation_protocol, schedule
from leakage.datamodules.labelled import LabelledImages
from leakage.errors import check_choice, check_count, check_positive
from leakage.objectives import DISTANCES


class GradientMatchingCondensation(Condensation):
    r"""Condenses a training set into a few synthetic images per class, by matching gradients.

    A network trained on the synthetic images alone shall do on real images what one trained on the whole set does. For
    networks :math:`\theta` drawn anew again and again, the synthetic images :math:`x_c` of each class c minimise

    .. math:: \sum_c D\left(\nabla_\theta \ell(x_c, c), \; \nabla_\theta \ell(r_c, c)\right)

    with :math:`r_c` a batch of real images of the class and D the row-wise cosine distance
    (:class:`~leakage.objectives.RowCosineDistance`).

    One *iteration* is one freshly drawn network. It has ``outer`` training steps; in each, the gradients of a batch of
    real images per class are taken, then the synthetic images make ``network_reuse`` steps towards them, and the
    network is trained for ``inner`` epochs on the synthetic images (not after the last step, so with one image per
    class it never is). With a ``pool`` an iteration is one step, on a network that real images have trained and that is
    met again and again (:class:`~leakage.condensation.pool.NetworkPool`). All iterations are one epoch of the Trainer.
    The images are normalised, start from N(0, 1) or from real images, and are never clamped.

    Args:
        images_per_class: synthetic images of each class.
        num_classes: to be checked against the data; by default the data's.
        protocol: ``"published"``, or ``"fast"``, which with a pool of networks gets further in the same time.
        loops: (outer, inner); by default the paper's, which it has for 1, 10, 20, 30, 40 and 50 images per class. Not
            with a pool.
        distance: a key of :data:`leakage.objectives.DISTANCES`.
        network_learning_rate, network_batch_size: for training the network on the synthetic images.
        options: see :class:`~leakage.condensation.Condensation`.

    Raises:
        ValueError: an unknown choice, or what :class:`~leakage.condensation.Condensation` raises; in ``fit``, a network
            without weights that the distance looks at, or with BatchNorm in bfloat16.
        FloatingPointError: as :class:`~leakage.condensation.Condensation`.

    References:
        Zhao, Mopuri, Bilen, *Dataset Condensation with Gradient Matching*, ICLR 2021,
        https://arxiv.org/abs/2006.05929; Zhao and Bilen, *Dataset Condensation with Differentiable Siamese
        Augmentation*, ICML 2021, https://arxiv.org/abs/2102.08259.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import LabelledImages
        >>> from leakage.models import ConvNet
        >>> condensation = GradientMatchingCondensation(network=ConvNet(width=4), iterations=2)
        >>> trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer.fit(condensation, datamodule=LabelledImages("sample", batch_size=8))
        >>> len(condensation.synthetic_dataset())
        10
    """

    def __init__(
        self,
        images_per_class: int = 1,
        num_classes: int | None = None,
        *,
        protocol: str = "published",
        loops: tuple[int, int] | None = None,
        distance: str = "row_cosine",
        network_learning_rate: float = 0.01,
        network_batch_size: int = 256,
        **options: Any,
    ) -> None:
        loops = tuple(loops) if isinstance(loops, list) else loops
        super().__init__(images_per_class, num_classes, **options)
        check_count(network_batch_size=network_batch_size)
        check_positive(network_learning_rate=network_learning_rate)
        check_choice("distance", distance, DISTANCES)
        self.method = protocol
        self.protocol = condensation_protocol(protocol, images_per_class, **self._replaced())
        self.outer, self.inner = schedule(images_per_class, loops, self.protocol.pool)

    def configure_matching(self, data: LabelledImages) -> Gradients:
        """The gradients of the weights that the distance looks at."""
        distance = self.hparams["distance"]
        names = matched_parameters(self.network, distance)
        if not names:
            raise ValueError(
                f"Expected a `network` with trainable weights that distance={distance!r} looks at, but got "
                f"{type(self.network).__name__} without."
            )
        if self.trainer.precision == "bf16-mixed" and batch_norms(self.network):
            raise ValueError(
                "Expected a `network` without BatchNorm with precision='bf16-mixed', but got "
                f"{type(self.network).__name__} with it, whose gradients `torch.func` can't take then."
            )
        return Gradients(names, distance, in_turn=self.protocol.pool > 0)
