"""Export of synthetic sets to DD-Ranking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from leakage.files.whole import whole_file

if TYPE_CHECKING:
    from leakage.condensation.synthetic_set import SyntheticSet

# The data sets that DD-Ranking and this library have in common. DD-Ranking normalises both with these statistics.
_DATASETS = ("cifar10", "cifar100")
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def export_dd_ranking(synthetic: SyntheticSet, folder: str | os.PathLike[str]) -> None:
    """Write a set as ``images.pt`` and ``labels.pt``, in the form that DD-Ranking (``ddranking`` 0.2) reads.

    ``images.pt`` holds float32 ``(M, 3, H, W)``, class by class, normalised as DD-Ranking normalises its test images.
    ``labels.pt`` holds int64 ``(M,)``. DD-Ranking takes them as ``image_tensor`` and ``hard_labels``::

        score = LabelRobustScoreHard(dataset="CIFAR10", ipc=10, model_name="ConvNet-3", real_data_path=...)
        images, labels = torch.load("images.pt"), torch.load("labels.pt")
        score.compute_metrics(image_tensor=images, hard_labels=labels, syn_lr=0.01)

    Args:
        synthetic: a set of CIFAR-10 or CIFAR-100, with the same number of images of each class. The decoded images are
            written.
        folder: the folder to write to; files of the same name are replaced.

    Raises:
        ValueError: the set is of another data set, or its classes differ in their number of images.
        OSError: a file can't be written.

    References:
        Li et al., *DD-Ranking: Rethinking the Evaluation of Dataset Distillation*, 2025,
        https://arxiv.org/abs/2505.13300.

    Example:
        >>> export_dd_ranking(SyntheticSet.load("cifar10_10.safetensors"), "for_dd_ranking")    # doctest: +SKIP
    """
    if synthetic.dataset not in _DATASETS:
        raise ValueError(
            f"Expected a set of one of {list(_DATASETS)}, which DD-Ranking supports, but got one of "
            f"{synthetic.dataset!r}."
        )
    synthetic = synthetic.decoded()
    counts = synthetic.images_per_class
    if int(counts.min()) != int(counts.max()):
        raise ValueError(
            f"Expected the same number of images for each class, as DD-Ranking does, but got {int(counts.min())} to "
            f"{int(counts.max())}."
        )
    mean, std = (synthetic.images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
    images = ((synthetic.images - mean) / std).contiguous()
    for name, tensor in (("images.pt", images), ("labels.pt", synthetic.labels.clone())):
        with whole_file(Path(folder) / name) as partial:
            torch.save(tensor, partial)
