// What turns a panel's scores into results, asynchronously, on a stream, of the device that is current. Null, or what
// went wrong.
#pragma once
#include "../channel_attention.h"
#include "rows.h"

namespace mmk::cuda {

// scores [rows, D], float, without the bias -> result and weights.
const char* channel_attention_weigh(const ChannelAttention&, const Panel&, const float* scores, void* stream);
// scores -> their gradient, in place, and in 16 bits in `rounded` (null for float). direct [rows, D]: grad_result *
// weights, or null.
const char* channel_attention_differentiate(const ChannelAttentionBackward&, const Panel&, float* scores, float* direct,
                                            void* rounded, void* stream);
// grad_image = direct + through, of a panel; both [rows, D].
const char* channel_attention_write(const ChannelAttentionBackward&, const Panel&, const float* direct,
                                    const float* through, void* stream);

}  // namespace mmk::cuda
