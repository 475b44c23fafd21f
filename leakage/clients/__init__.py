"""Clients: what one does with its images, and what it shares."""

from leakage.clients.shared_gradient import Protocol, SharedGradient
from leakage.clients.victim import Victim

__all__ = ["Protocol", "SharedGradient", "Victim"]
