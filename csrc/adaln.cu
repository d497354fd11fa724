// Gate, residual, LayerNorm and modulation of a transformer's tokens, in one pass.
//
//   sum = residual + gate * x    x alone where there is no residual; no gate: 1
//   y   = (sum - mean) / sqrt(variance + eps) * weight + bias, then * (1 + scale) + shift
//
//   norm_scale_shift                   x -> y
//   scale_residual                     residual, x -> sum
//   scale_residual_norm_scale_shift    residual, x -> sum, and y of the sum before it is rounded
//
// x, residual and the outputs have a row a token; the tokens of several videos follow each other. Mean and variance
// are over a row, divided by dim. gate, scale and shift have a row a frame of tokens: their rows divide the tokens,
// and token t takes row t / (tokens / rows). weight and bias are one row. scale comes with shift, weight with bias;
// null leaves a pair or the gate out. Each tensor is float32, float16 or bfloat16 by itself, at any element-aligned
// address; dim is at most kAdalnMaxDim. Arithmetic is float32, rounded once on the way out, in an order that depends
// on dim, types and alignment alone, so that a repeated call gives the same bits. An output may be residual or x
// itself (same address, type and stride). Everything runs on `stream` of the current device, and nothing waits for
// it.

#include "adaln.h"

#include <climits>
#include <iterator>

#include "common.cuh"

namespace skyreels_fast {
namespace {

// Elements of a token that a thread holds in registers. A block is as many threads as hold one token, so that few lanes
// idle whatever dim is: 96 threads at 1536, 320 at 5120.
constexpr int kElements = 16;
constexpr int kMaxThreads = kAdalnMaxDim / kElements;
constexpr int kMaxWarps = kMaxThreads / 32;

struct None {};  // the element type of a tensor that is left out
struct Any {};   // one known at run time only, of a tensor that may be left out

// The quotient of a number below 2^31 by a fixed one: a multiplication and a shift, exact.
struct Divisor {
  std::uint32_t shift = 31;
  std::uint32_t multiplier;

  explicit Divisor(std::int64_t divisor) {
    while ((std::int64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<std::uint32_t>(((std::int64_t{1} << shift) + divisor - 1) / divisor);
  }

  __device__ std::uint32_t divide(std::uint32_t number) const {
    return static_cast<std::uint32_t>((std::uint64_t{number} * multiplier) >> shift);
  }
};

struct Operand {
  char* data = nullptr;
  int dtype = 0;
  std::int64_t stride_bytes = 0;

  __device__ bool present() const { return data != nullptr; }

  template <typename T>
  __device__ T* row(std::uint32_t index) const {
    return reinterpret_cast<T*>(data + index * stride_bytes);
  }
};

struct Call {
  Operand x, residual, gate, scale, shift, weight, bias, sum, y;
  Divisor gate_span;   // tokens that take one row of the gate
  Divisor scale_span;  // tokens that take one row of scale and shift
  std::uint32_t tokens;
  int dim;
  float inverse_dim;
  float eps;
};

template <typename T>
__device__ bool present(const Operand& operand) {
  if constexpr (std::is_same_v<T, Any>) return operand.present();
  return !std::is_same_v<T, None>;
}

// Neighbouring elements as the 32-bit words they came in. Taking the words apart waits for the load, and the compiler
// would do that at once if it saw elements; so it is left to get().
template <typename T, int kWidth>
struct Words {
  using Wide = typename Pack<T, kWidth>::Word;
  static constexpr int kCount = sizeof(T) * kWidth / 4;
  static constexpr int kEach = sizeof(Wide) / 4;
  std::uint32_t word[kCount];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) split(i, reinterpret_cast<const Wide*>(from)[i / kEach]);
  }

  // Evict first: what is read once leaves the caches to what is read again.
  __device__ void load_once(const T* from) {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) split(i, __ldcs(reinterpret_cast<const Wide*>(from) + i / kEach));
  }

  __device__ void get(float (&values)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        values[i] = __uint_as_float(word[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        values[2 * i] = __uint_as_float(word[i] << 16);
        values[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
      } else {
        __half2 pair;
        memcpy(&pair, &word[i], sizeof(pair));
        values[2 * i] = __low2float(pair);
        values[2 * i + 1] = __high2float(pair);
      }
    }
  }

 private:
  __device__ void split(int i, uint4 wide) {
    word[i] = wide.x, word[i + 1] = wide.y, word[i + 2] = wide.z, word[i + 3] = wide.w;
  }
  __device__ void split(int i, uint2 wide) { word[i] = wide.x, word[i + 1] = wide.y; }
};

template <typename T>
struct Words<T, 1> {
  T element;

