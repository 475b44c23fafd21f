"""Clients: what one does with its images, and what it shares."""

from leakage.clients.activations import Activation
from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.precision import full_precision

__all__ = ["Activation", "Protocol", "SharedGradient", "Victim", "full_precision"]
