// Every CPU kernel of linear attention, every instruction set of this machine, against plain double loops.
//
// No torch, no Python: meant to be compiled with -fsanitize=address,undefined (buffers are heap blocks of the exact
// size) or -fsanitize=thread, and with -DLINATTN_POISON (workspace starts as NaN). tests/test_cpu_kernels.py builds and
// runs it.
//
// Tolerance: |error| <= units * magnitude, where magnitude is the same formula with every term replaced by its absolute
// value (so cancellation is accounted for) and units bounds the roundings on the way: float32 one per addition in the
// longest chain; float16 the same plus the rounding of the result; bfloat16 also the rounding of each operand.
#include "check.h"
#include "linear_attention.h"

namespace {

// ------------------------------------------------------------------------------------------------------- reference

double phi(int map, double x) {
  if (map == 0) return x;
  if (map == 1) return x > 0 ? x : 0;
  return x > 0 ? x + 1 : std::exp(x);
}
double phi_grad(int map, double x) {
  if (map == 0) return 1;
  if (map == 1) return x > 0 ? 1 : 0;
  return x > 0 ? 1 : std::exp(x);
}

struct Case {
  int64_t B, H, N, M;
  int D, E;
  int map;
  bool denom, normalize;
  Layout layout = kHeadsFirst;
};

double units(DType t, const Case& c) {
  double additions = 64 + static_cast<double>(std::max(c.N, c.M)) / 64 + 64 + std::max(c.D, c.E);
  double f32 = (additions + 16) * std::ldexp(1, -24);
  if (t == DType::kFloat32) return f32;
  if (t == DType::kFloat16) return f32 + 8e-6 + std::ldexp(1, -11);
  return f32 + 3e-4 + 6 * std::ldexp(1, -9);
}

void compare(const char* name, const Case& c, const Tensor& got, const Values& want) {
  const double u = units(got.type, c);
  size_t i = 0;
  got.each([&](int64_t b, int64_t h, int64_t n, int d) {
    compare(name, got.type, u, got.get(b, h, n, d), want[i++], true, [&] {
      return "[" + std::to_string(b) + "," + std::to_string(h) + "," + std::to_string(n) + "," + std::to_string(d) +
             "]";
    });
  });
  if (!got.gaps_untouched()) fail(std::string(name) + ": wrote between its rows");
}
void compare(const char* name, DType t, const Case& c, const Floats& got, const Values& want) {
  const double u = units(t, c);
  for (int64_t i = 0; i < got.size; ++i)
    compare(name, t, u, got.data[i], want[static_cast<size_t>(i)], false,
            [&] { return "[" + std::to_string(i) + "]"; });
}

// --------------------------------------------------------------------------------------------------------- a case

struct Problem {
  Case c;
  DType t;
  Tensor q, k, v, qd, kd, g;
  float scale, inv_count, eps = 1e-4f;
  Problem(const Case& cc, DType tt, unsigned seed) : c(cc), t(tt) {
    std::mt19937 random(seed);
    bool positive = c.map == 0 && c.normalize;  // so that z stays away from zero
    auto make = [&](int64_t n, int d, bool pos) {
      Tensor x(t, c.B, c.H, n, d, c.layout);
      x.fill(random, pos);
      return x;
    };
    q = make(c.N, c.D, positive), k = make(c.M, c.D, positive), v = make(c.M, c.E, false), g = make(c.N, c.E, false);
    if (c.denom) qd = make(c.N, c.D, true), kd = make(c.M, c.D, true);
    scale = 1.5f / static_cast<float>(c.M), inv_count = 1.0f / static_cast<float>(c.M);
  }
  LinearAttentionArgs args() const {
    LinearAttentionArgs a;
    a.dtype = t, a.B = c.B, a.H = c.H, a.N = c.N, a.M = c.M, a.D = c.D, a.E = c.E;
    a.feature_map = c.map, a.normalize = c.normalize, a.scale = scale, a.inv_count = inv_count, a.eps = eps;
    a.q = q.view, a.k = k.view, a.v = v.view, a.grad_out = g.view;
    if (c.denom) a.q_denom = qd.view, a.k_denom = kd.view;
    return a;
  }
  Tensor output(int64_t n, int d) const {
    return Tensor(t, c.B, c.H, n, d, c.layout == kExpanded ? kTokensFirst : c.layout);
  }
};

void run(bool (*kernel)(const LinearAttentionArgs&, const Parallel&), const LinearAttentionArgs& a, const Parallel& p) {
  if (!kernel(a, p)) fail("out of memory");
}

void check(const Case& c, DType t, const Parallel& parallel) {
  const LinearAttentionKernels& kernels = linear_attention_kernels();
  Problem p(c, t, 7);
  const int64_t heads = c.B * c.H;
  const int D = c.D, E = c.E;
  const Tensor &zq = c.denom ? p.qd : p.q, &zk = c.denom ? p.kd : p.k;

  // Reference: state, output, gradients of sum(out * g) and of the state.
  Values kv(heads * D * E), ks(heads * D), out(heads * c.N * E);
  Values gq(heads * c.N * D), gqd(heads * c.N * D), gkv(heads * D * E), gks(heads * D);
  Values gk(heads * c.M * D), gkd(heads * c.M * D), gv(heads * c.M * E);
  Floats g_state(heads * D * E), g_sum(heads * D);  // what state_backward is given
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < g_state.size; ++i) g_state.data[i] = normal(random);
  for (int64_t i = 0; i < g_sum.size; ++i) g_sum.data[i] = normal(random);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.H; ++h) {
      int64_t x = b * c.H + h;
      const std::vector<double> Q = p.q.head(b, h), K = p.k.head(b, h), V = p.v.head(b, h), G = p.g.head(b, h);
      const std::vector<double> ZQ = zq.head(b, h), ZK = zk.head(b, h);
      Value *KV = &kv[x * D * E], *KS = &ks[x * D], *GKV = &gkv[x * D * E], *GKS = &gks[x * D];
      for (int64_t j = 0; j < c.M; ++j)
        for (int d = 0; d < D; ++d) {
          double f = phi(c.map, K[j * D + d]);
          KS[d].add(phi(c.map, ZK[j * D + d]));
          for (int e = 0; e < E; ++e) KV[d * E + e].add(f * V[j * E + e]);
        }
      for (int64_t i = 0; i < c.N; ++i) {
        Value z;
        z.add(p.eps);
        for (int d = 0; d < D; ++d) {
          double f = phi(c.map, ZQ[i * D + d]) * p.inv_count;
          z.add(f * KS[d].x, std::fabs(f) * KS[d].size);
        }
        double r = c.normalize ? 1 / z.x : 1, rz = c.normalize ? z.size / std::fabs(z.x) : 1;  // rz: condition of z
        std::vector<Value> w(D);
        Value dot;
        for (int d = 0; d < D; ++d) {
          double f = phi(c.map, Q[i * D + d]);
          for (int e = 0; e < E; ++e) {
            double term = p.scale * G[i * E + e], value = KV[d * E + e].x;
            w[d].add(term * value, std::fabs(term) * KV[d * E + e].size);
            double o = f * r * p.scale;
            Value& y = out[(x * c.N + i) * E + e];
            y.add(o * value, std::fabs(o) * KV[d * E + e].size * (1 + rz));
            GKV[d * E + e].add(f * r * term, std::fabs(f * r * term) * (1 + rz));
          }
          dot.add(f * w[d].x, std::fabs(f) * w[d].size);
        }
        double dz = c.normalize ? -dot.x * r * r : 0, dz_size = c.normalize ? dot.size * r * r * (1 + 2 * rz) : 0;
        for (int d = 0; d < D; ++d) {
          double m = KS[d].x * p.inv_count, m_size = KS[d].size * p.inv_count, fz = phi(c.map, ZQ[i * D + d]);
          double dq = phi_grad(c.map, Q[i * D + d]);
          Value &a = gq[(x * c.N + i) * D + d], &ad = gqd[(x * c.N + i) * D + d];
          a.add(w[d].x * r * dq, w[d].size * std::fabs(r) * (1 + rz) * dq);
          if (c.denom) {
            double dd = phi_grad(c.map, ZQ[i * D + d]);
            ad.add(dz * m * dd, dz_size * m_size * dd);
          } else {
            a.add(dz * m * dq, dz_size * m_size * dq);
          }
          GKS[d].add(p.inv_count * dz * fz, p.inv_count * dz_size * std::fabs(fz));
        }
      }
      for (int64_t j = 0; j < c.M; ++j)
        for (int d = 0; d < D; ++d) {
          double f = phi(c.map, K[j * D + d]), df = phi_grad(c.map, K[j * D + d]);
          double sum = g_sum.data[x * D + d];
          Value& a = gk[(x * c.M + j) * D + d];
          for (int e = 0; e < E; ++e) {
            double s = g_state.data[(x * D + d) * E + e];
            gv[(x * c.M + j) * E + e].add(f * s);
            a.add(s * V[j * E + e] * df);
          }
          if (c.denom)
            gkd[(x * c.M + j) * D + d].add(sum * phi_grad(c.map, ZK[j * D + d]));
          else
            a.add(sum * df);
        }
    }

  // Kernels. apply and its backward read the state that the kernel made.
  LinearAttentionArgs a = p.args();
  Floats got_kv(heads * D * E), got_ks(heads * D), got_gkv(heads * D * E), got_gks(heads * D);
  {
    Tensor got = p.output(c.N, E);  // without the state: the other order of products where keys are few
    a.out = got.view;
    run(kernels.forward, a, parallel);
    compare("out", c, got, out);
  }
  a.kv = got_kv.data, a.k_sum = got_ks.data;
  Tensor first = p.output(c.N, E);
  a.out = first.view;
  run(kernels.forward, a, parallel);
  compare("out (with state)", c, first, out);
  compare("kv", t, c, got_kv, kv);
  compare("k_sum", t, c, got_ks, ks);
  {
    Floats again_kv(heads * D * E), again_ks(heads * D);
    a.kv = again_kv.data, a.k_sum = again_ks.data;
    run(kernels.state, a, parallel);
    if (memcmp(again_kv.data, got_kv.data, static_cast<size_t>(again_kv.size) * 4) ||
        memcmp(again_ks.data, got_ks.data, static_cast<size_t>(again_ks.size) * 4))
      fail("state differs from forward's");
    Tensor again = p.output(c.N, E);
    a.out = again.view;
    run(kernels.apply, a, parallel);
    if (memcmp(again.block, first.block, static_cast<size_t>(again.elements * size_of(t))))
      fail("apply differs from forward");
  }
  a.kv = got_kv.data, a.k_sum = got_ks.data;
  a.grad_kv = got_gkv.data, a.grad_k_sum = got_gks.data;
  Tensor got_gq = p.output(c.N, D), got_gqd = p.output(c.N, D);
  a.grad_q = got_gq.view;
  if (c.denom) a.grad_q_denom = got_gqd.view;
  run(kernels.apply_backward, a, parallel);
  compare("grad_q", c, got_gq, gq);
  if (c.denom) compare("grad_q_denom", c, got_gqd, gqd);
  compare("grad_kv", t, c, got_gkv, gkv);
  compare("grad_k_sum", t, c, got_gks, gks);
  a.grad_kv = g_state.data, a.grad_k_sum = g_sum.data;
  Tensor got_gk = p.output(c.M, D), got_gkd = p.output(c.M, D), got_gv = p.output(c.M, E);
  a.grad_k = got_gk.view, a.grad_v = got_gv.view;
  if (c.denom) a.grad_k_denom = got_gkd.view;
  run(kernels.state_backward, a, parallel);
  compare("grad_k", c, got_gk, gk);
  compare("grad_v", c, got_gv, gv);
  if (c.denom) compare("grad_k_denom", c, got_gkd, gkd);
}

