"""Multiple-instance learning: bags of any size, packed without padding, pooled by gated attention.

    python examples/bags_of_patches.py

A slide is cut into patches, hundreds of one, thousands of another. Only the slide has a label: positive where any patch
is. Attention learns which (Ilse et al. 2018, CLAM). The bags of a batch lie in one `[rows, D]` tensor, `offsets` are
their bounds: nothing is padded, and the `rows x hidden` matrix isn't stored for the backward pass.
"""

import torch
from torch import Tensor, nn

import mmkernels as mmk

CHANNELS = 32


class Slides(nn.Module):
    """patches [rows, D] of bags with bounds `offsets` [B + 1] -> a logit of each bag [B], weights [1, rows]"""

    def __init__(self) -> None:
        super().__init__()
        self.pool = mmk.AdditiveAttention(CHANNELS, hidden_dim=16, gated=True)
        self.classifier = nn.Linear(CHANNELS, 1)

    def forward(self, patches: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        pooled, weights = self.pool(patches, offsets=offsets, need_weights=True)  # [B, 1, D], [1, rows]
        return self.classifier(pooled).flatten(), weights


def bags(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """patches [rows, D], offsets [count + 1], labels [count], and which rows are positive: one in half of the bags."""
    sizes = torch.randint(20, 200, (count,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    patches = torch.randn(int(offsets[-1]), CHANNELS, generator=generator)
    labels = (torch.rand(count, generator=generator) < 0.5).float()
    chosen = offsets[:-1] + (torch.rand(count, generator=generator) * sizes).long()
    positive = torch.zeros(len(patches), dtype=torch.bool)
    positive[chosen[labels == 1]] = True
    patches[positive, :4] += 4
    return patches, offsets, labels, positive


def main() -> None:
    torch.manual_seed(0)
    model = Slides()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        patches, offsets, labels, _ = bags(16, generator)
        logits, _ = model(patches, offsets)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    patches, offsets, labels, positive = bags(200, torch.Generator().manual_seed(2))
    with torch.inference_mode():
        logits, weights = model(patches, offsets)
    right = ((logits > 0) == labels.bool()).float().mean().item()
    found = weights[0, positive].mean().item()
    print(f"{len(patches)} patches in {len(labels)} bags: {right:.0%} right")
    print(f"the one patch that makes a bag positive has {found:.0%} of its attention")
    assert right > 0.9 and found > 0.5


if __name__ == "__main__":
    main()
