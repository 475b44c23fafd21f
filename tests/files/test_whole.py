from __future__ import annotations

import os
from pathlib import Path

import pytest

from leakage.files.text import write_csv, write_json, write_text
from leakage.files.whole import check_output, remove_partials, whole_file


def test_a_file_is_there_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with whole_file(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")
    words = f"^Expected to write '{path}', but got: .*No space left" if isinstance(error, OSError) else None

    def write_half() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error), match=words):
        write_half()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^Expected to write '.*file/a', but got: "), whole_file(tmp_path / "file" / "a"):
        pytest.fail("nothing to write to")


def test_two_processes_that_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with whole_file(path) as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: 7)
        with whole_file(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert other.name == "file.7.partial"
    assert list(tmp_path.iterdir()) == [path]


def test_removes_what_was_left_half_written(tmp_path: Path) -> None:
    names = ["a.txt", "a.txt.7.partial", "b.txt.7.partial", "a.partial", "parts/a_1.x.7.partial", "parts/b.7.partial"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_partials(tmp_path, "a.txt", "parts/a_*.x")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a.txt", "b.txt.7.partial", "a.partial", "parts/b.7.partial"}


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ä\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\r\n\n".encode()


def test_json_knows_no_infinity(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1.5, float("nan")], "b": (float("inf"), None)})
    assert "".join((tmp_path / "a.json").read_text().split()) == '{"a":[1.5,null],"b":[null,null]}'


def test_a_table_has_eight_digits(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["one", "two"], [[1, 1 / 3], [None, "x,y"]])
    assert (tmp_path / "a.csv").read_bytes() == b'one,two\r\n1,0.33333333\r\n,"x,y"\r\n'


def test_a_folder_for_output(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Expected `output` to be a folder that can be written, but got '.*file': "):
        check_output(tmp_path / "file")
