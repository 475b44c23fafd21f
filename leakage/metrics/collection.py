"""The scores of all victims under the names by which they are logged."""

from __future__ import annotations

from collections.abc import Sequence

from leakage.errors import check_choice
from leakage.metrics.estimates import MeanOverVictims, ScoresOverVictims, ShareOverVictims
from leakage.metrics.scores import VictimScore

# Logged name to the attribute of a VictimScore and the kind of estimate.
_METRICS: dict[str, tuple[str, type[MeanOverVictims] | type[ShareOverVictims]]] = {
    "mse": ("mse", MeanOverVictims),
    "psnr": ("psnr", MeanOverVictims),
    "ssim": ("ssim", MeanOverVictims),
    "label_accuracy": ("label_accuracy", ShareOverVictims),
    "success_rate": ("success", ShareOverVictims),
}


class ReconstructionMetrics(ScoresOverVictims[VictimScore]):
    """The means of all scores over victims, each with its 95 % confidence interval, ready for ``log_dict``.

    ``update`` takes the :class:`VictimScore` of further victims, each victim once; ``compute`` gives,
    over all victims of all processes, for each metric the keys ``name``, ``name_low`` and
    ``name_high``, and once ``victims``:

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
        metrics: the names of those wanted.
        prefix: goes before each key, such as ``"val/"``.

    Raises:
        ValueError: a name that there is not, or none.
        TypeError: at ``update``, anything but VictimScores.

    Example:
        >>> metrics = ReconstructionMetrics(["psnr", "success_rate"], prefix="val/")
        >>> metrics.update([VictimScore(mse=1e-5, psnr=50.0, ssim=1.0, label_accuracy=1.0, success=1.0)])
        >>> metrics.update([VictimScore(mse=1e-1, psnr=10.0, ssim=0.1, label_accuracy=1.0, success=0.0)])
        >>> logged = metrics.compute()
        >>> list(logged)[:4]
        ['val/victims', 'val/psnr', 'val/psnr_low', 'val/psnr_high']
        >>> logged["val/psnr"], logged["val/success_rate"], logged["val/victims"]
        (30.0, 0.5, 2)
    """

    def __init__(self, metrics: Sequence[str] = tuple(_METRICS), *, prefix: str = "") -> None:
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        if not names:
            raise ValueError(f"Expected `metrics` to name at least one of {sorted(_METRICS)}, but got none.")
        for name in names:
            check_choice("metrics", name, _METRICS)
        super().__init__(VictimScore, {name: (_METRICS[name][0], _METRICS[name][1]()) for name in names})
        self.prefix = prefix

    def compute(self) -> dict[str, float]:
        """The estimates over all victims so far, as a flat dictionary."""
        logged: dict[str, float] = {}
        for name, estimate in self.by_name().items():
            logged |= {
                f"{self.prefix}victims": estimate.victims,
                f"{self.prefix}{name}": estimate.value,
                f"{self.prefix}{name}_low": estimate.low,
                f"{self.prefix}{name}_high": estimate.high,
            }
        return logged
