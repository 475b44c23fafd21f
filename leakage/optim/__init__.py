"""Solvers with one state per victim."""

from leakage.optim.gauss_newton import SOLVERS, GaussNewton
from leakage.optim.lbfgs import LBFGS
from leakage.optim.per_victim import STATUS, PerVictimOptimizer
from leakage.optim.plain_lbfgs import PlainLBFGS
from leakage.optim.spectrum import ImageSpectrum

__all__ = ["LBFGS", "SOLVERS", "STATUS", "GaussNewton", "ImageSpectrum", "PerVictimOptimizer", "PlainLBFGS"]
