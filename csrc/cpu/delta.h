// Changed words of a tensor between two versions. The layout is described in orz_async/ops/reference/delta.py, which
// writes the same bytes.
//
// Blocks of 65,536 words are coded on their own, so threads share nothing and the bytes do not depend on their number.
// A payload comes from outside: every size and position is checked before it is used, and apply() computes the
// checksum of the result on a copy, block by block, before it writes the first word.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "crc32c.h"
#include "dispatch.h"
#include "parallel.h"

namespace orz::delta {

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "payloads are little-endian and written as words are");
#endif

constexpr size_t kBlockWords = 65536;
constexpr uint8_t kEscape = 255;
constexpr uint8_t kFormat = 1, kFull = 0, kChanged = 1;
constexpr size_t kBlockHeaderBytes = 8, kHeaderBytes = 40;
// Fewer blocks than this are done before a second thread has started.
constexpr size_t kGrainBlocks = 4;

class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct Header {
  uint8_t word_bytes = 0, kind = 0;
  uint64_t num_words = 0, body_bytes = 0;
  uint32_t old_crc = 0, new_crc = 0, body_crc = 0;

  void write(uint8_t* out) const {
    const uint8_t start[8] = {'O', 'R', 'Z', 'D', kFormat, word_bytes, kind, 0};
    std::memcpy(out, start, 8);
    std::memcpy(out + 8, &num_words, 8);
    std::memcpy(out + 16, &old_crc, 4);
    std::memcpy(out + 20, &new_crc, 4);
    std::memcpy(out + 24, &body_bytes, 8);
    std::memcpy(out + 32, &body_crc, 4);
    const uint32_t crc = crc32c(out, 36);
    std::memcpy(out + 36, &crc, 4);
  }

  static Header read(const uint8_t* data, size_t size) {
    if (size < kHeaderBytes)
      throw Error("payload: expected at least " + std::to_string(kHeaderBytes) + " bytes, found " + std::to_string(size));
    uint32_t crc;
    std::memcpy(&crc, data + 36, 4);
    if (crc32c(data, 36) != crc)
      throw Error("payload: expected an intact header, found one whose checksum is wrong");
    const uint8_t start[5] = {'O', 'R', 'Z', 'D', kFormat};
    if (std::memcmp(data, start, 5) != 0) throw Error("payload: expected magic ORZD and format 1, found another");
    Header header;
    header.word_bytes = data[5];
    header.kind = data[6];
    std::memcpy(&header.num_words, data + 8, 8);
    std::memcpy(&header.old_crc, data + 16, 4);
    std::memcpy(&header.new_crc, data + 20, 4);
    std::memcpy(&header.body_bytes, data + 24, 8);
    std::memcpy(&header.body_crc, data + 32, 4);
    if (header.kind > kChanged) throw Error("payload: expected kind 0 or 1, found " + std::to_string(header.kind));
    return header;
  }
};

// Bytes that grow without being cleared first.
class Bytes {
 public:
  // Room for `more` bytes after the end; they become part of the content by advance().
  uint8_t* reserve(size_t more) {
    if (capacity_ - size_ < more) {
      capacity_ = std::max(2 * capacity_, size_ + more);
      std::unique_ptr<uint8_t[]> bigger(new uint8_t[capacity_]);
      if (size_ != 0) std::memcpy(bigger.get(), data_.get(), size_);
      data_ = std::move(bigger);
    }
    return data_.get() + size_;
  }
  void advance(size_t bytes) { size_ += bytes; }
  size_t size() const { return size_; }
  const uint8_t* data() const { return data_.get(); }

 private:
  std::unique_ptr<uint8_t[]> data_;
  size_t size_ = 0, capacity_ = 0;
};

struct Block {
  uint32_t changed = 0, gap_bytes = 0;
};

inline size_t num_blocks(size_t num_words) { return (num_words + kBlockWords - 1) / kBlockWords; }

// Positions of the changed words of a block, ascending. A caller's buffer has kSlack more than the words of a block.
constexpr size_t kSlack = 64;

