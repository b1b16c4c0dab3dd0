"""Text to token ids."""

import torch

from .extras import require

PAD, UNKNOWN = "[PAD]", "[UNK]"


def train_tokenizer(texts, *, vocabulary=10_000, min_frequency=2):
    """A Hugging Face tokenizer of whole words (every Chinese character is one), learnt from ``texts``.

    Ids: 0 ``[PAD]``, 1 ``[UNK]``, then words by frequency, at most ``vocabulary`` in all. Words rarer than
    ``min_frequency`` become ``[UNK]``, so that its embedding is trained too.

    Raises:
        ImportError: `tokenizers` isn't installed.
    """
    tokenizers = require("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)  # also sets Chinese apart
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=vocabulary, min_frequency=min_frequency, special_tokens=[PAD, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_padding(pad_id=0, pad_token=PAD)
    return tokenizer


def encode(tokenizer, texts):
    """A list of B strings -> int64 ``[B, T]``, padded at the end with 0."""
    return torch.tensor([line.ids for line in tokenizer.encode_batch(list(texts))], dtype=torch.int64)
