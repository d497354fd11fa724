// RMSNorm of queries and keys over all heads together; rotary positions in time, height and width.
//
//   qk_norm          out = x / sqrt(mean(x^2) + eps) * weight, the mean over the N * Dh channels of a token
//   qk_norm_rope3d   the same of q and of k, then each of a head's Dh/2 interleaved pairs turned by its token's angle:
//                    (a, b) -> (a cos - b sin, a sin + b cos)
//
// Inputs [B, L, N, Dh] of one type (float32, float16, bfloat16) have free strides but for Dh, which is contiguous; so
// have the outputs of qk_norm_rope3d, which may be its inputs, where these share no element; that of qk_norm is
// contiguous. Weights [N * Dh] are contiguous, of the inputs' type or float32. Dh is even and at most kMaxHeadChannels,
// N * Dh at most kMaxChannels, B and f at most kMaxFrames, h and w at most kMaxSide. Arithmetic is float32, rounded
// once on the way out.
//
// L = f * (stop - start) for the grid (f, h, w) and the token range [start, stop) within a frame's h * w tokens. The
// first Dh/2 - 2 (Dh/6) pairs turn with the frame, then Dh/6 with the row, Dh/6 with the column (integer division);
// `table` holds their (cos, sin) as pairs of float32: f rows for the frames, then h for the rows, w for the columns.
//
// A block does one token, q and k together: every element is read once, into registers, and written once. Where an
// address, a stride or a head is no whole number of 16 bytes, elements move one by one. The order of summation depends
// on N, Dh and that alone, so that a repeated call gives the same bits.
// Everything runs on `stream` of the current device, and nothing waits for it.

#include "common.cuh"
#include "elements.cuh"
#include "qk_norm_rope3d.h"

namespace skyreels_fast {
namespace {

constexpr int kElements = 16;  // of each input, held by a thread

// What the most channels take, and up to one head more where the heads do not divide by those a thread works on.
template <int kWidth>
constexpr int kMaxThreads = kMaxChannels / kElements + kMaxHeadChannels / (kWidth == 2 ? 2 : 4);

// Two blocks of so many bring the compiler down to 48 registers: 1280 threads a multiprocessor with 64 bytes each on
// their way to them. At float32 they carry twice that, and 48 would spill.
template <typename T, int kWidth>
constexpr int kMinBlocks = Elements<T, kWidth>::kWide && sizeof(T) == 2 ? 2 : 1;

// Division by multiplication, exact where n * value < 2^31.
struct Divisor {
  int value;
  std::uint32_t factor;

