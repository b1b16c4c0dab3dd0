"""Why attention of transformers that no operation fits is left alone: told by the names that a class's code uses."""

import inspect
import re

from torch import nn

CHOSEN = "its model chooses: integrations.transformers.register(), then set_attn_implementation('mmkernels')"
BIAS = "each pair of positions has a bias of its own: as a mask it would be written and read, and nothing gained"
PAIRS = "which pairs attend depends on where they lie (windows, blocks, hashes), or there is no softmax over them"
WRITTEN_OUT = "attention over heads, of which the model offers no choice; where one does it gains about 1 %"
# In this order: what a name that the class or its code uses begins with or holds, and what that means.
REASONS = {
    CHOSEN: "ALL_ATTENTION_FUNCTIONS",
    BIAS: "relative|rel_pos|rel_shift|rel_h|pos(ition)?_bias|attention_biases|alibi|disentangled|pairwise|linear_b",
    PAIRS: "lsh|landmark|sparse|ngram|neighbou?r|chunk|window|local|num_blocks|linear(self)?attention"
    "|efficientadditive",
    WRITTEN_OUT: "softmax|scaled_dot_product",
}


def why_not(cls):
    """A reason, or None."""
    words = " ".join(sorted(_words(cls)))
    found = (reason for reason, names in REASONS.items() if re.search(rf"\b\w*({names})", words, re.IGNORECASE))
    return next(found, None)


def _words(cls):
    """Names in the code of a class and of what it inherits from."""
    words = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        words.add(base.__name__)
        for value in vars(base).values():
            if inspect.isfunction(value):
                words |= _names(inspect.unwrap(value).__code__)
    return words


def _names(code):
    inner = (constant for constant in code.co_consts if inspect.iscode(constant))
    return {*code.co_names, *code.co_varnames}.union(*map(_names, inner))
