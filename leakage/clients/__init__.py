"""Clients of federated learning: how they compute gradients, and what they share."""

from leakage.clients.activations import Activation
from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.precision import full_precision

__all__ = ["Activation", "Protocol", "SharedGradient", "Victim", "full_precision"]
