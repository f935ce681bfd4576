// Kernels of the test cases. `./regenerate.sh` compiles each section to a .ptx; a section begins with its name and
// target.
#define GLOBAL extern "C" __attribute__((global))
#define SHARED __attribute__((shared)) static
#define DEVICE __attribute__((device))
#define TID __nvvm_read_ptx_sreg_tid_x()
#define LANE __nvvm_read_ptx_sreg_laneid()
#define BLOCK __nvvm_read_ptx_sreg_ctaid_x()
#define THREADS __nvvm_read_ptx_sreg_ntid_x()
#define BLOCKS __nvvm_read_ptx_sreg_nctaid_x()
#define ALL -1
#define IN_SHARED __attribute__((address_space(3)))

// A 16-byte vector, which is loaded and stored by one instruction.
typedef float float4 __attribute__((ext_vector_type(4)));
typedef _Float16 half2 __attribute__((ext_vector_type(2)));
typedef __bf16 bf162 __attribute__((ext_vector_type(2)));

#ifdef vector_add_70
GLOBAL void vector_add(const float *a, const float *b, float *c, int n) {
  int i = BLOCK * THREADS + TID;
  if (i < n) c[i] = a[i] + b[i];
}
#endif

#ifdef block_sum_70
GLOBAL void block_sum(const float *x, float *out, int n) {
  SHARED float part[64];
  int t = TID;
  float sum = 0;
  for (int i = BLOCK * 64 + t; i < n; i += 64 * BLOCKS) sum += x[i];
  part[t] = sum;
  __syncthreads();
#pragma unroll 1
  for (int width = 32; width > 0; width >>= 1) {
    if (t < width) part[t] += part[t + width];
    __syncthreads();
  }
  if (t == 0) out[BLOCK] = part[0];
}
#endif

#ifdef warp_sum_70
GLOBAL void warp_sum(const float *x, float *out) {
  float sum = x[BLOCK * 32 + TID];
  for (int o = 16; o > 0; o >>= 1) sum += __nvvm_shfl_sync_bfly_f32(ALL, sum, o, 31);
  if (TID == 0) out[BLOCK] = sum;
}
#endif

#ifdef collatz_70
GLOBAL void collatz(const unsigned *x, unsigned *steps, unsigned *evens, int n) {
  int i = BLOCK * THREADS + TID;
  if (i >= n) return;
  unsigned v = x[i], count = 0, even = 0;
  while (v != 1) {
    if (v & 1) {
      v = 3 * v + 1;
      for (unsigned j = 0; j < (v & 3); ++j) even += j;
    } else {
      v >>= 1;
      ++even;
    }
    ++count;
  }
  steps[i] = count;
  evens[i] = even;
}
#endif

#ifdef softmax_70
GLOBAL void softmax(const float *x, float *y, int n) {
  const float *row = x + (long)BLOCK * n;
  float *out = y + (long)BLOCK * n;
  float most = -3.4e38f, sum = 0;
  for (int i = TID; i < n; i += 32) most = __nvvm_fmax_f(most, row[i]);
  for (int o = 16; o > 0; o >>= 1) most = __nvvm_fmax_f(most, __nvvm_shfl_sync_bfly_f32(ALL, most, o, 31));
  for (int i = TID; i < n; i += 32) {
    float e = __nvvm_ex2_approx_ftz_f((row[i] - most) * 1.44269504f);
    sum += e;
    out[i] = e;
  }
  for (int o = 16; o > 0; o >>= 1) sum += __nvvm_shfl_sync_bfly_f32(ALL, sum, o, 31);
  float scale = __nvvm_rcp_approx_ftz_f(sum);
  for (int i = TID; i < n; i += 32) out[i] *= scale;
}
#endif

#ifdef half_70
GLOBAL void half(const half2 *a, const half2 *b, const float *x, half2 *out, float *wide) {
  int t = TID;
  half2 p = a[t], q = b[t], r = p * q + (half2)(_Float16)0.5;
  out[t] = r;
  out[t + 32] = -(p - q);
  out[t + 64] = p > q ? p : q;
  half2 narrow;
  narrow.x = (_Float16)(x[2 * t] * 3);
  narrow.y = (_Float16)(x[2 * t + 1] * 3);
  out[t + 96] = narrow;
  wide[2 * t] = (float)r.x;
  wide[2 * t + 1] = (float)r.y;
}
#endif

