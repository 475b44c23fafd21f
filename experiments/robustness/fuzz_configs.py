"""Fuzzed configurations of ``leakage fit``: mutated YAML, other values and classes, tags that run code."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from fuzz_common import DEADLINE, ODD_VALUES, BrokenError, Outcome, TooSlowError, kind_of, mutated_bytes
from hypothesis import strategies as st

from leakage.cli.main import main

# Few steps on one victim; nothing here starts processes or waits for others.
SOUND: dict[str, Any] = {
    "seed_everything": False,
    "model": {
        "class_path": "leakage.attacks.IDLGAttack",
        "init_args": {"protocol": "robust", "seed": 0, "distance": "squared", "max_evaluations": 3, "restarts": 0},
    },
    "data": {
        "class_path": "leakage.datamodules.Victims",
        "init_args": {
            "dataset": "sample",
            "victims": 1,
            "images": 1,
            "seed": 0,
            "loss": "cross_entropy",
            "reveal_labels": False,
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "max_epochs": 1,
        "logger": False,
        "callbacks": [],
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "val_check_interval": 2,
        "precision": "32-true",
    },
    "ckpt_path": None,
}
_CLASSES = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "pathlib.Path.touch",
    "leakage.attacks",
    "leakage.attacks.GradientInversion",
    "leakage.attacks.IDLGAttack",
    "leakage.datamodules.Victims",
    "torch.nn.Linear",
    "lightning.LightningModule",
    "nothing.at.all",
    "",
    ".",
    "..os",
    "os.",
    "leakage.attacks.IDLGAttack.__init__",
    "lambda: 0",
]


def _places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    below = (
        [place for key, item in value.items() for place in _places(item, (*path, key))]
        if isinstance(value, dict)
        else []
    )
    return [path, *below] if path else below


def inputs(marker: Path) -> st.SearchStrategy[bytes]:
    """Return mutations of a valid configuration."""
    touch = f"touch {marker}"
    tags = [
        f"!!python/object/apply:os.system ['{touch}']",
        f"!!python/object/new:subprocess.Popen [['touch', '{marker}']]",
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!binary aGVsbG8=",
        "!unknown x",
        "!!set {a, b}",
        "!!timestamp 2001-01-01",
        "${oc.env:HOME}",
        "*missing",
        "0x" + "f" * 500,
        "1_0",
        ".nan",
        "[" * 2000,
        "[" * 2000 + "]" * 2000,
        "&a [*a]",
    ]
    calls: list[dict[str, Any]] = [
        {"class_path": "os.system", "init_args": {"command": touch}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}},
        {"class_path": "builtins.eval", "init_args": {"source": f"open({str(marker)!r}, 'w')"}},
        {"class_path": "pathlib.Path.touch", "init_args": {"self": str(marker)}},
        {"class_path": "builtins.open", "init_args": {"file": str(marker), "mode": "w"}},
    ]
    laughs = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    whole = yaml.safe_dump(SOUND).encode()
    places = [place for place in _places(SOUND) if place[-1] != "max_steps" and place != ("trainer",)]
    values = (
        ODD_VALUES
        | st.sampled_from(_CLASSES)
        | st.sampled_from(calls)
        | st.sampled_from(calls).map(lambda call: [call])
    )
    changed = st.lists(
        st.tuples(
            st.sampled_from(["value", "value", "delete", "add", "class"]),
            st.sampled_from(places),
            values,
            st.sampled_from(_CLASSES),
        ),
        min_size=1,
        max_size=2,
    ).map(_edited)
    tagged = st.tuples(st.sampled_from(places), st.sampled_from(tags)).map(_tagged)
    return st.one_of(
        changed,
        changed,
        tagged,
        mutated_bytes(whole),
        st.sampled_from([b"", b"\0", b"\xff\xfe", b"[]", b"3", b"- a", b"a: b: c", b"--- {}\n--- {}", whole + whole]),
        st.just(f"l0: &l0 [0]\n{laughs}\n".encode() + whole),
    )


def _edited(edits: list[tuple[str, tuple[str, ...], Any, str]]) -> bytes:
    config = copy.deepcopy(SOUND)
    for kind, place, value, name in edits:
        try:
            parent = config
            for key in place[:-1]:
                parent = parent[key]
            if kind == "delete":
                del parent[place[-1]]
            elif kind == "add":
                parent["unknown"] = value
            elif kind == "class":
                parent[place[-1]] = {"class_path": name, "init_args": value}
            else:
                parent[place[-1]] = value
        except (KeyError, TypeError, IndexError):
            continue
    try:
        return yaml.safe_dump(config).encode("utf-8", "replace")
    except yaml.YAMLError:
        return b""


def _tagged(edit: tuple[tuple[str, ...], str]) -> bytes:
    place, tag = edit
    config = copy.deepcopy(SOUND)
    parent = config
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = "HERE"
    return yaml.safe_dump(config).replace("HERE", tag).encode()


def check(data: bytes, folder: Path, marker: Path) -> Outcome:
    """Run the command line on this configuration: it must succeed, or exit with code 2 and one line of explanation."""
    path = folder / "config.yaml"
    path.write_bytes(data)
    said = io.StringIO()
    here, modules = Path.cwd(), set(sys.modules)

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    earlier = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 3 * DEADLINE)
    os.chdir(folder)
    code: Any = 0
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            main(["fit", "--config", str(path)])
    except SystemExit as end:
        code = end.code
    except TooSlowError as error:
        raise BrokenError(f"Expected the run to end within {3 * DEADLINE} s, but it did not.") from error
    except BaseException as error:
        raise BrokenError(f"Expected one line, but got a traceback: {error!r:.300}") from error
    finally:
        os.chdir(here)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    if marker.exists():
        marker.unlink()
        raise BrokenError("Expected that no code in the input is run, but got the file that it creates.")
    if "antigravity" in set(sys.modules) - modules:
        raise BrokenError("Expected that no module is imported by a tag, but got 'antigravity'.")
    if code == 0:
        return Outcome("")
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    if code != 2 or len(lines) != 1 or not lines[0].startswith("leakage fit: error: "):
        raise BrokenError(f"Expected code 2 and one line, but got {code!r:.200} and {lines[:3]!r:.500}.")
    if len(lines[0]) > 3000:
        raise BrokenError(f"Expected a short line, but got {len(lines[0])} characters.")
    return Outcome(kind_of(lines[0]))