  __device__ void load(const T* from) { element = *from; }
  __device__ void get(float (&values)[1]) const { values[0] = static_cast<float>(element); }
};

// Calls run(T{}) with the element type of an operand, which was checked.
template <typename Run>
__device__ void with_element_type_of(const Operand& operand, Run run) {
  switch (static_cast<DType>(operand.dtype)) {
    case DType::kFloat32: return run(float{});
    case DType::kFloat16: return run(__half{});
    default: return run(__nv_bfloat16{});
  }
}

// A part of a row of any type. A modulation's row is read by many tokens, so it stays in the first-level cache.
template <int kWidth>
__device__ void load_row(const Operand& from, std::uint32_t row, int column, float (&values)[kWidth]) {
  with_element_type_of(from, [&](auto element) {
    Words<decltype(element), kWidth> words;
    words.load(from.row<const decltype(element)>(row) + column);
    words.get(values);
  });
}

// A part of a token: loaded a token ahead, used when its turn has come; 0 before it is first loaded.
template <typename T, int kWidth>
struct Ahead {
  Words<T, kWidth> words = {};

  __device__ void load(const Operand& from, std::uint32_t token, int column) {
    words.load_once(from.row<const T>(token) + column);
  }
  __device__ void get(float (&values)[kWidth]) const { words.get(values); }
};

template <>
struct Ahead<Any, 1> {
  float value[1] = {};

  __device__ void load(const Operand& from, std::uint32_t token, int column) { load_row(from, token, column, value); }
  __device__ void get(float (&values)[1]) const { values[0] = value[0]; }
};

template <int kWidth>
struct Ahead<None, kWidth> {
  __device__ void load(const Operand&, std::uint32_t, int) {}
  __device__ void get(float (&)[kWidth]) const {}
};

template <typename T, int kWidth>
__device__ void put(const Operand& to, std::uint32_t token, int column, const float (&values)[kWidth]) {
  if constexpr (std::is_same_v<T, Any>) {
    with_element_type_of(to, [&](auto element) { put<decltype(element)>(to, token, column, values); });
  } else if constexpr (!std::is_same_v<T, None>) {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.lane[k] = T(values[k]);
    pack.store(to.row<T>(token) + column);
  }
}

template <int kLanes>
__device__ float sum_of_lanes(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The block's total in all of its threads. Two calls in a row must not share `of_warp`: the barrier of one parts the
// other's reads from its next writes.
__device__ float block_sum(float value, float* of_warp) {
  static_assert(kMaxWarps == 16);
  value = sum_of_lanes<32>(value);
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return value;
  if (lane == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return sum_of_lanes<16>(lane % 16 < warps ? of_warp[lane % 16] : 0.0f);
}

// One token a block at a time; while it is worked on, the block's next one is on its way. Blocks go through the tokens
// side by side, so those on one processor want the same frame's rows, which its first-level cache keeps.
template <typename X, typename Residual, typename Sum, typename Y, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) adaln_kernel(const Call call) {
  constexpr int kPacks = kElements / kWidth;
  __shared__ float of_warp[2][kMaxWarps];
  Ahead<X, kWidth> x[kPacks];
  Ahead<Residual, kWidth> residual[kPacks];

  const auto for_each_pack = [&](auto use) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int column = static_cast<int>(j * blockDim.x + threadIdx.x) * kWidth;
      if (column < call.dim) use(j, column);
    }
  };
  const auto fetch = [&](std::uint32_t token) {
    for_each_pack([&](int j, int column) {
      x[j].load(call.x, token, column);
      if (present<Residual>(call.residual)) residual[j].load(call.residual, token, column);
    });
  };

  fetch(blockIdx.x);
  for (std::uint32_t token = blockIdx.x; token < call.tokens; token += gridDim.x) {
    float values[kPacks][kWidth];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) x[j].get(values[j]);
    if (present<Residual>(call.residual)) {
      for_each_pack([&](int j, int column) {
        float base[kWidth], gate[kWidth];
        residual[j].get(base);
        if (call.gate.present()) {
          load_row(call.gate, call.gate_span.divide(token), column, gate);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) values[j][k] = fmaf(gate[k], values[j][k], base[k]);
        } else {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) values[j][k] += base[k];
        }
      });
    }
    if (token + gridDim.x < call.tokens) fetch(token + gridDim.x);

    if (present<Sum>(call.sum)) {
      for_each_pack([&](int j, int column) { put<Sum>(call.sum, token, column, values[j]); });
    }
    if (!present<Y>(call.y)) continue;

    float total = 0.0f, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) total += values[j][k];  // past the row's end they are 0
    }
    const float mean = block_sum(total, of_warp[0]) * call.inverse_dim;
    for_each_pack([&](int j, int) {
#pragma unroll
      for (float& value : values[j]) {
        value -= mean;
        squares += value * value;
      }
    });
    const float inverse_deviation = rsqrtf(block_sum(squares, of_warp[1]) * call.inverse_dim + call.eps);

    for_each_pack([&](int j, int column) {
      float factor[kWidth], term[kWidth];
#pragma unroll
      for (float& value : values[j]) value *= inverse_deviation;
      if (call.weight.present()) {
        load_row(call.weight, 0, column, factor);
        load_row(call.bias, 0, column, term);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[j][k] = fmaf(values[j][k], factor[k], term[k]);
      }
      if (call.scale.present()) {
        const std::uint32_t frame = call.scale_span.divide(token);
        load_row(call.scale, frame, column, factor);
        load_row(call.shift, frame, column, term);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[j][k] = fmaf(values[j][k], 1.0f + factor[k], term[k]);
      }
      put<Y>(call.y, token, column, values[j]);
    });
  }
}