#ifdef half_80
GLOBAL void half(const half2 *a, const half2 *b, const float *x, half2 *out) {
  int t = TID;
  half2 p = a[t], q = b[t], narrow;
  narrow.x = (_Float16)x[2 * t];
  narrow.y = (_Float16)x[2 * t + 1];
  out[t] = narrow;
  out[t + 32] = p + q;
  out[t + 64] = __builtin_elementwise_max(p, q);
}
#endif

#ifdef bfloat_80
GLOBAL void bfloat(const bf162 *a, const bf162 *b, const float *x, bf162 *out, float *wide) {
  int t = TID;
  bf162 narrow;
  narrow.x = (__bf16)x[2 * t];
  narrow.y = (__bf16)x[2 * t + 1];
  out[t] = narrow;
  out[t + 32] = __builtin_elementwise_fma(a[t], b[t], narrow);
  __bf16 product = a[t].x * b[t].y;
  wide[t] = (float)product + (float)a[t].y;
}
#endif

#ifdef stream_80
// Double-buffered tiles of 128 floats: one is copied while the other is summed.
extern __attribute__((shared)) __attribute__((aligned(16))) float buffers[];
#define COPY(to, from)                                                                     \
  __nvvm_cp_async_cg_shared_global_16((IN_SHARED void *)(to),      \
                                      (const __attribute__((address_space(1))) void *)(from))
GLOBAL void stream(const float *x, float *y, int tiles) {
  int t = TID;
  float sum = 0;
  COPY(buffers + 4 * t, x + 4 * t);
  __nvvm_cp_async_commit_group();
#pragma unroll 1
  for (int k = 0; k < tiles; ++k) {
    if (k + 1 < tiles) COPY(buffers + (k + 1 & 1) * 128 + 4 * t, x + (k + 1) * 128 + 4 * t);
    __nvvm_cp_async_commit_group();
    __nvvm_cp_async_wait_group(1);
    __syncthreads();
    const float *tile = buffers + (k & 1) * 128;
    for (int i = 0; i < 4; ++i) sum += tile[31 - t + 32 * i] * (i + 1);
    __syncthreads();
  }
  y[t] = sum;
}
#endif

#ifdef scalars_70
GLOBAL void floats(const float *x, const double *d, float *out) {
  int t = TID;
  float a = x[t], b = x[t + 32];
  float results[] = {
      __builtin_sqrtf(a), a / b, __nvvm_rsqrt_approx_f(a), __builtin_floorf(a), __builtin_fabsf(b),
      __builtin_roundevenf(a), __builtin_fmaf(a, b, a), __nvvm_lg2_approx_f(a), __nvvm_sin_approx_f(a),
      a < b ? 1.0f : 2.0f, __builtin_isunordered(a, b) ? 3.0f : 4.0f, (float)d[t], __builtin_copysignf(a, b),
      __builtin_ceilf(b), __builtin_truncf(b), __nvvm_fmin_ftz_f(a, b), __nvvm_add_rm_f(a, b),
      __nvvm_mul_rp_f(a, b), (float)(d[t] * d[t] + d[t + 32]), __nvvm_saturate_f(b)};
  for (int i = 0; i < 20; ++i) out[32 * i + t] = results[i];
}
GLOBAL void integers(const unsigned *x, const float *f, unsigned *out) {
  int t = TID;
  unsigned a = x[t], b = x[t + 32];
  unsigned results[] = {__builtin_bitreverse32(a), (unsigned)__builtin_clz(a | 1), __builtin_rotateleft32(a, b),
                        __builtin_bswap32(a), (a >> 5) & 31, (unsigned)__builtin_popcount(a),
                        (unsigned)(((unsigned long)a * b) >> 32), a > b ? a : b,
                        (unsigned)((int)a < (int)b ? (int)a : (int)b), (unsigned)f[t], (unsigned)(int)f[t], a & ~b,
                        (unsigned)__builtin_ctz(a | 1 << 20), a % b, a / b, (unsigned)((int)a / (int)b),
                        (unsigned)((int)a % (int)b), (unsigned)__builtin_abs((int)a),
                        (unsigned)(short)a * (short)b, (unsigned)(signed char)a, (unsigned)((int)a >> (b & 31)),
                        (unsigned)((a & 0xFF) << 8 | (b & 0xFFFF00FF)), a - b, a * b + a, a % 7,
                        (unsigned)((int)a / 10)};
  for (int i = 0; i < 26; ++i) out[32 * i + t] = results[i];
}
GLOBAL void longs(const long *x, long *out) {
  int t = TID;
  long a = x[t], b = x[t + 32];
  long results[] = {a / b, a % b, a * b, a << (b & 63), a >> (b & 63), (long)((unsigned long)a >> (b & 63)),
                    __builtin_popcountl(a), __builtin_clzl(a | 1), a < b, (long)(int)a,
                    (long)(((__int128)a * b) >> 64), (long)(double)a, (long)(float)b, (long)(unsigned)a * (unsigned)b,
                    a < 0 ? -a : a, (long)((unsigned long)a / (unsigned long)b)};
  for (int i = 0; i < 16; ++i) out[32 * i + t] = results[i];
}
#endif