// ------------------------------------------------------------------------------------------------------ properties

// Everything the five kernels write for one problem, as bytes.
std::vector<char> all_results(const Problem& p, const LinearAttentionArgs& base, const Parallel& parallel) {
  const LinearAttentionKernels& kernels = linear_attention_kernels();
  const Case& c = p.c;
  LinearAttentionArgs a = base;
  int64_t heads = a.B * a.H;
  std::vector<char> bytes;
  auto keep = [&](const void* x, int64_t n) {
    bytes.insert(bytes.end(), static_cast<const char*>(x), static_cast<const char*>(x) + n);
  };
  auto output = [&](int64_t n, int d) { return Tensor(p.t, a.B, a.H, n, d, kHeadsFirst); };
  auto keep_tensor = [&](const Tensor& x) { keep(x.block, x.elements * size_of(x.type)); };
  Tensor out = output(c.N, c.E), alone = output(c.N, c.E);
  Floats kv(heads * c.D * c.E), ks(heads * c.D), gkv(heads * c.D * c.E), gks(heads * c.D);
  a.out = alone.view;
  run(kernels.forward, a, parallel);
  a.kv = kv.data, a.k_sum = ks.data, a.out = out.view;
  run(kernels.forward, a, parallel);
  Tensor gq = output(c.N, c.D), gk = output(c.M, c.D), gv = output(c.M, c.E);
  a.grad_q = gq.view, a.grad_k = gk.view, a.grad_v = gv.view, a.grad_kv = gkv.data, a.grad_k_sum = gks.data;
  run(kernels.apply_backward, a, parallel);
  run(kernels.state_backward, a, parallel);
  keep_tensor(alone), keep_tensor(out), keep_tensor(gq), keep_tensor(gk), keep_tensor(gv);
  keep(kv.data, kv.size * 4), keep(ks.data, ks.size * 4), keep(gkv.data, gkv.size * 4), keep(gks.data, gks.size * 4);
  return bytes;
}

