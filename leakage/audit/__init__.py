"""What an audit may say: bounds on what any attacker can achieve against a declared mechanism."""

from leakage.audit.bounds import (
    approximate_success_bound,
    gaussian_renyi_epsilon,
    gaussian_success_bound,
    mse_bound,
    subsampled_success_bound,
)
from leakage.audit.consistency import check_shared, check_update

__all__ = [
    "approximate_success_bound",
    "check_shared",
    "check_update",
    "gaussian_renyi_epsilon",
    "gaussian_success_bound",
    "mse_bound",
    "subsampled_success_bound",
]
