// Large CPU buffers that are used again. Fresh pages cost as much time as a good part of the
// arithmetic on them; these come from, and go back to, a bounded store of the process.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lstmx {

// As at::empty; on the CPU, from the store if it is large. The tensor owns its memory like any
// other, and the memory goes back when the last reference to it dies.
at::Tensor empty_cached(at::IntArrayRef size, const at::TensorOptions& options);

// What the store holds for later, in bytes; and gives all of it back to the system.
int64_t cached_bytes();
void empty_cache();

}  // namespace lstmx
