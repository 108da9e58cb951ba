// Instructions that work on each lane alone, by their whole names. Approximate ones err by as much as the PTX ISA allows them to.
#pragma once

#include <cmath>
#include <type_traits>
#include <unordered_map>

#include "machine.h"

namespace ptx {

struct Known {
  Run run = nullptr;
  size_t operands = 0;  // that are read
};
using Table = std::unordered_map<std::string, Known>;

// The instruction that puts f of its operands into each lane
template <class R, class... A, class F> Known map(F) {
  return {[](Warp& w, const Instruction& i, Mask m) {
    [&]<size_t... K>(std::index_sequence<K...>) {
      uint64_t* to = w.row(i.to[0]);
      const uint64_t* from[] = {w.row(i.from[K])...};
      lanes(m, [&](int l) { to[l] = put<R>(F{}(get<A>(from[K][l])...)); });
    }(std::index_sequence_for<A...>{});
  }, sizeof...(A)};
}

// What single precision makes of a NaN: positive, all mantissa bits, whatever came in. Double precision keeps what x86 keeps
inline float canonical(float x) { return x == x ? x : get<float>(0x7FFFFFFF); }
inline double canonical(double x) { return x; }

inline float bf16(uint16_t x) { return get<float>(uint64_t(x) << 16); }
inline uint16_t to_bf16(double exact) {  // one rounding, to nearest even
  if (std::isnan(exact)) return 0x7FFF;
  float f = float(exact);
  if (double(f) != exact && !std::isinf(f)) {  // round to odd first
    const uint32_t bits = get<uint32_t>(put(f));
    if (std::fabs(double(f)) > std::fabs(exact)) f = get<float>(bits - 1);
    f = get<float>(get<uint32_t>(put(f)) | 1);
  }
  uint32_t bits = get<uint32_t>(put(f));
  if (!std::isinf(f)) bits += 0x7FFF + (bits >> 16 & 1);
  return uint16_t(bits >> 16);
}
inline float f16(uint16_t x) { return float(get<_Float16>(x)); }
inline uint16_t to_f16(double x) { return x == x ? get<uint16_t>(put(_Float16(x))) : 0x7FFF; }

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// exact × (1 ± relative): the sign is as good as random, the same for the same value. What is a float already, as powers of two
// are, comes out as it is
inline float off(double exact, double relative) {
  if (double(float(exact)) == exact || exact != exact) return float(exact);
  const uint64_t bits = put(exact) * 0x9E3779B97F4A7C15ull;
  return float(exact * (1 + (bits >> 63 ? relative : -relative)));
}

template <class T> T shifted_left(T a, uint32_t n) { return n >= sizeof(T) * 8 ? 0 : T(a << n); }
template <class T> T shifted_right(T a, uint32_t n) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  return n >= kBits ? (std::is_signed_v<T> && a < 0 ? T(-1) : T(0)) : T(a >> n);
}
template <class T> struct Twice;
template <> struct Twice<int16_t> { using type = int32_t; };
template <> struct Twice<uint16_t> { using type = uint32_t; };
template <> struct Twice<int32_t> { using type = int64_t; };
template <> struct Twice<uint32_t> { using type = uint64_t; };
template <> struct Twice<int64_t> { using type = __int128; };
template <> struct Twice<uint64_t> { using type = unsigned __int128; };

template <class T> void comparisons(Table& t, const std::string& s) {
  auto name = [&](const char* op) { return std::string("setp.") + op + "." + s; };
  t[name("eq")] = map<bool, T, T>([](T a, T b) { return a == b; });
  t[name("lt")] = map<bool, T, T>([](T a, T b) { return a < b; });
  t[name("le")] = map<bool, T, T>([](T a, T b) { return a <= b; });
  t[name("gt")] = map<bool, T, T>([](T a, T b) { return a > b; });
  t[name("ge")] = map<bool, T, T>([](T a, T b) { return a >= b; });
  if constexpr (std::is_floating_point_v<T>) {
    t[name("ne")] = map<bool, T, T>([](T a, T b) { return a < b || a > b; });
    t[name("equ")] = map<bool, T, T>([](T a, T b) { return !(a < b || a > b); });
    t[name("neu")] = map<bool, T, T>([](T a, T b) { return a != b; });
    t[name("ltu")] = map<bool, T, T>([](T a, T b) { return !(a >= b); });
    t[name("leu")] = map<bool, T, T>([](T a, T b) { return !(a > b); });
    t[name("gtu")] = map<bool, T, T>([](T a, T b) { return !(a <= b); });
    t[name("geu")] = map<bool, T, T>([](T a, T b) { return !(a < b); });
    t[name("num")] = map<bool, T, T>([](T a, T b) { return a == a && b == b; });
    t[name("nan")] = map<bool, T, T>([](T a, T b) { return a != a || b != b; });
  } else {
    t[name("ne")] = map<bool, T, T>([](T a, T b) { return a != b; });
  }
}

