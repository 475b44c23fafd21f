"""What is published: what the wheel holds, and files that repeat the version."""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import leakage

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What a workflow of GitHub knows when a tag starts it.
TAGGED = {
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "someone/leakage",
    "GITHUB_REF_TYPE": "tag",
    "GITHUB_REF_NAME": "v0.2.0",
}
HOME = "https://github.com/someone/leakage"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    from hatchling.builders.wheel import WheelBuilder

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GITHUB_REF_TYPE", raising=False)
        (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "leakage").rglob("*") if path.is_file()}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in files if "__pycache__" not in name}
    for name in ("leakage/py.typed", "leakage/cli/demo_page.html", "leakage/datamodules/fashion_mnist_sample.png"):
        assert name in held
    kinds = {Path(name).suffix for name in held}
    assert kinds <= {".py", ".typed", ".png", ".txt", ".html", ".css", ".svg", ".json", ".md"}, (
        "of data, only what it shows"
    )
    assert sum(file.file_size for file in wheel.infolist()) < 5e6


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "leakage"
    assert metadata["Version"] == leakage.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_payload(decode=True) == README.encode(), "a local build knows no address"
    assert "Project-URL" not in metadata
    required = {
        re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert {"jinja2", "lightning", "torch", "torchmetrics", "torchvision", "wandb"} <= required
    licences = [name for name in wheel.namelist() if ".dist-info/licenses/" in name]
    assert len(licences) == 2, "that of the project, and that of the bundled images"
    (scripts,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "leakage = leakage.__main__:main" in wheel.read(scripts).decode()


def test_a_release_links_to_where_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    with monkeypatch.context() as patch:
        for name, value in TAGGED.items():
            patch.setenv(name, value)
        (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    monkeypatch.delenv("GITHUB_REF_TYPE", raising=False)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"leakage-{leakage.__version__}"
    assert {entry.name for entry in source.iterdir()} == {
        *(".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md"),
        *("hatch_build.py", "leakage", "pyproject.toml"),
    }
    # A wheel is built from the sdist, without these variables.
    metadata = WheelBuilder(str(source)).metadata.core
    assert metadata.urls == {
        "Homepage": HOME,
        "Documentation": "https://someone.github.io/leakage/",
        "Changelog": f"{HOME}/blob/v0.2.0/CHANGELOG.md",
        "Issues": f"{HOME}/issues",
    }
    assert "](https://github.com/someone/leakage/raw/v0.2.0/docs/front.png)\n" in metadata.readme
    links = re.findall(r"\]\((.*?)\)", metadata.readme)
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []
    files = [link.removeprefix(f"{HOME}/").split("/", 2)[2] for link in links if link.startswith(f"{HOME}/")]
    assert [name for name in files if not (ROOT / name.partition("#")[0]).is_file()] == []
    assert re.sub(rf"{HOME}/(raw|blob)/v0\.2\.0/", "", metadata.readme) == README, "and nothing else changes"


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == leakage.__version__
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == leakage.__version__


def test_names_of_the_package_are_there_when_they_are_asked_for() -> None:
    from leakage.models import LeNet

    assert leakage.LeNet is LeNet
    assert set(leakage.__all__) <= set(dir(leakage))
    assert leakage.attacks.IDLGAttack.__name__ == "IDLGAttack"
    with pytest.raises(AttributeError, match="module 'leakage' has no attribute 'Nothing'"):
        _ = leakage.Nothing
