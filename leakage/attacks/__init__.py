"""Attacks: one paper per file, on the loop of :class:`GradientMatchingAttack`."""

from leakage.attacks.dlg import DLGAttack
from leakage.attacks.gauss_newton import GaussNewtonAttack
from leakage.attacks.idlg import IDLGAttack
from leakage.attacks.protocols import PROTOCOLS, SearchProtocol
from leakage.attacks.rgap import RGAPAttack
from leakage.inversion.gradient_inversion import GradientMatchingAttack

__all__ = [
    "PROTOCOLS",
    "DLGAttack",
    "GaussNewtonAttack",
    "GradientMatchingAttack",
    "IDLGAttack",
    "RGAPAttack",
    "SearchProtocol",
]
