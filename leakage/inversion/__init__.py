"""What attacks share: the search for many victims at once, its lanes, processes and auditor."""

from leakage.inversion.gradient_inversion import GradientInversion
from leakage.inversion.reconstruction import Reconstruction

__all__ = ["GradientInversion", "Reconstruction"]
