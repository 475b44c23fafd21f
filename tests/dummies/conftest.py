"""Fixtures of attacks."""

from tests.kit import kit

__all__ = ["kit"]
