"""Pictures of victims within the page itself, as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

# Up to this side every pixel is kept, beyond it the page would be too large to send around: pictures are shown smaller
# and as JPEG, and the files beside the page keep their pixels.
_EXACT, _SHOWN, _QUALITY = 64, 160, 90


def data_uri(folder: Path, path: str) -> str:
    """A PNG of the folder as a data URI; ``""`` if there is none, or none that can be read.

    Raises:
        ValueError: the path leads out of the folder.
    """
    if not path:
        return ""
    try:
        file = (folder / path).resolve()
    except (OSError, ValueError):  # a name that no file can have
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
    # What a broken file raises depends on where it is broken; a page with a gap is better than none.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