// The tensors of a call; null where one is left out.
struct Tensors {
  const Rows *x, *residual, *gate, *scale, *shift, *weight, *bias, *sum, *y;
};

void check(const Tensors& tensors, std::int64_t dim, const std::string& where) {
  require(dim > 0 && dim <= kAdalnMaxDim,
          where + ": dim " + std::to_string(dim) + " is not in 1 to " + std::to_string(kAdalnMaxDim));
  const std::int64_t tokens = tensors.x->rows;
  require(tokens > 0 && tokens < INT_MAX, where + ": " + std::to_string(tokens) + " tokens are too many or none");
  const auto check_rows = [&](const char* name, const Rows* tensor, std::int64_t rows) {
    if (tensor == nullptr) return;
    with_element_type(tensor->dtype, where.c_str(), [&](auto element) {
      check_address<decltype(element)>(tensor->data, name, where.c_str());
    });
    require(tensor->rows == rows, where + ": " + name + " has " + std::to_string(tensor->rows) + " rows, not " +
                                      std::to_string(rows));
  };
  const auto check_frames = [&](const char* name, const Rows* tensor) {
    require(tensor == nullptr || (tensor->rows > 0 && tokens % tensor->rows == 0),
            where + ": " + std::to_string(tokens) + " tokens do not split into the rows of " + name);
  };
  require((tensors.scale == nullptr) == (tensors.shift == nullptr), where + ": scale and shift come together");
  require((tensors.weight == nullptr) == (tensors.bias == nullptr), where + ": weight and bias come together");
  check_frames("gate", tensors.gate);
  check_frames("scale", tensors.scale);
  check_rows("x", tensors.x, tokens);
  check_rows("residual", tensors.residual, tokens);
  check_rows("residual_out", tensors.sum, tokens);
  check_rows("out", tensors.y, tokens);
  check_rows("gate", tensors.gate, tensors.gate ? tensors.gate->rows : 0);
  check_rows("scale", tensors.scale, tensors.scale ? tensors.scale->rows : 0);
  check_rows("shift", tensors.shift, tensors.scale ? tensors.scale->rows : 0);
  check_rows("weight", tensors.weight, 1);
  check_rows("bias", tensors.bias, 1);
}

int element_bytes(int dtype) { return static_cast<DType>(dtype) == DType::kFloat32 ? 4 : 2; }

Operand operand(const Rows* tensor) {
  if (tensor == nullptr) return {};
  // The stride of a single row is never followed, and must not count as one that is not aligned.
  const std::int64_t stride = tensor->rows == 1 ? 0 : tensor->stride;
  return {reinterpret_cast<char*>(tensor->data), tensor->dtype, stride * element_bytes(tensor->dtype)};
}

Call make_call(const Tensors& tensors, std::int64_t dim, float eps) {
  const std::int64_t tokens = tensors.x->rows;
  const auto span = [&](const Rows* tensor) { return Divisor(tensor == nullptr ? tokens : tokens / tensor->rows); };
  return {operand(tensors.x),
          operand(tensors.residual),
          operand(tensors.gate),
          operand(tensors.scale),
          operand(tensors.shift),
          operand(tensors.weight),
          operand(tensors.bias),
          operand(tensors.sum),
          operand(tensors.y),
          span(tensors.gate),
          span(tensors.scale),
          static_cast<std::uint32_t>(tokens),
          static_cast<int>(dim),
          1.0f / static_cast<float>(dim),
          eps};
}

