// How the binding calls the CUDA kernels: asynchronous, on a stream, of the device that is current. Nothing is
// allocated here.
#pragma once
#include "../spatial_attention.h"

namespace mmk::cuda {

// Floats of scratch that a call needs; they may hold anything.
int64_t spatial_attention_scratch(const SpatialAttention&);
int64_t spatial_attention_scratch(const SpatialAttentionBackward&);

// Null, or what went wrong. dtype isn't float64. Offsets needn't be valid: then results are arbitrary, accesses are
// not.
const char* spatial_attention_forward(const SpatialAttention&, float* scratch, void* stream);
const char* spatial_attention_backward(const SpatialAttentionBackward&, float* scratch, void* stream);

}  // namespace mmk::cuda
