// Reuse of a transformer's residual between steps.
//
//   residual_add    out[i] = x[i] + residual[i]
//   residual_save   out[i] = after[i] - before[i]
//   relative_l1     out[0] = sum |next[i] - old[i]| / sum |old[i]|, float32; inf or NaN where old is all zeros
//
// Arrays hold `count` contiguous elements of one type (float32, float16, bfloat16), at any element-aligned address;
// arithmetic is float32, rounded once on the way out. `out` may be an input of residual_add and residual_save.
// relative_l1 needs kRelativeL1WorkspaceBytes of device memory, contents arbitrary, aligned to 8 bytes. Its order of
// summation depends on the count, the alignment and the device alone, so that a repeated call gives the same bits.
// Everything runs on `stream` of the current device, and nothing waits for it.

#include "common.cuh"
#include "elements.cuh"
#include "residual_reuse.h"

namespace skyreels_fast {
namespace {

struct Add {
  __device__ static float apply(float a, float b) { return a + b; }
};

struct Subtract {
  __device__ static float apply(float a, float b) { return a - b; }
};

// Calls use(offset, pack of a, pack of b) for all of both arrays, kInFlight packs of each loaded before the first is
// used; the elements past the last whole pack come as packs of one.
template <int kWidth, typename T, typename Use>
__device__ void for_each_pair(const T* a, const T* b, std::int64_t count, Use use) {
  using Pack = Elements<T, kWidth>;
  using Single = Elements<T, 1>;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * kWidth;
  const std::int64_t end = count / kWidth * kWidth;
  std::int64_t at = thread * kWidth;
  for (; at + (kInFlight - 1) * stride < end; at += kInFlight * stride) {
    Pack left[kInFlight], right[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      left[j] = Pack::template load<true>(a + at + j * stride);
      right[j] = Pack::template load<true>(b + at + j * stride);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) use(at + j * stride, left[j], right[j]);
  }
  for (; at < end; at += stride) use(at, Pack::template load<true>(a + at), Pack::template load<true>(b + at));
  at = end + thread;
  if (at < count) use(at, Single::template load<true>(a + at), Single::template load<true>(b + at));
}

template <typename Op, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads) elementwise_kernel(T* out, const T* a, const T* b, std::int64_t count) {
  for_each_pair<kWidth>(a, b, count, [=](std::int64_t at, auto left, auto right) {
    constexpr int kCount = decltype(left)::kCount;
    float first[kCount], second[kCount];
    left.get(first);
    right.get(second);
#pragma unroll
    for (int k = 0; k < kCount; ++k) first[k] = Op::apply(first[k], second[k]);
    left.set(first);
    left.store(out + at);
  });
}

__device__ float2 warp_sum(float2 sums) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sums.x += __shfl_xor_sync(0xffffffffu, sums.x, offset);
    sums.y += __shfl_xor_sync(0xffffffffu, sums.y, offset);
  }
  return sums;
}

// The block's total, valid in its first warp.
__device__ float2 block_sum(float2 sums) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float2 of_warp[kWarps];
  const int lane = threadIdx.x % 32;
  sums = warp_sum(sums);
  if (lane == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  return warp_sum(lane < kWarps ? of_warp[lane] : float2{0.0f, 0.0f});
}

// A block's share of sum |next - old| (.x) and sum |old| (.y).
template <int kWidth, typename T>
__global__ void __launch_bounds__(kThreads)
    partial_sums_kernel(float2* partials, const T* next, const T* old, std::int64_t count) {
  float2 sums{0.0f, 0.0f};
  for_each_pair<kWidth>(next, old, count, [&](std::int64_t, auto left, auto right) {
    constexpr int kCount = decltype(left)::kCount;
    float after[kCount], before[kCount];
    left.get(after);
    right.get(before);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      sums.x += fabsf(after[k] - before[k]);
      sums.y += fabsf(before[k]);
    }
  });
  sums = block_sum(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = sums;
}

// One block adds the partial sums up, each thread its own in their order.
__global__ void __launch_bounds__(kThreads) ratio_kernel(float* out, const float2* partials, int blocks) {
  float2 sums{0.0f, 0.0f};
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    sums.x += partials[i].x;
    sums.y += partials[i].y;
  }
  sums = block_sum(sums);
  if (threadIdx.x == 0) out[0] = sums.x / sums.y;
}

template <typename Op, typename T, int kWidth>
void launch_elementwise(Address out, Address a, Address b, std::int64_t count, cudaStream_t stream, const char* where) {
  const auto kernel = elementwise_kernel<Op, kWidth, T>;
  const int blocks = persistent_grid(kernel, count / kWidth, where);
  kernel<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<T*>(out), reinterpret_cast<const T*>(a),
                                          reinterpret_cast<const T*>(b), count);
  check_cuda(cudaGetLastError(), where);
}

template <typename T, int kWidth>
void launch_relative_l1(Address out, Address workspace, Address next, Address old, std::int64_t count,
                        cudaStream_t stream, const char* where) {
  const auto kernel = partial_sums_kernel<kWidth, T>;
  const auto partials = reinterpret_cast<float2*>(workspace);
  const int blocks = std::min(persistent_grid(kernel, count / kWidth, where), kMaxPartials);
  kernel<<<blocks, kThreads, 0, stream>>>(partials, reinterpret_cast<const T*>(next), reinterpret_cast<const T*>(old),
                                          count);
  check_cuda(cudaGetLastError(), where);
  ratio_kernel<<<1, kThreads, 0, stream>>>(reinterpret_cast<float*>(out), partials, blocks);
  check_cuda(cudaGetLastError(), where);
}

template <typename Op>
void elementwise(Address out, Address a, Address b, std::int64_t count, int dtype, Address stream, const char* where) {
  require(count >= 0, std::string(where) + ": count " + std::to_string(count) + " is negative");
  if (count == 0) return;
  with_element_type(dtype, where, [&](auto element) {
    using T = decltype(element);
    check_address<T>(out, "out", where);
    check_address<T>(a, "the first input", where);
    check_address<T>(b, "the second input", where);
    const bool wide = (out | a | b) % kPackBytes == 0;
    const auto launch = wide ? launch_elementwise<Op, T, kPackBytes / sizeof(T)> : launch_elementwise<Op, T, 1>;
    launch(out, a, b, count, reinterpret_cast<cudaStream_t>(stream), where);
  });
}

}  // namespace

void residual_add(Address out, Address x, Address residual, std::int64_t count, int dtype, Address stream) {
  elementwise<Add>(out, x, residual, count, dtype, stream, "residual_add");
}

void residual_save(Address out, Address after, Address before, std::int64_t count, int dtype, Address stream) {
  elementwise<Subtract>(out, after, before, count, dtype, stream, "residual_save");
}

void relative_l1(Address out, Address workspace, Address next, Address old, std::int64_t count, int dtype,
                 Address stream) {
  const char* where = "relative_l1";
  require(count > 0, std::string(where) + ": count " + std::to_string(count) + " is not positive");
  check_address<float>(out, "out", where);
  check_address<float2>(workspace, "workspace", where);
  with_element_type(dtype, where, [&](auto element) {
    using T = decltype(element);
    check_address<T>(next, "next", where);
    check_address<T>(old, "old", where);
    const bool wide = (next | old) % kPackBytes == 0;
    const auto launch = wide ? launch_relative_l1<T, kPackBytes / sizeof(T)> : launch_relative_l1<T, 1>;
    launch(out, workspace, next, old, count, reinterpret_cast<cudaStream_t>(stream), where);
  });
}

}  // namespace skyreels_fast
