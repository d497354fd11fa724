// The checked entry of adaln.cu, which states its contract.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace skyreels_fast {

// A matrix [rows, dim] whose rows are contiguous and `stride` elements apart; a vector [dim] is one row.
struct Rows {
  Address data;
  int dtype;
  std::int64_t rows;
  std::int64_t stride;
};

constexpr std::int64_t kAdalnMaxDim = 8192;

void norm_scale_shift(const Rows& out, const Rows& x, const Rows* scale, const Rows* shift, const Rows* weight,
                      const Rows* bias, std::int64_t dim, float eps, Address stream);

}  // namespace skyreels_fast
