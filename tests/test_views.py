"""Negative views, which PyTorch makes of conjugates, as inputs and as gradients that come in: what they show counts,
not what is in memory."""

import pytest
import torch
from support.attention_tests import assert_rule, negative
from support.calls import function_of, parameters, tensors_of

import mmkernels as mmk


@pytest.mark.property("negative views")
@pytest.mark.parametrize("backend, device, dtype, name", parameters())
def test_negative_views(backend, device, dtype, name):
    """Each tensor by itself and all together, forward and backward, with gradients that come in negated, too."""
    tensors = tensors_of(name, dtype, device)

    def computed(run, tensors, which=(), like=torch.clone):
        given = [(like if i in which else torch.clone)(t).requires_grad_() for i, t in enumerate(tensors)]
        results = run(*given)
        upstream = [like(torch.linspace(-1, 1, r.numel(), device=device).to(r.dtype).view(r.shape)) for r in results]
        return *results, *torch.autograd.grad(results, given, upstream)

    everything = range(len(tensors))
    truth = computed(function_of(name, device=device), [t.double() for t in tensors])
    peer = computed(function_of(name, device=device), tensors)
    for which in (*([i] for i in everything), everything):
        assert_rule(computed(function_of(name, mmk, device, backend=backend), tensors, which, negative), truth, peer)
