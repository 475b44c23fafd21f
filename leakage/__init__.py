"""leakage: what a shared gradient gives away."""

from leakage.models import LeNet
from leakage.shared_gradient import Protocol, SharedGradient
from leakage.victim import Victim

__version__ = "0.1.0"

__all__ = ["LeNet", "Protocol", "SharedGradient", "Victim"]
