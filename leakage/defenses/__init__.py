"""What a client does to its gradient before it shares it."""

from leakage.defenses.base import Defense
from leakage.defenses.clip import Clip
from leakage.defenses.gaussian_noise import GaussianNoise
from leakage.defenses.top_k import TopK

__all__ = ["Clip", "Defense", "GaussianNoise", "TopK"]