  explicit Divisor(int by) : value(by), factor((std::uint32_t{1} << 31) / by + 1) {}
  __device__ int quotient(int n) const { return static_cast<int>(__umulhi(2u * n, factor)); }
};

template <typename T, typename W>
struct Side {
  T* out;
  const T* x;
  const W* weight;
  std::int64_t batch_stride, token_stride, out_batch_stride, out_token_stride;
  int head_stride, out_head_stride;
};

struct Rope {
  const float2* table;
  int height;
  Divisor width;
  int start;
  int along, across;  // pairs of a head that turn with the frame; with the row, and as many with the column
};

// q and k with rotary positions, or one tensor without.
template <typename T, typename W, int kSides>
struct Arguments {
  Side<T, W> side[kSides];
  Rope rope;
  int heads, head_dim;
  int step;       // from a head to the next that the same thread works on
  Divisor packs;  // of a head
  float over_channels, eps;
};

// (cos, sin) of kPairs neighbouring pairs of a head, from `first`, for the block's token.
template <int kPairs>
__device__ void load_turns(float2 (&turn)[kPairs], const Rope& rope, int first) {
  const int place = rope.start + static_cast<int>(blockIdx.x);
  const int row = rope.width.quotient(place);
  const int column = place - row * rope.width.value;
  const int rows = static_cast<int>(gridDim.y) * rope.along;
  const int of_frame = static_cast<int>(blockIdx.y) * rope.along;
  const int of_row = rows + row * rope.across - rope.along;
  const int of_column = rows + (rope.height + column - 1) * rope.across - rope.along;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = first + i;
    const int at = pair < rope.along ? of_frame : pair < rope.along + rope.across ? of_row : of_column;
    turn[i] = __ldg(rope.table + (at + pair));
  }
}

// Each sum's total over the block, in every thread.
template <int kSums>
__device__ void block_sum(float (&sums)[kSums]) {
  __shared__ float of_warp[kSums][kMaxThreads<2> / 32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const auto warp_sum = [](float sum) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  };
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    sums[s] = warp_sum(sums[s]);
    if (lane == 0) of_warp[s][threadIdx.x / 32] = sums[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) sums[s] = warp_sum(lane < warps ? of_warp[s][lane] : 0.0f);
}

// rsqrtf and a step of Newton's: its last bits would be off for a whole token.
__device__ float precise_rsqrt(float x) {
  const float root = rsqrtf(x);
  return fmaf(0.5f * root, fmaf(-x * root, root, 1.0f), root);
}

// The grid: tokens of a frame, frames, batch. A thread takes kWidth channels, the same ones of every step-th head, so
// that it needs one set of angles.
template <int kWidth, typename T, typename W, int kSides>
__global__ void __launch_bounds__(kMaxThreads<kWidth>, kMinBlocks<T, kWidth>)
    norm_kernel(const Arguments<T, W, kSides> arguments) {
  constexpr bool kTurns = kSides == 2;
  constexpr int kPacks = kElements / kWidth;
  constexpr int kPairs = kWidth / 2;
  const int step = arguments.step, thread = static_cast<int>(threadIdx.x);
  const int first = arguments.packs.quotient(thread);
  const int channel = (thread - first * arguments.packs.value) * kWidth;
  const int end = first < step ? arguments.heads : 0;  // the last warp may be longer than the token
  const std::int64_t token = std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x;

  Elements<T, kWidth> x[kSides][kPacks];
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    const Side<T, W>& side = arguments.side[s];
    const T* from = side.x + blockIdx.z * side.batch_stride + token * side.token_stride;
    const int at = first * side.head_stride + channel, jump = step * side.head_stride;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      x[s][j] = {};
      if (first + j * step < end) x[s][j] = Elements<T, kWidth>::template load<true>(from + (at + j * jump));
    }
  }
  float sums[kSides];
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    sums[s] = 0.0f;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 pair = x[s][j].pair(i);
        sums[s] += pair.x * pair.x;
        sums[s] += pair.y * pair.y;
      }
    }
  }
  block_sum(sums);
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) x[s][j].refresh();
  }

  float2 turn[kPairs];
  if constexpr (kTurns) load_turns(turn, arguments.rope, channel / 2);
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    const Side<T, W>& side = arguments.side[s];
    T* const out = side.out + blockIdx.z * side.out_batch_stride + token * side.out_token_stride;
    const float scale = precise_rsqrt(sums[s] * arguments.over_channels + arguments.eps);
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int head = first + j * step;
      if (head >= end) continue;
      const int of_weight = head * arguments.head_dim + channel;
      const auto weight = Elements<W, kWidth>::template load<false>(side.weight + of_weight);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 by = weight.pair(i);
        float2 y = x[s][j].pair(i);
        y = {y.x * scale * by.x, y.y * scale * by.y};
        if constexpr (kTurns) y = {y.x * turn[i].x - y.y * turn[i].y, y.x * turn[i].y + y.y * turn[i].x};
        x[s][j].set_pair(i, y);
      }
      x[s][j].store(out + (head * side.out_head_stride + channel));
    }
  }
}

struct Given {
  const char* name;
  Address out, x, weight;
  Strides out_strides, strides;
};

// What the kernel is asked for, whatever the element type.
struct Task {
  const char* where;
  Shape shape;
  dim3 tokens;
  Rope rope;
  double eps;
  cudaStream_t stream;
};

template <int kWidth, typename T, typename W, int kSides>
void launch(const Task& task, const Given (&given)[kSides]) {
  const int heads = static_cast<int>(task.shape[2]), head_dim = static_cast<int>(task.shape[3]);
  const int step = (heads * kWidth + kElements - 1) / kElements;
  const float over_channels = 1.0f / static_cast<float>(heads * head_dim);
  Arguments<T, W, kSides> arguments{{},   task.rope, heads, head_dim, step, Divisor(head_dim / kWidth), over_channels,
                                    static_cast<float>(task.eps)};
  for (int s = 0; s < kSides; ++s) {
    const auto& [name, out, x, weight, out_strides, strides] = given[s];
    arguments.side[s] = {reinterpret_cast<T*>(out), reinterpret_cast<const T*>(x), reinterpret_cast<const W*>(weight),
                         strides[0], strides[1], out_strides[0], out_strides[1], static_cast<int>(strides[2]),
                         static_cast<int>(out_strides[2])};
  }
  const int warps = (step * arguments.packs.value + 31) / 32;
  norm_kernel<kWidth><<<task.tokens, warps * 32, 0, task.stream>>>(arguments);
  check_cuda(cudaGetLastError(), task.where);
}

