from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st


def test_counts_what_it_has_tried(fuzz: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fuzz.script.main(["--examples", "30", "--kinds", "shared", "images", "--output", str(tmp_path / "f.json")])
    assert end.value.code == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert set(found["kinds"]) == {"shared", "images"}
    for kind in found["kinds"].values():
        assert kind["inputs"] == 30 == kind["loaded"] + sum(kind["refused"].values())
        assert not kind["failures"]
    assert "shared                    30 inputs: " in capsys.readouterr().out


def test_tells_failures(fuzz: SimpleNamespace) -> None:
    def check(number: int) -> object:
        if number > 3:
            raise fuzz.common.BrokenError("Expected at most 3.")
        return fuzz.common.Outcome("odd" if number % 2 else "")

    found = fuzz.script.tally("numbers", st.integers(0, 9), check, 10, 0)
    assert found.inputs == 10
    assert (found.loaded, dict(found.refused), dict(found.failures)) == (2, {"odd": 2}, {"Expected at most 3.": 6})
    assert int(found.examples["Expected at most 3."]) > 3


def test_an_attempt_fails_where_it_should(fuzz: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> Callable[[], None]:
        def read() -> None:
            raise error

        return read

    with pytest.raises(fuzz.common.BrokenError, match="Expected a ValueError or an OSError, but got KeyError"):
        fuzz.common.attempt(raises(KeyError("x")))
    with pytest.raises(fuzz.common.BrokenError, match="Expected a message of the library"):
        fuzz.common.attempt(raises(ValueError("invalid literal")))
    with pytest.raises(fuzz.common.BrokenError, match=r"that names 'this\.file'"):
        fuzz.common.attempt(raises(ValueError("Expected a file, but got none")), named="this.file")
    assert fuzz.common.attempt(raises(ValueError("Expected 1 file, but got 2"))).refusal.startswith(
        "ValueError: Expected #"
    )
    monkeypatch.setattr(fuzz.common, "MEMORY", 2**25)
    with pytest.raises(fuzz.common.BrokenError, match="Expected less than 32 MiB more, but got"):
        fuzz.common.attempt(lambda: len(b"1" * 2**30))


def test_an_attempt_ends_in_time(fuzz: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def endless() -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz.common, "DEADLINE", 0.05)
    with pytest.raises(fuzz.common.BrokenError, match=r"Expected reading to end within 0\.05 s"):
        fuzz.common.attempt(endless)
    (tmp_path / "marker").touch()
    with pytest.raises(fuzz.common.BrokenError, match="no code in the input is run"):
        fuzz.common.attempt(lambda: None, marker=tmp_path / "marker")
