"""What attacks raise: losses of each image from logits of one or several noisy copies of it.

Every loss maps logits [m·B, C] and labels [B] to [B], in the logits' type. Rows i·m … i·m + m - 1 are the m copies of
image i; m is not given but follows from the two lengths.

    cross_entropy       -log p[label], p = softmax(logits)                                                   one copy
                        -log max(mean_j p_j[label], 1e-20), SmoothAdv's objective (Salman et al. 2019,    m > 1 copies
                        arXiv:1906.04584): the loss of the smoothed classifier, not the mean of the losses
    targeted(loss)      -loss, for labels that are targets

The mean over copies is taken of logarithms (logsumexp), so that nothing overflows and a small probability keeps its
digits. The published floor stays: below 1e-20 (46 nats) an image's gradient is zero, and it rests. With one copy the
published code has no floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]

FLOOR = 1e-20  # of the mean probability over copies


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image [B] in nats; of m copies of it, that of their mean probability.

    Args:
        logits: [m·B, C].
        labels: classes [B] int64.

    Raises:
        ValueError: logits that are not a whole number of rows for each label.
    """
    if len(logits) == len(labels):
        return F.cross_entropy(logits, labels, reduction="none")
    own = mean_log_probabilities(logits, len(labels)).gather(1, labels[:, None])[:, 0]
    return -own.clamp(min=math.log(FLOOR))


def mean_log_probabilities(logits: Tensor, samples: int) -> Tensor:
    """Logarithms [B, C] of the probabilities that each image has on average over its copies.

    Args:
        logits: [m·B, C].
        samples: B.

    Raises:
        ValueError: m is not a whole number.
    """
    if not samples or len(logits) % samples:
        raise ValueError(f"logits {tuple(logits.shape)} are not a whole number of copies of {samples} images")
    copies = len(logits) // samples
    log_probabilities = logits.log_softmax(1).unflatten(0, (samples, copies))
    return log_probabilities.logsumexp(1) - math.log(copies)


def targeted(loss: Loss) -> Loss:
    """The loss that grows as `loss` shrinks: raising it brings each image closer to its label, which is a target."""

    def negative(logits: Tensor, labels: Tensor) -> Tensor:
        return -loss(logits, labels)

    return negative
