/* Vectors of 16 floats, whatever the processor's own width, and the functions of one number on them.

   Every lane is computed by the same IEEE operations on every processor: additions, products, explicitly fused
   multiply-adds, divisions and square roots. Nothing is contracted or reordered (-ffp-contract=off), no libm is called.
*/
#pragma once
#include <stdint.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));

typedef float v8 __attribute__((vector_size(32), aligned(4))); /* half of one, where there are few channels */
typedef float v4 __attribute__((vector_size(16), aligned(4)));

INLINE v8 low(v16 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE v8 high(v16 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
INLINE v16 join(v8 a, v8 b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
INLINE v8 load8(const float *p) { return *(const v8 *)p; }
INLINE void store8(float *p, v8 x) { *(v8 *)p = x; }
INLINE v8 all8(float x) { return (v8){x, x, x, x, x, x, x, x}; }
INLINE v16 load(const float *p) { return *(const v16 *)p; }
INLINE void store(float *p, v16 x) { *(v16 *)p = x; }
INLINE v16 all(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; } /* 0 + x would be an addition */
INLINE v16 fma(v16 a, v16 b, v16 c) { return __builtin_elementwise_fma(a, b, c); }
INLINE i16 bits(v16 x) { return (i16)x; }
INLINE v16 floats(i16 x) { return (v16)x; }
INLINE v16 choose(i16 mask, v16 a, v16 b) { return floats((bits(a) & mask) | (bits(b) & ~mask)); }
INLINE v16 absolute(v16 x) { return floats(bits(x) & 0x7fffffff); }
INLINE v16 larger(v16 a, v16 b) { return choose((a > b) | (a != a), a, b); } /* NaN of either stays, as in PyTorch */
INLINE v16 smaller(v16 a, v16 b) { return choose((a < b) | (a != a), a, b); }

/* Of the lanes, always in this order. */
INLINE float sum_of(v16 x) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}
INLINE float max_of(v16 x) {
  float top = x[0];
  for (int i = 1; i < LANES; i++) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  return top;
}

INLINE v16 power_of_two(i16 n) { return floats((n + 127) << 23); }

/* e^x: 2^n times a polynomial of the rest; within 2 ulp (tests/export/test_native.py). */
INLINE v16 exponential(v16 x) {
  v16 inside = choose(x > all(89.f), all(89.f), choose(x < all(-104.f), all(-104.f), x));
  v16 n = fma(inside, all(1.44269504088896341f), all(12582912.f)) - all(12582912.f);
  v16 r = fma(n, all(-0.693145751953125f), inside);
  r = fma(n, all(-1.42860682030941723212e-6f), r);
  v16 p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r + all(1.f));
  i16 whole = __builtin_convertvector(n, i16), half = whole >> 1; /* two factors: subnormal results stay right */
  v16 y = p * power_of_two(half) * power_of_two(whole - half);
  y = choose(x > all(88.72283935546875f), all(__builtin_inff()), y);
  y = choose(x < all(-103.97208f), all(0.f), y);
  return choose(x != x, x, y);
}

/* ln x: exponent and a polynomial of the mantissa between √½ and √2. */
INLINE v16 logarithm(v16 x) {
  i16 tiny = x < all(1.17549435e-38f);
  v16 scaled = choose(tiny, x * all(8388608.f), x);
  i16 b = bits(scaled), e = ((b >> 23) & 255) - 126;
  v16 m = floats((b & 0x007fffff) | 0x3f000000); /* ½ … 1 */
  i16 low = m < all(0.707106781186547524f);
  e = e - (low & 1) - (tiny & 23);
  m = choose(low, m + m, m) - all(1.f);
  v16 z = m * m, p = all(7.0376836292e-2f), n = __builtin_convertvector(e, v16);
  p = fma(p, m, all(-1.1514610310e-1f));
  p = fma(p, m, all(1.1676998740e-1f));
  p = fma(p, m, all(-1.2420140846e-1f));
  p = fma(p, m, all(1.4249322787e-1f));
  p = fma(p, m, all(-1.6668057665e-1f));
  p = fma(p, m, all(2.0000714765e-1f));
  p = fma(p, m, all(-2.4999993993e-1f));
  p = fma(p, m, all(3.3333331174e-1f));
  v16 y = m * z * p;
  y = fma(n, all(-2.12194440e-4f), y);
  y = fma(z, all(-0.5f), y);
  y = fma(n, all(0.693359375f), m + y);
  y = choose(x == all(__builtin_inff()), x, y);
  y = choose(x == all(0.f), all(-__builtin_inff()), y);
  y = choose(x < all(0.f), all(__builtin_nanf("")), y);
  return choose(x != x, x, y);
}

INLINE v16 square_root(v16 x) { return __builtin_elementwise_sqrt(x); }

/* 1 / (1 + e^−x), of −|x|, so that neither side overflows. */
INLINE v16 sigmoid(v16 x) {
  v16 e = exponential(-absolute(x)), d = all(1.f) + e;
  return choose(x < all(0.f), e / d, all(1.f) / d);
}

/* tanh x: an odd polynomial near zero, else 1 − 2 / (e^2|x| + 1). */
INLINE v16 hyperbolic_tangent(v16 x) {
  v16 a = absolute(x), z = x * x, p = all(-5.70498872745e-3f);
  p = fma(p, z, all(2.06390887954e-2f));
  p = fma(p, z, all(-5.37397155531e-2f));
  p = fma(p, z, all(1.33314422036e-1f));
  p = fma(p, z, all(-3.33332819422e-1f));
  v16 near = fma(p * z, x, x);
  v16 far = all(1.f) - all(2.f) / (exponential(a + a) + all(1.f));
  far = floats(bits(far) | (bits(x) & (int32_t)0x80000000));
  return choose(x != x, x, choose(a < all(0.625f), near, far));
}

/* ln(1 + e^x) = max(x, 0) + ln(1 + u), u = e^−|x|; what 1 + u rounds away comes back as a factor. */
INLINE v16 softplus(v16 x) {
  v16 u = exponential(-absolute(x)), w = all(1.f) + u, lost = w - all(1.f);
  v16 l = choose(lost == all(0.f), u, logarithm(w) * (u / choose(lost == all(0.f), all(1.f), lost)));
  return choose(x != x, x, choose(x > all(0.f), x, all(0.f)) + l);
}

/* erf x: an odd polynomial divided by an even one, of x between −4 and 4, where it is ±1 (Eigen's coefficients). */
INLINE v16 error_function(v16 x) {
  v16 a = choose(x > all(4.f), all(4.f), choose(x < all(-4.f), all(-4.f), x)), z = a * a;
  v16 p = all(-2.72614225801306e-10f), q = all(-1.45660718464996e-05f);
  p = fma(p, z, all(2.77068142495902e-08f));
  p = fma(p, z, all(-2.10102402082508e-06f));
  p = fma(p, z, all(-5.69250639462346e-05f));
  p = fma(p, z, all(-7.34990630326855e-04f));
  p = fma(p, z, all(-2.95459980854025e-03f));
  p = fma(p, z, all(-1.60960333262415e-02f));
  q = fma(q, z, all(-2.13374055278905e-04f));
  q = fma(q, z, all(-1.68282697438203e-03f));
  q = fma(q, z, all(-7.37332916720468e-03f));
  q = fma(q, z, all(-1.42647390514189e-02f));
  v16 y = a * p / q;
  return choose(y > all(1.f), all(1.f), choose(y < all(-1.f), all(-1.f), y));
}

/* Rarely used functions, a lane at a time in double precision. */
INLINE double round_even(double x) { return (x + 6755399441055744.0) - 6755399441055744.0; }

INLINE double sine_near(double r) { /* |r| ≤ π/4 */
  double z = r * r;
  return r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z / 39916800.0))));
}
INLINE double cosine_near(double r) {
  double z = r * r;
  return 1 - z / 2 + z * z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 - z / 3628800.0)));
}
INLINE float turned(float x, int quarter) { /* sin(x + quarter·π/2) */
  if (!(x > -1e9f && x < 1e9f)) return __builtin_nanf("");
  double n = round_even((double)x * 0.63661977236758134308);
  double r = __builtin_fma(-n, 6.12323399573676603587e-17, __builtin_fma(-n, 1.57079632679489655800, (double)x));
  int q = (int)((int64_t)n + quarter) & 3;
  double y = q & 1 ? cosine_near(r) : sine_near(r);
  return (float)(q & 2 ? -y : y);
}
INLINE float arc_tangent(float x) {
  if (x != x) return x;
  double a = x < 0 ? -(double)x : (double)x, base = 0;
  int inverse = a > 1;
  if (inverse) a = 1 / a;
  if (a > 0.41421356237309503) base = 0.78539816339744831, a = (a - 1) / (a + 1);
  double z = a * a, s = 0;
  for (int k = 23; k >= 1; k -= 2) s = s * z + (k & 2 ? -1.0 : 1.0) / k;
  double y = base + a * s;
  if (inverse) y = 1.57079632679489661923 - y;
  return (float)(x < 0 ? -y : y);
}
INLINE double log_double(double x) { /* of a normal float, as a double */
  union { double d; uint64_t u; } v = {x};
  int e = (int)(v.u >> 52 & 2047) - 1023;
  v.u = (v.u & 0xfffffffffffffull) | 0x3ff0000000000000ull;
  if (v.d > 1.4142135623730951) v.d /= 2, e++;
  double f = (v.d - 1) / (v.d + 1), z = f * f, s = 0;
  for (int k = 21; k >= 1; k -= 2) s = s * z + 1.0 / k;
  return e * 0.69314718055994530942 + 2 * f * s;
}
INLINE double exp_double(double x) {
  if (x != x) return x;
  if (x > 700) return 1e300 * 1e300;
  if (x < -700) return 0;
  double n = round_even(x * 1.44269504088896340736), r = x - n * 0.69314718055994530942, s = 1;
  for (int k = 13; k >= 1; k--) s = 1 + s * r / k;
  union { uint64_t u; double d; } v = {(uint64_t)((int64_t)n + 1023) << 52};
  return s * v.d;
}
INLINE float power(float x, float exponent) {
  if (exponent == 0) return 1;
  if (x != x) return x;
  float whole = (float)(int64_t)(exponent > -1e9f && exponent < 1e9f ? exponent : 0);
  int integer = whole == exponent, odd = integer && ((int64_t)whole & 1);
  if (x == 0) return exponent > 0 ? 0 : __builtin_inff();
  if (x < 0 && !integer) return __builtin_nanf("");
  double a = x < 0 ? -(double)x : (double)x, y = exp_double((double)exponent * log_double(a));
  return (float)(x < 0 && odd ? -y : y);
}
