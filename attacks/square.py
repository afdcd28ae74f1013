"""Square attack (Andriushchenko et al. 2020, arXiv:1912.00049): random search on the scores of a black box, batched.

No gradient is taken: a network that hides its gradients is attacked as well as any other. Of each image the margin
z_y - max_{k≠y} z_k is lowered. A query changes a square window of the perturbation δ; the change is kept if the margin
is lower. The side of the window is √(p·H·W), where p falls in steps, after Q/1000, Q/200, Q/50, Q/20, Q/10, Q/5, 2Q/5,
3Q/5 and 4Q/5 of Q queries, from `p_init` to p_init/512 (`share`; Q = 10,000 is the published schedule).

    linf   start: vertical stripes of width 1, ±eps for each channel; window: ±eps, one sign for each channel
    l2     start: 25 tiles, each the pattern η with a random sign for each channel, together of norm eps; window: the
           norm of a second window (which is emptied) and what was left of eps are moved into the first, where they
           change δ/‖δ‖ by ±η. η: two halves of opposite sign, each a pyramid of nested rectangles with heights 1/k²,
           cut along rows or columns by chance; sides are odd and at least 3.

Every image has windows and signs of its own (AutoAttack's code draws one window for the batch), at all places where the
window fits. An image is asked about until the model gets it wrong; the host waits for each answer to know which are
left. Defaults are AutoAttack's standard: 5,000 queries, p_init 0.8.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from attacks.apgd import Found, check_settings, look
from attacks.pgd import Network, Norm, Precision, check_batch, misclassified, under_attack

# Queries of 10,000 after which p is halved.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def share(query: int, queries: int, p_init: float) -> float:
    """p, the share of the pixels in the window, of 0-based `query` of `queries`."""
    at = query * 10_000 // queries
    return p_init / 2 ** sum(at > halved for halved in HALVED_AFTER)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{k≠y} z_k [B] of logits [B, C] and classes [B]: negative where the prediction is wrong."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], float("-inf")).amax(1)


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float,
    queries: int = 5000,
    p_init: float = 0.8,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    check_images: bool = True,
) -> Found:
    """What the search finds of each image, with at most `queries` questions about it after that about its start.

    Args:
        model: images in [0, 1] → logits [B, C]; in evaluation mode meanwhile.
        images: [B, C, H, W] float32, or float64 with a model of that type.
        labels: true classes [B] int64.
        norm, eps: of the ball, for pixels in [0, 1]; 0 gives the images.
        generator: of the images' device; None: the global one.
        precision: of the questions; whether an image fools the model is decided without autocast.
        check_images: as in `attacks.pgd.pgd`.

    Returns:
        `Found`; its losses are the negative of the lowest margins, as they came in `precision`.

    Raises:
        ValueError: what `attacks.pgd.pgd` refuses of these, images that have not four dimensions, queries below 1,
            p_init outside (0, 1].
    """
    check_settings(norm, eps, queries)
    check_batch(images, labels, look=check_images)
    if images.ndim != 4 or labels.ndim != 1:
        raise ValueError(f"images {tuple(images.shape)}, labels {tuple(labels.shape)}: expected [B, C, H, W] and [B]")
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must be in (0, 1], not {p_init}")
    found = Found(
        images.detach().clone(), labels.new_zeros(len(labels), dtype=torch.bool), images.new_zeros(len(images))
    )
    if not images.numel():
        return found
    with under_attack(model, images.device, precision=precision) as network, torch.no_grad():
        logits = look(network, images)
        found.fooled[:] = misclassified(logits, labels)
        found.losses[:] = -margin(logits, labels)
        if eps == 0:
            return found
        place = (~found.fooled).nonzero()[:, 0]  # of those that still stand
        clean, labels = images[place].clamp(0, 1), labels[place]
        propose = _linf_window if norm == "linf" else _l2_window
        best = (_linf_start if norm == "linf" else _l2_start)(clean, eps, generator)
        lowest = torch.full_like(clean[:, 0, 0, 0], float("inf"))
        candidate = best
        for query in range(queries + 1):  # the first one is about the start
            if not len(place):
                break
            if query:
                candidate = propose(best, clean, eps, share(query - 1, queries, p_init), generator)
            asked, fooled = _ask(network, candidate, labels)
            better = (asked < lowest) | fooled
            best = torch.where(better[:, None, None, None], candidate, best)
            lowest = torch.where(better, asked, lowest)
            left = (~fooled).nonzero()[:, 0]
            if len(left) < len(place):
                found.images[place], found.fooled[place], found.losses[place] = best, fooled, -lowest.to(images.dtype)
                place, clean, labels, best, lowest = (x[left] for x in (place, clean, labels, best, lowest))
        found.images[place], found.losses[place] = best, -lowest.to(images.dtype)
    return found


def _ask(network: Network, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Margins [B], and which of the images are misclassified [B]."""
    logits = network(images)
    fooled = misclassified(logits, labels)
    if torch.is_autocast_enabled(images.device.type) and bool(fooled.any()):
        fooled &= misclassified(look(network, images), labels)
    return margin(logits if logits.dtype == torch.float64 else logits.float(), labels), fooled