void check_same_bits(DType t) {
  // Lengths around one and several segments, heads adjacent so that groups form.
  for (const Case& c : {Case{3, 2, 1500, 1700, 40, 40, 2, false, true, kTokensFirst},
                        Case{2, 3, 70, 50, 72, 64, 2, false, true, kHeadsFirst}}) {
    Problem p(c, t, 3);
    LinearAttentionArgs a = p.args();
    std::vector<char> one = all_results(p, a, serial());
    for (int threads : {2, 3, 7})
      if (all_results(p, a, threaded(threads)) != one) fail("results depend on the number of threads");
    // The first sample alone: its results are the first B-th of every output.
    LinearAttentionArgs single = a;
    single.B = 1;
    std::vector<char> alone = all_results(p, single, serial());
    size_t whole = 0, part = 0;
    int64_t s = size_of(t);
    for (int64_t per_sample : {s * c.N * c.E, s * c.N * c.E, s * c.N * c.D, s * c.M * c.D, s * c.M * c.E,
                               int64_t(4) * c.D * c.E, int64_t(4) * c.D, int64_t(4) * c.D * c.E, int64_t(4) * c.D}) {
      size_t n = static_cast<size_t>(per_sample * c.H);
      if (memcmp(&one[whole], &alone[part], n)) fail("a sample in a batch differs from the sample alone");
      whole += n * static_cast<size_t>(c.B), part += n;
    }
  }
}

