"""Solvers with one state per victim."""

from leakage.optim.lbfgs import LBFGS
from leakage.optim.per_victim import STATUS, PerVictimOptimizer
from leakage.optim.plain_lbfgs import PlainLBFGS

__all__ = ["LBFGS", "STATUS", "PerVictimOptimizer", "PlainLBFGS"]