#ifdef control_70
__attribute__((noinline)) DEVICE float power(float x, int n) {
  float product = 1;
#pragma unroll 1
  for (int i = 0; i < n; i++) product *= x;
  return product;
}
// Calls in diverged lanes, and an array in local memory.
GLOBAL void powers(const float *x, float *y) {
  float all[4];
  for (int i = 0; i < 4; ++i) all[i] = power(x[TID], i);
  float picked = all[TID & 3];
  if (TID & 4) picked += power(picked, TID & 3);
  y[TID] = picked;
}
__attribute__((constant)) float table[5] = {1.5f, -2, 3.25f, 0, 1e-3f};
__attribute__((constant)) unsigned char small[4] = {1, 2, 3, 250};
DEVICE unsigned counter = 7;
GLOBAL void variables(float *y, unsigned *before) {
  y[TID] = table[TID % 5] * small[TID & 3];
  if (TID == 0) {
    *before = counter;
    counter += 5;
  }
}
GLOBAL void choose(const int *x, const int *z, int *y) {
  int value = x[TID], result;
  switch (value) {
  case 0: result = value * 3 + z[0]; break;
  case 1: result = z[1] / 7; break;
  case 2: result = z[2] % 5; break;
  case 3: result = z[3] << 4; break;
  case 4: result = z[4] ^ 77; break;
  case 5: result = z[5] - 1; break;
  default: result = -1;
  }
  y[TID] = result;
}
#endif

#ifdef cooperation_70
GLOBAL void votes(const int *x, unsigned *y) {
  int t = TID, v = x[t];
  y[t] = __nvvm_vote_ballot_sync(ALL, v > 3);
  y[32 + t] = __nvvm_vote_all_sync(ALL, v > -1);
  y[64 + t] = __nvvm_vote_any_sync(ALL, v > 100);
  y[96 + t] = 0;
  if (v > 3) y[96 + t] = __nvvm_activemask();
  __nvvm_bar_warp_sync(ALL);
  y[128 + t] = __nvvm_shfl_sync_down_i32(ALL, v, 3, 31);
  y[160 + t] = __nvvm_shfl_sync_up_i32(ALL, v, 3, 0);
  y[192 + t] = __nvvm_shfl_sync_idx_i32(ALL, v, 5, 31);
  y[224 + t] = __nvvm_shfl_sync_down_i32(ALL, v, 3, 0x181f);
}
GLOBAL void counts(int *a, unsigned long long *wide, int *seen) {
  SHARED int sum;
  if (TID == 0) sum = 0;
  __syncthreads();
  __nvvm_atom_add_gen_i(a, 1);
  __nvvm_atom_max_gen_i(a + 1, TID);
  __nvvm_atom_cas_gen_i(a + 2, 0, 5);
  __nvvm_atom_inc_gen_ui((unsigned *)a + 3, 10);
  __nvvm_atom_xor_gen_i(a + 4, 1 << (TID & 31));
  __atomic_fetch_add(wide, 1ull << 33, __ATOMIC_RELAXED);
  int before = __nvvm_atom_add_gen_i(&sum, 2);
  __syncthreads();
  seen[TID] = sum;
  seen[64 + TID] = before;
}
GLOBAL void float_sum(float *a) { __nvvm_atom_add_gen_f(a, 1.0f); }
#endif

