// Straight-line PTX on all selected threads of a batch: the fast path of machine.py, built and called by
// native.py.
//
// run() executes instructions until one that it does not know, or one whose memory access is not clean: out
// of bounds, misaligned, perhaps a race, not resolved as a whole. It returns that instruction's number before
// anything of it has happened, and the numpy code executes it, which also words the finding. So what is here
// decides nothing but speed: every check below may refuse too much, and none may refuse too little.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;
typedef _Float16 f16;
typedef u8 pred;

enum { WINDOW = 38, SHARED_ID = 4, LOCAL_ID = 8, WARP = 32 };
#define PARAM_BASE ((16ull << WINDOW) + (1ull << (WINDOW - 1)))
enum { GLOBAL, SHARED, LOCAL, GENERIC };  // spaces
enum {
  STOP,
  LD,
  ST,
  LD_PARAM,
  SHFL,
  VOTE,
  SETP2,
  UNPACK,
  PACK,
  WARP_BARRIER,
  COPY,
  COPY_GROUP,
  NOTHING,
  LOP3,
  ELEMENTWISE = 32
};

typedef struct {
  s64 id, nbytes, log;
  u64 base;
  u8* data;
  u8 *read_sectors, *written_sectors;
  s64 bytes[2], sectors[2];  // loads, stores
  s32 *w_id, *w_time;
  u8* w_strong;
  s32 *r_id, *r_time, *r_many, *r_far;
  s64 shadowed;
} Region;

typedef struct {
  s64 N, time, last_sync, cluster, stats, races, nregions;
  u8* uni;     // by register: whether all threads have the same value,
  u64* uval;   // that value,
  u8* width;   // bytes,
  s64* place;  // bytes a thread has in the arena before this register
  u8* arena;
  u8* scratch;  // 16 * 8 * N bytes
  s64* index;   // N
  Region* regions;
  s32 *slot_of, *cta_of;
  s64 *fence_time, *atom_time, *met_time, *bar_time, *warp_time, *cluster_time;
  u8* sm;
  s64 sm_size, sm_stride, sm_shadowed, sm_log, sm_copies;
  s32 *s_w_id, *s_w_time;
  u8* s_w_strong;
  s32 *s_r_id, *s_r_time, *s_r_many, *s_group;
  s32 *copy_committed, *copy_done;
  u8* lm;
  s64 lm_size, lm_stride;
  u8* params;
  s64 nparams;
  s64 widths[2][8];  // accesses by log2 of their bytes: loads, stores
  s64 waves[2][2];   // loads, stores: wavefronts, and those without conflicts
} Machine;

typedef struct {
  s32 op, guard;  // guard: -1, or 2 * predicate + whether it is negated
  s32 d, a, b, c;
  s32 aux, count;  // position in the list of further registers, and how many there are
  s32 elem, space, strong, sign;
  s64 imm;
} Ins;

// ---- elementwise instructions ----

typedef void Kernel(void*, const void*, const void*, const void*, s64);

#define K1(name, TD, TA, expr)                                                            \
  static void k_##name(void* vd, const void* va, const void* vb, const void* vc, s64 n) { \
    TD* d = vd;                                                                           \
    const TA* pa = va;                                                                    \
    _Pragma("GCC ivdep") for (s64 i = 0; i < n; i++) {                                    \
      TA a = pa[i];                                                                       \
      d[i] = (TD)(expr);                                                                  \
    }                                                                                     \
  }
#define K2(name, TD, TA, TB, expr)                                                        \
  static void k_##name(void* vd, const void* va, const void* vb, const void* vc, s64 n) { \
    TD* d = vd;                                                                           \
    const TA* pa = va;                                                                    \
    const TB* pb = vb;                                                                    \
    _Pragma("GCC ivdep") for (s64 i = 0; i < n; i++) {                                    \
      TA a = pa[i];                                                                       \
      TB b = pb[i];                                                                       \
      d[i] = (TD)(expr);                                                                  \
    }                                                                                     \
  }
#define K3(name, TD, TA, TB, TC, expr)                                                    \
  static void k_##name(void* vd, const void* va, const void* vb, const void* vc, s64 n) { \
    TD* d = vd;                                                                           \
    const TA* pa = va;                                                                    \
    const TB* pb = vb;                                                                    \
    const TC* pc = vc;                                                                    \
    _Pragma("GCC ivdep") for (s64 i = 0; i < n; i++) {                                    \
      TA a = pa[i];                                                                       \
      TB b = pb[i];                                                                       \
      TC c = pc[i];                                                                       \
      d[i] = (TD)(expr);                                                                  \
    }                                                                                     \
  }

static inline u32 bits(f32 x) {
  u32 u;
  memcpy(&u, &x, 4);
  return u;
}
static inline f32 of_bits(u32 u) {
  f32 x;
  memcpy(&x, &u, 4);
  return x;
}
static inline u64 bits64(f64 x) {
  u64 u;
  memcpy(&u, &x, 8);
  return u;
}
static inline f64 of_bits64(u64 u) {
  f64 x;
  memcpy(&x, &u, 8);
  return x;
}
static inline f32 ftz(f32 x) {
  u32 u = bits(x);
  return (u & 0x7f800000) ? x : of_bits(u & 0x80000000);
}
static inline f32 of_bf16(u16 h) { return of_bits((u32)h << 16); }
static inline u16 to_bf16(f32 x) {
  u32 u = bits(x);
  return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static inline u16 to_bf16_rz(f32 x) {
  u32 u = bits(x);
  return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : u >> 16;
}
static inline f32 of_f16(u16 h) {
  f16 x;
  memcpy(&x, &h, 2);
  return x;
}
static inline u16 to_f16(f32 x) {
  f16 y = (f16)x;
  u16 u;
  memcpy(&u, &y, 2);
  return u;
}

// -0 < +0, one NaN is left out, two are the canonical one; with .NaN one is enough
static inline f32 max32(f32 a, f32 b) {
  u32 both = bits(a) & bits(b);
  f32 r = a > b ? a : b;
  r = b != b ? a : r;
  r = a == 0 && b == 0 ? of_bits(both) : r;
  return r != r ? of_bits(0x7fffffff) : r;
}
static inline f32 min32(f32 a, f32 b) {
  u32 both = bits(a) | bits(b);
  f32 r = a < b ? a : b;
  r = b != b ? a : r;
  r = a == 0 && b == 0 ? of_bits(both) : r;
  return r != r ? of_bits(0x7fffffff) : r;
}
static inline f32 nan_or32(f32 a, f32 b, f32 r) { return a != a || b != b ? of_bits(0x7fffffff) : r; }
static inline f64 max64(f64 a, f64 b) {
  u64 both = bits64(a) & bits64(b);
  f64 r = a > b ? a : b;
  r = b != b ? a : r;
  r = a == 0 && b == 0 ? of_bits64(both) : r;
  return r != r ? of_bits64(0x7ff8000000000000) : r;
}
static inline f64 min64(f64 a, f64 b) {
  u64 both = bits64(a) | bits64(b);
  f64 r = a < b ? a : b;
  r = b != b ? a : r;
  r = a == 0 && b == 0 ? of_bits64(both) : r;
  return r != r ? of_bits64(0x7ff8000000000000) : r;
}
static inline f32 sat32(f32 x) { return x != x ? 0 : x < 0 ? 0 : x > 1 ? 1 : x; }

#define TO_INT(name, T, lo, hi) \
  static inline T name(f64 r) { return r != r ? 0 : r <= (f64)(lo) ? (lo) : r >= (f64)(hi) ? (hi) : (T)r; }
TO_INT(int_s32, s32, INT32_MIN, INT32_MAX)
TO_INT(int_u32, u32, 0, UINT32_MAX)
TO_INT(int_s64, s64, INT64_MIN, INT64_MAX)
TO_INT(int_u64, u64, 0, UINT64_MAX)
TO_INT(int_s16, s16, INT16_MIN, INT16_MAX)
TO_INT(int_u16, u16, 0, UINT16_MAX)
TO_INT(int_s8, s8, INT8_MIN, INT8_MAX)
TO_INT(int_u8, u8, 0, UINT8_MAX)

static inline u64 mulhi_u64(u64 a, u64 b) { return (u64)(((unsigned __int128)a * b) >> 64); }
static inline s64 mulhi_s64(s64 a, s64 b) { return (s64)(((__int128)a * b) >> 64); }

static inline u32 prmt(u32 a, u32 b, u32 c) {
  u64 v = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = (c >> (4 * i)) & 15;
    u32 byte = (v >> ((s & 7) * 8)) & 255;
    byte = s & 8 ? (byte & 128 ? 255 : 0) : byte;
    out |= byte << (8 * i);
  }
  return out;
}

