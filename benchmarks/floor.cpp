// The least that a loss with a gradient can cost on a CPU: read two arrays, write a third, compute next to
// nothing.
//
// The stores are non-temporal ("streaming"): they go past the caches to memory. An ordinary store to a line
// that is not in the cache first reads that line from memory, so writing one array would cost a read and a
// write of it; a gradient that is written once and read much later gains nothing from having passed through
// the cache. The floor has to be the cheapest way there is, or being near it would mean little.
//
// Everything is bytes, so one loop is the floor of every dtype.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
using Line = __m512i;
static inline Line load(const char* from) { return _mm512_loadu_si512(from); }
static inline Line combine(Line a, Line b) { return _mm512_xor_si512(a, b); }
static inline void stream(char* to, Line line) { _mm512_stream_si512(reinterpret_cast<Line*>(to), line); }
static inline void fence() { _mm_sfence(); }
#elif defined(__AVX2__)
#include <immintrin.h>
using Line = __m256i;
static inline Line load(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const Line*>(from)); }
static inline Line combine(Line a, Line b) { return _mm256_xor_si256(a, b); }
static inline void stream(char* to, Line line) { _mm256_stream_si256(reinterpret_cast<Line*>(to), line); }
static inline void fence() { _mm_sfence(); }
#elif defined(__SSE2__)
#include <emmintrin.h>
using Line = __m128i;
static inline Line load(const char* from) { return _mm_loadu_si128(reinterpret_cast<const Line*>(from)); }
static inline Line combine(Line a, Line b) { return _mm_xor_si128(a, b); }
static inline void stream(char* to, Line line) { _mm_stream_si128(reinterpret_cast<Line*>(to), line); }
static inline void fence() { _mm_sfence(); }
#else  // another architecture: what its compiler knows as a streaming store, else an ordinary one
typedef uint64_t Line __attribute__((vector_size(16)));
static inline Line load(const char* from) {
  Line line;
  std::memcpy(&line, from, sizeof line);
  return line;
}
static inline Line combine(Line a, Line b) { return a ^ b; }
static inline void stream(char* to, Line line) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_nontemporal_store)
  __builtin_nontemporal_store(line, reinterpret_cast<Line*>(to));
  return;
#endif
#endif
  std::memcpy(to, &line, sizeof line);
}
static inline void fence() {}
#endif

namespace {

constexpr int64_t kStep = 256;  // bytes a turn of the loop: whole cache lines of each array

// One thread's stretch, in bytes, of which each is a whole number of turns but the last.
struct Stretch {
  int64_t begin, end;
};

Stretch stretch(int64_t bytes, int threads, int thread) {
  const int64_t each = (bytes / threads + kStep - 1) / kStep * kStep;
  const int64_t begin = each * thread < bytes ? each * thread : bytes;
  const int64_t end = begin + each < bytes ? begin + each : bytes;
  return {begin, end};
}

void read_write(const char* a, const char* b, char* out, Stretch part) {
  int64_t i = part.begin;
  for (; i + kStep <= part.end; i += kStep)
    for (int64_t j = 0; j < kStep; j += sizeof(Line))
      stream(out + i + j, combine(load(a + i + j), load(b + i + j)));
  for (; i < part.end; ++i) out[i] = static_cast<char>(a[i] ^ b[i]);
  fence();
}

uint64_t read_only(const char* a, const char* b, Stretch part) {
  constexpr int kLines = kStep / sizeof(Line);  // as many sums, so that none waits for another
  Line sums[kLines] = {};
  int64_t i = part.begin;
  for (; i + kStep <= part.end; i += kStep)
    for (int j = 0; j < kLines; ++j) {
      const int64_t at = i + j * static_cast<int64_t>(sizeof(Line));
      sums[j] = combine(sums[j], combine(load(a + at), load(b + at)));
    }
  uint64_t result = 0;
  for (; i < part.end; ++i) result ^= static_cast<unsigned char>(a[i] ^ b[i]);
  for (int j = 1; j < kLines; ++j) sums[0] = combine(sums[0], sums[j]);
  uint64_t words[sizeof(Line) / sizeof(uint64_t)];
  std::memcpy(words, &sums[0], sizeof words);
  for (uint64_t word : words) result ^= word;
  return result;
}

}  // namespace

// Reads `bytes` of a and of b and writes as many to out, which must start at a multiple of 64.
extern "C" void floor_read_write(const char* a, const char* b, char* out, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; ++thread) read_write(a, b, out, stretch(bytes, threads, thread));
}

// Reads `bytes` of a and of b. The result depends on all of them, so that no compiler leaves the reading out.
extern "C" uint64_t floor_read_only(const char* a, const char* b, int64_t bytes, int threads) {
  uint64_t result = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : result)
  for (int thread = 0; thread < threads; ++thread) result ^= read_only(a, b, stretch(bytes, threads, thread));
  return result;
}
