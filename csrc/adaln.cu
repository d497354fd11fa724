// LayerNorm and modulation of a transformer's tokens, in one pass.
//
//   norm_scale_shift    out = (x - mean) / sqrt(variance + eps) * weight + bias, then * (1 + scale) + shift
//
// x and out have a row a token; the tokens of several videos follow each other. Mean and variance are over a row,
// divided by dim. scale and shift have a row a frame of tokens: their rows divide the tokens, and token t takes row
// t / (tokens / rows). weight and bias are one row. scale comes with shift, weight with bias; null leaves a pair out.
// x and out are float32, float16 or bfloat16, each by itself, the others float32, all at any element-aligned address;
// dim is at most kAdalnMaxDim. Arithmetic is float32, rounded once on the way out, in an order that depends on dim and
// alignment alone, so that a repeated call gives the same bits. Everything runs on `stream` of the current device, and
// nothing waits for it.

#include "adaln.h"

#include <climits>

#include "common.cuh"
#include "elements.cuh"

namespace skyreels_fast {
namespace {

// Elements to a load: 16 bytes of scale and shift, which are most of what a row reads, though from the first-level
// cache. With 8 a warp's load would take every other 16 bytes of them, at half that cache's rate.
constexpr int kWidth = 4;
constexpr int kRowsOfBlock = 4;  // where a row is one warp's

template <int kElements>  // of a row, held by a thread from the load to the store
constexpr int kMaxWarps = (kAdalnMaxDim + 32 * kElements - 1) / (32 * kElements);

template <typename X, typename Y>
struct Call {
  Y* out;
  const X* x;
  const float *scale, *shift, *weight, *bias;
  std::int64_t out_stride, x_stride, scale_stride, shift_stride;
  std::uint32_t tokens, span;  // span: tokens that take one row of scale and shift
  int dim;
  float inverse_dim, eps;
};

// The row's total in all of its threads. Two calls in a row must not share `of_warp`: the barrier of one parts the
// other's reads from its next writes.
template <int kWidth, int kWarps>
__device__ float row_sum(const float (&values)[kWidth], float (&of_warp)[kWarps]) {
  float value = values[0];
#pragma unroll
  for (int k = 1; k < kWidth; ++k) value += values[k];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = blockDim.x / 32;
  if (warps == 1) return value;
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) value += warp < warps ? of_warp[warp] : 0.0f;
  return value;
}

template <int kWidth>
__device__ void load(const float* from, float (&to)[kWidth]) {
  Elements<float, kWidth>::template load<false>(from).get(to);
}

// Blocks are (threads of a row, rows). kFull: dim is what the row's threads hold, so that no column is compared to it.
template <int kWidth, int kElements, int kMinBlocks, bool kFull, typename X, typename Y>
__global__ void __launch_bounds__(32 * std::max(kRowsOfBlock, kMaxWarps<kElements>), kMinBlocks)
    norm_kernel(const Call<X, Y> call) {
  constexpr int kPacks = kElements / kWidth;
  __shared__ float of_warp[2][kMaxWarps<kElements>];
  const std::uint32_t token = blockIdx.x * blockDim.y + threadIdx.y;
  if (token >= call.tokens) return;  // a row of one warp, so that no barrier waits for it

  // A warp takes neighbouring packs, so that its addresses are constants from each other.
  const int first = static_cast<int>(threadIdx.x / 32) * 32 * kElements + static_cast<int>(threadIdx.x % 32) * kWidth;
  const auto for_each_pack = [&](auto use) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      if (kFull || first + j * 32 * kWidth < call.dim) use(j, j * 32 * kWidth);
    }
  };
  Elements<X, kWidth> x[kPacks] = {};
  float values[kPacks][kWidth];
  for_each_pack([&, from = call.x + (token * call.x_stride + first)](int j, int offset) {
    x[j] = Elements<X, kWidth>::template load<true>(from + offset);
  });

  float totals[kWidth] = {}, squares[kWidth] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    x[j].get(values[j]);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) totals[k] += values[j][k];  // past the row's end they are 0
  }
  const float mean = row_sum(totals, of_warp[0]) * call.inverse_dim;
  for_each_pack([&](int j, int) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      values[j][k] -= mean;
      squares[k] += values[j][k] * values[j][k];
    }
  });
  const float factor = rsqrtf(row_sum(squares, of_warp[1]) * call.inverse_dim + call.eps);
  const std::int64_t frame = call.scale == nullptr ? 0 : token / call.span;
  const float* scales = call.scale + (frame * call.scale_stride + first);
  const float* shifts = call.shift + (frame * call.shift_stride + first);
  Y* to = call.out + (token * call.out_stride + first);
  const auto finish = [&](auto is_affine, auto is_modulated) {
    for_each_pack([&](int j, int offset) {
      float by[kWidth], plus[kWidth];
#pragma unroll
      for (float& value : values[j]) value *= factor;
      if constexpr (decltype(is_affine)::value) {
        load(call.weight + first + offset, by);
        load(call.bias + first + offset, plus);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[j][k] = fmaf(values[j][k], by[k], plus[k]);
      }
      if constexpr (decltype(is_modulated)::value) {
        load(scales + offset, by);
        load(shifts + offset, plus);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[j][k] = fmaf(values[j][k], 1.0f + by[k], plus[k]);
      }
      Elements<Y, kWidth> y;
      y.set(values[j]);
      y.store(to + offset);
    });
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (call.weight == nullptr) {
    call.scale == nullptr ? finish(no, no) : finish(no, yes);
  } else {
    call.scale == nullptr ? finish(yes, no) : finish(yes, yes);
  }
}

