"""torch.compile and torch.export see one operation, with its shapes.

    python examples/compile_and_export.py

The fused operations are registered with PyTorch: a model that holds them compiles into one graph, trains there, and is
exported, saved and loaded. Whoever loads it has to import mmkernels, which brings the operations.
"""

import io

import torch
from torch import Tensor, nn

import mmkernels as mmk


class Model(nn.Module):
    """image [B, N, 64] and tokens [B, T, 32] -> [B, 10]"""

    def __init__(self) -> None:
        super().__init__()
        self.words_into_image = mmk.GatedCrossAttention(64, 32, num_heads=4)
        self.pool = mmk.SpatialAttention(64, 32, combine="pool")
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        image = image + self.words_into_image(image, tokens)
        logits: Tensor = self.classifier(self.pool(image, tokens.mean(1)))
        return logits


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    image = torch.randn(4, 49, 64)
    tokens = torch.randn(4, 7, 32)
    eager = model(image, tokens)

    compiled = torch.compile(model, fullgraph=True)
    result = compiled(image, tokens)
    result.square().mean().backward()
    assert model.words_into_image.query_projection.weight.grad is not None
    print(f"compiled: off by {(result - eager).abs().max().item():.1e}")

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (image, tokens), dynamic_shapes={"image": {0: batch}, "tokens": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    operations = [str(node.target) for node in program.graph.nodes if "mmkernels" in str(node.target)]
    print("exported, with the operations:", *operations)
    other = torch.cat([image, image]), torch.cat([tokens, tokens])
    assert len(operations) == 2
    torch.testing.assert_close(loaded(*other), model(*other))
    print("loaded again: the same results, for another batch size")


if __name__ == "__main__":
    main()
