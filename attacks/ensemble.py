"""An ensemble of attacks without anything to choose: PGD-20, then APGD-CE, APGD-T and Square on what still stands.

An image counts as robust if none of them finds a point in its ball that the model gets wrong. PGD-20 comes first, so
that the ensemble's robust accuracy is never above its. The settings are those of AutoAttack's standard set (Croce &
Hein 2020, arXiv:2003.01690), of which FAB-T is missing here: hence another name, and a number that may lie above its.

    pgd      PGD-20: steps of eps/8 from the clean image, ball then box       20 passes an image
    apgd_ce  APGD on cross-entropy, 100 steps                                101
    apgd_t   APGD on the targeted DLR loss, 9 targets, 100 steps each        909
    square   Square attack, 5,000 queries                                    5,001 without gradients

Whatever precision an attack runs in, whether its images fool the model is asked in float32 (`right`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attacks.apgd import apgd, apgd_targeted, check_settings
from attacks.pgd import Norm, Precision, check_batch, last_word, pgd, unwrapped
from attacks.square import square

STAGES = ("pgd", "apgd_ce", "apgd_t", "square")


@dataclass(frozen=True)
class Budget:
    """How much each attack may spend; the defaults are the standard, and what differs from it shows in the titles."""

    pgd_steps: int = 20
    steps: int = 100
    targets: int = 9
    queries: int = 5000

    def title(self, stage: str) -> str:
        """What people call the attack."""
        if stage == "pgd":
            return f"PGD-{self.pgd_steps}"
        if stage == "square":
            return "Square" if self.queries == 5000 else f"Square ({self.queries} queries)"
        own = [] if self.steps == 100 else [f"{self.steps} steps"]
        if stage == "apgd_ce":
            return " ".join(["APGD-CE", *(f"({text})" for text in own)])
        own += [] if self.targets == 9 else [f"{self.targets} targets"]
        return "APGD-T" + (f" ({', '.join(own)})" if own else "")

    def passes(self, stage: str) -> int:
        """How often a stage asks the model about an image that stands, but for looks at what it has found."""
        return {
            "pgd": self.pgd_steps,
            "apgd_ce": self.steps + 1,
            "apgd_t": self.targets * (self.steps + 1),
            "square": self.queries + 1,
        }[stage]


STANDARD = Budget()


def search(
    stage: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float,
    budget: Budget = STANDARD,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
    check_images: bool = True,
) -> Tensor:
    """What one of STAGES finds of images [B, C, H, W] with classes [B]: images in the balls, most fooling the model.

    Raises ValueError for another stage, and for what attacks.pgd, attacks.apgd and attacks.square refuse.
    """
    if stage == "pgd":
        # Radii as a tensor, so that radius 0 takes all steps too: what comes back is then a check of the attack.
        radii = torch.full((len(images),), eps, device=images.device)
        return pgd(
            model,
            images,
            labels,
            norm=norm,
            eps=radii,
            step_size=2.5 / budget.pgd_steps * radii,
            steps=budget.pgd_steps,
            order="ball_then_box",
            precision=precision,
            check_images=check_images,
        )
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, not {stage!r}")
    options: dict[str, Any] = {"norm": norm, "eps": eps, "generator": generator, "precision": precision}
    options["check_images"] = check_images
    if stage == "square":
        return square(model, images, labels, queries=budget.queries, **options).images
    options["steps"] = budget.steps
    if stage == "apgd_ce":
        return apgd(model, images, labels, **options).images
    return apgd_targeted(model, images, labels, targets=budget.targets, **options).images


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the model, in evaluation mode, gives images [B, ...] their classes, bool [B]; see `last_word`.

    It does not where its logits are not finite.
    """
    module = unwrapped(model)
    network = vars(module).get("_original_forward", module)
    in_training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        with last_word(images.device):
            logits: Tensor = network(images)
    finally:
        for part in in_training:
            part.training = True
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)


def ensemble(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float,
    budget: Budget = STANDARD,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """Adversarial images where there are any, and the attack that each image fell to.

    Args:
        images: [B, C, H, W] float32 in [0, 1].
        labels: true classes [B] int64.
        norm, eps, budget: of the balls, and of the attacks.
        generator, precision: as in `attacks.apgd.apgd`.

    Returns:
        Images like `images`, those that still stand being as given (among them those for which an attack gave no
        finite numbers); and int64 [B], places in STAGES, -1 for an image
        that the model gets wrong as it is, len(STAGES) for one that stands.

    Raises ValueError for what the attacks refuse.
    """
    check_settings(norm, eps, 1)
    check_batch(images, labels, look=True)
    found = images.detach().clone()
    fell_to = torch.full_like(labels, len(STAGES))
    fell_to[~right(model, found, labels)] = -1
    for place, stage in enumerate(STAGES):
        standing = (fell_to == len(STAGES)).nonzero()[:, 0]
        if not len(standing):
            break
        adversarial = search(
            stage,
            model,
            images[standing],
            labels[standing],
            norm=norm,
            eps=eps,
            budget=budget,
            generator=generator,
            precision=precision,
            check_images=False,
        )
        fooled = ~right(model, adversarial, labels[standing]) & adversarial.flatten(1).isfinite().all(1)
        found[standing[fooled]] = adversarial[fooled]
        fell_to[standing[fooled]] = place
    return found, fell_to
