// The checked entries of qk_norm_rope3d.cu, which states their contract.
#pragma once

#include <array>
#include <cstdint>

#include "dtype.h"

namespace skyreels_fast {

constexpr int kMaxChannels = 8192;     // of a token, all heads together
constexpr int kMaxHeadChannels = 512;  // of a head
constexpr int kMaxFrames = 65535;      // and as many in a batch
constexpr int kMaxSide = 1290;         // rows or columns of the grid

using Shape = std::array<std::int64_t, 4>;    // B, L, N, Dh
using Strides = std::array<std::int64_t, 3>;  // of B, L, N; elements
using Extent = std::array<std::int64_t, 3>;   // f, h, w
using Range = std::array<std::int64_t, 2>;    // start, stop

void qk_norm(Address out, Address x, Address weight, Shape shape, Strides strides, double eps, int dtype,
             int weight_dtype, Address stream);
void qk_norm_rope3d(Address q_out, Address k_out, Address q, Address k, Address q_weight, Address k_weight,
                    Address table, Shape shape, Strides q_out_strides, Strides k_out_strides, Strides q_strides,
                    Strides k_strides, Extent grid, Range token_range, double eps, int dtype, int weight_dtype,
                    Address stream);

}  // namespace skyreels_fast
