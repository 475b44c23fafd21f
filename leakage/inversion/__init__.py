"""What attacks share: the search for many victims at once, its lanes, processes and auditor."""

from leakage import notices
from leakage.inversion.gradient_inversion import GradientInversion
from leakage.inversion.reconstruction import Reconstruction

notices.leave_out()

__all__ = ["GradientInversion", "Reconstruction"]
