// Every CPU kernel of window attention, every instruction set of this machine, against plain double loops.
//
// Compiled and run as check_linear_attention.cpp is. Tolerance: |error| <= units * magnitude, where magnitude is the
// same formula with every term replaced by its absolute value, times the condition of exp: 1 + the largest sum of
// absolute terms of a score.
#include "check.h"
#include "window_attention.h"

namespace {

struct Case {
  int64_t B, H, height, width, radius, text;
  bool text_first;
  int64_t q_row, q_rows, q_text, pooled;
  int D;
  Layout layout = kHeadsFirst;
  int64_t queries() const { return q_text + q_rows * width; }
  int64_t keys() const { return text + height * width; }
};

// Does query i see key j (pooled keys follow the others)?
bool sees(const Case& c, int64_t i, int64_t j) {
  int64_t q_image = c.text_first ? c.q_text : 0, k_image = c.text_first ? c.text : 0;
  int64_t qi = i - q_image, kj = j - k_image, image = c.height * c.width;
  bool text_query = qi < 0 || qi >= c.q_rows * c.width, pooled = j >= c.keys();
  if (text_query) return !pooled;
  if (pooled || kj < 0 || kj >= image) return true;
  int64_t dy = c.q_row + qi / c.width - kj / c.width, dx = qi % c.width - kj % c.width;
  return dy * dy + dx * dx < c.radius * c.radius;
}

// f(key) for every key that query i sees; of the grid only the rows around the disk is tried.
template <class F>
void for_each_seen(const Case& c, int64_t i, const F& f) {
  int64_t k_image = c.text_first ? c.text : 0, qi = i - (c.text_first ? c.q_text : 0);
  int64_t first = 0, end = c.height;
  if (qi >= 0 && qi < c.q_rows * c.width) {
    int64_t y = c.q_row + qi / c.width, r = std::min(c.radius, c.height);
    first = std::max<int64_t>(0, y - r), end = std::min(c.height, y + r + 1);
  }
  auto part = [&](int64_t begin, int64_t stop) {
    for (int64_t j = begin; j < stop; ++j)
      if (sees(c, i, j)) f(j);
  };
  part(0, k_image), part(k_image + first * c.width, k_image + end * c.width);
  part(k_image + c.height * c.width, c.keys() + c.pooled);
}

double units(DType t, const Case& c) {
  double f32 = (static_cast<double>(c.D) + 200) * std::ldexp(1, -24);
  if (t == DType::kFloat32) return f32;
  if (t == DType::kFloat16) return f32 + 8e-6 + std::ldexp(1, -11);
  return f32 + 3e-4 + 4 * std::ldexp(1, -9);
}

struct Problem {
  Case c;
  DType t;
  Tensor q, k, v, pk, pv, g;
  Floats g_lse;
  float scale;
  Problem(const Case& cc, DType tt, unsigned seed) : c(cc), t(tt), g_lse(cc.B * cc.H * cc.queries()) {
    std::mt19937 random(seed);
    auto make = [&](int64_t n) {
      Tensor x(t, c.B, c.H, n, c.D, c.layout);
      x.fill(random, false);
      return x;
    };
    q = make(c.queries()), k = make(c.keys()), v = make(c.keys()), g = make(c.queries());
    pk = make(c.pooled), pv = make(c.pooled);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < g_lse.size; ++i) g_lse.data[i] = normal(random);
    scale = 1.0f / std::sqrt(static_cast<float>(c.D));
  }
  WindowAttentionArgs args() const {
    WindowAttentionArgs a;
    a.dtype = t, a.B = c.B, a.H = c.H, a.D = c.D, a.height = c.height, a.width = c.width, a.radius = c.radius;
    a.text_length = c.text, a.text_first = c.text_first, a.pooled = c.pooled;
    a.q_text_length = c.q_text, a.q_row = c.q_row, a.q_rows = c.q_rows, a.scale = scale;
    a.q = q.view, a.k = k.view, a.v = v.view, a.pooled_k = pk.view, a.pooled_v = pv.view, a.grad_out = g.view;
    a.grad_lse = g_lse.data;
    a.grad_lse_stride[0] = c.H * c.queries(), a.grad_lse_stride[1] = c.queries(), a.grad_lse_stride[2] = 1;
    return a;
  }
  Tensor output(int64_t n) const {
    return Tensor(t, c.B, c.H, n, c.D, c.layout == kExpanded ? kTokensFirst : c.layout);
  }
};