template <class T> void integers(Table& t, const std::string& s) {
  using U = std::make_unsigned_t<T>;
  using W = typename Twice<T>::type;
  t["add." + s] = map<T, T, T>([](T a, T b) { return T(U(a) + U(b)); });
  t["sub." + s] = map<T, T, T>([](T a, T b) { return T(U(a) - U(b)); });
  t["mul.lo." + s] = map<T, T, T>([](T a, T b) { return T(W(a) * W(b)); });
  t["mul.hi." + s] = map<T, T, T>([](T a, T b) { return T(W(a) * W(b) >> sizeof(T) * 8); });
  t["mad.lo." + s] = map<T, T, T, T>([](T a, T b, T c) { return T(U(T(W(a) * W(b))) + U(c)); });
  if constexpr (sizeof(T) < 8) {
    t["mul.wide." + s] = map<W, T, T>([](T a, T b) { return W(a) * W(b); });
    t["mad.wide." + s] =
        map<W, T, T, W>([](T a, T b, W c) { return W(std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c)); });
  }
  t["div." + s] = map<T, T, T>([](T a, T b) { return b == 0 ? T(-1) : b == T(-1) && std::is_signed_v<T> ? T(U(0) - U(a)) : T(a / b); });
  t["rem." + s] = map<T, T, T>([](T a, T b) { return b == 0 ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b); });
  t["min." + s] = map<T, T, T>([](T a, T b) { return a < b ? a : b; });
  t["max." + s] = map<T, T, T>([](T a, T b) { return a > b ? a : b; });
  t["neg." + s] = map<T, T>([](T a) { return T(U(0) - U(a)); });
  t["abs." + s] = map<T, T>([](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
  t["shr." + s] = map<T, T, uint32_t>([](T a, uint32_t n) { return shifted_right(a, n); });
  t["selp." + s] = map<T, T, T, bool>([](T a, T b, bool p) { return p ? a : b; });
  comparisons<T>(t, s);
}

template <class T> void bits(Table& t, const std::string& s) {
  t["and." + s] = map<T, T, T>([](T a, T b) { return T(a & b); });
  t["or." + s] = map<T, T, T>([](T a, T b) { return T(a | b); });
  t["xor." + s] = map<T, T, T>([](T a, T b) { return T(a ^ b); });
  t["selp." + s] = map<T, T, T, bool>([](T a, T b, bool p) { return p ? a : b; });
  t["setp.eq." + s] = map<bool, T, T>([](T a, T b) { return a == b; });
  t["setp.ne." + s] = map<bool, T, T>([](T a, T b) { return a != b; });
  if constexpr (std::is_same_v<T, bool>) {
    t["not." + s] = map<T, T>([](T a) { return !a; });
  } else {
    t["not." + s] = map<T, T>([](T a) { return T(~a); });
    t["shl." + s] = map<T, T, uint32_t>([](T a, uint32_t n) { return shifted_left(a, n); });
    t["shr." + s] = map<T, T, uint32_t>([](T a, uint32_t n) { return shifted_right(a, n); });
    t["popc." + s] = map<uint32_t, T>([](T a) { return uint32_t(__builtin_popcountll(a)); });
    t["clz." + s] = map<uint32_t, T>([](T a) { return a ? uint32_t(__builtin_clzll(a) - (64 - sizeof(T) * 8)) : uint32_t(sizeof(T) * 8); });
  }
}

template <class T> T least(T a, T b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; }
template <class T> T greatest(T a, T b) { return a != a ? b : b != b ? a : a > b || (a == b && std::signbit(b)) ? a : b; }

template <class T> void floats(Table& t, const std::string& s) {
  for (const char* rounding : {"", "rn."}) {
    t[std::string("add.") + rounding + s] = map<T, T, T>([](T a, T b) { return canonical(a + b); });
    t[std::string("sub.") + rounding + s] = map<T, T, T>([](T a, T b) { return canonical(a - b); });
    t[std::string("mul.") + rounding + s] = map<T, T, T>([](T a, T b) { return canonical(a * b); });
  }
  t["fma.rn." + s] = map<T, T, T, T>([](T a, T b, T c) { return canonical(std::fma(a, b, c)); });
  t["div.rn." + s] = map<T, T, T>([](T a, T b) { return canonical(a / b); });
  t["sqrt.rn." + s] = map<T, T>([](T a) { return canonical(std::sqrt(a)); });
  t["rcp.rn." + s] = map<T, T>([](T a) { return canonical(1 / a); });
  t["neg." + s] = map<T, T>([](T a) { return -a; });
  t["abs." + s] = map<T, T>([](T a) { return std::fabs(a); });
  t["min." + s] = map<T, T, T>([](T a, T b) { return canonical(least(a, b)); });
  t["max." + s] = map<T, T, T>([](T a, T b) { return canonical(greatest(a, b)); });
  t["min.NaN." + s] = map<T, T, T>([](T a, T b) { return a != a || b != b ? canonical(T(NAN)) : least(a, b); });
  t["max.NaN." + s] = map<T, T, T>([](T a, T b) { return a != a || b != b ? canonical(T(NAN)) : greatest(a, b); });
  t["selp." + s] = map<T, T, T, bool>([](T a, T b, bool p) { return p ? a : b; });
  t["copysign." + s] = map<T, T, T>([](T sign, T of) { return std::copysign(of, sign); });
  comparisons<T>(t, s);
}

// A signed result goes on into a destination that is wider
template <class To> using Widened = std::conditional_t<std::is_integral_v<To> && std::is_signed_v<To>, int64_t, To>;

template <class To, class From> void convert(Table& t, const std::string& to, const std::string& from) {
  for (const char* rounding : {"", "rn.", "rzi.", "rni."})
    t[std::string("cvt.") + rounding + to + "." + from] = map<Widened<To>, From>([](From a) { return To(a); });
}
template <class To, class... From> void from_all(Table& t, const std::string& to, std::initializer_list<const char*> names) {
  auto name = names.begin();
  (convert<To, From>(t, to, *name++), ...);
}
template <class To, class From> To saturated(From x) {  // of a rounded value; NaN gives 0, or where 64 bits take part the highest bit
  constexpr double kLow = double(std::numeric_limits<To>::min()), kHigh = double(std::numeric_limits<To>::max());
  if (x != x) return sizeof(From) == 8 || sizeof(To) == 8 ? To(1ull << (sizeof(To) * 8 - 1)) : To(0);
  return double(x) <= kLow ? std::numeric_limits<To>::min() : double(x) >= kHigh ? std::numeric_limits<To>::max() : To(x);
}
template <class To, class From> void to_integer(Table& t, const std::string& to, const std::string& from) {
  for (const std::string ftz : {"", "ftz."}) {
    t["cvt.rzi." + ftz + to + "." + from] = map<Widened<To>, From>([](From a) { return saturated<To>(std::trunc(a)); });
    t["cvt.rni." + ftz + to + "." + from] = map<Widened<To>, From>([](From a) { return saturated<To>(std::nearbyint(a)); });
  }
  t["cvt.rmi." + to + "." + from] = map<Widened<To>, From>([](From a) { return saturated<To>(std::floor(a)); });
}

inline void conversions(Table& t) {
#define EF_ALL int8_t, uint8_t, int16_t, uint16_t, int32_t, uint32_t, int64_t, uint64_t
#define EF_NAMES {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"}
  from_all<int8_t, EF_ALL>(t, "s8", EF_NAMES), from_all<uint8_t, EF_ALL>(t, "u8", EF_NAMES);
  from_all<int16_t, EF_ALL>(t, "s16", EF_NAMES), from_all<uint16_t, EF_ALL>(t, "u16", EF_NAMES);
  from_all<int32_t, EF_ALL>(t, "s32", EF_NAMES), from_all<uint32_t, EF_ALL>(t, "u32", EF_NAMES);
  from_all<int64_t, EF_ALL>(t, "s64", EF_NAMES), from_all<uint64_t, EF_ALL>(t, "u64", EF_NAMES);
  from_all<float, EF_ALL, double>(t, "f32", {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64", "f64"});
  from_all<double, EF_ALL, float>(t, "f64", {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64", "f32"});
#undef EF_ALL
#undef EF_NAMES
  to_integer<int32_t, float>(t, "s32", "f32"), to_integer<uint32_t, float>(t, "u32", "f32"), to_integer<int64_t, float>(t, "s64", "f32");
  to_integer<int32_t, double>(t, "s32", "f64"), to_integer<uint32_t, double>(t, "u32", "f64"), to_integer<int64_t, double>(t, "s64", "f64");
  to_integer<int8_t, float>(t, "s8", "f32"), to_integer<int16_t, float>(t, "s16", "f32"), to_integer<int16_t, double>(t, "s16", "f64");
  t["cvt.rzi.f32.f32"] = map<float, float>([](float a) { return canonical(std::trunc(a)); });
  t["cvt.rni.f32.f32"] = map<float, float>([](float a) { return canonical(std::nearbyint(a)); });
  t["cvt.f32.bf16"] = map<float, uint16_t>([](uint16_t a) { return bf16(a); });
  t["cvt.f64.bf16"] = map<double, uint16_t>([](uint16_t a) { return double(bf16(a)); });
  t["cvt.rn.bf16.f32"] = map<uint16_t, float>([](float a) { return to_bf16(a); });
  t["cvt.rn.bf16.f64"] = map<uint16_t, double>([](double a) { return to_bf16(a); });
  t["cvt.rn.bf16x2.f32"] = map<uint32_t, float, float>([](float a, float b) { return uint32_t(to_bf16(a)) << 16 | to_bf16(b); });
  t["cvt.f32.f16"] = map<float, uint16_t>([](uint16_t a) { return f16(a); });
  t["cvt.f64.f16"] = map<double, uint16_t>([](uint16_t a) { return double(f16(a)); });
  t["cvt.rn.f16.f32"] = map<uint16_t, float>([](float a) { return to_f16(a); });
  t["cvt.rn.f16.f64"] = map<uint16_t, double>([](double a) { return to_f16(a); });
  t["cvt.rn.f16x2.f32"] = map<uint32_t, float, float>([](float a, float b) { return uint32_t(to_f16(a)) << 16 | to_f16(b); });
  t["cvt.rna.tf32.f32"] = map<uint32_t, uint32_t>([](uint32_t a) { return (a & 0x7F800000) == 0x7F800000 ? a : (a + 0x1000) & 0xFFFFE000; });
}

template <bool kFlush> float in(float x) { return kFlush ? flushed(x) : x; }
template <bool kFlush> float out(float x) { return canonical(kFlush ? flushed(x) : x); }

template <bool kFlush> void approximation(Table& t, const std::string& ftz) {
  static constexpr auto in = ptx::in<kFlush>, out = ptx::out<kFlush>;
  static constexpr double kUlp = 0x1p-23;
  t["ex2.approx." + ftz + "f32"] = map<float, float>([](float a) { return out(off(std::exp2(double(in(a))), 2 * kUlp)); });
  t["lg2.approx." + ftz + "f32"] = map<float, float>([](float a) {
    const double exact = std::log2(double(in(a)));
    return out(a > 0.5f && a < 2.0f && a != 1 ? float(exact + (put(exact) * 0x9E3779B97F4A7C15ull >> 63 ? 2 : -2) * kUlp)
                                              : off(exact, 2 * kUlp));
  });
  t["rcp.approx." + ftz + "f32"] = map<float, float>([](float a) { return out(off(1 / double(in(a)), kUlp)); });
  t["sqrt.approx." + ftz + "f32"] = map<float, float>([](float a) { return out(off(std::sqrt(double(in(a))), kUlp)); });
  t["rsqrt.approx." + ftz + "f32"] = map<float, float>([](float a) { return out(off(1 / std::sqrt(double(in(a))), kUlp)); });
  t["div.full." + ftz + "f32"] = t["div.approx." + ftz + "f32"] =
      map<float, float, float>([](float a, float b) { return out(off(double(in(a)) / double(in(b)), 2 * kUlp)); });
}

inline void approximations(Table& t) {
  approximation<false>(t, ""), approximation<true>(t, "ftz.");
  t["rcp.approx.ftz.f64"] = map<double, double>([](double a) { return get<double>(put(1 / a) & 0xFFFFFFFF00000000ull); });
  t["fma.rn.ftz.f32"] = map<float, float, float, float>(
      [](float a, float b, float c) { return out<true>(std::fma(flushed(a), flushed(b), flushed(c))); });
  t["mul.rn.ftz.f32"] = t["mul.ftz.f32"] = map<float, float, float>([](float a, float b) { return out<true>(flushed(a) * flushed(b)); });
  t["add.rn.ftz.f32"] = t["add.ftz.f32"] = map<float, float, float>([](float a, float b) { return out<true>(flushed(a) + flushed(b)); });
  t["abs.ftz.f32"] = map<float, float>([](float a) { return std::fabs(flushed(a)); });
  t["neg.ftz.f32"] = map<float, float>([](float a) { return -flushed(a); });
}

inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t choice) {
  const uint64_t all = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t c = choice >> 4 * i & 0xF, byte = all >> 8 * (c & 7) & 0xFF;
    out |= (c & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << 8 * i;
  }
  return out;
}
template <class T> T extracted(T a, uint32_t from, uint32_t length) {
  from &= 0xFF, length &= 0xFF;
  if (!length) return 0;
  const uint64_t wide = shifted_right<int64_t>(int64_t(a), from);  // sign-extended where T is signed
  if (length >= 32) return T(wide);
  if (std::is_signed_v<T>) return T(int64_t(wide << (64 - length)) >> (64 - length));
  return T(wide & ((1ull << length) - 1));
}

inline void words(Table& t) {
  using U = uint32_t;
  t["shf.l.wrap.b32"] = map<U, U, U, U>([](U a, U b, U n) { return U((uint64_t(b) << 32 | a) << (n & 31) >> 32); });
  t["shf.r.wrap.b32"] = map<U, U, U, U>([](U a, U b, U n) { return U((uint64_t(b) << 32 | a) >> (n & 31)); });
  t["prmt.b32"] = map<U, U, U, U>([](U a, U b, U c) { return permuted(a, b, c); });
  t["bfe.u32"] = map<U, U, U, U>([](U a, U b, U c) { return extracted<U>(a, b, c); });
  t["bfe.s32"] = map<int32_t, int32_t, U, U>([](int32_t a, U b, U c) { return extracted<int32_t>(a, b, c); });
  t["bfi.b32"] = map<U, U, U, U, U>([](U a, U b, U from, U length) {
    const U mask = shifted_left(U(~shifted_left(~0u, length & 0xFF)), from & 0xFF);
    return (b & ~mask) | (shifted_left(a, from & 0xFF) & mask);
  });
  t["lop3.b32"] = map<U, U, U, U, U>([](U a, U b, U c, U truth) {
    U out = 0;
    for (int k = 0; k < 8; ++k)
      if (truth >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return out;
  });
  t["abs.bf16x2"] = t["abs.f16x2"] = map<U, U>([](U a) { return a & 0x7FFF7FFFu; });
  t["neg.bf16x2"] = t["neg.f16x2"] = map<U, U>([](U a) { return a ^ 0x80008000u; });
  t["abs.bf16"] = t["abs.f16"] = map<uint16_t, uint16_t>([](uint16_t a) { return uint16_t(a & 0x7FFF); });
  t["neg.bf16"] = t["neg.f16"] = map<uint16_t, uint16_t>([](uint16_t a) { return uint16_t(a ^ 0x8000); });
  t["mad.lo.cc.u32"] = {[](Warp& w, const Instruction& i, Mask m) {
    lanes(m, [&](int l) {
      const uint64_t sum = uint64_t(U(w.row(i.from[0])[l] * w.row(i.from[1])[l])) + U(w.row(i.from[2])[l]);
      w.row(i.to[0])[l] = U(sum), w.carry[l] = sum >> 32;
    });
  }, 3};
  t["madc.hi.u32"] = {[](Warp& w, const Instruction& i, Mask m) {
    lanes(m, [&](int l) {
      const uint64_t product = uint64_t(U(w.row(i.from[0])[l])) * U(w.row(i.from[1])[l]);
      w.row(i.to[0])[l] = U((product >> 32) + U(w.row(i.from[2])[l]) + w.carry[l]);
    });
  }, 3};
}

// Comparisons of 16-bit floats
template <float (*widen)(uint16_t)> void halves(Table& t, const std::string& s) {
  t["setp.num." + s] = map<bool, uint16_t, uint16_t>([](uint16_t a, uint16_t b) { return widen(a) == widen(a) && widen(b) == widen(b); });
  t["setp.nan." + s] = map<bool, uint16_t, uint16_t>([](uint16_t a, uint16_t b) { return widen(a) != widen(a) || widen(b) != widen(b); });
  t["setp.lt." + s] = map<bool, uint16_t, uint16_t>([](uint16_t a, uint16_t b) { return widen(a) < widen(b); });
  t["setp.gt." + s] = map<bool, uint16_t, uint16_t>([](uint16_t a, uint16_t b) { return widen(a) > widen(b); });
}

inline Table arithmetic() {
  Table t;
  integers<int16_t>(t, "s16"), integers<uint16_t>(t, "u16"), integers<int32_t>(t, "s32"), integers<uint32_t>(t, "u32");
  integers<int64_t>(t, "s64"), integers<uint64_t>(t, "u64");
  bits<bool>(t, "pred"), bits<uint16_t>(t, "b16"), bits<uint32_t>(t, "b32"), bits<uint64_t>(t, "b64");
  floats<float>(t, "f32"), floats<double>(t, "f64"), halves<bf16>(t, "bf16"), halves<f16>(t, "f16");
  conversions(t), approximations(t), words(t);
  return t;
}

}  // namespace ptx