template <typename Word>
size_t find_scalar(const Word* fresh, const Word* old, size_t from, size_t count, uint32_t* out) {
  size_t found = 0;
  for (size_t i = from; i < count; ++i) {
    out[found] = static_cast<uint32_t>(i);
    found += fresh[i] != old[i];
  }
  return found;
}

#if ORZ_X86
// Bit i is set if word i of the 32 differs.
template <typename Word>
ORZ_TARGET_AVX2 inline uint32_t differing32(const Word* fresh, const Word* old) {
  const auto same = [&](size_t vector) ORZ_TARGET_AVX2 {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(fresh) + vector);
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(old) + vector);
    return sizeof(Word) == 2 ? _mm256_cmpeq_epi16(a, b) : _mm256_cmpeq_epi32(a, b);
  };
  // Packing narrows within each half of a register, so the words come out interleaved and are put back in order.
  __m256i bytes;
  if (sizeof(Word) == 2) {
    bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(same(0), same(1)), _MM_SHUFFLE(3, 1, 2, 0));
  } else {
    bytes = _mm256_packs_epi16(_mm256_packs_epi32(same(0), same(1)), _mm256_packs_epi32(same(2), same(3)));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

// With a word in fifty changed, "does any of these differ" is a coin toss that the branch predictor loses. So the first
// four positions of each 64 words are always written, and the end of the list moves by how many there really were.
template <typename Word>
ORZ_TARGET_AVX2 size_t find_avx2(const Word* fresh, const Word* old, size_t count, uint32_t* out) {
  uint32_t* end = out;
  size_t i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t differs = differing32(fresh + i, old + i);
    differs |= static_cast<uint64_t>(differing32(fresh + i + 32, old + i + 32)) << 32;
    const auto changed = static_cast<size_t>(__builtin_popcountll(differs));
    for (size_t k = 0; k < 4; ++k) {
      end[k] = static_cast<uint32_t>(i + _tzcnt_u64(differs));
      differs &= differs - 1;
    }
    for (size_t k = 4; k < changed; ++k) {
      end[k] = static_cast<uint32_t>(i + _tzcnt_u64(differs));
      differs &= differs - 1;
    }
    end += changed;
  }
  return static_cast<size_t>(end - out) + find_scalar(fresh, old, i, count, end);
}
#endif

template <typename Word>
size_t find_changed(const Word* fresh, const Word* old, size_t count, uint32_t* out) {
#if ORZ_X86
  if (has_avx2()) return find_avx2(fresh, old, count, out);
#endif
  return find_scalar(fresh, old, 0, count, out);
}

// Returns the end of the gaps.
inline uint8_t* write_gaps(const uint32_t* positions, size_t count, uint8_t* out) {
  uint32_t next = 0;
  for (size_t k = 0; k < count; ++k) {
    uint32_t unchanged = positions[k] - next;
    for (; unchanged >= kEscape; unchanged -= kEscape) *out++ = kEscape;
    *out++ = static_cast<uint8_t>(unchanged);
    next = positions[k] + 1;
  }
  return out;
}

// CRCs of consecutive ranges, joined left to right.
struct Checksum {
  uint32_t crc = 0;
  uint64_t bytes = 0;
};

inline uint32_t join(const std::vector<Checksum>& parts) {
  uint32_t crc = 0;
  for (const Checksum& part : parts) crc = crc32c_combine(crc, part.crc, part.bytes);
  return crc;
}

// The changed words, found; still to be written out. Keeps pointers into the new words.
class Encoder {
 public:
  template <typename Word>
  Encoder(const Word* fresh, const Word* old, size_t num_words, size_t threads)
      : fresh_(reinterpret_cast<const uint8_t*>(fresh)), blocks_(num_blocks(num_words)) {
    parts_.resize(std::max<size_t>(1, std::min(threads, std::max<size_t>(1, blocks_.size() / kGrainBlocks))));
    const size_t ranges = parts_.size();
    parallel_ranges(ranges, ranges, 1, [&](size_t first, size_t last) {
      for (size_t r = first; r < last; ++r)
        scan_range(fresh, old, num_words, blocks_.size() * r / ranges, blocks_.size() * (r + 1) / ranges, parts_[r]);
    });
    header_.word_bytes = sizeof(Word);
    header_.num_words = num_words;
    std::vector<Checksum> olds, news;
    size_t body = kBlockHeaderBytes * blocks_.size();
    for (const Part& part : parts_) {
      olds.push_back(part.old_sum);
      news.push_back(part.new_sum);
      body += part.gaps.size() + part.values.size();
    }
    header_.old_crc = join(olds);
    header_.new_crc = join(news);
    const size_t whole = num_words * sizeof(Word);
    header_.kind = body < whole ? kChanged : kFull;
    header_.body_bytes = std::min(body, whole);
  }

