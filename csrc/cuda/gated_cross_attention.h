// How the binding calls the CUDA kernels: asynchronous, on a stream, of the device that is current. Nothing is
// allocated here.
#pragma once
#include "../gated_cross_attention.h"

namespace mmk::cuda {

// Floats of scratch that a call needs; they may hold anything.
int64_t gated_cross_attention_scratch(const GatedCrossAttention&);
int64_t gated_cross_attention_scratch(const GatedCrossAttentionBackward&);

// Null, or what went wrong. dtype isn't float64.
const char* gated_cross_attention_forward(const GatedCrossAttention&, float* scratch, void* stream);
const char* gated_cross_attention_backward(const GatedCrossAttentionBackward&, float* scratch, void* stream);

}  // namespace mmk::cuda
