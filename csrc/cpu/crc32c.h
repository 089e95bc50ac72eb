// CRC-32C (Castagnoli). Hardware instruction where there is one, slicing-by-8 elsewhere.
//
// The instruction takes 3 cycles and starts every cycle, so one chain of it runs at a third of its speed. Long buffers
// are cut into three lanes, and the lanes joined by advancing a CRC over the zero bytes that follow it, which is a
// linear map: four table look-ups.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dispatch.h"

namespace orz {

constexpr uint32_t kCrcPolynomial = 0x82F63B78u;

struct CrcTables {
  std::array<std::array<uint32_t, 256>, 8> slice{};

  constexpr CrcTables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = (crc & 1u) ? (crc >> 1) ^ kCrcPolynomial : crc >> 1;
      slice[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (size_t s = 1; s < 8; ++s) slice[s][i] = (slice[s - 1][i] >> 8) ^ slice[0][slice[s - 1][i] & 0xFFu];
  }
};

inline constexpr CrcTables kCrc{};

// A linear map of CRC registers, as its images of the 32 single bits.
using CrcMatrix = std::array<uint32_t, 32>;

inline uint32_t crc_apply(const CrcMatrix& matrix, uint32_t state) {
  uint32_t out = 0;
  for (size_t bit = 0; state != 0; state >>= 1, ++bit)
    if (state & 1u) out ^= matrix[bit];
  return out;
}

// The map "num_bytes zero bytes follow", by repeated squaring.
inline CrcMatrix crc_advance(uint64_t num_bytes) {
  CrcMatrix power{}, result{};
  for (uint32_t bit = 0; bit < 32; ++bit) {
    const uint32_t state = 1u << bit;
    result[bit] = state;
    power[bit] = kCrc.slice[0][state & 0xFFu] ^ (state >> 8);
  }
  for (; num_bytes != 0; num_bytes >>= 1) {
    CrcMatrix next{};
    if (num_bytes & 1u)
      for (size_t bit = 0; bit < 32; ++bit) result[bit] = crc_apply(power, result[bit]);
    for (size_t bit = 0; bit < 32; ++bit) next[bit] = crc_apply(power, power[bit]);
    power = next;
  }
  return result;
}

// CRC of two pieces one after the other, from the CRC of each.
inline uint32_t crc32c_combine(uint32_t first, uint32_t second, uint64_t second_bytes) {
  return crc_apply(crc_advance(second_bytes), first) ^ second;
}

// The same map as four tables of a byte each.
struct CrcShift {
  uint32_t table[4][256];

  explicit CrcShift(uint64_t num_bytes) {
    const CrcMatrix matrix = crc_advance(num_bytes);
    for (uint32_t byte = 0; byte < 256; ++byte)
      for (uint32_t place = 0; place < 4; ++place) table[place][byte] = crc_apply(matrix, byte << (8 * place));
  }

  uint32_t operator()(uint32_t state) const {
    return table[0][state & 0xFFu] ^ table[1][(state >> 8) & 0xFFu] ^ table[2][(state >> 16) & 0xFFu] ^
           table[3][state >> 24];
  }
};

inline uint64_t load64(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

inline uint32_t crc_state_software(uint32_t state, const uint8_t* data, size_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    const uint64_t word = load64(data) ^ state;
    state = 0;
    for (size_t byte = 0; byte < 8; ++byte) state ^= kCrc.slice[7 - byte][(word >> (8 * byte)) & 0xFFu];
  }
  for (; size > 0; ++data, --size) state = (state >> 8) ^ kCrc.slice[0][(state ^ *data) & 0xFFu];
  return state;
}

#if ORZ_X86
constexpr size_t kCrcLane = 4096;

ORZ_TARGET_SSE42 inline uint32_t crc_state_hardware(uint32_t state, const uint8_t* data, size_t size) {
  static const CrcShift one_lane(kCrcLane), two_lanes(2 * kCrcLane);
  while (size >= 3 * kCrcLane) {
    uint64_t a = state, b = 0, c = 0;
    for (size_t i = 0; i < kCrcLane; i += 8) {
      a = _mm_crc32_u64(a, load64(data + i));
      b = _mm_crc32_u64(b, load64(data + i + kCrcLane));
      c = _mm_crc32_u64(c, load64(data + i + 2 * kCrcLane));
    }
    state = two_lanes(static_cast<uint32_t>(a)) ^ one_lane(static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
    data += 3 * kCrcLane;
    size -= 3 * kCrcLane;
  }
  uint64_t wide = state;
  for (; size >= 8; data += 8, size -= 8) wide = _mm_crc32_u64(wide, load64(data));
  state = static_cast<uint32_t>(wide);
  for (; size > 0; ++data, --size) state = _mm_crc32_u8(state, *data);
  return state;
}
#endif

// Continues from `init`, the CRC of what came before.
inline uint32_t crc32c(const void* data, size_t size, uint32_t init = 0) {
  const auto* bytes = static_cast<const uint8_t*>(data);
#if ORZ_X86
  if (has_sse42()) return ~crc_state_hardware(~init, bytes, size);
#endif
  return ~crc_state_software(~init, bytes, size);
}

}  // namespace orz
