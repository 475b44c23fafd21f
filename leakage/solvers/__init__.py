"""Solvers with one state per victim."""

from leakage.solvers.gauss_newton import SOLVERS, GaussNewton
from leakage.solvers.lbfgs import LBFGS
from leakage.solvers.per_victim import STATUS, PerVictimOptimizer
from leakage.solvers.plain_lbfgs import PlainLBFGS
from leakage.solvers.spectrum import ImageSpectrum

__all__ = ["LBFGS", "SOLVERS", "STATUS", "GaussNewton", "ImageSpectrum", "PerVictimOptimizer", "PlainLBFGS"]
