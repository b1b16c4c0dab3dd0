"""Which samples a step takes, and how they are divided over processes and, in each, over micro-batches."""

import torch


class Order:
    """The samples of every step, the same for the same seed; those that fill no batch at an epoch's end are left out.

    Args:
        count: samples of the data set.
        batch_size: samples a step; more than there are is all of them.
        seed: of the order.
    """

    def __init__(self, count, batch_size, seed):
        if not count:
            raise ValueError("training must have at least one sample, got none")
        self.count = count
        self.batch_size = min(batch_size, count)
        self.seed = seed

    def __len__(self):
        """Steps an epoch."""
        return self.count // self.batch_size

    def epochs(self):
        """For every epoch, without end, the samples of each step: lists of indices."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            # What a shuffling DataLoader in a progress bar draws, so that a seed's order stays what it always was: a
            # number for each of two iterators, the order, and at its end another that isn't used.
            torch.empty(2, dtype=torch.int64).random_(generator=generator)
            order, _ = (torch.randperm(self.count, generator=generator) for _ in range(2))
            yield [taken.tolist() for taken in order[: len(self) * self.batch_size].split(self.batch_size)]


def divide(samples, parts):
    """Cuts a list into parts, the first of them longer by one where it doesn't come out even.

    Every part is computed, as those who compute wait for each other: one that would be empty is the first sample, and
    counts nothing.

    Returns:
        For every part its positions in the list (a range), and its share of the whole, from 0 to 1.
    """
    size, longer = divmod(len(samples), parts)
    ends = [size * (i + 1) + min(i + 1, longer) for i in range(parts)]
    ranges = [range(start, end) for start, end in zip([0, *ends], ends)]
    return [(where or range(1), len(where) / len(samples)) for where in ranges]


def load(data, indices):
    """The samples of these indices, a :class:`mmkernels.data.Batch`."""
    return data.collate([data[i] for i in indices])