// Whether every row is whole packs of `width` elements, at addresses they may be loaded from.
bool is_of_packs(const Call& call, int width) {
  const Operand* operands[] = {&call.x,      &call.residual, &call.gate, &call.scale, &call.shift,
                               &call.weight, &call.bias,     &call.sum,  &call.y};
  return call.dim % width == 0 && std::all_of(std::begin(operands), std::end(operands), [&](const Operand* each) {
           const int alignment = std::min(width * element_bytes(each->dtype), kPackBytes);
           return reinterpret_cast<Address>(each->data) % alignment == 0 && each->stride_bytes % alignment == 0;
         });
}

template <typename X, typename Residual, typename Sum, typename Y, int kWidth>
void launch(const Call& call, cudaStream_t stream, const char* where) {
  const auto kernel = adaln_kernel<X, Residual, Sum, Y, kWidth>;
  const int threads = (call.dim + 32 * kElements - 1) / (32 * kElements) * 32;
  const std::int64_t blocks = std::min<std::int64_t>(resident_blocks(kernel, threads, where), call.tokens);
  kernel<<<static_cast<int>(blocks), threads, 0, stream>>>(call);
  check_cuda(cudaGetLastError(), where);
}

// Calls run(X{}) or run(float{}) where `dtype` is X's or float32.
template <typename X, typename Run>
void with_float_or(int x_dtype, int dtype, Run run) {
  if (static_cast<DType>(dtype) == DType::kFloat32) {
    run(float{});
  } else if (dtype == x_dtype) {
    run(X{});
  }
}

// Kernels that move packs are there for the types that transformers mix: a norm from or to float32, or of one type; a
// residual and a sum of x's type or float32, with y of x's type. One slower kernel takes all the rest, by the element.
void run(const Tensors& tensors, std::int64_t dim, float eps, Address stream_address, const char* where) {
  check(tensors, dim, where);
  const Call call = make_call(tensors, dim, eps);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  bool launched = false;
  const auto launch_packs = [&](auto x, auto residual, auto sum, auto y) {
    constexpr std::size_t kWidest = std::max({sizeof(x), sizeof(residual), sizeof(sum), sizeof(y)});
    constexpr int kWidth = kPackBytes / static_cast<int>(kWidest);
    if (!is_of_packs(call, kWidth)) return;
    launch<decltype(x), decltype(residual), decltype(sum), decltype(y), kWidth>(call, stream, where);
    launched = true;
  };
  const auto launch_norm = [&](auto x) {
    with_element_type(tensors.y->dtype, where, [&](auto y) {
      constexpr bool kOneType = std::is_same_v<decltype(x), decltype(y)>;
      if constexpr (kOneType || std::is_same_v<decltype(x), float> || std::is_same_v<decltype(y), float>) {
        launch_packs(x, None{}, None{}, y);
      }
    });
  };
  const auto launch_sum = [&](auto x) {
    const int dtype = tensors.x->dtype;
    with_float_or<decltype(x)>(dtype, tensors.residual->dtype, [&](auto residual) {
      with_float_or<decltype(x)>(dtype, tensors.sum->dtype, [&](auto sum) {
        if (tensors.y == nullptr) {
          launch_packs(x, residual, sum, None{});
        } else if (tensors.y->dtype == dtype) {
          launch_packs(x, residual, sum, x);
        }
      });
    });
  };
  with_element_type(tensors.x->dtype, where, [&](auto x) {
    if (tensors.residual == nullptr) {
      launch_norm(x);
    } else {
      launch_sum(x);
    }
  });
  if (!launched) launch<Any, Any, Any, Any, 1>(call, stream, where);
}

}  // namespace

void norm_scale_shift(const Rows& out, const Rows& x, const Rows* scale, const Rows* shift, const Rows* weight,
                      const Rows* bias, std::int64_t dim, float eps, Address stream) {
  const Tensors tensors{&x, nullptr, nullptr, scale, shift, weight, bias, nullptr, &out};
  run(tensors, dim, eps, stream, "norm_scale_shift");
}

void scale_residual(const Rows& residual_out, const Rows& residual, const Rows& x, const Rows* gate, std::int64_t dim,
                    Address stream) {
  const Tensors tensors{&x, &residual, gate, nullptr, nullptr, nullptr, nullptr, &residual_out, nullptr};
  run(tensors, dim, 0.0f, stream, "scale_residual");
}

void scale_residual_norm_scale_shift(const Rows& residual_out, const Rows& out, const Rows& residual, const Rows& x,
                                     const Rows* gate, const Rows* scale, const Rows* shift, const Rows* weight,
                                     const Rows* bias, std::int64_t dim, float eps, Address stream) {
  const Tensors tensors{&x, &residual, gate, scale, shift, weight, bias, &residual_out, &out};
  run(tensors, dim, eps, stream, "scale_residual_norm_scale_shift");
}

}  // namespace skyreels_fast