# ----------------------------------------------------------------------------------------------------------------------
# Chance
# ----------------------------------------------------------------------------------------------------------------------


def _signs(clean: Tensor, width: int, generator: torch.Generator | None) -> Tensor:
    """±1 [B, C, 1, width], each with probability 1/2."""
    drawn = torch.randint(2, (len(clean), clean.shape[1], 1, width), device=clean.device, generator=generator)
    return (2 * drawn - 1).to(clean.dtype)


def _window(clean: Tensor, side: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Indices into [B, C, H, W] that broadcast to [B, C, side, side]: a window of each image, wherever it fits."""
    samples, channels, height, width = clean.shape
    top = torch.randint(height - side + 1, (samples, 1, 1, 1), device=clean.device, generator=generator)
    left = torch.randint(width - side + 1, (samples, 1, 1, 1), device=clean.device, generator=generator)
    along = torch.arange(side, device=clean.device)
    row = torch.arange(samples, device=clean.device)[:, None, None, None]
    channel = torch.arange(channels, device=clean.device)[:, None, None]
    return row, channel, top + along[:, None], left + along


# ----------------------------------------------------------------------------------------------------------------------
# L∞
# ----------------------------------------------------------------------------------------------------------------------


def _linf_start(clean: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    return (clean + eps * _signs(clean, clean.shape[3], generator)).clamp_(0, 1)


def _linf_window(best: Tensor, clean: Tensor, eps: float, p: float, generator: torch.Generator | None) -> Tensor:
    height, width = clean.shape[2:]
    side = min(max(round(math.sqrt(p * height * width)), 1), height, width)
    window = _window(clean, side, generator)
    candidate = best.clone()
    candidate[window] = (clean[window] + eps * _signs(clean, 1, generator)).clamp_(0, 1)
    return candidate


# ----------------------------------------------------------------------------------------------------------------------
# L2
# ----------------------------------------------------------------------------------------------------------------------


def pyramid(height: int, width: int) -> Tensor:
    """Nested rectangles around the middle, the k-th adding 1/k² (from the inside), float64 [height, width]."""
    heights = torch.zeros(height, width, dtype=torch.float64)
    top, left = height // 2, width // 2
    for k in range(1, max(height // 2 + 1, width // 2 + 1) + 1):
        heights[max(top, 0) : top + 2 * k - 1, max(left, 0) : left + 2 * k - 1] += 1 / k**2
        top, left = top - 1, left - 1
    return heights


@functools.cache
def pattern(side: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
    """η of norm 1 [side, side]: a pyramid over a negative one, each first of norm 1. Not to be written to."""
    halves = [pyramid(side // 2, side), -pyramid(side - side // 2, side)]
    whole = torch.cat([half / half.norm() for half in halves if half.numel()])
    return (whole / whole.norm()).to(device, dtype)


def _patterns(clean: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
    """±η or ±ηᵀ [B, C, side, side]; the sign is drawn for each channel, the direction for each image."""
    eta = pattern(side, clean.dtype, clean.device)
    drawn = torch.rand((len(clean), 1, 1, 1), device=clean.device, generator=generator)
    return torch.where(drawn > 0.5, eta.T, eta) * _signs(clean, 1, generator)


def _norms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """L2 norms over dims, which stay with length 1."""
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True)


def _at_radius(delta: Tensor, clean: Tensor, eps: float) -> Tensor:
    """clean + delta, delta being brought to norm eps, clipped to [0, 1]."""
    return (clean + delta * (eps / (_norms(delta, (1, 2, 3)) + 1e-12))).clamp_(0, 1)


def _l2_start(clean: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    height, width = clean.shape[2:]
    side = max(min(height, width) // 5, 1)
    edge = max((height - 5 * side) // 2, 0)
    delta = torch.zeros_like(clean)
    for top in range(edge, height - side + 1, side):
        for left in range(edge, width - side + 1, side):
            delta[:, :, top : top + side, left : left + side] = _patterns(clean, side, generator)
    return _at_radius(delta, clean, eps)


def _l2_window(best: Tensor, clean: Tensor, eps: float, p: float, generator: torch.Generator | None) -> Tensor:
    channels, height, width = clean.shape[1:]
    side = max(round(math.sqrt(p * height * width)), 3)
    side = min(side + 1 - side % 2, height, width)
    delta = best - clean
    gaining, losing = (_window(clean, side, generator) for _ in range(2))
    within = torch.zeros_like(delta)
    within[gaining] = 1
    within[losing] = 1
    unused = (eps**2 - _norms(delta, (1, 2, 3)) ** 2).clamp_(min=0)
    available = (unused / channels + _norms(delta * within, (2, 3)) ** 2).sqrt()
    old = delta[gaining]
    new = _patterns(clean, side, generator) + old / (_norms(old, (2, 3)) + 1e-12)
    delta[losing] = 0
    delta[gaining] = new * (available / (_norms(new, (2, 3)) + 1e-12))
    return _at_radius(delta, clean, eps)
