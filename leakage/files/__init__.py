"""Files: written whole or not at all, read without running code."""

from leakage.files.checkpoints import WholeCheckpointIO

__all__ = ["WholeCheckpointIO"]
