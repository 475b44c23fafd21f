"""Updates of real systems: read them as shared gradients, and capture them as they leave a client."""

from leakage.updates.flower import CaptureUpdates
from leakage.updates.reading import read_update

__all__ = ["CaptureUpdates", "read_update"]