void check_nan(DType t) {
  for (int64_t m : {40, 700}) {  // both orders of the products
    Case c{1, 2, 66, m, 48, 40, 2, false, true, kTokensFirst};
    Problem p(c, t, 5);
    LinearAttentionArgs a = p.args();
    auto forward = [&] {
      Tensor out = p.output(c.N, c.E);
      a.out = out.view;
      run(linear_attention_kernels().forward, a, serial());
      return out;
    };
    Tensor clean = forward();
    auto poisoned = [&](const Tensor& x, int64_t n, int d) {
      char saved[4];
      memcpy(saved, x.at(0, 1, n, d), static_cast<size_t>(size_of(t)));
      encode(t, NAN, x.at(0, 1, n, d));
      Tensor out = forward();
      memcpy(x.at(0, 1, n, d), saved, static_cast<size_t>(size_of(t)));
      return out;
    };
    Tensor out = poisoned(p.q, 65, 47);
    out.each([&](int64_t b, int64_t h, int64_t n, int d) {
      bool row = h == 1 && n == 65;
      if (row ? !std::isnan(out.get(b, h, n, d)) : out.get(b, h, n, d) != clean.get(b, h, n, d))
        fail("NaN in q: wrong at head " + std::to_string(h) + " row " + std::to_string(n));
    });
    out = poisoned(p.k, m - 1, 47);
    out.each([&](int64_t b, int64_t h, int64_t n, int d) {
      if (h == 1 ? !std::isnan(out.get(b, h, n, d)) : out.get(b, h, n, d) != clean.get(b, h, n, d))
        fail("NaN in k: wrong at head " + std::to_string(h));
    });
    out = poisoned(p.v, m - 1, 39);
    for (int64_t n = 0; n < c.N; ++n)
      if (!std::isnan(out.get(0, 1, n, 39)) || std::isnan(out.get(0, 0, n, 39))) fail("NaN in v: wrong reach");
  }
}