template <class Args>
void run(bool (*kernel)(const Args&, const Parallel&), const Args& a, const Parallel& p) {
  if (!kernel(a, p)) fail("out of memory");
}

// Everything that the two kernels write.
struct Results {
  Tensor out, gq, gk, gv, gpk, gpv;
  Floats lse;
  Results(const Problem& p, WindowAttentionArgs a, const Parallel& parallel)
      : out(p.output(p.c.queries())),
        gq(p.output(p.c.queries())),
        gk(p.output(p.c.keys())),
        gv(p.output(p.c.keys())),
        gpk(p.output(p.c.pooled)),
        gpv(p.output(p.c.pooled)),
        lse(p.c.B * p.c.H * p.c.queries()) {
    a.out = out.view, a.lse = lse.data;
    a.grad_q = gq.view, a.grad_k = gk.view, a.grad_v = gv.view, a.grad_pooled_k = gpk.view, a.grad_pooled_v = gpv.view;
    run(window_attention_kernels().forward, a, parallel);
    run(window_attention_kernels().backward, a, parallel);
  }
  template <class F>
  void each(const F& f) const {
    f("out", out), f("grad_q", gq), f("grad_k", gk), f("grad_v", gv), f("grad_pooled_k", gpk), f("grad_pooled_v", gpv);
  }
};

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

void check(const Case& c, DType t, const Parallel& parallel) {
  Problem p(c, t, 7);
  Results got(p, p.args(), parallel);
  const int64_t heads = c.B * c.H, nq = c.queries(), nk = c.keys();
  const int D = c.D;
  Values out(heads * nq * D), lse(heads * nq), gq(heads * nq * D), gk(heads * nk * D), gv(heads * nk * D);
  Values gpk(heads * c.pooled * D), gpv(heads * c.pooled * D);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.H; ++h) {
      int64_t x = b * c.H + h;
      std::vector<double> Q = p.q.head(b, h), K = p.k.head(b, h), V = p.v.head(b, h), G = p.g.head(b, h);
      std::vector<double> PK = p.pk.head(b, h), PV = p.pv.head(b, h), O = got.out.head(b, h);
      K.insert(K.end(), PK.begin(), PK.end()), V.insert(V.end(), PV.begin(), PV.end());
      for (int64_t i = 0; i < nq; ++i) {
        std::vector<int64_t> seen;
        std::vector<double> s;
        double most = -INFINITY, condition = 0, sum = 0;
        for_each_seen(c, i, [&](int64_t j) {
          Value score;
          for (int d = 0; d < D; ++d) score.add(p.scale * Q[i * D + d] * K[j * D + d]);
          seen.push_back(j), s.push_back(score.x);
          most = std::max(most, score.x), condition = std::max(condition, score.size);
        });
        for (double& y : s) sum += y = std::exp(y - most);
        Value& L = lse[x * nq + i];
        if (seen.empty()) {
          if (got.lse.data[x * nq + i] != -INFINITY) fail("lse of a query that sees nothing is not -inf");
          L = {NAN, 0};
          continue;
        }
        L = {most + std::log(sum), 1 + condition};
        Value delta;
        for (int d = 0; d < D; ++d) delta.add(G[i * D + d] * O[i * D + d]);
        delta.add(-p.g_lse.data[x * nq + i]);
        for (size_t n = 0; n < seen.size(); ++n) {
          int64_t j = seen[n];
          double w = s[n] / sum, error = 2 * (1 + condition);
          Value dp;
          for (int d = 0; d < D; ++d) dp.add(G[i * D + d] * V[j * D + d]);
          double ds = p.scale * w * (dp.x - delta.x), size = std::fabs(p.scale) * w * (dp.size + delta.size) * error;
          bool pooled = j >= nk;
          for (int d = 0; d < D; ++d) {
            out[(x * nq + i) * D + d].add(w * V[j * D + d], w * std::fabs(V[j * D + d]) * error);
            gq[(x * nq + i) * D + d].add(ds * K[j * D + d], size * std::fabs(K[j * D + d]));
            Value& a = pooled ? gpk[(x * c.pooled + j - nk) * D + d] : gk[(x * nk + j) * D + d];
            Value& y = pooled ? gpv[(x * c.pooled + j - nk) * D + d] : gv[(x * nk + j) * D + d];
            a.add(ds * Q[i * D + d], size * std::fabs(Q[i * D + d]));
            y.add(w * G[i * D + d], w * std::fabs(G[i * D + d]) * error);
          }
        }
      }
    }
  compare("out", c, got.out, out), compare("grad_q", c, got.gq, gq);
  compare("grad_k", c, got.gk, gk), compare("grad_v", c, got.gv, gv);
  compare("grad_pooled_k", c, got.gpk, gpk), compare("grad_pooled_v", c, got.gpv, gpv);
  for (int64_t i = 0; i < got.lse.size; ++i)
    if (!std::isnan(lse[i].x))
      compare("lse", t, units(t, c), got.lse.data[i], lse[i], false, [&] { return "[" + std::to_string(i) + "]"; });
}

