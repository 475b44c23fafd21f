"""leakage: what a shared gradient gives away."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leakage.clients.protocol import Protocol
    from leakage.clients.shared_gradient import SharedGradient
    from leakage.clients.victim import Victim
    from leakage.models import LeNet

__version__ = "0.2.0"

__all__ = ["LeNet", "Protocol", "SharedGradient", "Victim"]

_HOMES = {"LeNet": "models", "Protocol": "clients", "SharedGradient": "clients", "Victim": "clients"}


def __getattr__(name: str) -> Any:
    # Imported on first use: torch alone takes seconds to import, and `leakage --help` does not need it.
    if name in _HOMES:
        return getattr(import_module(f"leakage.{_HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"leakage.{name}"):
        return import_module(f"leakage.{name}")
    raise AttributeError(f"module 'leakage' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