// q, k and v as slices of one (B, N, 3, H, D) buffer.
void check_fused_buffer(DType t) {
  const int64_t B = 2, H = 3, N = 131;
  const int D = 40;
  Tensor buffer(t, B, N * 3, H, D, kHeadsFirst);  // (B, N, 3, H, D) in memory, ends with v's last element
  std::mt19937 random(9);
  buffer.fill(random, false);
  LinearAttentionArgs a;
  a.dtype = t, a.B = B, a.H = H, a.N = a.M = N, a.D = a.E = D, a.feature_map = 2, a.eps = 1e-4f;
  a.scale = a.inv_count = 1.0f / static_cast<float>(N);
  auto slice = [&](int i) {
    return View{static_cast<char*>(buffer.view.data) + i * H * D * size_of(t), N * 3 * H * D, D, 3 * H * D};
  };
  a.q = slice(0), a.k = slice(1), a.v = slice(2);
  Tensor out(t, B, H, N, D, kTokensFirst), other(t, B, H, N, D, kTokensFirst);
  a.out = out.view;
  run(linear_attention_kernels().forward, a, threaded(2));
  Tensor parts[3];
  for (int i = 0; i < 3; ++i) {
    parts[i] = Tensor(t, B, H, N, D, kHeadsFirst);
    parts[i].each([&](int64_t b, int64_t h, int64_t n, int d) {
      View s = slice(i);
      memcpy(parts[i].at(b, h, n, d),
             static_cast<char*>(s.data) + (b * s.stride_b + h * s.stride_h + n * s.stride_n + d) * size_of(t),
             static_cast<size_t>(size_of(t)));
    });
  }
  a.q = parts[0].view, a.k = parts[1].view, a.v = parts[2].view, a.out = other.view;
  run(linear_attention_kernels().forward, a, serial());
  if (memcmp(out.block, other.block, static_cast<size_t>(out.elements * size_of(t))))
    fail("fused buffer differs from its parts");
}