// ------------------------------------------------------------------------------------------------------ properties

bool same(const Tensor& x, const Tensor& y) {
  return !memcmp(x.block, y.block, static_cast<size_t>(x.elements * size_of(x.type)));
}

void check_same_bits(DType t) {
  for (const Case& c : {Case{2, 1, 19, 17, 5, 40, true, 2, 15, 33, 9, 16, kHeadsFirst},
                        Case{1, 1, 92, 91, 1, 3, false, 0, 92, 2, 3, 8, kHeadsFirst}}) {  // long runs: several splits
    Problem p(c, t, 3);
    WindowAttentionArgs a = p.args();
    Results one(p, a, serial());
    auto against = [&](const Results& other, int64_t B, const char* what) {
      auto part = [&](const Tensor& x) { return static_cast<size_t>(x.elements / c.B * B * size_of(x.type)); };
      const Tensor* mine[] = {&one.out, &one.gq, &one.gk, &one.gv, &one.gpk, &one.gpv};
      const Tensor* theirs[] = {&other.out, &other.gq, &other.gk, &other.gv, &other.gpk, &other.gpv};
      for (int i = 0; i < 6; ++i)
        if (memcmp(mine[i]->block, theirs[i]->block, part(*mine[i]))) fail(what);
      if (memcmp(one.lse.data, other.lse.data, static_cast<size_t>(one.lse.size / c.B * B) * 4)) fail(what);
    };
    for (int threads : {2, 7})
      against(Results(p, a, threaded(threads)), c.B, "results depend on the number of threads");
    a.B = 1;
    against(Results(p, a, serial()), 1, "a sample in a batch differs from the sample alone");
  }
}

