"""Dataset condensation with distribution matching: a few images with the mean embeddings of a training set."""

from __future__ import annotations

from typing import Any

from leakage.condensation.condensation import Condensation
from leakage.condensation.embeddings import Embeddings, embedding_layer
from leakage.condensation.protocols import CondensationProtocol, replace_given
from leakage.datamodules.labelled import LabelledImages

# The published protocol, used with the default augmentation below.
PUBLISHED = CondensationProtocol(iterations=20_000, batch_size=256, learning_rate=1.0, initialization="real")


class DistributionMatchingCondensation(Condensation):
    r"""Condenses a training set into a few synthetic images per class, by matching mean embeddings.

    The embedding f of an image is the input of the network's last linear layer. Over many randomly drawn networks
    :math:`\theta`, which are never trained, the synthetic images :math:`x_c` of each class c minimise

    .. math:: \sum_c \left\lVert \frac{1}{|r_c|} \sum_{r \in r_c} f_\theta(A_{\omega_c}(r))
        - \frac{1}{|x_c|} \sum_{x \in x_c} f_\theta(A_{\omega_c}(x)) \right\rVert_2^2

    with :math:`r_c` a batch of real images of the class and :math:`A_{\omega_c}` one random transform for both
    (:class:`~leakage.condensation.SiameseAugmentation`). A step needs one derivative where gradient matching needs
    two, and networks are not trained.

    One *iteration* is one newly drawn network and one batch. With a ``pool`` it is one visit to a network trained on
    real images (:class:`~leakage.condensation.pool.NetworkPool`); this is not part of the paper.

    The defaults are those published: 20,000 iterations, 256 real images of each class, SGD with momentum 0.5, real
    images as the start, and DSA's augmentation. The learning rate of 1.0 is the default of the authors' code for any
    number of images (https://github.com/VICO-UoE/DatasetCondensation, ``main_DM.py``).

    Args:
        images_per_class: synthetic images of each class.
        num_classes: number of classes, checked against the data; by default that of the data.
        augmentation: strategy of :class:`~leakage.condensation.SiameseAugmentation`; None for no augmentation. For
            digits, leave out mirror images: ``SiameseAugmentation.dsa("mnist").strategy``.
        options: see :class:`~leakage.condensation.Condensation`.

    Raises:
        ValueError: as for :class:`~leakage.condensation.Condensation`; in ``fit``, the logits of the network are not
            the output of a linear layer.
        FloatingPointError: as for :class:`~leakage.condensation.Condensation`.

    References:
        Zhao and Bilen, *Dataset Condensation with Distribution Matching*, WACV 2023, https://arxiv.org/abs/2110.04181.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import LabelledImages
        >>> from leakage.models import ConvNet
        >>> condensation = DistributionMatchingCondensation(2, network=ConvNet(width=4), iterations=2)
        >>> trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer.fit(condensation, datamodule=LabelledImages("sample", batch_size=8))
        >>> len(condensation.synthetic_dataset())
        20
    """

    method = "dm"

    def __init__(
        self,
        images_per_class: int = 1,
        num_classes: int | None = None,
        *,
        augmentation: str | None = "color_crop_cutout_flip_scale_rotate",
        **options: Any,
    ) -> None:
        super().__init__(images_per_class, num_classes, augmentation=augmentation, **options)
        self.protocol = replace_given(PUBLISHED, **self._replaced())

    def configure_matching(self, data: LabelledImages) -> Embeddings:
        """Match the mean embeddings: the inputs of the last linear layer."""
        return Embeddings(embedding_layer(self.network, data.image_shape))
