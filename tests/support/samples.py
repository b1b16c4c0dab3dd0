"""Small data sets and a small model of several modalities, for what trains any."""

import torch
from torch import nn

from mmkernels import tasks
from mmkernels.data import Batch

OUTPUTS = {"binary": 1, "multiclass": 3, "multilabel": 3, "regression": 1}


class Samples:
    """Pictures of one colour, texts of one word, which together decide the target."""

    def __init__(self, task="binary", count=20, seed=0, texts=None):
        draw = torch.Generator().manual_seed(seed)
        self.task = task
        self.colours = torch.randn(count, 3, generator=draw)
        self.words = torch.randint(1, 5, (count, *(() if texts is None else (texts,)), 1), generator=draw)

    def __len__(self):
        return len(self.colours)

    def __getitem__(self, index):
        return index

    def collate(self, items):
        colours, words = self.colours[items], self.words[items]
        told = colours[:, :1] + words[..., 0].view(len(items), -1) - 2.5
        told = told if words.dim() == 3 else told[:, 0]
        target = {
            "binary": (told > 0).float(),
            "multiclass": (told > 0).long() + (told > 1),
            "multilabel": (told[..., None] > torch.tensor([-1.0, 0.0, 1.0])).float(),
            "regression": told,
        }[self.task]
        image = colours[:, :, None, None].expand(-1, -1, 4, 4)
        return Batch({"image": image, "text": words}, target, {"warm": colours[:, 0] > 0} if target.dim() == 1 else {})


class Toy(nn.Module):
    """An encoder, an embedding, dropout between them and what answers."""

    def __init__(self, task="binary", dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.task = tasks.get(task, OUTPUTS[task])
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.embedding = nn.Embedding(5, 8)
        self.fusion = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(16, self.task.outputs)

    def forward(
        self, image=None, text=None, *, image_present=None, text_present=None, target=None, positive_weight=None
    ):
        looked = self.encoder(image).mean((2, 3))
        read = self.embedding(text[..., 0])
        if image_present is not None:
            looked = looked.where(image_present[:, None], 0)
        if text_present is not None:
            read = read.where(text_present.view(-1, *[1] * (read.dim() - 1)), 0)
        looked = looked if read.dim() == 2 else looked[:, None].expand_as(read)
        logits = self.classifier(self.fusion(torch.cat([looked, read], -1)))
        logits = logits if self.task.outputs > 1 else logits[..., 0]
        return logits if target is None else (self.task.loss(logits, target, positive_weight), logits)
