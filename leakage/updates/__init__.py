"""Updates of real systems: read as shared gradients, and captured as they leave a client."""

from leakage.updates.flower import CaptureUpdates
from leakage.updates.reading import read_update

__all__ = ["CaptureUpdates", "read_update"]
