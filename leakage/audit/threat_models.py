"""What attackers of federated learning see, know and may do."""

from __future__ import annotations

from leakage.audit.report import Problem

#: What an attacker knows and may do, after Carletti et al., *SoK: Gradient Inversion Attacks in Federated Learning*,
#: USENIX Security 2025.
THREAT_MODELS = {
    "A": "eavesdropper: sees updates",
    "B": "informed eavesdropper: sees updates, knows the task",
    "C": "parameter-aware eavesdropper: sees updates, knows the task and how clients train",
    "D": "data-enhanced eavesdropper: sees updates, knows how clients train, has images of the same kind",
    "E": "statistical-informed eavesdropper: as D, and knows statistics of the client's own data",
    "F": "active manipulator: sees updates, knows how clients train, changes the model that it sends",
    "G": "data-enhanced manipulator: as F, and has images of the same kind",
    "H": "active client manipulator: as G, and chooses which clients take part",
}


def problems_of(threat_model: str) -> list[Problem]:
    """Return the problem that all attacks here only observe, if the attacker with this letter does more."""
    if threat_model in "ABCD":
        return []
    knows, changes = "knows statistics of the client's data", "changes the model that it sends"
    does = knows if threat_model == "E" else changes
    return [
        Problem(
            *("not yet", "threat_model", f"an attacker who {does}"),
            "Inspect the models that clients receive before they train on them.",
            "The verdict is for attackers who only observe (threat model D). The declared one may find more.",
        )
    ]
