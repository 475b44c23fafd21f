"""Solvers, which move the unknowns of many victims at once, with one state per victim."""

from leakage.solvers.adam import Adam, SignedAdam
from leakage.solvers.continuation import Continuation
from leakage.solvers.gauss_newton import SOLVERS, GaussNewton
from leakage.solvers.lbfgs import LBFGS
from leakage.solvers.no_search import NoSearch
from leakage.solvers.per_victim import PerVictimOptimizer
from leakage.solvers.plain_lbfgs import PlainLBFGS
from leakage.solvers.solver import STATUS, STEERING, Evaluated, Problem, Solver, running, settle
from leakage.solvers.spectrum import ImageSpectrum

__all__ = [
    "LBFGS",
    "SOLVERS",
    "STATUS",
    "STEERING",
    "Adam",
    "Continuation",
    "Evaluated",
    "GaussNewton",
    "ImageSpectrum",
    "NoSearch",
    "PerVictimOptimizer",
    "PlainLBFGS",
    "Problem",
    "SignedAdam",
    "Solver",
    "running",
    "settle",
]
