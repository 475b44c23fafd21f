"""Metadata of a release: where the project is published, and links in the README that work on PyPI."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# The target of a Markdown link or picture that is a file of the repository.
_FILE = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


class ReleaseMetadata(MetadataHookInterface):
    """Set ``readme`` and ``urls``.

    In a workflow of GitHub that runs for a tag, as ``release.yml`` does, the repository's address is known: the URLs
    are derived from it, and relative links in the README become links to the files of that tag. In any other build, the
    README stays as it is and there are no URLs. A wheel that is built from an sdist has the metadata of the sdist.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the fields to the ``[project]`` table of pyproject.toml."""
        if "readme" in metadata:  # it came from the sdist
            metadata.setdefault("urls", {})
            return
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        urls = {}
        if os.environ.get("GITHUB_REF_TYPE") == "tag":
            owner, name = os.environ["GITHUB_REPOSITORY"].split("/")
            home, tag = f"{os.environ['GITHUB_SERVER_URL']}/{owner}/{name}", os.environ["GITHUB_REF_NAME"]
            text = _FILE.sub(
                lambda link: f"{link[1]}{link[2]}({home}/{'raw' if link[1] else 'blob'}/{tag}/{link[3]})", text
            )
            urls = {
                "Homepage": home,
                "Documentation": f"https://{owner}.github.io/{name}/",
                "Changelog": f"{home}/blob/{tag}/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls
