"""Attacks: one paper per file, on the loop of :class:`GradientMatchingAttack`."""

from leakage.attacks.base import PROTOCOLS, GradientMatchingAttack, SearchProtocol
from leakage.attacks.dlg import DLGAttack
from leakage.attacks.idlg import IDLGAttack

__all__ = ["PROTOCOLS", "DLGAttack", "GradientMatchingAttack", "IDLGAttack", "SearchProtocol"]
