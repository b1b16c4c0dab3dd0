"""A fused layer in a small model that answers questions about pictures.

    python examples/fusion_layer.py

A picture is a grid of positions, most of them empty; a few hold an object: its colour and its shape, as features. The
question names a colour, the answer is the shape of the object that has it. So the question has to choose a position:
attention whose scores come from the text, whose weights multiply the image, pooled. That is one call of
`mmkernels.SpatialAttention` instead of four lines of PyTorch, with the same parameters and the same results.
"""

import torch
from torch import Tensor, nn

import mmkernels as mmk

COLOURS = 6
SHAPES = 5
POSITIONS = 49
CHANNELS = 64


class Answer(nn.Module):
    """image [B, N, D] and a question's colour [B] -> a logit for each shape [B, SHAPES]"""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Linear(COLOURS + SHAPES, CHANNELS), nn.ReLU())
        self.question_encoder = nn.Embedding(COLOURS, 32)
        self.fusion = mmk.SpatialAttention(CHANNELS, 32, num_heads=4, combine="pool", backend=backend)
        self.classifier = nn.Linear(CHANNELS, SHAPES)

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        pooled = self.fusion(self.image_encoder(image), self.question_encoder(question))
        logits: Tensor = self.classifier(pooled)
        return logits


def examples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """image [count, N, COLOURS + SHAPES], question [count], answer [count]: one object of each colour in a picture."""
    image = torch.zeros(count, POSITIONS, COLOURS + SHAPES)
    places = torch.rand(count, POSITIONS, generator=generator).argsort(1)[:, :COLOURS]
    shapes = torch.randint(SHAPES, (count, COLOURS), generator=generator)
    sample = torch.arange(count)[:, None]
    image[sample, places, torch.arange(COLOURS)] = 1
    image[sample, places, COLOURS + shapes] = 1
    question = torch.randint(COLOURS, (count,), generator=generator)
    return image, question, shapes[torch.arange(count), question]


def train(backend: str | None = None, steps: int = 150) -> tuple[Answer, list[float]]:
    torch.manual_seed(0)
    model = Answer(backend)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        image, question, answer = examples(128, generator)
        loss = nn.functional.cross_entropy(model(image, question), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    model, losses = train()
    _, plain = train(backend="reference", steps=10)
    image, question, answer = examples(1000, torch.Generator().manual_seed(2))
    right = (model(image, question).argmax(1) == answer).float().mean().item()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {right:.0%} of new questions are answered rightly")
    print("losses of the first steps, fused:", *(f"{loss:.4f}" for loss in losses[:5]))
    print("the same layer in plain PyTorch: ", *(f"{loss:.4f}" for loss in plain[:5]))
    assert right > 0.95
    assert all(abs(a - b) < 1e-3 for a, b in zip(losses, plain))


if __name__ == "__main__":
    main()
