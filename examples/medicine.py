"""Medicine: which patches of a stained tissue make a slide positive? Bags of patches, attention-based pooling.

    python examples/medicine.py           # about a minute on 2 cores; --quick: seconds, and worse

The tissue is real: scikit-image's photograph of a stained section (immunohistochemistry). A slide is a bag of hundreds
of its patches, and positive where a few of them are stained brown; nobody says which. Then a bag is pooled that is too
large for plain PyTorch in a budget of memory. Guide: docs/guides/medicine.md. Needs scikit-image.
"""

import argparse
import multiprocessing
import resource
import sys
from pathlib import Path

import torch
from skimage import color
from skimage import data as photographs
from torch import nn

from mmkernels.models import AttentionMIL

PATCH = 8


def patches():
    """Patches of the left and of the right half of the photograph, each [N, 192], and how brown each is [N]."""
    tissue = photographs.immunohistochemistry()
    brown = torch.from_numpy(color.rgb2hed(tissue)[..., 2]).float()
    pixels = torch.from_numpy(tissue).permute(2, 0, 1).float() / 255
    cut = lambda image: image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [C, rows, columns, PATCH, PATCH]
    features = cut(pixels).permute(1, 2, 0, 3, 4).flatten(2)
    stain = cut(brown[None])[0].mean((2, 3))
    half = features.shape[1] // 2
    for side in (slice(None, half), slice(half, None)):
        yield features[:, side].flatten(0, 1), stain[:, side].flatten()


def bags(features, stain, count, generator):
    """Packed bags: features [rows, 192], offsets [count + 1], labels [count], and which rows are brown: a few, in every
    second bag. Between brown and not brown, patches are left out."""
    brown = (stain > stain.quantile(0.9)).nonzero().flatten()
    pale = (stain < stain.median()).nonzero().flatten()
    pick = lambda of, n: of[torch.randint(len(of), (n,), generator=generator)]
    rows, sizes, labels = [], [], []
    for number in range(count):
        few = 3 * (number % 2)
        size = int(torch.randint(100, 300, (), generator=generator))
        rows.append(torch.cat([pick(brown, few), pick(pale, size - few)]))
        sizes.append(size)
        labels.append(float(few > 0))
    rows = torch.cat(rows)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return features[rows], offsets, torch.tensor(labels), torch.isin(rows, brown)


def train(steps):
    """A model of slides, and how well it does on slides of the tissue's other half."""
    (left, left_stain), (right, right_stain) = patches()
    mean, std = left.mean(0), left.std(0)
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Linear(left.shape[1], 32), "pool": AttentionMIL(32, hidden_dim=16, gated=True)})
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)

    def logits(features, offsets, **options):
        return model["pool"](torch.relu(model["embed"]((features - mean) / std)), offsets=offsets, **options)

    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        features, offsets, labels, _ = bags(left, left_stain, 16, generator)
        loss = nn.functional.binary_cross_entropy_with_logits(logits(features, offsets).flatten(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, offsets, labels, brown = bags(right, right_stain, 100, torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, weights = logits(features, offsets, need_weights=True)
    right = ((found.flatten() > 0) == labels.bool()).float().mean().item()
    return right, weights[0, brown].sum().item() / labels.sum().item()


def pool_within(megabytes, rows, backend, answer):
    """In a process of its own: one training step on a bag of so many rows with a limit on further memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bag = torch.randn(1, rows, 512)
    model = AttentionMIL(512, hidden_dim=256, gated=True, backend=backend)
    model(bag[:, :100]).sum().backward()  # whatever is loaded or made once
    status = Path("/proc/self/status").read_text().splitlines()
    used = int(next(line for line in status if line.startswith("VmData")).split()[1]) * 1024
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + megabytes * 2**20, most))
    try:
        model(bag).sum().backward()
        found = "fits"
    except (RuntimeError, MemoryError) as error:
        found = f"doesn't fit: {str(error).splitlines()[0]}"
    resource.setrlimit(resource.RLIMIT_DATA, (before, most))
    answer.send(found)


def main(quick=False):
    right, found = train(5 if quick else 300)
    print(f"{right:.0%} of the slides of tissue that it hasn't seen are judged right")
    print(f"the few brown patches have {found:.0%} of a positive slide's attention")
    assert quick or (right > 0.9 and found > 0.3)
    if sys.platform != "linux":
        return
    megabytes, rows = (150, 60_000) if quick else (200, 100_000)
    context = multiprocessing.get_context("spawn")
    outcomes = {}
    for name, backend in (("fused", None), ("plain PyTorch", "reference")):
        receiver, answer = context.Pipe(duplex=False)
        process = context.Process(target=pool_within, args=(megabytes, rows, backend, answer))
        process.start()
        answer.close()
        outcomes[name] = receiver.recv()
        process.join()
        print(f"training on a bag of {rows} patches in {megabytes} MB beside the bag, {name}: {outcomes[name]}")
    assert outcomes["fused"] == "fits" and outcomes["plain PyTorch"] != "fits"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
