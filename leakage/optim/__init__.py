"""Solvers with one state per victim."""

from leakage.optim.lbfgs import LBFGS
from leakage.optim.per_victim import STATUS, PerVictimOptimizer
from leakage.optim.plain_lbfgs import PlainLBFGS
from leakage.optim.spectrum import ImageSpectrum

__all__ = ["LBFGS", "STATUS", "ImageSpectrum", "PerVictimOptimizer", "PlainLBFGS"]
