// How the binding calls the CUDA kernels: asynchronous, on a stream, of the device that is current. Nothing is
// allocated here.
#pragma once
#include "../deformable_attention.h"

namespace mmk::cuda {

// Floats of scratch that a call needs; they may hold anything.
int64_t deformable_attention_scratch(const DeformableAttention&);
int64_t deformable_attention_scratch(const DeformableAttentionBackward&);

// Null, or what went wrong. dtype isn't float64.
const char* deformable_attention_forward(const DeformableAttention&, float* scratch, void* stream);
const char* deformable_attention_backward(const DeformableAttentionBackward&, float* scratch, void* stream);

}  // namespace mmk::cuda
