// How the binding calls the CUDA kernels: asynchronous, on a stream, of the device that is current. Nothing is
// allocated here.
#pragma once
#include "../absorbed_attention.h"

namespace mmk::cuda {

// Floats of scratch that a call needs; they may hold anything.
int64_t absorbed_attention_scratch(const AbsorbedAttention&);
int64_t absorbed_attention_scratch(const AbsorbedAttentionBackward&);

// Null, or what went wrong. dtype isn't float64.
const char* absorbed_attention_forward(const AbsorbedAttention&, float* scratch, void* stream);
const char* absorbed_attention_backward(const AbsorbedAttentionBackward&, float* scratch, void* stream);

}  // namespace mmk::cuda
