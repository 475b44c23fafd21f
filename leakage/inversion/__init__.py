"""The common part of all attacks: the search for many victims at once, lanes, processes and auditor."""

from leakage import notices
from leakage.inversion.gradient_inversion import GradientInversion
from leakage.inversion.reconstruction import Reconstruction

notices.leave_out()

__all__ = ["GradientInversion", "Reconstruction"]
