// Attention over packed segments, some of which share a prompt: forward, and backward by computing the weights again.
//
// A head's queries are cut into tiles of 64, the keys that a tile sees into tiles of 256. A query sees its own segment up
// to itself and all of the segment's prompt, or what of both lies in its window. Scores, softmax and sums are float32;
// weights and their gradients are rounded to the type of storage for the products, as flash kernels do. Each sum has one
// order, whatever the number of threads.
// Reference: Dao (2023), FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
//
// Compiled once for each type of storage: -DALIGNLAB_STORAGE=Float32 or BFloat16.
#include "backward.h"
#include "forward.h"

extern "C" {

int64_t alignlab_attention_problem_size() { return sizeof(alignlab::Problem); }
void alignlab_attention_forward(const alignlab::Problem* problem) { alignlab::forward(*problem); }
void alignlab_attention_backward(const alignlab::Problem* problem) { alignlab::backward(*problem); }

}  // extern "C"
