"""Pictures of victims within the page itself, as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

# Larger ones are shown smaller; the files beside the page keep every pixel.
_SIDE = 160


def data_uri(folder: Path, path: str) -> str:
    """A PNG of the folder as a data URI; ``""`` if there is none, or none that can be read.

    Raises:
        ValueError: the path leads out of the folder.
    """
    if not path:
        return ""
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"Expected pictures within the audit's folder, but got {path!r}.")
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            picture.thumbnail((_SIDE, _SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG", optimize=True)
    # What a broken file raises depends on where it is broken; a page with a gap is better than none.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