template <int kWidth, int kElements, int kMinBlocks, bool kFull, typename X, typename Y>
void launch(const Call<X, Y>& call, cudaStream_t stream, const char* where) {
  const int warps = (call.dim + 32 * kElements - 1) / (32 * kElements);
  const dim3 threads(32 * warps, warps == 1 ? kRowsOfBlock : 1);
  const unsigned blocks = (call.tokens + threads.y - 1) / threads.y;
  norm_kernel<kWidth, kElements, kMinBlocks, kFull><<<blocks, threads, 0, stream>>>(call);
  check_cuda(cudaGetLastError(), where);
}

struct Given {
  const char* name;
  const Rows* tensor;
};

void check(const Given (&given)[6], std::int64_t tokens, std::int64_t dim, const std::string& where) {
  require(dim > 0 && dim <= kAdalnMaxDim,
          where + ": dim " + std::to_string(dim) + " is not in 1 to " + std::to_string(kAdalnMaxDim));
  require(tokens > 0 && tokens < INT_MAX, where + ": " + std::to_string(tokens) + " tokens are too many or none");
  const auto& [out, x, scale, shift, weight, bias] = given;
  require((scale.tensor == nullptr) == (shift.tensor == nullptr), where + ": scale and shift come together");
  require((weight.tensor == nullptr) == (bias.tensor == nullptr), where + ": weight and bias come together");
  const std::int64_t frames = scale.tensor == nullptr ? 1 : scale.tensor->rows;
  require(frames > 0 && tokens % frames == 0,
          where + ": " + std::to_string(tokens) + " tokens do not split into the rows of scale");
  const std::int64_t rows[] = {tokens, tokens, frames, frames, 1, 1};
  for (int i = 0; i < 6; ++i) {
    const char* name = given[i].name;
    const Rows* tensor = given[i].tensor;
    if (tensor == nullptr) continue;
    with_element_type(tensor->dtype, where.c_str(), [&](auto element) {
      check_address<decltype(element)>(tensor->data, name, where.c_str());
      require(i < 2 || std::is_same_v<decltype(element), float>, where + ": " + name + " is not float32");
    });
    require(tensor->rows == rows[i], where + ": " + name + " has " + std::to_string(tensor->rows) + " rows, not " +
                                         std::to_string(rows[i]));
  }
}

// Whether every row is whole packs, at addresses they may be loaded from.
bool is_of_packs(const Given (&given)[6], std::int64_t dim) {
  return dim % kWidth == 0 && std::all_of(std::begin(given), std::end(given), [](const Given& each) {
           if (each.tensor == nullptr) return true;
           const int bytes = static_cast<DType>(each.tensor->dtype) == DType::kFloat32 ? 4 : 2;
           // The stride of a single row is never followed.
           const std::int64_t stride = each.tensor->rows == 1 ? 0 : each.tensor->stride;
           return each.tensor->data % (kWidth * bytes) == 0 && stride % kWidth == 0;
         });
}

}  // namespace

void norm_scale_shift(const Rows& out, const Rows& x, const Rows* scale, const Rows* shift, const Rows* weight,
                      const Rows* bias, std::int64_t dim, float eps, Address stream) {
  const char* where = "norm_scale_shift";
  const Given given[] = {{"out", &out},     {"x", &x},           {"scale", scale},
                         {"shift", shift}, {"weight", weight}, {"bias", bias}};
  check(given, x.rows, dim, where);
  const auto row = [](const Rows* tensor) {
    return tensor == nullptr ? nullptr : reinterpret_cast<const float*>(tensor->data);
  };
  const auto stride = [](const Rows* tensor) { return tensor == nullptr ? 0 : tensor->stride; };
  const std::int64_t span = scale == nullptr ? x.rows : x.rows / scale->rows;
  with_element_type(x.dtype, where, [&](auto x_element) {
    with_element_type(out.dtype, where, [&](auto out_element) {
      using X = decltype(x_element);
      using Y = decltype(out_element);
      const Call<X, Y> call{reinterpret_cast<Y*>(out.data),
                            reinterpret_cast<const X*>(x.data),
                            row(scale),
                            row(shift),
                            row(weight),
                            row(bias),
                            out.stride,
                            x.stride,
                            stride(scale),
                            stride(shift),
                            static_cast<std::uint32_t>(x.rows),
                            static_cast<std::uint32_t>(span),
                            static_cast<int>(dim),
                            1.0f / static_cast<float>(dim),
                            eps};
      // A warp takes a row of 1536, and meets no barrier; four take one of 5120. Four blocks a multiprocessor, of as
      // many warps as the longest row takes, bring the compiler down to 80 registers and 24 warps.
      const auto run = !is_of_packs(given, dim) ? launch<1, 48, 1, false, X, Y>
                       : dim % (32 * 48) == 0   ? launch<kWidth, 48, 4, true, X, Y>
                       : dim % (32 * 40) == 0   ? launch<kWidth, 40, 4, true, X, Y>
                                                : launch<kWidth, 48, 4, false, X, Y>;
      run(call, reinterpret_cast<cudaStream_t>(stream), where);
    });
  });
}

}  // namespace skyreels_fast
