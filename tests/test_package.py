"""What is published: what the wheel holds, and files that repeat the version."""

from __future__ import annotations

import email
import re
import zipfile
from pathlib import Path

import pytest
import yaml

import leakage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    from hatchling.builders.wheel import WheelBuilder

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
    told = email.message_from_bytes(wheel.read(name))
    assert told["Name"] == "leakage"
    assert told["Version"] == leakage.__version__
    assert told["License-Expression"] == "MIT"
    required = {re.split(r"[^\w-]", line)[0] for line in told.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {"jinja2", "lightning", "torch", "torchmetrics", "torchvision", "wandb"} <= required
    licences = [name for name in wheel.namelist() if ".dist-info/licenses/" in name]
    assert len(licences) == 2, "that of the project, and that of the bundled images"
    (scripts,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "leakage = leakage.__main__:main" in wheel.read(scripts).decode()


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
