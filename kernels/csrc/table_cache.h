// Tables that decoders made from codewords, kept by each thread from call to call: for a small layer
// to make one takes as long as the product.
#pragma once

#include <cstring>
#include <memory>
#include <new>

#include "isa.h"

namespace pcdvq {
namespace {

class TableCache {
 public:
  // The table of `codewords`, which are compared byte by byte: they may have changed in place. It is
  // in `fallback` if there is no memory for it.
  static const int8_t* get(const BlockDecoder& decoder, const int8_t* codewords,
                           int8_t* fallback) {
    thread_local std::unique_ptr<TableCache> cache(new (std::nothrow) TableCache());
    if (cache) return cache->find(decoder, codewords);
    decoder.expand(codewords, fallback);
    return fallback;
  }

 private:
  struct Entry {
    alignas(64) int8_t table[kTableBytes];
    int8_t codewords[kTableBytes];
    void (*expand)(const int8_t*, int8_t*);
  };
  static constexpr int kEntries = 4;  // rates that a model mixes
  Entry entries_[kEntries] = {};
  int next_ = 0;

  const int8_t* find(const BlockDecoder& decoder, const int8_t* codewords) {
    const size_t bytes = size_t(decoder.codeword_bytes);
    for (const Entry& entry : entries_) {
      const bool same = entry.expand == decoder.expand;
      if (same && !std::memcmp(entry.codewords, codewords, bytes)) return entry.table;
    }
    Entry& entry = entries_[next_];
    next_ = (next_ + 1) % kEntries;
    decoder.expand(codewords, entry.table);
    std::memcpy(entry.codewords, codewords, bytes);
    entry.expand = decoder.expand;
    return entry.table;
  }
};

}  // namespace
}  // namespace pcdvq
