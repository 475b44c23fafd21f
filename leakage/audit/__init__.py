"""What an audit may say: its report, and bounds on what any attacker can achieve against a declared mechanism."""

from leakage.audit.bounds import (
    approximate_success_bound,
    gaussian_renyi_epsilon,
    gaussian_success_bound,
    mse_bound,
    subsampled_success_bound,
)
from leakage.audit.report import (
    AuditReport,
    Bound,
    Check,
    Declared,
    Figure,
    Measured,
    Planned,
    Problem,
    Threshold,
    VictimRow,
    read_victims,
    write_victims,
)

__all__ = [
    "AuditReport",
    "Bound",
    "Check",
    "Declared",
    "Figure",
    "Measured",
    "Planned",
    "Problem",
    "Threshold",
    "VictimRow",
    "approximate_success_bound",
    "gaussian_renyi_epsilon",
    "gaussian_success_bound",
    "mse_bound",
    "read_victims",
    "subsampled_success_bound",
    "write_victims",
]
