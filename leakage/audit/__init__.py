"""What an audit may say: bounds on what any attacker can achieve against a declared mechanism."""

from leakage.audit.bounds import (
    approximate_success_bound,
    gaussian_renyi_epsilon,
    gaussian_success_bound,
    mse_bound,
    subsampled_success_bound,
)

__all__ = [
    "approximate_success_bound",
    "gaussian_renyi_epsilon",
    "gaussian_success_bound",
    "mse_bound",
    "subsampled_success_bound",
]
