"""leakage: what a shared gradient gives away."""

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.models import LeNet

__version__ = "0.1.0"

__all__ = ["LeNet", "Protocol", "SharedGradient", "Victim"]
