"""Phrase grounding: image and text attend to each other, as in GLIP and Grounding DINO.

    python examples/grounding.py

Which position does each word of a phrase name? Positions and words pass through fusion layers:
`mmkernels.BidirectionalAttention` computes the scores of positions and words once and gives both results, what the
image learns of the text and the text of the image. Phrases have different lengths: their padding is masked.
"""

import torch
from torch import Tensor, nn

import mmkernels as mmk

WORDS = 20
POSITIONS = 36
CHANNELS = 32
PAD = 0


class FusionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = mmk.BidirectionalAttention(CHANNELS, CHANNELS, embed_dim=32, num_heads=4)
        self.image_norm = nn.LayerNorm(CHANNELS)
        self.text_norm = nn.LayerNorm(CHANNELS)

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        of_text, of_image = self.attention(self.image_norm(image), self.text_norm(text), text_mask=text_mask)
        return image + of_text, text + of_image


class Grounding(nn.Module):
    """image [B, N, D], words [B, T] (0 is padding) -> a logit of each word for each position [B, T, N]"""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Linear(WORDS, CHANNELS)
        self.text_encoder = nn.Embedding(WORDS, CHANNELS, padding_idx=PAD)
        self.layers = nn.ModuleList(FusionLayer() for _ in range(2))

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        text_mask = words != PAD
        seen: Tensor = self.image_encoder(image)
        text: Tensor = self.text_encoder(words)
        for layer in self.layers:
            seen, text = layer(seen, text, text_mask)
        return text @ seen.transpose(1, 2)


def examples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """image [count, N, WORDS] of things and noise; words [count, 5] for some of them; their positions, padding -100."""
    things = torch.rand(count, WORDS - 1, generator=generator).argsort(1) + 1
    places = torch.rand(count, POSITIONS, generator=generator).argsort(1)[:, : WORDS - 1]
    image = 0.15 * torch.randn(count, POSITIONS, WORDS, generator=generator)
    image[torch.arange(count)[:, None], places, things] += 1
    length = torch.randint(1, 6, (count, 1), generator=generator)
    padding = torch.arange(5) >= length
    return image, things[:, :5].masked_fill(padding, PAD), places[:, :5].masked_fill(padding, -100)


def main() -> None:
    torch.manual_seed(0)
    model = Grounding()
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    generator = torch.Generator().manual_seed(1)
    for step in range(150):
        image, words, places = examples(64, generator)
        loss = nn.functional.cross_entropy(model(image, words).flatten(0, 1), places.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}")

    image, words, places = examples(500, torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found = model(image, words).argmax(-1)
    there = places >= 0
    right = (found == places)[there].float().mean().item()
    print(f"{right:.0%} of {int(there.sum())} words are found in new pictures of {POSITIONS} positions")
    assert right > 0.9


if __name__ == "__main__":
    main()
