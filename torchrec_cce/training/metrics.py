"""How good predicted click probabilities are."""

from dataclasses import dataclass

import torch
from torchmetrics.functional.classification import binary_auroc


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one model on one split."""

    bce: float
    """Mean binary cross entropy, nats a row."""
    auc: float
    """Area under the ROC curve; NaN where all labels are equal, or where a logit is NaN."""
    rows: int


def quality(logits: torch.Tensor, labels: torch.Tensor) -> Quality:
    """BCE and exact AUC of `logits: [N] float32` against `labels: [N] float32` of 0 and 1.

    Raises:
        ValueError: N is 0.
    """
    if len(labels) == 0:
        raise ValueError("no rows to evaluate")
    logits = logits.double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double()).item()
    positives = int(labels.sum())
    undefined = positives in (0, len(labels)) or bool(logits.isnan().any())
    auc = float("nan") if undefined else binary_auroc(logits.sigmoid(), labels.int()).item()
    return Quality(bce=bce, auc=auc, rows=len(labels))
