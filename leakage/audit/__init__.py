"""Audit training for gradient leakage: :func:`audit` attacks clients that train the way a LightningModule does."""

from leakage.audit.auditing import audit
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
from leakage.audit.threat_models import THREAT_MODELS

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
