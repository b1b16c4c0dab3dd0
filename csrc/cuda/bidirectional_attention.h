// How the binding calls the CUDA kernels: asynchronous, on a stream, of the device that is current. Nothing is
// allocated here.
#pragma once
#include "../bidirectional_attention.h"

namespace mmk::cuda {

// Floats of scratch that a call needs; they may hold anything.
int64_t bidirectional_attention_scratch(const BidirectionalAttention&);
int64_t bidirectional_attention_scratch(const BidirectionalAttentionBackward&);

// Null, or what went wrong. dtype isn't float64.
const char* bidirectional_attention_forward(const BidirectionalAttention&, float* scratch, void* stream);
const char* bidirectional_attention_backward(const BidirectionalAttentionBackward&, float* scratch, void* stream);

}  // namespace mmk::cuda
