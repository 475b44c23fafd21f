"""Messages of other libraries that would stand between a user and a result: two advertisements, two warnings.

Importing attacks or condensation leaves these out, and no others::

    💡 Tip: For seamless cloud logging and experiment tracking, try installing ...
    💡 Tip: For seamless cloud uploads and versioning, try installing ...
    Starting from v1.9.0, `tensorboardX` has been removed as a dependency ... pip install ...
    `isinstance(treespec, LeafSpec)` is deprecated, use ...

The last is Lightning's to mend, and nothing that its users can change. All else that Lightning says and warns of is
shown as it would be without this library.
"""

from __future__ import annotations

import logging
import warnings

_ADVERTISEMENT = "💡 Tip: For seamless cloud"
_WARNINGS = (
    r"Starting from v1\.9\.0, `tensorboardX` has been removed as a dependency",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVERTISEMENT)


def leave_out() -> None:
    """Leave out the messages above from now on; calling it again changes nothing."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
