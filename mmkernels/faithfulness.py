"""Does a model's attention tell what it looks at? What it attends to most is deleted, and its score should fall."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import checks


@dataclass(frozen=True)
class Deletion:
    """What :func:`deletion` measured, of B pictures of which more and more is deleted, in F steps.

    Attributes:
        fractions: float ``[F]``.
        attended, least: float ``[B, F]``: scores while the most (the least) attended patches are deleted first.
        random: float ``[R, B, F]``: in R random orders.
    """

    fractions: torch.Tensor
    attended: torch.Tensor
    least: torch.Tensor
    random: torch.Tensor

    @property
    def areas(self):
        """The mean score over all shares of deletion, ``(attended [B], random [B])``: the attended one is smaller where
        attention tells what counts."""
        return self._area(self.attended), self._area(self.random).mean(0)

    @property
    def faithful(self):
        """Of how many pictures (a share, from 0 to 1) the attended patches count more than random ones do."""
        attended, random = self.areas
        return (attended < random).double().mean().item()

    def _area(self, scores):
        return torch.trapezoid(scores, self.fractions, dim=-1)


@torch.no_grad()
def deletion(score, image, weights, *, patches=8, rounds=5, steps=None, fill=0.0, seed=0):
    """Deletes patch after patch of each picture, the most attended first, and in random orders beside.

    Args:
        score: takes images like ``image`` and gives a score each, float ``[B]``, as in
            ``lambda image: model.predict(image, text)``. The model should be in eval mode.
        image: float ``[B, C, Y, X]``.
        weights: float ``[B, y, x]``: attention over the picture, 0 or more. A patch's is its mean.
        patches: the picture is cut into so many rows and columns.
        rounds: R random orders.
        steps: of deletion; default: as many as there are rows of patches.
        fill: what stands where a patch was; a float, or a tensor that broadcasts with ``image`` (as a blurred copy).
        seed: of the random orders.

    Returns:
        A :class:`Deletion`.

    Source: Petsiuk et al. 2018, RISE (arXiv:1806.07421), the deletion metric; there with pixels, here with patches.
    """
    checks.is_tensor("image", image)
    checks.is_tensor("weights", weights)
    if image.dim() != 4 or weights.dim() != 3 or len(image) != len(weights):
        raise ValueError(
            f"image must be [B, C, Y, X] and weights [B, y, x], got {list(image.shape)} and {list(weights.shape)}"
        )
    if min(image.shape[2:]) < patches:
        raise ValueError(f"patches must be at most {min(image.shape[2:])}, the image's smaller side, got {patches}")
    count = patches * patches
    cells = F.adaptive_avg_pool2d(weights[:, None].float(), patches).flatten(1)
    ranks = cells.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    generator = torch.Generator().manual_seed(seed)
    orders = [ranks, count - 1 - ranks]
    orders += [
        torch.stack([torch.randperm(count, generator=generator) for _ in image]).to(ranks.device) for _ in range(rounds)
    ]
    fractions = torch.linspace(0, 1, (steps or patches) + 1, dtype=torch.float64)
    fill = torch.as_tensor(fill, dtype=image.dtype, device=image.device)
    scores = torch.empty(len(orders), len(image), len(fractions), dtype=torch.float64)
    for number, order in enumerate(orders):
        for step, fraction in enumerate(fractions.tolist()):
            deleted = (order < round(fraction * count)).view(-1, 1, patches, patches)
            deleted = F.interpolate(deleted.float(), image.shape[2:], mode="nearest-exact") > 0
            scores[number, :, step] = score(torch.where(deleted, fill, image)).double().cpu()
    return Deletion(fractions, scores[0], scores[1], scores[2:])