// Who may become NaN, and must, when token n of one input does: worked out pair by pair.
void check_nan(DType t) {
  const Case c{1, 1, 13, 20, 4, 3, true, 1, 11, 2, 4, 16, kTokensFirst};
  Problem p(c, t, 5);
  Results clean(p, p.args(), serial());
  struct Input {
    const char* name;
    const Tensor* x;
    int64_t n;
  };
  const int64_t key = c.text + 6 * c.width + 9, query = c.q_text + 5 * c.width + 9;
  const Input inputs[] = {{"q", &p.q, query}, {"grad_out", &p.g, query}, {"k", &p.k, key}, {"v", &p.v, key},
                          {"k", &p.k, 1},     {"pooled_v", &p.pv, 2}};
  for (const Input& in : inputs)
    for (double value : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      std::string what = std::string(std::isnan(value) ? "NaN in " : "inf in ") + in.name;
      char saved[4];
      char* at = in.x->at(0, 0, in.n, 3);
      memcpy(saved, at, static_cast<size_t>(size_of(t)));
      encode(t, value, at);
      Results got(p, p.args(), serial());
      memcpy(at, saved, static_cast<size_t>(size_of(t)));
      bool row = in.x == &p.q || in.x == &p.g;
      auto touched_query = [&](int64_t i) {
        return row ? i == in.n : sees(c, i, in.x == &p.pv ? c.keys() + in.n : in.n);
      };
      auto touched_key = [&](int64_t j) {  // by a touched query that sees it
        for (int64_t i = 0; i < c.queries(); ++i)
          if (touched_query(i) && sees(c, i, j)) return true;
        return false;
      };
      auto finite = [](const Tensor& x, int64_t n) {
        for (int d = 0; d < x.D; ++d)
          if (!std::isfinite(x.get(0, 0, n, d))) return false;
        return true;
      };
      bool forward = in.x != &p.g;
      for (int64_t i = 0; i < c.queries(); ++i) {
        bool hit = touched_query(i), is_key = in.x == &p.k || in.x == &p.v || in.x == &p.pv;
        // An infinite score may also be -inf, and then the key has no weight.
        bool must = hit && forward && (std::isnan(value) || in.x == &p.v || in.x == &p.pv);
        if (must ? finite(got.out, i) : !(hit && is_key) && !(hit && forward) && !finite(got.out, i))
          fail(what + ": out of query " + std::to_string(i));
        if (!hit && !finite(got.gq, i)) fail(what + ": reached grad_q of query " + std::to_string(i));
        if (hit && std::isnan(value) && finite(got.gq, i)) fail(what + ": did not reach grad_q " + std::to_string(i));
      }
      for (int64_t j = 0; j < c.keys(); ++j)
        if (!touched_key(j) && !(finite(got.gk, j) && finite(got.gv, j)))
          fail(what + ": reached the gradients of key " + std::to_string(j));
    }
}

// q, k and v as slices of one (B, N, 3, H, D) buffer, rows far from each other.
void check_fused_buffer(DType t) {
  const Case c{2, 3, 9, 14, 4, 5, true, 0, 9, 5, 0, 40, kHeadsFirst};
  const int64_t N = c.keys(), row = 3 * c.H * c.D;
  Tensor buffer(t, c.B, N * 3, c.H, c.D, kHeadsFirst);
  std::mt19937 random(9);
  buffer.fill(random, false);
  Problem p(c, t, 9);
  WindowAttentionArgs a = p.args();
  auto slice = [&](int i) {
    return View{static_cast<char*>(buffer.view.data) + i * c.H * c.D * size_of(t), N * row, c.D, row};
  };
  Tensor* const parts[] = {&p.q, &p.k, &p.v};
  for (int i = 0; i < 3; ++i)
    parts[i]->each([&](int64_t b, int64_t h, int64_t n, int d) {
      View s = slice(i);
      memcpy(parts[i]->at(b, h, n, d),
             static_cast<char*>(s.data) + (b * s.stride_b + h * s.stride_h + n * s.stride_n + d) * size_of(t),
             static_cast<size_t>(size_of(t)));
    });
  Results separate(p, a, serial());
  a.q = slice(0), a.k = slice(1), a.v = slice(2);
  Results fused(p, a, threaded(2));
  if (!same(separate.out, fused.out) || !same(separate.gq, fused.gq) || !same(separate.gk, fused.gk))
    fail("fused buffer differs from its parts");
}

// ---------------------------------------------------------------------------------------------------------- pooling

