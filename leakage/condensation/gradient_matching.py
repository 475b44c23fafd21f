"""Dataset condensation with gradient matching: a few images with the gradients of a training set."""

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

    The aim is that a network trained on the synthetic images alone works on real images like one trained on the whole
    set. Over many randomly drawn networks :math:`\theta`, the synthetic images :math:`x_c` of each class c minimise

    .. math:: \sum_c D\left(\nabla_\theta \ell(x_c, c), \; \nabla_\theta \ell(r_c, c)\right)

    with :math:`r_c` a batch of real images of the class and D the row-wise cosine distance
    (:class:`~leakage.objectives.RowCosineDistance`).

    One *iteration* is one newly drawn network with ``outer`` training steps. Each step computes the gradients of a
    batch of real images per class, then updates the synthetic images ``network_reuse`` times towards them. Between two
    steps the network is trained for ``inner`` epochs on the synthetic images (with the paper's loops for one image per
    class there is only one step, so it is never trained). With a ``pool`` an iteration is one step on a network that
    was trained on real images and is used repeatedly (:class:`~leakage.condensation.pool.NetworkPool`). All iterations
    are one epoch of the Trainer. The images are normalised, start from N(0, 1) or from real images, and are never
    clamped.

    Args:
        images_per_class: synthetic images of each class.
        num_classes: number of classes, checked against the data; by default that of the data.
        protocol: ``"published"``, or ``"fast"``, which uses a pool of networks and gets further in the same time.
        loops: (outer, inner); by default those of the paper, which exist for 1, 10, 20, 30, 40 and 50 images per class.
            Not allowed with a pool.
        distance: a key of :data:`leakage.objectives.DISTANCES`.
        network_learning_rate, network_batch_size: used to train the network on the synthetic images.
        options: see :class:`~leakage.condensation.Condensation`.

    Raises:
        ValueError: a choice is unknown, or as for :class:`~leakage.condensation.Condensation`; in ``fit``, the network
            has no trainable weights that the distance compares, or has BatchNorm in bfloat16.
        FloatingPointError: as for :class:`~leakage.condensation.Condensation`.

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
        """Match the gradients of the weights that the distance compares."""
        distance = self.hparams["distance"]
        names = matched_parameters(self.network, distance)
        if not names:
            raise ValueError(
                f"Expected a `network` with trainable weights that distance={distance!r} compares, but got "
                f"{type(self.network).__name__} without any."
            )
        if self.trainer.precision == "bf16-mixed" and batch_norms(self.network):
            raise ValueError(
                "Expected a `network` without BatchNorm for precision='bf16-mixed', but got "
                f"{type(self.network).__name__} with BatchNorm, whose gradients `torch.func` can't compute in this "
                "precision."
            )
        return Gradients(names, distance, in_turn=self.protocol.pool > 0)
