// Neighbouring elements in the form they have in memory, two to a word where they are 16 bits, read as pairs of floats.
// A kernel that sums first and computes after holds half the registers that floats would take.
#pragma once

#include "common.cuh"

namespace skyreels_fast {

// bfloat16 by its bits: the conversions of CUDA's headers take an instruction more.
__device__ inline float2 unpack(std::uint32_t word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ inline float2 unpack(std::uint32_t word, __half) {
  __half2 pair;
  memcpy(&pair, &word, sizeof(pair));
  return __half22float2(pair);
}

__device__ inline __nv_bfloat162 rounded(float2 pair, __nv_bfloat16) { return __float22bfloat162_rn(pair); }
__device__ inline __half2 rounded(float2 pair, __half) { return __float22half2_rn(pair); }

// kWidth of them, moved 16 or 8 bytes at a time where they make so many (at addresses that are multiples of those), else
// one by one.
template <typename T, int kWidth>
struct Elements {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * kWidth;
  static constexpr bool kWide = kWidth > 2;
  using Word = std::conditional_t<kWide, std::conditional_t<kBytes % kPackBytes == 0, uint4, uint2>, T>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  static_assert(kWidth <= 2 || kBytes % sizeof(Word) == 0);
  std::uint32_t word[(kBytes + 3) / 4];

  // kOnce: nobody reads them again, so the caches should keep what is.
  template <bool kOnce>
  __device__ static Elements load(const T* from) {
    Word words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const Word* at = reinterpret_cast<const Word*>(from) + i;
      words[i] = kOnce ? __ldcs(at) : __ldg(at);
    }
    Elements elements;
    memcpy(elements.word, words, sizeof(words));
    return elements;
  }

  // Evict first: what these kernels write outgrows the caches.
  __device__ void store(T* to) const {
    Word words[kWords];
    memcpy(words, word, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<Word*>(to) + i, words[i]);
  }

  __device__ float2 pair(int i) const {
    if constexpr (sizeof(T) == 4) {
      return {__uint_as_float(word[2 * i]), __uint_as_float(word[2 * i + 1])};
    } else {
      return unpack(word[i], T{});
    }
  }

  __device__ void set_pair(int i, float2 pair) {
    if constexpr (sizeof(T) == 4) {
      word[2 * i] = __float_as_uint(pair.x);
      word[2 * i + 1] = __float_as_uint(pair.y);
    } else {
      const auto both = rounded(pair, T{});
      memcpy(word + i, &both, sizeof(both));
    }
  }

  // Changes nothing, which the compiler cannot know, so that it unpacks anew what it would else keep as floats from
  // one use to the next. For grids of blocks that are flat (blockDim.z is 1).
  __device__ void refresh() {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (std::uint32_t& bits : word) bits ^= blockDim.z - 1;
    }
  }
};

}  // namespace skyreels_fast
