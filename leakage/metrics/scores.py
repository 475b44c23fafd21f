"""Scores of reconstructions: of every image, of every victim, and over victims."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from leakage.errors import check_positive
from leakage.metrics.estimates import MeanOverVictims, ScoresOverVictims, ShareOverVictims
from leakage.metrics.matching import check_images, match, score_dtype
from leakage.precision import full_precision

#: PSNR is limited to plus and minus this many dB, so that means stay finite: 150 dB is an MSE of
#: 1e-15, about the rounding error of single precision.
PSNR_LIMIT = 150.0

#: A reconstruction with a smaller MSE counts as a success.
SUCCESS_THRESHOLD = 1e-3

# Radius of the window of SSIM in pixels, and its standard deviation.
_SSIM_RADIUS, _SSIM_SIGMA = 5, 1.5

# SSIM holds ten copies of its input. 2^14 numbers at a time stay in the cache of a CPU core, which
# was eight times faster than 1,000 MNIST images at once.
_NUMBERS_AT_ONCE = 2**14


@dataclass
class VictimScore:
    """The scores of one victim.

    Attributes:
        mse: mean over the victim's N images, at least 0.
        psnr: mean over the images of the PSNR of each, in dB.
        ssim: mean over the images, in [-1, 1].
        label_accuracy: share of the images whose label is right.
        success: share of the images whose MSE is below the threshold.
        final: whether the attack is done with the victim.
    """

    mse: float
    psnr: float
    ssim: float
    label_accuracy: float
    success: float
    final: bool = True


@dataclass
class Scores:
    """Scores of the N images of each of V victims, computed by :func:`score`.

    Attributes:
        order: ``(V, N)`` int64, the index of the reconstruction that is matched with image n.
        mse: ``(V, N)``, at least 0.
        psnr: ``(V, N)``, dB, from -150 to 150.
        ssim: ``(V, N)``, in [-1, 1].
        label_correct: ``(V, N)`` bool.
    """

    order: Tensor
    mse: Tensor
    psnr: Tensor
    ssim: Tensor
    label_correct: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def per_victim(self, *, threshold: float = SUCCESS_THRESHOLD, final: bool = True) -> list[VictimScore]:
        """Average over the images of each victim; the order of the victims is kept.

        Args:
            threshold: a reconstruction is a success if its MSE is below this.
            final: whether the attack is done with these victims.

        Raises:
            ValueError: ``threshold`` is not positive.

        Example:
            >>> images = torch.full((1, 2, 1, 8, 8), 0.5)
            >>> images[:, 1] = 0.9
            >>> guess = torch.full_like(images, 0.5)
            >>> score(guess, torch.tensor([[3, 3]]), images, torch.tensor([[3, 8]])).per_victim()[0].success
            0.5
        """
        check_positive(threshold=threshold)
        scores = {
            "mse": self.mse,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "label_accuracy": self.label_correct,
            "success": self.mse < threshold,
        }
        means = {name: score.cpu().double().mean(1).tolist() for name, score in scores.items()}
        rows = zip(*means.values(), strict=True)
        return [VictimScore(**dict(zip(means, row, strict=True)), final=final) for row in rows]


@torch.no_grad()
@full_precision()
def score(reconstructed_images: Tensor, reconstructed_labels: Tensor, images: Tensor, labels: Tensor) -> Scores:
    r"""Score reconstructions against the private images, after matching them one-to-one (:func:`match`).

    .. math::
        \mathrm{MSE} = \tfrac{1}{CHW} \lVert \hat x - x \rVert^2, \qquad
        \mathrm{PSNR} = -10 \log_{10} \mathrm{MSE} \; \mathrm{dB}

    for each image, with a data range of 1. Reconstructions are not clamped: values outside
    [0, 1] count as errors. PSNR is limited to -150 to 150 dB, so identical images have
    150 dB instead of infinity.

    SSIM follows Wang et al. for a data range of 1: a Gaussian window of 11 pixels with standard
    deviation 1.5, reflected borders, and the mean over pixels and channels. It is always computed in single precision.
    If the smaller side has fewer than 11 pixels, the window has the largest
    odd size that fits, and its standard deviation is scaled in proportion. With 1 or 2 pixels, the window is a single
    pixel, which only compares brightness.

    A reconstruction whose MSE is not finite gets the worst value of each score: MSE inf, PSNR -150 dB,
    SSIM -1. Tensors are moved to the device of ``images``.

    Args:
        reconstructed_images: ``(V, N, C, H, W)``, any values.
        reconstructed_labels: ``(V, N)``, class indices, in the order of the reconstructed images.
        images: ``(V, N, C, H, W)``, the private images, values in [0, 1].
        labels: ``(V, N)``, their class indices.

    Returns:
        The scores of each image, in the order of ``images``.

    Raises:
        ValueError: shapes differ, private images are outside [0, 1], or labels are not whole numbers.

    References:
        Wang et al., *Image Quality Assessment: From Error Visibility to Structural Similarity*, 2004,
        https://doi.org/10.1109/TIP.2003.819861.

    Example:
        >>> images = torch.full((1, 1, 1, 28, 28), 0.5)
        >>> scores = score(images + 0.1, torch.tensor([[3]]), images, torch.tensor([[3]]))
        >>> round(scores.mse.item(), 4), round(scores.psnr.item(), 2), scores.label_correct.item()
        (0.01, 20.0, True)
    """
    check_images(reconstructed_images, images)
    _check_labels(reconstructed_labels, labels, tuple(images.shape[:2]))
    # This form of the comparison also refuses NaN.
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"Expected `images` with values in [0, 1], but got {low:g} to {high:g}.")
    order = match(reconstructed_images, images)
    victims = torch.arange(len(order), device=images.device)[:, None]
    dtype = score_dtype(reconstructed_images, images)
    found = reconstructed_images.to(images.device)[victims, order].flatten(0, 1).to(dtype)
    truth = images.flatten(0, 1).to(dtype)

    mse = (found - truth).square().flatten(1).mean(1)
    finite = torch.isfinite(mse)
    psnr = peak_signal_noise_ratio(found, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = _ssim(found, truth)
    return Scores(
        order=order,
        mse=mse.where(finite, torch.inf).view_as(order),
        psnr=psnr.where(finite, -torch.inf).clamp(-PSNR_LIMIT, PSNR_LIMIT).view_as(order),
        ssim=ssim.where(finite & torch.isfinite(ssim), -1.0).clamp(-1, 1).view_as(order),
        label_correct=reconstructed_labels.to(images.device)[victims, order] == labels.to(images.device),
    )


class ReconstructionMetrics(ScoresOverVictims):
    """The means of all scores over victims, each with its 95 % confidence interval, ready for ``log_dict``.

    ``update`` takes the :class:`VictimScore` of further victims; pass each victim once. ``compute`` returns,
    over all victims of all processes, the keys ``name``, ``name_low`` and
    ``name_high`` for each metric, and ``victims``:

    ================== ================ ===================== ==========
    name               values           unit                  interval
    ================== ================ ===================== ==========
    ``mse``            at least 0       (image values)²       Student
    ``psnr``           -150 to 150      dB                    Student
    ``ssim``           -1 to 1          none                  Student
    ``label_accuracy`` 0 to 1           share of images       Wilson
    ``success_rate``   0 to 1           share of images       Wilson
    ================== ================ ===================== ==========

    Args:
        prefix: text in front of each key, such as ``"val/"``.

    Raises:
        TypeError: at ``update``, a score is not a VictimScore.

    Example:
        >>> metrics = ReconstructionMetrics(prefix="val/")
        >>> metrics.update([VictimScore(mse=1e-5, psnr=50.0, ssim=1.0, label_accuracy=1.0, success=1.0)])
        >>> metrics.update([VictimScore(mse=1e-1, psnr=10.0, ssim=0.1, label_accuracy=1.0, success=0.0)])
        >>> logged = metrics.compute()
        >>> list(logged)[:4]
        ['val/victims', 'val/mse', 'val/mse_low', 'val/mse_high']
        >>> logged["val/psnr"], logged["val/success_rate"], logged["val/victims"]
        (30.0, 0.5, 2)
    """

    kind = VictimScore

    def __init__(self, *, prefix: str = "") -> None:
        super().__init__(
            mse=MeanOverVictims(),
            psnr=MeanOverVictims(),
            ssim=MeanOverVictims(),
            label_accuracy=ShareOverVictims(),
            success=ShareOverVictims(),
        )
        self.prefix = prefix

    def compute(self) -> dict[str, float]:
        """Return the estimates over all victims so far, as a flat dictionary."""
        logged: dict[str, float] = {}
        for score, estimate in super().compute().items():
            name = "success_rate" if score == "success" else score
            logged |= {
                f"{self.prefix}victims": estimate.victims,
                f"{self.prefix}{name}": estimate.value,
                f"{self.prefix}{name}_low": estimate.low,
                f"{self.prefix}{name}_high": estimate.high,
            }
        return logged


def _ssim(found: Tensor, truth: Tensor) -> Tensor:
    """Compute the SSIM ``(B,)`` of images ``(B, C, H, W)``."""
    radius = min(_SSIM_RADIUS, (min(truth.shape[-2:]) - 1) // 2)
    # torchmetrics derives the window from sigma: int(3.5 * sigma + 0.5) pixels to each side. Sigma must be positive
    # even for a radius of 0.
    sigma = _SSIM_SIGMA * radius / _SSIM_RADIUS or 0.1
    scores = torch.empty(len(truth), device=truth.device)
    size = max(1, _NUMBERS_AT_ONCE // truth[:1].numel()) if len(truth) else 1
    for start in range(0, len(truth), size):
        part = slice(start, start + size)
        scores[part] = structural_similarity_index_measure(  # type: ignore[assignment]
            found[part].float(), truth[part].float(), sigma=sigma, data_range=1.0, reduction="none"
        )
    return scores


def _check_labels(reconstructed_labels: Tensor, labels: Tensor, expected: tuple[int, ...]) -> None:
    for name, tensor in (("labels", labels), ("reconstructed_labels", reconstructed_labels)):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"Expected `{name}` of shape (V, N) = {expected}, but got {tuple(tensor.shape)}.")
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"Expected `{name}` as whole numbers, but got {tensor.dtype}.")
