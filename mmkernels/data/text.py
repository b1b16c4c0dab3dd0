"""Text to token ids, and words' vectors from files."""

import torch

from .extras import require

PAD, UNKNOWN = "[PAD]", "[UNK]"


def train_tokenizer(texts, *, vocabulary=10_000, min_frequency=2, length=None):
    """A Hugging Face tokenizer of whole words (every Chinese character is one), learnt from ``texts``.

    Ids: 0 ``[PAD]``, 1 ``[UNK]``, then words by frequency, at most ``vocabulary`` in all. Words rarer than
    ``min_frequency`` become ``[UNK]``, so that its embedding is trained too. What comes after ``length`` tokens of a
    text is cut off; None cuts nothing.

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
    if length is not None:
        tokenizer.enable_truncation(length)
    return tokenizer


def encode(tokenizer, texts):
    """A list of B strings -> int64 ``[B, T]``, padded at the end with 0."""
    return torch.tensor([line.ids for line in tokenizer.encode_batch(list(texts))], dtype=torch.int64)


def read_embedding(path, tokenizer, *, seed=0):
    """The vectors of a tokenizer's words from a text file of GloVe, word2vec or fastText.

    A line is a word (it may hold spaces) and its D numbers; a first line of two whole numbers (word2vec, fastText) is
    skipped. Where a word isn't in the file as it is, one that differs only in capitals counts. A word that isn't there
    at all is drawn from a normal distribution with the mean and the standard deviation of those that are, by ``seed``;
    padding's vector is 0.

    Returns:
        ``(weight float [V, D], found bool [V])``, what :class:`torch.nn.Embedding`'s weight becomes, and which words
        were in the file.

    Raises:
        ValueError: a line isn't what it should be, or no word is there; the message names file and line.
    """
    ids = tokenizer.get_vocab()
    exact, alike = {}, {}
    for word, vector in _vectors(path, lambda word: word in ids or word.lower() in ids):
        (exact if word in ids else alike).setdefault(word if word in ids else word.lower(), vector)
    vectors = alike | exact
    vectors.pop(PAD, None)
    if not vectors:
        raise ValueError(f"{path} has none of the tokenizer's {len(ids)} words")
    rows = [ids[word] for word in vectors]
    known = torch.stack(list(vectors.values()))
    found = torch.zeros(len(ids), dtype=torch.bool)
    found[rows] = True
    draw = torch.randn(len(ids), known.shape[1], generator=torch.Generator().manual_seed(seed))
    weight = draw * known.std(0, correction=0) + known.mean(0)
    weight[rows] = known
    weight[ids[PAD]] = 0
    return weight, found


def _vectors(path, wanted):
    """Word and vector of every line whose word is wanted."""
    size = None
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip(" \r\n").split(" ")
            if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
                continue
            size = size or _numbers_at_the_end(fields)
            word = " ".join(fields[:-size]) if size else ""
            if not word:
                raise ValueError(f"{path}, line {number}: expected a word and {size or 'its'} numbers")
            if wanted(word):
                try:
                    vector = torch.tensor([float(field) for field in fields[-size:]])
                except ValueError:
                    raise ValueError(f"{path}, line {number}: expected {size} numbers after {word!r}") from None
                if not vector.isfinite().all():
                    raise ValueError(f"{path}, line {number}: the vector of {word!r} isn't finite")
                yield word, vector


def _numbers_at_the_end(fields):
    """How many fields after the first are numbers, from the last on."""
    count = 0
    for field in reversed(fields[1:]):
        try:
            float(field)
        except ValueError:
            break
        count += 1
    return count
