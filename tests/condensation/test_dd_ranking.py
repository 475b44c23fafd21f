"""Sets in the form that DD-Ranking takes; the package itself is not needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leakage.condensation import SyntheticSet, export_dd_ranking

NAMES = ("airplane", "automobile", "bird")


def make(labels: tuple[int, ...] = (0, 0, 1, 1, 2, 2), dataset: str = "cifar10") -> SyntheticSet:
    images = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(images, torch.tensor(labels), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), NAMES, dataset)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_tensors_as_its_evaluators_take_them(tmp_path: Path, dataset: str) -> None:
    synthetic = make(dataset=dataset)
    export_dd_ranking(synthetic, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["images.pt", "labels.pt"]
    images, labels = (torch.load(tmp_path / "new" / name, weights_only=True) for name in ("images.pt", "labels.pt"))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous()
    assert images.shape == (6, 3, 32, 32)
    # The labels that it takes where it is given none.
    assert torch.equal(labels, torch.arange(3).repeat_interleave(2))
    # The statistics by which it normalises its test images, whatever the set was condensed with.
    for channel, (mean, std) in enumerate(zip((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), strict=True)):
        torch.testing.assert_close(images[:, channel] * std + mean, synthetic.images[:, channel], atol=1e-6, rtol=1e-6)


def test_what_it_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of \['cifar10', 'cifar100'\], which DD-Ranking supports, .*'mnist'"):
        export_dd_ranking(replace(make(), dataset="mnist"), tmp_path)
    with pytest.raises(ValueError, match=r"Expected the same number of images for each class, .* but got 1 to 3"):
        export_dd_ranking(make((0, 0, 0, 1, 1, 2)), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Expected to write"):
        export_dd_ranking(make(), tmp_path / "file")
