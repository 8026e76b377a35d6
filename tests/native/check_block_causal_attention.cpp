// Every CPU kernel of block-causal attention, every instruction set of this machine, against plain double loops.
//
// Compiled and run as check_linear_attention.cpp is. Tolerance: |error| <= units * magnitude, where magnitude is the
// same formula with every term replaced by its absolute value, times the condition of exp: 1 + the largest sum of
// absolute terms of a score.
#include "block_causal_attention.h"
#include "check.h"

namespace {

struct Case {  // sizes in blocks
  int64_t B, H, rows, columns, block, q_row, q_rows;
  bool clamp, embedded;
  int D;
  Layout layout = kHeadsFirst;
  int64_t row() const { return columns * block * block; }  // tokens in a row of blocks
  int64_t queries() const { return q_rows * row(); }
  int64_t keys() const { return rows * row(); }
};

// f(slot, key) for all that query i sees, a repeated block once for each of its slots.
template <class F>
void for_each_seen(const Case& c, int64_t i, const F& f) {
  const int64_t width = c.columns * c.block, y = i / width / c.block + c.q_row, x = i % width / c.block;
  const int64_t up[] = {0, 1, 0, 1}, left[] = {0, 1, 1, 0};
  for (int s = 0; s < 4; ++s) {
    int64_t row = y - up[s], column = x - left[s];
    if (!c.clamp && (row < 0 || column < 0)) continue;
    row = std::max<int64_t>(0, row), column = std::max<int64_t>(0, column);
    for (int64_t j = 0; j < c.block * c.block; ++j)
      f(s, (row * c.block + j / c.block) * width + column * c.block + j % c.block);
  }
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
  Tensor q, k, v, g;
  Floats g_lse, embed;
  float scale;
  Problem(const Case& cc, DType tt, unsigned seed)
      : c(cc), t(tt), g_lse(cc.B * cc.H * cc.queries()), embed(4 * cc.H * cc.D) {
    std::mt19937 random(seed);
    auto make = [&](int64_t n) {
      Tensor x(t, c.B, c.H, n, c.D, c.layout);
      x.fill(random, false);
      return x;
    };
    q = make(c.queries()), k = make(c.keys()), v = make(c.keys()), g = make(c.queries());
    std::normal_distribution<float> normal;
    for (Floats* x : {&g_lse, &embed})
      for (int64_t i = 0; i < x->size; ++i) x->data[i] = normal(random);
    scale = 1.0f / std::sqrt(static_cast<float>(c.D));
  }
  BlockCausalAttentionArgs args() const {
    BlockCausalAttentionArgs a;
    a.dtype = t, a.B = c.B, a.H = c.H, a.D = c.D, a.rows = c.rows, a.columns = c.columns, a.block = c.block;
    a.q_row = c.q_row, a.q_rows = c.q_rows, a.clamp = c.clamp, a.scale = scale;
    a.q = q.view, a.k = k.view, a.v = v.view, a.grad_out = g.view;
    if (c.embedded) a.slot_embed = embed.data;
    a.grad_lse = g_lse.data;
    a.grad_lse_stride[0] = c.H * c.queries(), a.grad_lse_stride[1] = c.queries(), a.grad_lse_stride[2] = 1;
    return a;
  }
  Tensor output(int64_t n) const {
    return Tensor(t, c.B, c.H, n, c.D, c.layout == kExpanded ? kTokensFirst : c.layout);
  }
};

// Everything that the two kernels write.
struct Results {
  Tensor out, gq, gk, gv;
  Floats lse, ge;
  Results(const Problem& p, BlockCausalAttentionArgs a, const Parallel& parallel)
      : out(p.output(p.c.queries())),
        gq(p.output(p.c.queries())),
        gk(p.output(p.c.keys())),
        gv(p.output(p.c.keys())),
        lse(p.c.B * p.c.H * p.c.queries()),
        ge(4 * p.c.H * p.c.D) {
    a.out = out.view, a.lse = lse.data;
    a.grad_q = gq.view, a.grad_k = gk.view, a.grad_v = gv.view;
    if (p.c.embedded) a.grad_slot_embed = ge.data;
    if (!block_causal_attention_kernels().forward(a, parallel)) fail("out of memory");
    if (!block_causal_attention_kernels().backward(a, parallel)) fail("out of memory");
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
void compare(const char* name, const Case& c, DType t, const Floats& got, const Values& want) {
  for (int64_t i = 0; i < got.size; ++i)
    compare(name, t, units(t, c), got.data[i], want[static_cast<size_t>(i)], false,
            [&] { return "[" + std::to_string(i) + "]"; });
}

void check(const Case& c, DType t, const Parallel& parallel) {
  Problem p(c, t, 7);
  Results got(p, p.args(), parallel);
  const int64_t heads = c.B * c.H, nq = c.queries(), nk = c.keys();
  const int D = c.D;
  Values out(heads * nq * D), lse(heads * nq), gq(heads * nq * D), gk(heads * nk * D), gv(heads * nk * D);
  Values ge(4 * c.H * D);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.H; ++h) {
      const int64_t x = b * c.H + h;
      std::vector<double> Q = p.q.head(b, h), K = p.k.head(b, h), V = p.v.head(b, h), G = p.g.head(b, h);
      std::vector<double> O = got.out.head(b, h);
      auto e = [&](int s, int d) {
        return c.embedded ? static_cast<double>(p.embed.data[(s * c.H + h) * D + d]) : 0.0;
      };
      for (int64_t i = 0; i < nq; ++i) {
        struct Seen {
          int slot;
          int64_t key;
          double weight;
        };
        std::vector<Seen> seen;
        double most = -INFINITY, condition = 0, sum = 0;
        for_each_seen(c, i, [&](int s, int64_t j) {
          Value score;
          for (int d = 0; d < D; ++d) {
            score.add(p.scale * Q[i * D + d] * K[j * D + d]);
            score.add(p.scale * Q[i * D + d] * e(s, d));
          }
          seen.push_back({s, j, score.x});
          most = std::max(most, score.x), condition = std::max(condition, score.size);
        });
        for (Seen& n : seen) sum += n.weight = std::exp(n.weight - most);
        lse[x * nq + i] = {most + std::log(sum), 1 + condition};
        Value delta;
        for (int d = 0; d < D; ++d) delta.add(G[i * D + d] * O[i * D + d]);
        delta.add(-p.g_lse.data[x * nq + i]);
        for (const Seen& n : seen) {
          const int64_t j = n.key;
          double w = n.weight / sum, error = 2 * (1 + condition);
          Value dp;
          for (int d = 0; d < D; ++d) dp.add(G[i * D + d] * V[j * D + d]);
          double ds = p.scale * w * (dp.x - delta.x), size = std::fabs(p.scale) * w * (dp.size + delta.size) * error;
          for (int d = 0; d < D; ++d) {
            double key = K[j * D + d] + e(n.slot, d), most_key = std::fabs(K[j * D + d]) + std::fabs(e(n.slot, d));
            out[(x * nq + i) * D + d].add(w * V[j * D + d], w * std::fabs(V[j * D + d]) * error);
            gq[(x * nq + i) * D + d].add(ds * key, size * most_key);
            gk[(x * nk + j) * D + d].add(ds * Q[i * D + d], size * std::fabs(Q[i * D + d]));
            gv[(x * nk + j) * D + d].add(w * G[i * D + d], w * std::fabs(G[i * D + d]) * error);
            ge[(n.slot * c.H + h) * D + d].add(ds * Q[i * D + d], size * std::fabs(Q[i * D + d]));
          }
        }
      }
    }
  compare("out", c, got.out, out), compare("grad_q", c, got.gq, gq);
  compare("grad_k", c, got.gk, gk), compare("grad_v", c, got.gv, gv);
  compare("lse", c, t, got.lse, lse);
  if (c.embedded) compare("grad_slot_embed", c, t, got.ge, ge);
}

// ------------------------------------------------------------------------------------------------------ properties

void check_same_bits(DType t) {
  for (const Case& c : {Case{2, 1, 2, 2, 9, 0, 2, true, true, 16}, Case{2, 2, 3, 2, 3, 1, 2, false, true, 24}}) {
    Problem p(c, t, 3);
    BlockCausalAttentionArgs a = p.args();
    Results one(p, a, serial());
    auto against = [&](const Results& other, int64_t B, const char* what) {
      auto part = [&](const Tensor& x) { return static_cast<size_t>(x.elements / c.B * B * size_of(x.type)); };
      const Tensor* mine[] = {&one.out, &one.gq, &one.gk, &one.gv};
      const Tensor* theirs[] = {&other.out, &other.gq, &other.gk, &other.gv};
      for (int i = 0; i < 4; ++i)
        if (memcmp(mine[i]->block, theirs[i]->block, part(*mine[i]))) fail(what);
      if (memcmp(one.lse.data, other.lse.data, static_cast<size_t>(one.lse.size / c.B * B) * 4)) fail(what);
      if (B == c.B && memcmp(one.ge.data, other.ge.data, static_cast<size_t>(one.ge.size) * 4)) fail(what);
    };
    for (int threads : {2, 7})
      against(Results(p, a, threaded(threads)), c.B, "results depend on the number of threads");
    a.B = 1;
    against(Results(p, a, serial()), 1, "a sample in a batch differs from the sample alone");
  }
}

// A NaN in token n of q, k or v: in out of the queries that see it, and of no others.
void check_nan(DType t) {
  for (bool clamp : {true, false}) {
    const Case c{1, 1, 3, 3, 4, 0, 3, clamp, true, 16, kTokensFirst};
    Problem p(c, t, 5);
    const int64_t n = 5 * c.columns * c.block + 6;  // in the block in the middle
    for (const Tensor* x : {&p.q, &p.k, &p.v}) {
      char saved[4];
      char* at = x->at(0, 0, n, 3);
      memcpy(saved, at, static_cast<size_t>(size_of(t)));
      encode(t, NAN, at);
      Results got(p, p.args(), serial());
      memcpy(at, saved, static_cast<size_t>(size_of(t)));
      for (int64_t i = 0; i < c.queries(); ++i) {
        bool hit = x == &p.q && i == n;
        for_each_seen(c, i, [&](int, int64_t j) { hit = hit || (x != &p.q && j == n); });
        if (std::isfinite(got.out.get(0, 0, i, 3)) == hit) fail("NaN: out of query " + std::to_string(i));
        if (!hit && !std::isfinite(got.gq.get(0, 0, i, 3))) fail("NaN: reached grad_q of query " + std::to_string(i));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Case cases[] = {
      // B H rows columns block q_row q_rows clamp embedded D
      {1, 1, 1, 1, 1, 0, 1, true, true, 8},
      {2, 2, 2, 3, 3, 0, 2, true, true, 16, kTokensFirst},
      {1, 2, 3, 2, 5, 1, 2, false, true, 37, kGaps},
      {1, 1, 2, 2, 9, 0, 2, true, false, 48},
      {2, 1, 3, 2, 4, 1, 1, false, false, 255, kExpanded},
      {1, 1, 2, 1, 12, 0, 2, true, true, 24},
      {1, 1, 1, 3, 8, 0, 1, false, true, 9, kGaps},
      {1, 1, 2, 2, 3, 0, 2, true, true, 256},
      {1, 1, 3, 3, 2, 3, 0, true, true, 8},
      {0, 2, 2, 2, 2, 0, 2, true, true, 8},
      {1, 2, 0, 3, 2, 0, 0, true, true, 8},
  };
  return for_each_level(argc, argv, [&](const std::string& prefix, DType t) {
    int i = 0;
    for (const Case& c : cases) {
      char text[160];
      snprintf(text, sizeof(text), " B%d H%d %dx%d blocks of %d, queries %d+%d %s %s D%d %s", int(c.B), int(c.H),
               int(c.rows), int(c.columns), int(c.block), int(c.q_row), int(c.q_rows), c.clamp ? "clamp" : "drop",
               c.embedded ? "embedded" : "", c.D, kLayoutNames[c.layout]);
      context = prefix + text;
      check(c, t, i++ % 2 ? serial() : threaded(3));
    }
    context = prefix;
    check_same_bits(t), check_nan(t);
  });
}
