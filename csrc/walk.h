// The steps of a sequence in the order in which a pass takes them.
#pragma once

#include "cells/math.h"
#include "sequence.h"

namespace lstmx {

// Walks the steps in the order of forward, or of backward. A step's rows are a prefix of the batch.
class Walk {
 public:
  LSTMX_HD Walk(const SequenceShape& shape, bool backward)
      : shape_(shape), ascending_(shape.reverse == backward) {
    index_ = -1;
    next_rows = rows_at(0);
    next_offset = 0;
    if (!ascending_) {
      for (int64_t t = 0; t + 1 < shape.steps; ++t) next_offset += rows_at_step(t);
    }
  }

  // To the next step; past the last one there are no rows.
  LSTMX_HD bool advance() {
    previous_rows = rows, previous_offset = offset;
    rows = next_rows, offset = next_offset;
    if (++index_ >= shape_.steps) return false;
    next_rows = rows_at(index_ + 1);
    next_offset = ascending_ ? offset + rows : offset - next_rows;
    return true;
  }

  int64_t rows = 0, offset = 0;  // of the current step; row b lies at [offset + b]
  int64_t previous_rows = 0, previous_offset = 0;
  int64_t next_rows, next_offset;

 private:
  LSTMX_HD int64_t rows_at_step(int64_t t) const {
    return shape_.batch_sizes ? shape_.batch_sizes[t] : shape_.batch;
  }
  LSTMX_HD int64_t rows_at(int64_t index) const {
    if (index >= shape_.steps) return 0;
    return rows_at_step(ascending_ ? index : shape_.steps - 1 - index);
  }

  const SequenceShape& shape_;
  bool ascending_;
  int64_t index_;
};

}  // namespace lstmx
