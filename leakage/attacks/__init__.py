"""Attacks: one file per paper, each a choice of pieces for :class:`GradientInversion`."""

from leakage.attacks.continuation import ContinuationAttack
from leakage.attacks.dlg import DLGAttack
from leakage.attacks.gauss_newton import GaussNewtonAttack
from leakage.attacks.gias import GIASAttack
from leakage.attacks.gradinversion import GradInversionAttack
from leakage.attacks.idlg import IDLGAttack
from leakage.attacks.inverting_gradients import InvertingGradientsAttack
from leakage.attacks.protocols import PROTOCOLS, SearchProtocol
from leakage.attacks.rgap import RGAPAttack
from leakage.inversion import GradientInversion

__all__ = [
    "PROTOCOLS",
    "ContinuationAttack",
    "DLGAttack",
    "GIASAttack",
    "GaussNewtonAttack",
    "GradInversionAttack",
    "GradientInversion",
    "IDLGAttack",
    "InvertingGradientsAttack",
    "RGAPAttack",
    "SearchProtocol",
]