// Rows more than 2^31 elements apart, in memory that is only reserved.
void check_far_rows(DType t) {
#if defined(__SANITIZE_THREAD__) || !defined(MAP_NORESERVE)
  (void)t;
#else
  const int64_t N = 3, stride = (int64_t(1) << 31) + 64;
  const int D = 24;
  size_t bytes = static_cast<size_t>(((N - 1) * stride + 4 * D) * size_of(t));
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;
  auto far = [&](int i) { return View{static_cast<char*>(memory) + i * D * size_of(t), 0, 0, stride}; };
  Tensor near[3], out(t, 1, 1, N, D, kHeadsFirst);
  std::mt19937 random(13);
  LinearAttentionArgs a;
  a.dtype = t, a.B = a.H = 1, a.N = a.M = N, a.D = a.E = D, a.feature_map = 2, a.eps = 1e-4f,
  a.scale = a.inv_count = 1 / 3.0f;
  for (int i = 0; i < 3; ++i) {
    near[i] = Tensor(t, 1, 1, N, D, kHeadsFirst);
    near[i].fill(random, false);
    for (int64_t n = 0; n < N; ++n)
      memcpy(static_cast<char*>(far(i).data) + n * stride * size_of(t), near[i].at(0, 0, n, 0),
             static_cast<size_t>(D * size_of(t)));
  }
  Floats kv(D * D), ks(D);
  a.kv = kv.data, a.k_sum = ks.data;
  a.q = near[0].view, a.k = near[1].view, a.v = near[2].view, a.out = out.view;
  run(linear_attention_kernels().forward, a, serial());
  a.q = far(0), a.k = far(1), a.v = far(2), a.out = far(3);
  run(linear_attention_kernels().forward, a, serial());
  for (int64_t n = 0; n < N; ++n)
    if (memcmp(static_cast<char*>(far(3).data) + n * stride * size_of(t), out.at(0, 0, n, 0),
               static_cast<size_t>(D * size_of(t))))
      fail("rows 2^31 elements apart differ from adjacent rows");
  munmap(memory, bytes);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  const Case cases[] = {
      // B  H  N    M    D    E   map denom  norm  layout
      {1, 1, 1, 1, 8, 8, 2, false, true, kHeadsFirst},       {2, 3, 65, 130, 40, 40, 2, false, true, kTokensFirst},
      {1, 8, 129, 64, 40, 40, 2, false, true, kTokensFirst}, {1, 2, 3, 1301, 16, 24, 2, true, true, kGaps},
      {2, 2, 64, 64, 80, 80, 2, false, false, kHeadsFirst},  {1, 2, 33, 7, 160, 160, 2, false, true, kGaps},
      {1, 2, 70, 99, 37, 51, 2, true, true, kGaps},          {1, 1, 67, 63, 255, 256, 1, false, false, kGaps},
      {1, 2, 66, 65, 9, 33, 0, true, true, kTokensFirst},    {2, 2, 31, 200, 64, 8, 0, false, true, kExpanded},
      {1, 2, 21, 13, 27, 40, 2, false, true, kGaps},  // few keys, odd head dim: phi(0) = 1 must not pair up
      {1, 2, 0, 10, 16, 16, 2, true, true, kHeadsFirst},     {2, 0, 5, 5, 16, 16, 2, false, true, kHeadsFirst},
      {1, 2, 4, 3, 11, 13, 1, true, false, kGaps},           {1, 3, 1100, 600, 24, 16, 2, false, true, kTokensFirst},
  };
  return for_each_level(argc, argv, [&](const std::string& prefix, DType t) {
    int i = 0;
    for (const Case& c : cases) {
      char text[160];
      snprintf(text, sizeof(text), " B%d H%d N%d M%d D%d E%d map%d%s%s %s", int(c.B), int(c.H), int(c.N), int(c.M), c.D,
               c.E, c.map, c.denom ? " denom" : "", c.normalize ? " norm" : "", kLayoutNames[c.layout]);
      context = prefix + text;
      check(c, t, i++ % 2 ? serial() : threaded(3));
    }
    context = prefix;
    check_same_bits(t), check_nan(t), check_fused_buffer(t), check_far_rows(t);
  });
}
