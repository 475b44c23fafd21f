"""Audit training for gradient leakage: :func:`audit` attacks clients that train the way a LightningModule does."""

from leakage.audit.auditing import THREAT_MODELS, audit
from leakage.audit.bounds import (
    approximate_success_bound,
    gaussian_renyi_epsilon,
    gaussian_success_bound,
    mse_bound,
    subsampled_success_bound,
)
from leakage.audit.client import Client
from leakage.audit.consistency import check_shared, check_update
from leakage.audit.plan import ATTACKS
from leakage.audit.report import AuditReport

__all__ = [
    "ATTACKS",
    "THREAT_MODELS",
    "AuditReport",
    "Client",
    "approximate_success_bound",
    "audit",
    "check_shared",
    "check_update",
    "gaussian_renyi_epsilon",
    "gaussian_success_bound",
    "mse_bound",
    "subsampled_success_bound",
]