  size_t size() const { return kHeaderBytes + header_.body_bytes; }

  void write(uint8_t* out) {
    uint8_t* at = out + kHeaderBytes;
    const auto append = [&at](const void* data, size_t bytes) {
      if (bytes != 0) std::memcpy(at, data, bytes);
      at += bytes;
    };
    if (header_.kind == kFull) {
      append(fresh_, header_.body_bytes);
    } else {
      append(blocks_.data(), blocks_.size() * kBlockHeaderBytes);
      for (const Part& part : parts_) append(part.gaps.data(), part.gaps.size());
      for (const Part& part : parts_) append(part.values.data(), part.values.size());
    }
    header_.body_crc = crc32c(out + kHeaderBytes, header_.body_bytes);
    header_.write(out);
  }

 private:
  struct Part {
    Bytes gaps, values;
    Checksum old_sum, new_sum;
  };

  template <typename Word>
  void scan_range(const Word* fresh, const Word* old, size_t num_words, size_t first, size_t last, Part& part) {
    const std::unique_ptr<uint32_t[]> positions(new uint32_t[kBlockWords + kSlack]);
    for (size_t b = first; b < last; ++b) {
      const size_t start = b * kBlockWords, count = std::min(kBlockWords, num_words - start);
      const size_t changed = find_changed(fresh + start, old + start, count, positions.get());
      // Each changed word has one byte of gap, and every 255 unchanged ones at most one more.
      uint8_t* gaps = part.gaps.reserve(changed + count / kEscape + 1);
      const auto gap_bytes = static_cast<size_t>(write_gaps(positions.get(), changed, gaps) - gaps);
      uint8_t* values = part.values.reserve(changed * sizeof(Word));
      for (size_t k = 0; k < changed; ++k)
        std::memcpy(values + k * sizeof(Word), fresh + start + positions[k], sizeof(Word));
      part.gaps.advance(gap_bytes);
      part.values.advance(changed * sizeof(Word));
      blocks_[b] = {static_cast<uint32_t>(changed), static_cast<uint32_t>(gap_bytes)};
      // Both blocks are still in the cache.
      part.old_sum.crc = crc32c(old + start, count * sizeof(Word), part.old_sum.crc);
      part.new_sum.crc = crc32c(fresh + start, count * sizeof(Word), part.new_sum.crc);
      part.old_sum.bytes = part.new_sum.bytes += count * sizeof(Word);
    }
  }

  const uint8_t* fresh_;
  std::vector<Block> blocks_;
  std::vector<Part> parts_;
  Header header_;
};

static_assert(sizeof(Block) == kBlockHeaderBytes, "blocks are written as they are");

// Writes the changed words of one block, or reports that the block is malformed and stops there.
template <typename Word>
bool patch(Word* words, size_t count, const uint8_t* gaps, const Block& block, const uint8_t* values) {
  size_t position = 0, changed = 0;
  bool open = false;  // an escape must be followed by the rest of its gap
  for (const uint8_t* end = gaps + block.gap_bytes; gaps != end; ++gaps) {
    position += *gaps;
    open = *gaps == kEscape;
    if (open) continue;
    if (position >= count || changed == block.changed) return false;
    std::memcpy(words + position, values + changed * sizeof(Word), sizeof(Word));
    ++changed;
    ++position;
  }
  return changed == block.changed && !open;
}

// Where each block's gaps and values begin in the body; throws unless everything lies inside it.
struct Layout {
  std::vector<Block> blocks;
  std::vector<size_t> gap_at, value_at;

