from __future__ import annotations

import pytest

from leakage.labels import inference, posterior


@pytest.fixture
def quick_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """A posterior that learns in a moment, and less well; fewer clients for `auto` to try on."""
    _set(monkeypatch, clients=512, passes=15)


@pytest.fixture
def hasty_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """A posterior that learns next to nothing, for tests of what is around it."""
    _set(monkeypatch, clients=64, passes=2)


def _set(monkeypatch: pytest.MonkeyPatch, *, clients: int, passes: int) -> None:
    monkeypatch.setattr(posterior, "_FEWEST", clients)
    monkeypatch.setattr(posterior, "_MOST", clients)
    monkeypatch.setattr(posterior, "_PASSES", passes)
    monkeypatch.setattr(posterior, "_BATCH", 64)
    monkeypatch.setattr(posterior, "_WIDTH", 32)
    monkeypatch.setattr(inference, "_TRIED_ON", 100)