void check_pool(DType t) {
  for (const Case& c : {Case{2, 2, 8, 12, 0, 0, true, 0, 0, 0, 4, 24, kTokensFirst},
                        Case{1, 3, 7, 10, 0, 0, true, 0, 0, 0, 3, 37, kGaps},
                        Case{2, 1, 3, 2, 0, 0, true, 0, 0, 0, 5, 8, kHeadsFirst}}) {
    const int64_t f = c.pooled, rows = (c.height + f - 1) / f, columns = (c.width + f - 1) / f, N = c.height * c.width;
    Tensor x(t, c.B, c.H, N, c.D, c.layout), g(t, c.B, c.H, rows * columns, c.D, c.layout);
    Tensor out(t, c.B, c.H, rows * columns, c.D, c.layout), gx(t, c.B, c.H, N, c.D, c.layout);
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    x.fill(random, false), g.fill(random, false);
    Floats weight(f * f), gw(f * f), gw_threaded(f * f);
    for (int64_t i = 0; i < f * f; ++i) weight.data[i] = normal(random);
    PoolTokensArgs a;
    a.dtype = t, a.B = c.B, a.H = c.H, a.height = c.height, a.width = c.width, a.f = f, a.D = c.D;
    a.x = x.view, a.out = out.view, a.weight = weight.data, a.grad_x = gx.view, a.grad_weight = gw.data;
    run(window_attention_kernels().pool, a, threaded(2));
    a.out = g.view;
    run(window_attention_kernels().pool_backward, a, serial());
    a.grad_weight = gw_threaded.data;
    run(window_attention_kernels().pool_backward, a, threaded(3));
    if (memcmp(gw.data, gw_threaded.data, static_cast<size_t>(f * f) * 4)) fail("grad_weight depends on the threads");
    Values y(c.B * c.H * rows * columns * c.D), dx(c.B * c.H * N * c.D), dw(f * f);
    for (int64_t head = 0; head < c.B * c.H; ++head)
      for (int64_t r = 0; r < rows * f; ++r)
        for (int64_t s = 0; s < columns * f; ++s)
          for (int d = 0; d < c.D; ++d) {
            int64_t token = std::min(r, c.height - 1) * c.width + std::min(s, c.width - 1);
            int64_t patch = r / f * columns + s / f, k = r % f * f + s % f, b = head / c.H, h = head % c.H;
            double X = x.get(b, h, token, d), G = g.get(b, h, patch, d), w = weight.data[k];
            y[(head * rows * columns + patch) * c.D + d].add(w * X);
            dx[(head * N + token) * c.D + d].add(w * G);
            dw[k].add(G * X);
          }
    compare("pooled", c, out, y), compare("grad_x", c, gx, dx);
    for (int64_t k = 0; k < f * f; ++k)
      compare("grad_weight", DType::kFloat32, units(DType::kFloat32, c), gw.data[k], dw[k], false,
              [&] { return "[" + std::to_string(k) + "]"; });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Case cases[] = {
      // B H  h   w  radius text first q_row q_rows q_text pooled D
      {1, 1, 1, 1, 1, 0, true, 0, 1, 0, 0, 8},           {2, 2, 12, 21, 4, 16, true, 0, 12, 16, 0, 16, kTokensFirst},
      {1, 2, 9, 13, 5, 7, false, 2, 4, 3, 6, 37, kGaps}, {1, 1, 15, 20, 14, 5, true, 3, 11, 5, 9, 48},
      {1, 1, 1, 50, 6, 3, true, 0, 1, 2, 0, 9, kGaps},   {1, 2, 40, 1, 1000000, 3, false, 0, 40, 3, 1, 24},
      {1, 1, 0, 0, 4, 10, true, 0, 0, 12, 0, 16},        {1, 1, 0, 0, 4, 0, true, 0, 0, 5, 3, 16},
      {1, 1, 8, 8, 1, 0, true, 0, 8, 0, 0, 256},         {2, 1, 6, 7, 40, 20, true, 2, 3, 0, 67, 255, kExpanded},
      {1, 1, 5, 4, 3, 0, true, 5, 0, 0, 2, 8},           {2, 0, 4, 4, 2, 1, true, 0, 4, 1, 0, 8},
      {1, 1, 92, 91, 2, 2, true, 0, 92, 2, 1, 8},  // long runs: several splits
  };
  return for_each_level(argc, argv, [&](const std::string& prefix, DType t) {
    int i = 0;
    for (const Case& c : cases) {
      char text[160];
      snprintf(text, sizeof(text), " B%d H%d grid %dx%d r%d text %d queries %d+%d*%d pooled %d D%d %s", int(c.B),
               int(c.H), int(c.height), int(c.width), int(c.radius), int(c.text), int(c.q_text), int(c.q_rows),
               int(c.width), int(c.pooled), c.D, kLayoutNames[c.layout]);
      context = prefix + text;
      check(c, t, i++ % 2 ? serial() : threaded(3));
    }
    context = prefix;
    check_same_bits(t), check_nan(t), check_fused_buffer(t), check_pool(t);
  });
}