#ifdef vectors_70
GLOBAL void vectors(const float4 *x, float4 *y, const float *__restrict__ z) {
  float4 a = x[TID];
  y[TID] = a * z[TID] + a.wzyx;
}
#endif

#ifdef fragments_70
// Products in all three shapes, with mixed row-major and column-major layouts, from global memory.
GLOBAL void wide(const int *a, const int *b, const float *c, float *d) {
  int fa[8], fb[8];
  float fc[8], fd[8];
  __hmma_m32n8k16_ld_a(fa, a, 16, 0);
  __hmma_m32n8k16_ld_b(fb, b, 16, 1);
  __hmma_m32n8k16_ld_c_f32(fc, c, 8, 0);
  __hmma_m32n8k16_mma_f32f32(fd, fa, fb, fc, 1, 0);
  for (int i = 0; i < 8; ++i) fd[i] *= 0.5f;
  __hmma_m32n8k16_st_c_f32(d, fd, 8, 0);
}
GLOBAL void tall(const int *a, const int *b, float *d) {
  int fa[8], fb[8];
  float fc[8] = {}, fd[8];
  __hmma_m8n32k16_ld_a(fa, a, 16, 1);
  __hmma_m8n32k16_ld_b(fb, b, 32, 0);
  __hmma_m8n32k16_mma_f32f32(fd, fa, fb, fc, 2, 0);
  __hmma_m8n32k16_st_c_f32(d, fd, 8, 1);
}
GLOBAL void narrow(const int *a, const int *b, const int *c, int *d) {
  int fa[8], fb[8], fc[4], fd[4];
  __hmma_m16n16k16_ld_a(fa, a, 16, 0);
  __hmma_m16n16k16_ld_b(fb, b, 16, 0);
  __hmma_m16n16k16_ld_c_f16(fc, c, 16, 0);
  __hmma_m16n16k16_mma_f16f16(fd, fa, fb, fc, 0, 0);
  __hmma_m16n16k16_st_c_f16(d, fd, 16, 0);
}
// Assumes that register i of lane l holds element i + 8 l.
GLOBAL void knows_layout(const float *c, float *d) {
  float fc[8];
  __hmma_m16n16k16_ld_c_f32(fc, c, 16, 0);
  for (int i = 0; i < 8; ++i) d[8 * TID + i] = fc[i];
}
#endif

#ifdef fragments_80
GLOBAL void brain(const int *a, const int *b, float *d) {
  int fa[4], fb[4];
  float fc[8] = {}, fd[8];
  __mma_bf16_m16n16k16_ld_a(fa, a, 16, 0);
  __mma_bf16_m16n16k16_ld_b(fb, b, 16, 1);
  __mma_bf16_m16n16k16_mma_f32(fd, fa, fb, fc, 1, 0);
  __hmma_m16n16k16_st_c_f32(d, fd, 16, 0);
}
// The documented layouts: ldmatrix into mma, with results per lane.
GLOBAL void documented(const unsigned *a, const unsigned *b, float *d) {
  SHARED __attribute__((aligned(16))) unsigned tile_a[16 * 8], tile_b[16 * 4];
  for (int i = TID; i < 16 * 8; i += 32) tile_a[i] = a[i];
  for (int i = TID; i < 16 * 4; i += 32) tile_b[i] = b[i];
  __syncthreads();
  unsigned fa[4], fb[2];
  float fd[4];
  unsigned at_a = (unsigned)(unsigned long)(IN_SHARED unsigned *)(tile_a + (LANE & 15) * 8 + (LANE >> 4) * 4);
  unsigned at_b = (unsigned)(unsigned long)(IN_SHARED unsigned *)(tile_b + (LANE & 15) * 4);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(at_a));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(fb[0]), "=r"(fb[1]) : "r"(at_b));
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
               : "=f"(fd[0]), "=f"(fd[1]), "=f"(fd[2]), "=f"(fd[3])
               : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]), "f"(0.0f));
  for (int i = 0; i < 4; ++i) d[(LANE / 4 + 8 * (i / 2)) * 8 + LANE % 4 * 2 + i % 2] = fd[i];
}
#endif