  Layout(const uint8_t* body, size_t body_bytes, size_t num_words, size_t word_bytes) : blocks(num_blocks(num_words)) {
    const size_t headers = blocks.size() * kBlockHeaderBytes;
    if (body_bytes < headers)
      throw Error("payload: expected " + std::to_string(blocks.size()) + " block headers, found " +
                  std::to_string(body_bytes) + " bytes");
    if (headers != 0) std::memcpy(blocks.data(), body, headers);
    // 32-bit counts of fewer than 2^48 blocks cannot overflow 64 bits.
    size_t gaps = headers, values = 0;
    for (const Block& block : blocks) {
      gap_at.push_back(gaps);
      gaps += block.gap_bytes;
    }
    for (const Block& block : blocks) {
      value_at.push_back(gaps + values);
      values += block.changed * word_bytes;
    }
    if (gaps + values != body_bytes)
      throw Error("payload: expected a body of " + std::to_string(gaps + values) + " bytes, found " +
                  std::to_string(body_bytes));
  }
};

template <typename Word>
void apply_changed(Word* words, size_t num_words, const uint8_t* body, const Header& header, size_t threads) {
  const Layout layout(body, header.body_bytes, num_words, sizeof(Word));
  const size_t blocks = layout.blocks.size();
  const size_t ranges = std::max<size_t>(1, std::min(threads, std::max<size_t>(1, blocks / kGrainBlocks)));
  const auto for_blocks = [&](const auto& work) {
    parallel_ranges(ranges, ranges, 1, [&](size_t first, size_t last) {
      for (size_t r = first; r < last; ++r)
        for (size_t b = blocks * r / ranges; b < blocks * (r + 1) / ranges; ++b)
          work(r, b, words + b * kBlockWords, std::min(kBlockWords, num_words - b * kBlockWords));
    });
  };
  std::vector<Checksum> olds(ranges), news(ranges);
  std::vector<uint8_t> intact(ranges, 1);
  std::vector<std::unique_ptr<Word[]>> copies(ranges);
  for (auto& copy : copies) copy.reset(new Word[kBlockWords]);
  for_blocks([&](size_t r, size_t b, Word* block, size_t count) {
    const size_t bytes = count * sizeof(Word);
    Word* copy = copies[r].get();
    std::memcpy(copy, block, bytes);
    olds[r].crc = crc32c(copy, bytes, olds[r].crc);
    if (!patch(copy, count, body + layout.gap_at[b], layout.blocks[b], body + layout.value_at[b])) intact[r] = 0;
    news[r].crc = crc32c(copy, bytes, news[r].crc);
    olds[r].bytes = news[r].bytes += bytes;
  });
  if (join(olds) != header.old_crc)
    throw Error("tensor: expected the version this payload was encoded against, found another (checksum differs)");
  if (std::find(intact.begin(), intact.end(), uint8_t{0}) != intact.end())
    throw Error("payload: expected positions inside their blocks, found some outside or too few");
  if (join(news) != header.new_crc)
    throw Error("payload: expected a result with the checksum it names, found another");
  for_blocks([&](size_t, size_t b, Word* block, size_t count) {
    patch(block, count, body + layout.gap_at[b], layout.blocks[b], body + layout.value_at[b]);
  });
}

// In place; throws Error, with the words as they were, if anything about the payload or its base is not as encoded.
template <typename Word>
void apply(Word* words, size_t num_words, const uint8_t* payload, size_t size, size_t threads) {
  const Header header = Header::read(payload, size);
  const auto expect = [](const char* what, uint64_t expected, uint64_t found) {
    if (expected != found)
      throw Error(std::string("payload: expected ") + what + " " + std::to_string(expected) + ", found " +
                  std::to_string(found));
  };
  expect("word size", sizeof(Word), header.word_bytes);
  expect("number of words", num_words, header.num_words);
  expect("body size", header.body_bytes, size - kHeaderBytes);
  const uint8_t* body = payload + kHeaderBytes;
  expect("body checksum", header.body_crc, crc32c(body, header.body_bytes));
  if (header.kind == kFull) {
    expect("bytes of words", num_words * sizeof(Word), header.body_bytes);
    expect("checksum of the result", header.new_crc, header.body_crc);
    if (num_words != 0) std::memcpy(words, body, header.body_bytes);
    return;
  }
  apply_changed(words, num_words, body, header, threads);
}

}  // namespace orz::delta