template <typename T, typename W, int kSides>
void check_and_launch(const Task& task, const Given (&given)[kSides]) {
  bool wide = task.shape[3] * sizeof(T) % kPackBytes == 0;
  for (const auto& [name, out, x, weight, out_strides, strides] : given) {
    const std::string label = name;
    check_address<T>(out, (label + "_out").c_str(), task.where);
    check_address<T>(x, name, task.where);
    check_address<W>(weight, (label + "_weight").c_str(), task.where);
    wide = wide && (out | x | weight) % kPackBytes == 0;
    for (const Strides& each : {out_strides, strides}) {
      require(each[2] >= 0 && each[2] <= INT32_MAX / task.shape[2],
              std::string(task.where) + ": the heads of " + label + " are too far apart");
      for (const std::int64_t stride : each) wide = wide && stride * sizeof(T) % kPackBytes == 0;
    }
  }
  wide ? launch<kPackBytes / sizeof(T), T, W>(task, given) : launch<2, T, W>(task, given);
}

template <int kSides>
void run(const Task& task, const Given (&given)[kSides], int dtype, int weight_dtype) {
  const std::string where = task.where;
  const auto [batch, tokens, heads, head_dim] = task.shape;
  require(batch > 0 && batch <= kMaxFrames && tokens > 0 && tokens <= INT32_MAX, where + ": no tokens, or too many");
  require(head_dim > 0 && head_dim % 2 == 0 && head_dim <= kMaxHeadChannels,
          where + ": heads of " + std::to_string(head_dim) + " channels are not even, or too long");
  require(heads > 0 && heads <= kMaxChannels / head_dim,
          where + ": " + std::to_string(heads) + " heads of " + std::to_string(head_dim) + " channels do not fit");
  with_element_type(dtype, task.where, [&](auto element) {
    using T = decltype(element);
    const bool as_float = weight_dtype == static_cast<int>(DType::kFloat32);
    require(as_float || weight_dtype == dtype, where + ": weights are neither float32 nor of the inputs' type");
    as_float ? check_and_launch<T, float>(task, given) : check_and_launch<T, T>(task, given);
  });
}

}  // namespace

void qk_norm(Address out, Address x, Address weight, Shape shape, Strides strides, double eps, int dtype,
             int weight_dtype, Address stream) {
  const dim3 tokens(static_cast<unsigned>(shape[1]), 1, static_cast<unsigned>(shape[0]));
  const Rope none{nullptr, 0, Divisor(1), 0, 0, 0};
  const Task task{"qk_norm", shape, tokens, none, eps, reinterpret_cast<cudaStream_t>(stream)};
  const Strides contiguous{shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]};
  run(task, {{"x", out, x, weight, contiguous, strides}}, dtype, weight_dtype);
}

void qk_norm_rope3d(Address q_out, Address k_out, Address q, Address k, Address q_weight, Address k_weight,
                    Address table, Shape shape, Strides q_out_strides, Strides k_out_strides, Strides q_strides,
                    Strides k_strides, Extent grid, Range token_range, double eps, int dtype, int weight_dtype,
                    Address stream) {
  const std::string where = "qk_norm_rope3d";
  check_address<float2>(table, "table", where.c_str());
  const auto [frames, height, width] = grid;
  const auto [start, stop] = token_range;
  require(frames > 0 && frames <= kMaxFrames && height > 0 && width > 0 && width <= kMaxSide && height <= kMaxSide,
          where + ": the grid is empty or too large");
  require(0 <= start && start < stop && stop <= height * width && shape[1] == frames * (stop - start),
          where + ": the tokens are not those of the grid and the token range");
  const int across = static_cast<int>(shape[3] / 6), along = static_cast<int>(shape[3] / 2) - 2 * across;
  const Rope rope{reinterpret_cast<const float2*>(table), static_cast<int>(height), Divisor(static_cast<int>(width)),
                  static_cast<int>(start), along, across};
  const auto per_frame = static_cast<unsigned>(stop - start);
  const dim3 tokens(per_frame, static_cast<unsigned>(frames), static_cast<unsigned>(shape[0]));
  const Task task{where.c_str(), shape, tokens, rope, eps, reinterpret_cast<cudaStream_t>(stream)};
  run(task,
      {{"q", q_out, q, q_weight, q_out_strides, q_strides}, {"k", k_out, k, k_weight, k_out_strides, k_strides}},
      dtype, weight_dtype);
}

}  // namespace skyreels_fast
