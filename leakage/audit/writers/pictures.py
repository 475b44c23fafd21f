"""Pictures of victims as data URIs, which the page contains."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

# Pictures up to the first size (longer side, pixels) keep every pixel. Larger ones would make the page too large to
# send, so they are reduced to the second size and stored as JPEG. The files beside the page keep all pixels.
_EXACT, _SHOWN, _QUALITY = 64, 160, 90


def data_uri(folder: Path, path: str) -> str:
    """Return a PNG of the folder as a data URI; ``""`` if it does not exist or can't be read.

    Raises:
        ValueError: the path leads out of the folder.
    """
    if not path:
        return ""
    try:
        file = (folder / path).resolve()
    except (OSError, ValueError):  # no file can have such a name
        return ""
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"Expected pictures within the audit's folder, but got {path!r}.")
    buffer = io.BytesIO()
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            if exact := max(picture.size) <= _EXACT:
                picture.save(buffer, "PNG", optimize=True)
            else:
                picture.thumbnail((_SHOWN, _SHOWN))
                picture.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    # A broken file raises different errors. A page without one picture is better than no page.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
