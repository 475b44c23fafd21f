"""Fixtures of attacks."""

from tests.kit import case, kit, lbfgs_case

__all__ = ["case", "kit", "lbfgs_case"]
