"""Attacks: one paper per file, on the loop of :class:`GradientMatchingAttack`."""

from leakage.attacks.base import GradientMatchingAttack
from leakage.attacks.dlg import DLGAttack
from leakage.attacks.idlg import IDLGAttack
from leakage.attacks.protocols import PROTOCOLS, SearchProtocol

__all__ = ["PROTOCOLS", "DLGAttack", "GradientMatchingAttack", "IDLGAttack", "SearchProtocol"]