static inline u64 shf(u32 a, u32 b, u32 n, int left) {
  u64 v = (u64)b << 32 | a;
  return left ? (u32)((v << n) >> 32) : (u32)(v >> n);
}
static inline u32 bfe_u32(u32 x, u32 pos, u32 len) {
  pos &= 255, len &= 255;
  u32 r = pos < 32 ? x >> pos : 0;
  u32 mask = len >= 32 ? ~0u : (1u << len) - 1;
  return r & mask;
}
static inline u32 bfi_u32(u32 a, u32 b, u32 pos, u32 len) {
  pos &= 255, len &= 255;
  if (pos >= 32) return b;
  u32 mask = (len >= 32 ? ~0u : (1u << len) - 1) << pos;
  return (b & ~mask) | ((a << pos) & mask);
}

// clang-format off
#define INTS(X) X(u16, 16) X(s16, 16) X(u32, 32) X(s32, 32) X(u64, 64) X(s64, 64)
#define INT_OPS(T, n)                                                                                   \
  K2(add_##T, T, T, T, a + b) K2(sub_##T, T, T, T, a - b) K2(mul_##T, T, T, T, a * b)                   \
  K3(mad_##T, T, T, T, T, (T)(a * b) + c)                                                               \
  K2(min_##T, T, T, T, a < b ? a : b) K2(max_##T, T, T, T, a > b ? a : b)                               \
  K2(shr_##T, T, T, u32, b < n ? a >> b : (T)-1 < 0 ? a >> (n - 1) : 0)                                 \
  K2(eq_##T, pred, T, T, a == b) K2(ne_##T, pred, T, T, a != b) K2(lt_##T, pred, T, T, a < b)           \
  K2(le_##T, pred, T, T, a <= b) K2(gt_##T, pred, T, T, a > b) K2(ge_##T, pred, T, T, a >= b)           \
  K1(to_f32_##T, f32, T, (f32)a) K1(to_f64_##T, f64, T, (f64)a) K1(neg_##T, T, T, -a)
INTS(INT_OPS)
#define BITS(X) X(u16, 16) X(u32, 32) X(u64, 64)
#define BIT_OPS(T, n)                                                                                   \
  K2(and_##T, T, T, T, a & b) K2(or_##T, T, T, T, a | b) K2(xor_##T, T, T, T, a ^ b) K1(not_##T, T, T, ~a) \
  K2(shl_##T, T, T, u32, b < n ? a << b : 0) K3(sel_##T, T, T, T, pred, c ? a : b) K1(mov_##T, T, T, a)
BITS(BIT_OPS)
K1(abs_s32, s32, s32, a < 0 ? -(u32)a : a) K1(abs_s64, s64, s64, a < 0 ? -(u64)a : a)
K2(and_pred, pred, pred, pred, a & b) K2(or_pred, pred, pred, pred, a | b) K2(xor_pred, pred, pred, pred, a ^ b)
K1(not_pred, pred, pred, !a) K1(mov_pred, pred, pred, a) K3(sel_pred, pred, pred, pred, pred, c ? a : b)

#define WIDE(W, T) K2(wide_##T, W, T, T, (W)a * (W)b) K3(madwide_##T, W, T, T, W, (W)a * (W)b + c)
WIDE(u32, u16) WIDE(s32, s16) WIDE(u64, u32) WIDE(s64, s32)
K2(mulhi_u32, u32, u32, u32, ((u64)a * b) >> 32) K2(mulhi_s32, s32, s32, s32, ((s64)a * b) >> 32)
K2(mulhi_u64, u64, u64, u64, mulhi_u64(a, b)) K2(mulhi_s64, s64, s64, s64, mulhi_s64(a, b))
K2(div_u32, u32, u32, u32, b ? a / b : UINT32_MAX) K2(rem_u32, u32, u32, u32, b ? a % b : a)
K2(div_u64, u64, u64, u64, b ? a / b : UINT64_MAX) K2(rem_u64, u64, u64, u64, b ? a % b : a)
K2(div_u16, u16, u16, u16, b ? a / b : UINT16_MAX) K2(rem_u16, u16, u16, u16, b ? a % b : a)
K2(div_s32, s32, s32, s32, b == 0 ? a : b == -1 ? -a : a / b) K2(rem_s32, s32, s32, s32, b == 0 ? a : b == -1 ? 0 : a % b)
K2(div_s64, s64, s64, s64, b == 0 ? a : b == -1 ? -a : a / b) K2(rem_s64, s64, s64, s64, b == 0 ? a : b == -1 ? 0 : a % b)
K3(prmt, u32, u32, u32, u32, prmt(a, b, c))
K3(shf_l_wrap, u32, u32, u32, u32, shf(a, b, c & 31, 1)) K3(shf_r_wrap, u32, u32, u32, u32, shf(a, b, c & 31, 0))
K3(shf_l_clamp, u32, u32, u32, u32, shf(a, b, c < 32 ? c : 32, 1)) K3(shf_r_clamp, u32, u32, u32, u32, shf(a, b, c < 32 ? c : 32, 0))
K3(bfe_u32, u32, u32, u32, u32, bfe_u32(a, b, c))
K1(popc_u32, u32, u32, __builtin_popcount(a)) K1(clz_u32, u32, u32, a ? __builtin_clz(a) : 32)
K1(popc_u64, u32, u64, __builtin_popcountll(a)) K1(clz_u64, u32, u64, a ? __builtin_clzll(a) : 64)

K2(add_f32, f32, f32, f32, a + b) K2(sub_f32, f32, f32, f32, a - b) K2(mul_f32, f32, f32, f32, a * b) K2(div_f32, f32, f32, f32, a / b)
K2(add_f32_ftz, f32, f32, f32, ftz(ftz(a) + ftz(b))) K2(sub_f32_ftz, f32, f32, f32, ftz(ftz(a) - ftz(b)))
K2(mul_f32_ftz, f32, f32, f32, ftz(ftz(a) * ftz(b))) K2(div_f32_ftz, f32, f32, f32, ftz(ftz(a) / ftz(b)))
K2(add_f32_sat, f32, f32, f32, sat32(a + b)) K2(mul_f32_sat, f32, f32, f32, sat32(a * b))
K3(fma_f32, f32, f32, f32, f32, __builtin_fmaf(a, b, c)) K3(fma_f32_ftz, f32, f32, f32, f32, ftz(__builtin_fmaf(ftz(a), ftz(b), ftz(c))))
K3(fma_f32_sat, f32, f32, f32, f32, sat32(__builtin_fmaf(a, b, c)))
K2(add_f64, f64, f64, f64, a + b) K2(sub_f64, f64, f64, f64, a - b) K2(mul_f64, f64, f64, f64, a * b) K2(div_f64, f64, f64, f64, a / b)
K3(fma_f64, f64, f64, f64, f64, __builtin_fma(a, b, c))
K2(max_f32, f32, f32, f32, max32(a, b)) K2(min_f32, f32, f32, f32, min32(a, b))
K2(max_f32_NaN, f32, f32, f32, nan_or32(a, b, max32(a, b))) K2(min_f32_NaN, f32, f32, f32, nan_or32(a, b, min32(a, b)))
K2(max_f64, f64, f64, f64, max64(a, b)) K2(min_f64, f64, f64, f64, min64(a, b))
K1(neg_f32, f32, f32, -a) K1(neg_f64, f64, f64, -a) K1(abs_f32, f32, f32, __builtin_fabsf(a)) K1(abs_f64, f64, f64, __builtin_fabs(a))
K1(ex2_f32, f32, f32, exp2f(a)) K1(ex2_f32_ftz, f32, f32, ftz(exp2f(ftz(a)))) K1(lg2_f32, f32, f32, log2f(a)) K1(lg2_f32_ftz, f32, f32, log2f(ftz(a)))
K1(rcp_f32, f32, f32, 1 / a) K1(rcp_f32_ftz, f32, f32, ftz(1 / ftz(a))) K1(rcp_f64, f64, f64, 1 / a)
K1(sqrt_f32, f32, f32, __builtin_sqrtf(a)) K1(sqrt_f32_ftz, f32, f32, __builtin_sqrtf(ftz(a))) K1(sqrt_f64, f64, f64, __builtin_sqrt(a))
K1(rsqrt_f32, f32, f32, (f32)(1 / __builtin_sqrt((f64)a))) K1(rsqrt_f32_ftz, f32, f32, (f32)(1 / __builtin_sqrt((f64)ftz(a))))
K1(tanh_f32, f32, f32, (f32)tanh((f64)a))

#define CMPS(T)                                                                                         \
  K2(eq_##T, pred, T, T, a == b) K2(ne_##T, pred, T, T, (a < b) | (a > b)) K2(lt_##T, pred, T, T, a < b) \
  K2(le_##T, pred, T, T, a <= b) K2(gt_##T, pred, T, T, a > b) K2(ge_##T, pred, T, T, a >= b)           \
  K2(equ_##T, pred, T, T, !((a < b) | (a > b))) K2(neu_##T, pred, T, T, a != b) K2(ltu_##T, pred, T, T, !(a >= b)) \
  K2(leu_##T, pred, T, T, !(a > b)) K2(gtu_##T, pred, T, T, !(a <= b)) K2(geu_##T, pred, T, T, !(a < b)) \
  K2(num_##T, pred, T, T, !((a != a) | (b != b))) K2(nan_##T, pred, T, T, (a != a) | (b != b))
CMPS(f32) CMPS(f64)

// conversions: cvt_<to>_<from>
K1(cvt_f64_f32, f64, f32, a) K1(cvt_f32_f64, f32, f64, a)
K1(cvt_f32_bf16, f32, u16, of_bf16(a)) K1(cvt_f32_f16, f32, u16, of_f16(a))
K1(cvt_bf16_f32, u16, f32, to_bf16(a)) K1(cvt_bf16_f32_rz, u16, f32, to_bf16_rz(a)) K1(cvt_f16_f32, u16, f32, to_f16(a))
K2(cvt_bf16x2_f32, u32, f32, f32, (u32)to_bf16(a) << 16 | to_bf16(b)) K2(cvt_f16x2_f32, u32, f32, f32, (u32)to_f16(a) << 16 | to_f16(b))
#define INT_OF(T) K1(cvt_##T##_f32_rzi, T, f32, int_##T(__builtin_trunc((f64)a))) K1(cvt_##T##_f32_rni, T, f32, int_##T(__builtin_rint((f64)a))) \
  K1(cvt_##T##_f32_rmi, T, f32, int_##T(__builtin_floor((f64)a))) K1(cvt_##T##_f32_rpi, T, f32, int_##T(__builtin_ceil((f64)a))) \
  K1(cvt_##T##_f64_rzi, T, f64, int_##T(__builtin_trunc(a))) K1(cvt_##T##_f64_rni, T, f64, int_##T(__builtin_rint(a)))
INT_OF(u16) INT_OF(s16) INT_OF(u32) INT_OF(s32) INT_OF(u64) INT_OF(s64)
K1(cvt_f32_f32_rni, f32, f32, __builtin_rintf(a)) K1(cvt_f32_f32_rzi, f32, f32, __builtin_truncf(a))
K1(cvt_f32_f32_rmi, f32, f32, __builtin_floorf(a)) K1(cvt_f32_f32_rpi, f32, f32, __builtin_ceilf(a)) K1(cvt_f32_f32_sat, f32, f32, sat32(a))
K1(cvt_f64_f64_rni, f64, f64, __builtin_rint(a)) K1(cvt_f64_f64_rzi, f64, f64, __builtin_trunc(a)) K1(cvt_f64_f64_rmi, f64, f64, __builtin_floor(a))
// between integers: register of 16, 32 or 64 bits to one of the same, over a type that may be narrower
#define WIDTHS(X) X(16, 16) X(16, 32) X(16, 64) X(32, 16) X(32, 32) X(32, 64) X(64, 16) X(64, 32) X(64, 64)
#define INT_CVT(D, S)                                                                                   \
  K1(int_##D##_##S##_u8, u##D, u##S, (u8)a) K1(int_##D##_##S##_s8, u##D, u##S, (s##D)(s8)a)             \
  K1(int_##D##_##S##_u16, u##D, u##S, (u16)a) K1(int_##D##_##S##_s16, u##D, u##S, (s##D)(s16)a)         \
  K1(int_##D##_##S##_u32, u##D, u##S, (u32)a) K1(int_##D##_##S##_s32, u##D, u##S, (s##D)(s32)a)         \
  K1(int_##D##_##S##_u64, u##D, u##S, a)
WIDTHS(INT_CVT)
// pairs of 16 bits
#define LO(x) ((u16)(x))
#define HI(x) ((u16)((x) >> 16))
#define PAIR(lo, hi) ((u32)(hi) << 16 | (lo))
#define BF2(f) PAIR(f(LO(a), LO(b)), f(HI(a), HI(b)))
#define MAX16(t, a, b) to_##t(max32(of_##t(a), of_##t(b)))
#define MIN16(t, a, b) to_##t(min32(of_##t(a), of_##t(b)))
#define MINMAX_OF_PAIRS(t)                                                                   \
  K2(max_##t##x2, u32, u32, u32, PAIR(MAX16(t, LO(a), LO(b)), MAX16(t, HI(a), HI(b))))       \
  K2(min_##t##x2, u32, u32, u32, PAIR(MIN16(t, LO(a), LO(b)), MIN16(t, HI(a), HI(b))))
MINMAX_OF_PAIRS(bf16) MINMAX_OF_PAIRS(f16)
K1(neg_bf16x2, u32, u32, a ^ 0x80008000) K1(abs_bf16x2, u32, u32, a & 0x7fff7fff) K1(neg_bf16, u16, u16, a ^ 0x8000) K1(abs_bf16, u16, u16, a & 0x7fff)
#undef INT_OPS
#undef BIT_OPS
    // clang-format on

    typedef struct {
  const char* name;
  Kernel* run;
  s8 sources, d, a, b, c;  // bytes of each
} Entry;

// clang-format off
#define E1(name, TD, TA) {#name, k_##name, 1, sizeof(TD), sizeof(TA), 1, 1},
#define E2(name, TD, TA, TB) {#name, k_##name, 2, sizeof(TD), sizeof(TA), sizeof(TB), 1},
#define E3(name, TD, TA, TB, TC) {#name, k_##name, 3, sizeof(TD), sizeof(TA), sizeof(TB), sizeof(TC)},
#define INT_ENTRIES(T, n)                                                                               \
  E2(add_##T, T, T, T) E2(sub_##T, T, T, T) E2(mul_##T, T, T, T) E3(mad_##T, T, T, T, T) E2(min_##T, T, T, T)    \
  E2(max_##T, T, T, T) E2(shr_##T, T, T, u32) E2(eq_##T, pred, T, T) E2(ne_##T, pred, T, T)             \
  E2(lt_##T, pred, T, T) E2(le_##T, pred, T, T) E2(gt_##T, pred, T, T) E2(ge_##T, pred, T, T)           \
  E1(to_f32_##T, f32, T) E1(to_f64_##T, f64, T) E1(neg_##T, T, T)
#define BIT_ENTRIES(T, n)                                                                               \
  E2(and_##T, T, T, T) E2(or_##T, T, T, T) E2(xor_##T, T, T, T) E1(not_##T, T, T) E2(shl_##T, T, T, u32) \
  E3(sel_##T, T, T, T, pred) E1(mov_##T, T, T)
#define CMP_ENTRIES(T)                                                                                  \
  E2(eq_##T, pred, T, T) E2(ne_##T, pred, T, T) E2(lt_##T, pred, T, T) E2(le_##T, pred, T, T) E2(gt_##T, pred, T, T) \
  E2(ge_##T, pred, T, T) E2(equ_##T, pred, T, T) E2(neu_##T, pred, T, T) E2(ltu_##T, pred, T, T)        \
  E2(leu_##T, pred, T, T) E2(gtu_##T, pred, T, T) E2(geu_##T, pred, T, T) E2(num_##T, pred, T, T) E2(nan_##T, pred, T, T)
#define INT_OF_ENTRIES(T)                                                                               \
  E1(cvt_##T##_f32_rzi, T, f32) E1(cvt_##T##_f32_rni, T, f32) E1(cvt_##T##_f32_rmi, T, f32) E1(cvt_##T##_f32_rpi, T, f32) \
  E1(cvt_##T##_f64_rzi, T, f64) E1(cvt_##T##_f64_rni, T, f64)
#define INT_CVT_ENTRIES(D, S)                                                                           \
  E1(int_##D##_##S##_u8, u##D, u##S) E1(int_##D##_##S##_s8, u##D, u##S) E1(int_##D##_##S##_u16, u##D, u##S) \
  E1(int_##D##_##S##_s16, u##D, u##S) E1(int_##D##_##S##_u32, u##D, u##S) E1(int_##D##_##S##_s32, u##D, u##S) \
  E1(int_##D##_##S##_u64, u##D, u##S)

const Entry entries[] = {
  INTS(INT_ENTRIES) BITS(BIT_ENTRIES) CMP_ENTRIES(f32) CMP_ENTRIES(f64)
  E1(abs_s32, s32, s32) E1(abs_s64, s64, s64) E2(and_pred, pred, pred, pred) E2(or_pred, pred, pred, pred)
  E2(xor_pred, pred, pred, pred) E1(not_pred, pred, pred) E1(mov_pred, pred, pred) E3(sel_pred, pred, pred, pred, pred)
  E2(wide_u16, u32, u16, u16) E2(wide_s16, s32, s16, s16) E2(wide_u32, u64, u32, u32) E2(wide_s32, s64, s32, s32)
  E3(madwide_u16, u32, u16, u16, u32) E3(madwide_s16, s32, s16, s16, s32) E3(madwide_u32, u64, u32, u32, u64)
  E3(madwide_s32, s64, s32, s32, s64) E2(mulhi_u32, u32, u32, u32) E2(mulhi_s32, s32, s32, s32) E2(mulhi_u64, u64, u64, u64)
  E2(mulhi_s64, s64, s64, s64) E2(div_u32, u32, u32, u32) E2(rem_u32, u32, u32, u32) E2(div_u64, u64, u64, u64)
  E2(rem_u64, u64, u64, u64) E2(div_u16, u16, u16, u16) E2(rem_u16, u16, u16, u16) E2(div_s32, s32, s32, s32)
  E2(rem_s32, s32, s32, s32) E2(div_s64, s64, s64, s64) E2(rem_s64, s64, s64, s64) E3(prmt, u32, u32, u32, u32) E3(shf_l_wrap, u32, u32, u32, u32)
  E3(shf_r_wrap, u32, u32, u32, u32) E3(shf_l_clamp, u32, u32, u32, u32) E3(shf_r_clamp, u32, u32, u32, u32)
  E3(bfe_u32, u32, u32, u32, u32) E1(popc_u32, u32, u32) E1(clz_u32, u32, u32) E1(popc_u64, u32, u64) E1(clz_u64, u32, u64)
  E2(add_f32, f32, f32, f32) E2(sub_f32, f32, f32, f32) E2(mul_f32, f32, f32, f32) E2(div_f32, f32, f32, f32)
  E2(add_f32_ftz, f32, f32, f32) E2(sub_f32_ftz, f32, f32, f32) E2(mul_f32_ftz, f32, f32, f32) E2(div_f32_ftz, f32, f32, f32)
  E2(add_f32_sat, f32, f32, f32) E2(mul_f32_sat, f32, f32, f32) E3(fma_f32, f32, f32, f32, f32) E3(fma_f32_ftz, f32, f32, f32, f32)
  E3(fma_f32_sat, f32, f32, f32, f32) E2(add_f64, f64, f64, f64) E2(sub_f64, f64, f64, f64) E2(mul_f64, f64, f64, f64)
  E2(div_f64, f64, f64, f64) E3(fma_f64, f64, f64, f64, f64) E2(max_f32, f32, f32, f32) E2(min_f32, f32, f32, f32)
  E2(max_f32_NaN, f32, f32, f32) E2(min_f32_NaN, f32, f32, f32) E2(max_f64, f64, f64, f64) E2(min_f64, f64, f64, f64)
  E1(neg_f32, f32, f32) E1(neg_f64, f64, f64) E1(abs_f32, f32, f32) E1(abs_f64, f64, f64) E1(ex2_f32, f32, f32)
  E1(ex2_f32_ftz, f32, f32) E1(lg2_f32, f32, f32) E1(lg2_f32_ftz, f32, f32) E1(rcp_f32, f32, f32) E1(rcp_f32_ftz, f32, f32)
  E1(rcp_f64, f64, f64) E1(sqrt_f32, f32, f32) E1(sqrt_f32_ftz, f32, f32) E1(sqrt_f64, f64, f64) E1(rsqrt_f32, f32, f32)
  E1(rsqrt_f32_ftz, f32, f32) E1(tanh_f32, f32, f32)
  E1(cvt_f64_f32, f64, f32) E1(cvt_f32_f64, f32, f64) E1(cvt_f32_bf16, f32, u16) E1(cvt_f32_f16, f32, u16) E1(cvt_bf16_f32, u16, f32)
  E1(cvt_bf16_f32_rz, u16, f32) E1(cvt_f16_f32, u16, f32) E2(cvt_bf16x2_f32, u32, f32, f32) E2(cvt_f16x2_f32, u32, f32, f32)
  INT_OF_ENTRIES(u16) INT_OF_ENTRIES(s16) INT_OF_ENTRIES(u32) INT_OF_ENTRIES(s32) INT_OF_ENTRIES(u64) INT_OF_ENTRIES(s64)
  E1(cvt_f32_f32_rni, f32, f32) E1(cvt_f32_f32_rzi, f32, f32) E1(cvt_f32_f32_rmi, f32, f32) E1(cvt_f32_f32_rpi, f32, f32)
  E1(cvt_f32_f32_sat, f32, f32) E1(cvt_f64_f64_rni, f64, f64) E1(cvt_f64_f64_rzi, f64, f64) E1(cvt_f64_f64_rmi, f64, f64)
  WIDTHS(INT_CVT_ENTRIES)
  E2(max_bf16x2, u32, u32, u32) E2(min_bf16x2, u32, u32, u32) E2(max_f16x2, u32, u32, u32) E2(min_f16x2, u32, u32, u32)
  E1(neg_bf16x2, u32, u32) E1(abs_bf16x2, u32, u32) E1(neg_bf16, u16, u16) E1(abs_bf16, u16, u16)
};
// clang-format on
const s64 entry_count = sizeof entries / sizeof *entries;
const s64 machine_size = sizeof(Machine), region_size = sizeof(Region), ins_size = sizeof(Ins);

// ---- registers ----

#define BY_WIDTH(w, DO) \
  switch (w) {          \
    case 1: {           \
      DO(u8) break;     \
    }                   \
    case 2: {           \
      DO(u16) break;    \
    }                   \
    case 4: {           \
      DO(u32) break;    \
    }                   \
    default: {          \
      DO(u64) break;    \
    }                   \
  }

static void fill(void* to, int width, u64 value, s64 n) {
#define DO(T)              \
  T *p = to, v = (T)value; \
  for (s64 i = 0; i < n; i++) p[i] = v;
  BY_WIDTH(width, DO)
#undef DO
}

static inline u8* array_of(Machine* m, s32 k) { return m->arena + m->place[k] * m->N; }

// The values of a register in the selected threads, side by side; `slot` numbers the scratch that they may
// need.
static const void* values(Machine* m, s32 k, const s64* sel, s64 n, int slot) {
  u8* to = m->scratch + (s64)slot * 8 * m->N;
  int width = m->width[k];
  if (m->uni[k]) {
    fill(to, width, m->uval[k], n);
    return to;
  }
  u8* from = array_of(m, k);
  if (!sel) return from;
#define DO(T)                   \
  T *p = (T*)to, *q = (T*)from; \
  for (s64 i = 0; i < n; i++) p[i] = q[sel[i]];
  BY_WIDTH(width, DO)
#undef DO
  return to;
}

// Where to write the selected threads' values of a register, which put() then takes into it.
static void* room(Machine* m, s32 k, const s64* sel) {
  return sel ? m->scratch + (s64)15 * 8 * m->N : array_of(m, k);
}

static void put(Machine* m, s32 k, const s64* sel, s64 n, const void* from) {
  u8* to = array_of(m, k);
  int width = m->width[k];
  if (!sel) {
    if (from != to) memcpy(to, from, (size_t)(n * width));
    m->uni[k] = 0;
    return;
  }
  if (m->uni[k]) fill(to, width, m->uval[k], m->N);
  m->uni[k] = 0;
#define DO(T)        \
  T* p = (T*)to;     \
  const T* q = from; \
  for (s64 i = 0; i < n; i++) p[sel[i]] = q[i];
  BY_WIDTH(width, DO)
#undef DO
}

static void put_same(Machine* m, s32 k, const s64* sel, s64 n, u64 value) {
  if (!sel) {
    m->uni[k] = 1, m->uval[k] = value;
    return;
  }
  u8* to = m->scratch + (s64)15 * 8 * m->N;
  fill(to, m->width[k], value, n);
  put(m, k, sel, n, to);
}

static void elementwise(Machine* m, const Ins* p, const s64* sel, s64 n) {
  const Entry* e = &entries[p->op - ELEMENTWISE];
  s32 a = p->a, b = e->sources > 1 ? p->b : a, c = e->sources > 2 ? p->c : a;
  if (m->uni[a] & m->uni[b] & m->uni[c]) {
    u64 value = 0;
    e->run(&value, &m->uval[a], &m->uval[b], &m->uval[c], 1);
    put_same(m, p->d, sel, n, value);
    return;
  }
  const void* va = values(m, a, sel, n, 0);
  const void* vb = e->sources > 1 ? values(m, b, sel, n, 1) : 0;
  const void* vc = e->sources > 2 ? values(m, c, sel, n, 2) : 0;
  void* to = room(m, p->d, sel);
  e->run(to, va, vb, vc, n);
  put(m, p->d, sel, n, to);
}

// ---- memory ----

static inline s64 thread(const s64* sel, s64 i) { return sel ? sel[i] : i; }

static void addresses(Machine* m, const Ins* p, s32 reg, const s64* sel, s64 n, s64 imm, u64* out) {
  if (reg < 0) {
    for (s64 i = 0; i < n; i++) out[i] = (u64)imm;
    return;
  }
  const void* v = values(m, reg, sel, n, 3);
  if (m->width[reg] == 8) {
    const u64* a = v;
    for (s64 i = 0; i < n; i++) out[i] = a[i] + (u64)imm;
  } else {
    const u32* a = v;
    for (s64 i = 0; i < n; i++) out[i] = (u32)(a[i] + (u32)imm);
  }
}

static Region* region_of(Machine* m, u64 id) {
  for (s64 i = 0; i < m->nregions; i++)
    if ((u64)m->regions[i].id == id) return &m->regions[i];
  return 0;
}

static int of_one_cluster(Machine* m, s32 a, s32 b) { return a / m->cluster == b / m->cluster; }

static int unordered(Machine* m, s32 other, s32 when, s32 cta) {
  return other != cta && !(m->fence_time[other] >= when && m->atom_time[cta] > when) &&
         !(of_one_cluster(m, other, cta) && m->met_time[cta] > when);
}

// Offsets into the one allocation that all lie in, or 0.
static Region* global(Machine* m, const u64* addr, s64 n, s64 width, s64* off) {
  Region* r = region_of(m, addr[0] >> WINDOW);
  if (!r) return 0;
  s64 low = INT64_MAX, high = INT64_MIN, all = 0;
  for (s64 i = 0; i < n; i++) {
    s64 o = (s64)(addr[i] - r->base);
    off[i] = o;
    low = o < low ? o : low;
    high = o > high ? o : high;
    all |= o;
  }
  return low >= 0 && high <= r->nbytes - width && !(all & (width - 1)) ? r : 0;
}

static int log2_of(s64 width) { return 63 - __builtin_clzll((u64)width); }

// Sectors of 32 bytes, those that a warp's threads share counted once.
static void account(Machine* m, Region* r, const s64* sel, s64 n, const s64* off, s64 width, int store) {
  if (!m->stats) return;
  u8* seen = store ? r->written_sectors : r->read_sectors;
  s64 sectors = 0;
  for (s64 i = 0; i < n;) {
    s64 warp = thread(sel, i) >> 5, list[WARP];
    int k = 0;
    for (; i < n && thread(sel, i) >> 5 == warp; i++) {
      s64 s = off[i] >> 5;
      if (k && list[k - 1] == s) continue;
      int j = k - 1;
      while (j >= 0 && list[j] > s) j--;
      if (j >= 0 && list[j] == s) continue;
      memmove(list + j + 2, list + j + 1, sizeof(s64) * (size_t)(k - 1 - j));
      list[j + 1] = s;
      k++;
    }
    for (int j = 0; j < k; j++) seen[list[j]] = 1;
    sectors += k;
  }
  r->bytes[store] += n * width;
  r->sectors[store] += sectors;
  m->widths[store][log2_of(width)] += n;
}

static int global_read_clean(Machine* m, Region* r, const s64* sel, s64 n, const s64* off, s64 width,
                             int strong) {
  if (!r->shadowed || (width >> r->log) == 0) return 0;
  s64 k = width >> r->log;
  for (s64 i = 0; i < n; i++) {
    s32 cta = m->cta_of[thread(sel, i)];
    for (s64 g = off[i] >> r->log, end = g + k; g < end; g++) {
      s32 w = r->w_id[g];
      if (w >= 0 && w != cta && unordered(m, w, r->w_time[g], cta) && !(strong && r->w_strong[g])) return 0;
    }
  }
  return 1;
}

static void global_read_note(Machine* m, Region* r, const s64* sel, s64 n, const s64* off, s64 width) {
  s64 k = width >> r->log;
  int more = 0;
  for (s64 i = 0; i < n; i++) {
    s32 cta = m->cta_of[thread(sel, i)];
    for (s64 g = off[i] >> r->log, end = g + k; g < end; g++)
      if (r->r_id[g] >= 0 && r->r_id[g] != cta) {
        r->r_many[g] = r->r_time[g];
        if (!of_one_cluster(m, r->r_id[g], cta)) r->r_far[g] = r->r_time[g];
      }
  }
  for (s64 i = 0; i < n; i++) {
    s32 cta = m->cta_of[thread(sel, i)];
    for (s64 g = off[i] >> r->log, end = g + k; g < end; g++) r->r_id[g] = cta, r->r_time[g] = (s32)m->time;
    more |= cta != m->cta_of[thread(sel, 0)];
  }
  if (!more) return;
  for (s64 i = 0; i < n; i++) {
    s32 cta = m->cta_of[thread(sel, i)];
    for (s64 g = off[i] >> r->log, end = g + k; g < end; g++)
      if (r->r_id[g] != cta) {
        r->r_many[g] = (s32)m->time;
        if (!of_one_cluster(m, r->r_id[g], cta)) r->r_far[g] = (s32)m->time;
      }
  }
}

// Marks the writer, or leaves all as it was and returns 0.
static int global_write_clean(Machine* m, Region* r, const s64* sel, s64 n, const s64* off, s64 width,
                              int strong) {
  if (!r->shadowed || (width >> r->log) == 0) return 0;
  s64 k = width >> r->log;
  s32 first = m->cta_of[thread(sel, 0)];
  int several = 0;
  for (s64 i = 0; i < n; i++) {
    s32 cta = m->cta_of[thread(sel, i)];
    several |= cta != first;
    for (s64 g = off[i] >> r->log, end = g + k; g < end; g++) {
      s32 w = r->w_id[g], rd = r->r_id[g], many = r->r_many[g];
      if (w >= 0 && w != cta && unordered(m, w, r->w_time[g], cta) && !(strong && r->w_strong[g])) return 0;
      if (rd >= 0 && rd != cta && unordered(m, rd, r->r_time[g], cta)) return 0;
      if (many >= 0 && m->atom_time[cta] <= many &&
          !(r->r_far[g] < 0 && of_one_cluster(m, rd, cta) && m->met_time[cta] > many))
        return 0;
    }
  }
  if (several && !strong) {  // two blocks at one place in this very instruction: w_id is taken back then
    s32* old = (s32*)(m->scratch + 8 * 8 * m->N);
    if (k > 8) return 0;
    for (s64 i = 0; i < n; i++)
      for (s64 g = off[i] >> r->log, j = 0; j < k; j++) {
        old[i * k + j] = r->w_id[g + j];
        r->w_id[g + j] = m->cta_of[thread(sel, i)];
      }
    int clash = 0;
    for (s64 i = 0; i < n; i++)
      for (s64 g = off[i] >> r->log, j = 0; j < k; j++) clash |= r->w_id[g + j] != m->cta_of[thread(sel, i)];
    if (clash) {
      for (s64 i = n - 1; i >= 0; i--)
        for (s64 g = off[i] >> r->log, j = k - 1; j >= 0; j--) r->w_id[g + j] = old[i * k + j];
      return 0;
    }
  }
  return 1;
}

static void global_write_note(Machine* m, Region* r, const s64* sel, s64 n, const s64* off, s64 width,
                              int strong) {
  s64 k = width >> r->log;
  for (s64 i = 0; i < n; i++) {
    s32 cta = m->cta_of[thread(sel, i)];
    for (s64 g = off[i] >> r->log, end = g + k; g < end; g++)
      r->w_id[g] = cta, r->w_time[g] = (s32)m->time, r->w_strong[g] = (u8)strong;
  }
}

// ---- shared memory ----

// Offsets into the batch's shared memory, or 0 where an access is not clean or is to another block's.
static int shared(Machine* m, const u64* addr, const s64* sel, s64 n, s64 width, s64* off) {
  s64 low = INT64_MAX, high = INT64_MIN, all = 0;
  for (s64 i = 0; i < n; i++) {
    s64 a = (s64)addr[i];
    low = a < low ? a : low;
    high = a > high ? a : high;
    all |= a;
    off[i] = a + m->slot_of[thread(sel, i)] * m->sm_stride;
  }
  return low >= 0 && high < (1 << 24) && high <= m->sm_size - width && !(all & (width - 1));
}

static int conflicting(Machine* m, s64 other, s64 when, s64 t) {
  if (other == t) return 0;
  s64 bar = m->bar_time[m->slot_of[t]];
  if (m->cluster > 1 && m->slot_of[other] != m->slot_of[t]) bar = m->cluster_time[m->slot_of[t] / m->cluster];
  if (other >> 5 == t >> 5 && m->warp_time[t >> 5] > bar) bar = m->warp_time[t >> 5];
  return when > bar;
}

static int shared_read_clean(Machine* m, const s64* sel, s64 n, const s64* off, s64 width, int strong) {
  if ((width >> m->sm_log) == 0) return 0;
  s64 k = width >> m->sm_log;
  for (s64 i = 0; i < n; i++) {
    s64 t = thread(sel, i);
    for (s64 g = off[i] >> m->sm_log, end = g + k; g < end; g++) {
      s64 wt = m->s_w_time[g], w = m->s_w_id[g];
      if (wt < 0) return 0;
      if (m->sm_copies && m->s_group[g] > 0 && m->copy_done[w] < m->s_group[g]) return 0;
      if (wt > m->last_sync && conflicting(m, w, wt, t) && !(strong && m->s_w_strong[g])) return 0;
    }
  }
  return 1;
}

static void shared_read_note(Machine* m, const s64* sel, s64 n, const s64* off, s64 width) {
  s64 k = width >> m->sm_log;
  u8* many = m->scratch + 8 * 8 * m->N;
  for (s64 i = 0; i < n; i++) {  // what was read before its block met is forgotten
    s64 t = thread(sel, i), met = m->bar_time[m->slot_of[t]];
    for (s64 g = off[i] >> m->sm_log, end = g + k; g < end; g++)
      if (m->s_r_time[g] <= met) m->s_r_time[g] = -1;
  }
  for (s64 i = 0; i < n; i++) {
    s64 t = thread(sel, i);
    for (s64 g = off[i] >> m->sm_log, j = 0; j < k; j++, g++)
      many[i * k + j] = m->s_r_time[g] > m->last_sync && m->s_r_id[g] >> 5 != t >> 5;
  }
  for (s64 i = 0; i < n; i++) {
    s64 t = thread(sel, i);
    for (s64 g = off[i] >> m->sm_log, end = g + k; g < end; g++)
      m->s_r_id[g] = (s32)t, m->s_r_time[g] = (s32)m->time;
  }
  for (s64 i = 0; i < n; i++) {
    s64 t = thread(sel, i);
    for (s64 g = off[i] >> m->sm_log, j = 0; j < k; j++, g++)
      if (many[i * k + j] || m->s_r_id[g] >> 5 != t >> 5) m->s_r_many[g] = (s32)m->time;
  }
}

static int shared_write_clean(Machine* m, const s64* sel, s64 n, const s64* off, s64 width, int strong) {
  if ((width >> m->sm_log) == 0) return 0;
  s64 k = width >> m->sm_log;
  for (s64 i = 0; i < n; i++) {
    s64 t = thread(sel, i);
    for (s64 g = off[i] >> m->sm_log, end = g + k; g < end; g++) {
      s64 wt = m->s_w_time[g], rt = m->s_r_time[g];
      if (wt > m->last_sync && conflicting(m, m->s_w_id[g], wt, t) && !(strong && m->s_w_strong[g])) return 0;
      if (rt > m->last_sync &&
          (conflicting(m, m->s_r_id[g], rt, t) || m->s_r_many[g] > m->bar_time[m->slot_of[t]]))
        return 0;
    }
  }
  if (strong) return 1;
  s32* old = (s32*)(m->scratch +
                    8 * 8 * m->N);  // two threads at one place in this very instruction: w_id is taken back
  if (k > 8) return 0;
  for (s64 i = 0; i < n; i++)
    for (s64 g = off[i] >> m->sm_log, j = 0; j < k; j++) {
      old[i * k + j] = m->s_w_id[g + j];
      m->s_w_id[g + j] = (s32)thread(sel, i);
    }
  int clash = 0;
  for (s64 i = 0; i < n; i++)
    for (s64 g = off[i] >> m->sm_log, j = 0; j < k; j++) clash |= m->s_w_id[g + j] != (s32)thread(sel, i);
  if (!clash) return 1;
  for (s64 i = n - 1; i >= 0; i--)
    for (s64 g = off[i] >> m->sm_log, j = k - 1; j >= 0; j--) m->s_w_id[g + j] = old[i * k + j];
  return 0;
}

static void shared_write_note(Machine* m, const s64* sel, s64 n, const s64* off, s64 width, int strong) {
  s64 k = width >> m->sm_log;
  for (s64 i = 0; i < n; i++)
    for (s64 g = off[i] >> m->sm_log, end = g + k; g < end; g++)
      m->s_w_id[g] = (s32)thread(sel, i), m->s_w_time[g] = (s32)m->time, m->s_w_strong[g] = (u8)strong;
}

// Wavefronts: threads that are served together, in each bank the number of different words.
static void bank_waves(Machine* m, const s64* sel, s64 n, const s64* off, s64 width, int store) {
  if (!m->stats) return;
  s64 unit = width < 4 ? 4 : width, lanes = 128 / unit;
  int shift = log2_of(unit), group = log2_of(lanes);
  s64 waves = 0, ideal = 0;
  for (s64 i = 0; i < n;) {
    s64 phase = thread(sel, i) >> group, low = INT64_MAX, high = INT64_MIN, words[WARP];
    int k = 0;
    for (; i < n && thread(sel, i) >> group == phase; i++) {
      s64 u = off[i] >> shift;
      words[k++] = u;
      low = u < low ? u : low;
      high = u > high ? u : high;
    }
    ideal++;
    if (high - low < lanes) {
      waves++;
      continue;
    }
    u8 of_bank[WARP] = {0};
    int most = 0;
    for (int j = 0; j < k; j++) {
      int before = 0;
      for (int l = 0; l < j; l++) before |= words[l] == words[j];
      if (before) continue;
      int w = ++of_bank[words[j] % lanes];
      most = w > most ? w : most;
    }
    waves += most;
  }
  m->waves[store][0] += waves;
  m->waves[store][1] += ideal;
}

static int local(Machine* m, const u64* addr, const s64* sel, s64 n, s64 width, s64* off) {
  s64 low = INT64_MAX, high = INT64_MIN, all = 0;
  for (s64 i = 0; i < n; i++) {
    s64 a = (s64)addr[i];
    low = a < low ? a : low;
    high = a > high ? a : high;
    all |= a;
    off[i] = a + thread(sel, i) * m->lm_stride;
  }
  return low >= 0 && high <= m->lm_size - width && !(all & (width - 1));
}

// The space that all addresses are in, made relative to it, or GENERIC.
static int resolved(u64* addr, s64 n) {
  u64 id = addr[0] >> WINDOW, all = 0;
  for (s64 i = 0; i < n; i++) all |= (addr[i] >> WINDOW) ^ id;
  if (all) return GENERIC;
  if (id != SHARED_ID && id != LOCAL_ID) return GLOBAL;
  for (s64 i = 0; i < n; i++) addr[i] -= id << WINDOW;
  return id == SHARED_ID ? SHARED : LOCAL;
}

static u64 extended(u64 value, int elem, int sign) {
  if (!sign) return value;
  return elem == 1   ? (u64)(s64)(s8)value
         : elem == 2 ? (u64)(s64)(s16)value
         : elem == 4 ? (u64)(s64)(s32)value
                     : value;
}

// One element of each thread to a register.
static void take(Machine* m, s32 k, const s64* sel, s64 n, const u8* data, const s64* off, s64 at, int elem,
                 int sign) {
  void* to = room(m, k, sel);
  int width = m->width[k];
  if (width == elem) {
#define DO(T) \
  T* p = to;  \
  for (s64 i = 0; i < n; i++) memcpy(&p[i], data + off[i] + at, sizeof(T));
    BY_WIDTH(width, DO)
#undef DO
  } else {
#define DO(T)                                     \
  T* p = to;                                      \
  for (s64 i = 0; i < n; i++) {                   \
    u64 v = 0;                                    \
    memcpy(&v, data + off[i] + at, (size_t)elem); \
    p[i] = (T)extended(v, elem, sign);            \
  }
    BY_WIDTH(width, DO)
#undef DO
  }
  put(m, k, sel, n, to);
}

static void give(u8* data, const s64* off, s64 at, s64 n, const void* from, int width, int elem) {
  const u8* q = from;
  if (elem == 4 && width == 4)
    for (s64 i = 0; i < n; i++) memcpy(data + off[i] + at, q + 4 * i, 4);
  else if (elem == 2 && width == 2)
    for (s64 i = 0; i < n; i++) memcpy(data + off[i] + at, q + 2 * i, 2);
  else
    for (s64 i = 0; i < n; i++) memcpy(data + off[i] + at, q + width * i, (size_t)elem);
}

static int load(Machine* m, const Ins* p, const s32* aux, const s64* sel, s64 n) {
  u64* addr = (u64*)(m->scratch + 4 * 8 * m->N);
  s64 *off = (s64*)(m->scratch + 5 * 8 * m->N), width = p->elem * p->count;
  const u8* data;
  addresses(m, p, p->a, sel, n, p->imm, addr);
  int space = p->space == GENERIC ? resolved(addr, n) : p->space;
  m->time++;
  if (space == GLOBAL) {
    Region* r = global(m, addr, n, width, off);
    if (!r || (m->races && !global_read_clean(m, r, sel, n, off, width, p->strong))) return m->time--, 0;
    account(m, r, sel, n, off, width, 0);
    if (m->races && !p->strong) global_read_note(m, r, sel, n, off, width);
    data = r->data;
  } else if (space == SHARED) {
    if (!shared(m, addr, sel, n, width, off)) return m->time--, 0;
    if (m->sm_shadowed && !shared_read_clean(m, sel, n, off, width, p->strong)) return m->time--, 0;
    bank_waves(m, sel, n, off, width, 0);
    if (m->sm_shadowed && !p->strong) shared_read_note(m, sel, n, off, width);
    data = m->sm;
  } else if (space == LOCAL) {
    if (!local(m, addr, sel, n, width, off)) return m->time--, 0;
    data = m->lm;
  } else {
    return m->time--, 0;
  }
  for (int i = 0; i < p->count; i++)
    if (aux[i] >= 0) take(m, aux[i], sel, n, data, off, i * p->elem, p->elem, p->sign);
  if (p->strong && space == GLOBAL) {
    m->time++;
    for (s64 i = 0; i < n; i++) m->atom_time[m->cta_of[thread(sel, i)]] = m->time;
  }
  return 1;
}

static int store(Machine* m, const Ins* p, const s32* aux, const s64* sel, s64 n) {
  u64* addr = (u64*)(m->scratch + 4 * 8 * m->N);
  s64 *off = (s64*)(m->scratch + 5 * 8 * m->N), width = p->elem * p->count;
  u8* data;
  addresses(m, p, p->a, sel, n, p->imm, addr);
  int space = p->space == GENERIC ? resolved(addr, n) : p->space;
  if (p->strong && space == GLOBAL) return 0;
  m->time++;
  if (space == GLOBAL) {
    Region* r = global(m, addr, n, width, off);
    if (!r || (m->races && !global_write_clean(m, r, sel, n, off, width, 0))) return m->time--, 0;
    account(m, r, sel, n, off, width, 1);
    if (m->races) global_write_note(m, r, sel, n, off, width, 0);
    data = r->data;
  } else if (space == SHARED) {
    if (!shared(m, addr, sel, n, width, off)) return m->time--, 0;
    if (m->sm_shadowed && !shared_write_clean(m, sel, n, off, width, p->strong)) return m->time--, 0;
    bank_waves(m, sel, n, off, width, 1);
    if (m->sm_shadowed) {
      shared_write_note(m, sel, n, off, width, p->strong);
      if (m->sm_copies)
        for (s64 i = 0; i < n; i++)
          for (s64 g = off[i] >> m->sm_log, end = g + (width >> m->sm_log); g < end; g++) m->s_group[g] = 0;
    }
    data = m->sm;
  } else if (space == LOCAL) {
    if (!local(m, addr, sel, n, width, off)) return m->time--, 0;
    data = m->lm;
  } else {
    return m->time--, 0;
  }
  for (s64 j = 0; j < p->count; j++)
    give(data, off, j * p->elem, n, values(m, aux[j], sel, n, 6), m->width[aux[j]], p->elem);
  return 1;
}

// Of a kernel's parameters; by a register where that is the same in all threads.
static int load_param(Machine* m, const Ins* p, const s32* aux, const s64* sel, s64 n) {
  u64 value[8], at = (u64)p->imm;
  if (p->a >= 0) {
    if (!m->uni[p->a]) return 0;
    at += m->uval[p->a];
    if (at >= PARAM_BASE) at -= PARAM_BASE;
  }
  if (at > (u64)m->nparams || at + (u64)(p->count * p->elem) > (u64)m->nparams) return 0;
  for (int i = 0; i < p->count; i++) {
    value[i] = 0;
    memcpy(&value[i], m->params + at + i * p->elem, (size_t)p->elem);
  }
  for (int i = 0; i < p->count; i++)
    if (aux[i] >= 0) put_same(m, aux[i], sel, n, extended(value[i], p->elem, p->sign));
  return 1;
}

// cp.async without a source size: from global to shared memory at once.
static int copy(Machine* m, const Ins* p, const s64* sel, s64 n) {
  u64* addr = (u64*)(m->scratch + 4 * 8 * m->N);
  s64 *off = (s64*)(m->scratch + 5 * 8 * m->N), *from = (s64*)(m->scratch + 7 * 8 * m->N), width = p->elem;
  addresses(m, p, p->a, sel, n, p->imm, addr);
  Region* r = global(m, addr, n, width, from);
  m->time++;
  if (!r || (m->races && !global_read_clean(m, r, sel, n, from, width, 0))) return m->time--, 0;
  addresses(m, p, p->d, sel, n, p->aux, addr);
  if (!shared(m, addr, sel, n, width, off)) return m->time--, 0;
  if (m->sm_shadowed && !(m->sm_copies && shared_write_clean(m, sel, n, off, width, 0))) return m->time--, 0;
  account(m, r, sel, n, from, width, 0);
  if (m->races) global_read_note(m, r, sel, n, from, width);
  bank_waves(m, sel, n, off, width, 1);
  if (m->sm_shadowed) {
    shared_write_note(m, sel, n, off, width, 0);
    for (s64 i = 0; i < n; i++)
      for (s64 g = off[i] >> m->sm_log, end = g + (width >> m->sm_log); g < end; g++)
        m->s_group[g] = m->copy_committed[thread(sel, i)] + 1;
  }
  for (s64 i = 0; i < n; i++) memcpy(m->sm + off[i], r->data + from[i], (size_t)width);
  return 1;
}

// ---- between the lanes of a warp ----

enum { UP, DOWN, BFLY, IDX };

static int shuffle(Machine* m, const Ins* p, const s64* sel, s64 n) {
  const u32 *a = values(m, p->a, sel, n, 0), *b = values(m, p->b, sel, n, 1), *c = values(m, p->c, sel, n, 2);
  u32* out = (u32*)(m->scratch + 6 * 8 * m->N);
  u8* ok = m->scratch + 7 * 8 * m->N;
  for (s64 i = 0; i < n;) {
    s64 warp = thread(sel, i) >> 5, first = i;
    u32 lane_value[WARP], here = 0;
    for (; i < n && thread(sel, i) >> 5 == warp; i++) {
      s64 lane = thread(sel, i) & 31;
      lane_value[lane] = a[i];
      here |= 1u << lane;
    }
    for (s64 k = first; k < i; k++) {
      s32 lane = (s32)(thread(sel, k) & 31), by = b[k] & 31, seg = (c[k] >> 8) & 31, clamp = c[k] & 31, j;
      s32 top = (lane & seg) | (clamp & ~seg & 31);
      if (p->space == UP)
        ok[k] = (j = lane - by) >= top;
      else if (p->space == DOWN)
        ok[k] = (j = lane + by) <= top;
      else if (p->space == BFLY)
        ok[k] = (j = lane ^ by) <= top;
      else
        ok[k] = (j = (lane & seg) | (by & ~seg & 31)) <= top;
      if (!ok[k]) j = lane;
      if (!(here >> j & 1)) return 0;
      out[k] = lane_value[j];
    }
  }
  if (p->d >= 0) put(m, p->d, sel, n, out);
  if (p->aux >= 0) put(m, p->aux, sel, n, ok);
  return 1;
}

enum { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };

static void vote(Machine* m, const Ins* p, const s64* sel, s64 n) {
  const u8* a = values(m, p->a, sel, n, 0);
  const u32* mask = p->b >= 0 ? values(m, p->b, sel, n, 1) : 0;
  u8* out = m->scratch + 7 * 8 * m->N;
  for (s64 i = 0; i < n;) {
    s64 warp = thread(sel, i) >> 5, first = i;
    u32 here = 0, yes = 0;
    for (; i < n && thread(sel, i) >> 5 == warp; i++) {
      u32 bit = 1u << (thread(sel, i) & 31);
      here |= bit;
      yes |= (a[i] != p->sign) ? bit : 0;
    }
    for (s64 k = first; k < i; k++) {
      u32 mk = (mask ? mask[k] : ~0u) & here, got = yes & mk;
      if (p->space == VOTE_BALLOT)
        ((u32*)out)[k] = got;
      else
        out[k] = p->space == VOTE_ALL ? got == mk : p->space == VOTE_ANY ? got != 0 : got == mk || got == 0;
    }
  }
  put(m, p->d, sel, n, out);
}

static void lop3(Machine* m, const Ins* p, const s64* sel, s64 n) {
  const u32 *a = values(m, p->a, sel, n, 0), *b = values(m, p->b, sel, n, 1), *c = values(m, p->c, sel, n, 2);
  u32* to = room(m, p->d, sel);
  s64 table = p->imm;
  for (s64 i = 0; i < n; i++) {
    u32 out = 0, x = a[i], y = b[i], z = c[i];
    for (int j = 0; j < 8; j++)
      out |= table >> j & 1 ? (j & 4 ? x : ~x) & (j & 2 ? y : ~y) & (j & 1 ? z : ~z) : 0;
    to[i] = out;
  }
  put(m, p->d, sel, n, to);
}

// setp with a further predicate, or two results: r = a <op> b by the entry `aux`, then (r, !r) <and/or/xor>
// c.
static void compare(Machine* m, const Ins* p, const s32* aux, const s64* sel, s64 n) {
  const Entry* e = &entries[aux[0]];
  s32 q = aux[1];
  int same = m->uni[p->a] & m->uni[p->b] & (p->c < 0 || m->uni[p->c]);
  s64 k = same ? 1 : n;
  const void* va = same ? &m->uval[p->a] : values(m, p->a, sel, n, 0);
  const void* vb = same ? &m->uval[p->b] : values(m, p->b, sel, n, 1);
  const u8* vc = p->c < 0 ? 0 : same ? (const u8*)&m->uval[p->c] : values(m, p->c, sel, n, 2);
  u8 *r = m->scratch + 6 * 8 * m->N, *s = m->scratch + 7 * 8 * m->N;
  e->run(r, va, vb, 0, k);
  for (s64 i = 0; i < k; i++) {
    u8 x = r[i], y = !x;
    if (vc) {
      u8 z = vc[i] != p->sign;  // !c
      x = p->space == 0 ? x & z : p->space == 1 ? x | z : x ^ z;
      y = p->space == 0 ? y & z : p->space == 1 ? y | z : y ^ z;
    }
    r[i] = x, s[i] = y;
  }
  if (p->d >= 0) same ? put_same(m, p->d, sel, n, r[0]) : put(m, p->d, sel, n, r);
  if (q >= 0) same ? put_same(m, q, sel, n, s[0]) : put(m, q, sel, n, s);
}

static void unpack(Machine* m, const Ins* p, const s32* aux, const s64* sel, s64 n) {
  int elem = p->elem, width = m->width[p->a];
  if (m->uni[p->a]) {
    u64 v = m->uval[p->a];
    for (int i = 0; i < p->count; i++)
      if (aux[i] >= 0)
        put_same(m, aux[i], sel, n,
                 (v >> (8 * elem * i)) & (elem == 4   ? 0xffffffff
                                          : elem == 2 ? 0xffff
                                                      : 0xff));
    return;
  }
  const u8* v = values(m, p->a, sel, n, 0);
  if (!sel) {  // a register may be among its own parts
    u8* kept = m->scratch;
    memcpy(kept, v, (size_t)(n * width));
    v = kept;
  }
  for (int i = 0; i < p->count; i++) {
    if (aux[i] < 0) continue;
    void* to = room(m, aux[i], sel);
    if (elem == 4)
      for (s64 j = 0; j < n; j++) memcpy((u32*)to + j, v + width * j + 4 * i, 4);
    else if (elem == 2)
      for (s64 j = 0; j < n; j++) memcpy((u16*)to + j, v + width * j + 2 * i, 2);
    else
      for (s64 j = 0; j < n; j++) ((u8*)to)[j] = v[width * j + i];
    put(m, aux[i], sel, n, to);
  }
}

static void pack(Machine* m, const Ins* p, const s32* aux, const s64* sel, s64 n) {
  int elem = p->elem, width = m->width[p->d], same = 1;
  for (int i = 0; i < p->count; i++) same &= m->uni[aux[i]];
  if (same) {
    u64 v = 0;
    for (int i = 0; i < p->count; i++) v |= m->uval[aux[i]] << (8 * elem * i);
    put_same(m, p->d, sel, n, v);
    return;
  }
  u8* to = m->scratch + 6 * 8 * m->N;
  for (int i = 0; i < p->count; i++) {
    const u8* v = values(m, aux[i], sel, n, 0);
    if (elem == 2)
      for (s64 j = 0; j < n; j++) memcpy(to + width * j + 2 * i, v + 2 * j, 2);
    else if (elem == 4)
      for (s64 j = 0; j < n; j++) memcpy(to + width * j + 4 * i, v + 4 * j, 4);
    else
      for (s64 j = 0; j < n; j++) to[width * j + i] = v[j];
  }
  put(m, p->d, sel, n, to);
}

s64 run(Machine* m, const Ins* code, const s32* list, s64 from, s64 to, const s64* selected, s64 count) {
  for (s64 at = from; at < to; at++) {
    const Ins* p = &code[at];
    const s64* sel = selected;
    s64 n = selected ? count : m->N;
    if (p->op == STOP) return at;
    if (p->guard >= 0) {
      s32 k = p->guard >> 1;
      u8 negated = p->guard & 1;
      if (m->uni[k]) {
        if ((u8)m->uval[k] == negated) continue;
      } else {
        const u8* q = array_of(m, k);
        s64 *index = m->index, found = 0;
        if (sel)
          for (s64 i = 0; i < n; i++) index[found] = sel[i], found += q[sel[i]] != negated;
        else
          for (s64 i = 0; i < n; i++) index[found] = i, found += q[i] != negated;
        if (!found) continue;
        if (found < n) sel = index, n = found;
      }
    }
    const s32* aux = list + p->aux;
    switch (p->op) {
      case LD:
        if (!load(m, p, aux, sel, n)) return at;
        break;
      case ST:
        if (!store(m, p, aux, sel, n)) return at;
        break;
      case LD_PARAM:
        if (!load_param(m, p, aux, sel, n)) return at;
        break;
      case SHFL:
        if (!shuffle(m, p, sel, n)) return at;
        break;
      case VOTE:
        vote(m, p, sel, n);
        break;
      case SETP2:
        compare(m, p, aux, sel, n);
        break;
      case UNPACK:
        unpack(m, p, aux, sel, n);
        break;
      case PACK:
        pack(m, p, aux, sel, n);
        break;
      case LOP3:
        lop3(m, p, sel, n);
        break;
      case WARP_BARRIER:
        m->time++;
        for (s64 i = 0; i < n; i++) m->warp_time[thread(sel, i) >> 5] = m->time;
        m->time++;
        break;
      case COPY:
        if (!copy(m, p, sel, n)) return at;
        break;
      case COPY_GROUP:  // elem: whether a group is committed, sign: whether groups but the last `imm` are
                        // waited for
        for (s64 i = 0; i < n; i++) {
          s64 t = thread(sel, i);
          if (p->elem) m->copy_committed[t]++;
          s32 done = m->copy_committed[t] - (s32)p->imm;
          if (p->sign && done > m->copy_done[t]) m->copy_done[t] = done;
        }
        break;
      case NOTHING:
        break;
      default:
        elementwise(m, p, sel, n);
    }
  }
  return to;
}
