// Launches every kernel with threads, and block after block in one thread: no bit of what comes out may differ.
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <vector>

#include "launch.cuh"

using namespace fastsam;

namespace {

void expect(bool as_expected, const char* what) {
  if (as_expected) return;
  std::printf("differs: %s\n", what);
  std::exit(1);
}

template <class T> bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class W> std::vector<W> random_numbers(int n) {
  static unsigned state = 1;
  std::vector<W> numbers(n);
  for (W& x : numbers) {
    state = state * 1664525 + 1013904223;
    narrow(Scalar<W>((state >> 8) / double(1 << 23) - 1), x);
  }
  return numbers;
}

// Three parameters in two groups: of two chunks; without a gradient; not climbed, and between two vectors at its begin.
constexpr int kSizes[] = {3000, 1, 1026}, kRows = 3, kElements = 3000 + 1 + 1026, kLongestChunk = 2048;
constexpr int kWithoutGradient = 1, kNotClimbed = 2, kGroup[] = {0, 0, 1};

struct Method {
  bool ema, vector, weighted;
};
constexpr Method kMethods[] = {{false, false, false}, {true, false, false}, {false, true, true}, {true, true, false}};
constexpr int kSums = std::size(kMethods);

// What the host keeps for the kernels.
template <class W> struct Model {
  std::vector<W> w = random_numbers<W>(kElements), g = random_numbers<W>(kElements), v = random_numbers<W>(kElements);
  std::vector<W> m = random_numbers<W>(kElements), m_next = m, backup = w, momentum = m, exp_avg = m;
  std::vector<W> exp_avg_sq = std::vector<W>(kElements), stored = v, stored_next = m;
  std::vector<float> steps = std::vector<float>(kRows, 3);
  std::vector<double> sums = std::vector<double>(3 * kSums + 3);
  int counter = 0;

  const AscentGroup ascent[2] = {{0.1, 0.3, 0.7, 0.9, 1}, {0.2, 0.1, 0.5, 0.8, 0}};
  const SgdGroup sgd[2] = {{0.1, 0.9, 0, 0.01, 0, 0}, {0.2, 0.5, 0.1, 0, 1, 1}};
  const AdamGroup adam[2] = {{0.1, 0.9, 0.99, log2(0.9), log2(0.99), 1e-8, 0.1, 1, 0},
                             {0.2, 0.8, 0.90, log2(0.8), log2(0.90), 1e-6, 0.1, 0, 1}};
  const MixtureGroup mixtures[2] = {{0.7, 0.4, 0.01, -0.02, 1, -0.3}, {1, -0.5, 0, 0, 0.2, 0.9}};
  const Scaling scaling = {0.5, 10, 0.9};

  std::vector<Row> rows;
  std::vector<Chunk> chunks;
  std::vector<double> partials;

  Tables tables(Dtype dtype) {
    int64_t begin = 0;
    for (int r = 0; r < kRows; begin += kSizes[r++]) {
      const int64_t gradient = r == kWithoutGradient ? 0 : address(&g[begin]);
      rows.push_back({int64_t(address(&w[begin])), gradient, begin, kSizes[r], kGroup[r], r, r != kNotClimbed, dtype, begin});
      for (int at = 0; at < kSizes[r]; at += kLongestChunk)
        chunks.push_back({r, at, kSizes[r] - at < kLongestChunk ? kSizes[r] - at : kLongestChunk});
    }
    partials.resize(3 * chunks.size());
    return {rows.data(), chunks.data(), kRows, int(chunks.size())};
  }
};

// Every pass, one after the other on the same memory.
template <class W> void run(Model<W>& x, Dtype dtype, Place place) {
  const Types types = {dtype, dtype, false};
  const Tables table = x.tables(dtype);
  const auto norms = [&](Method method, double* sums, const double* met) {
    gram({table, x.ascent, &x.scaling, method.ema ? x.m.data() : nullptr, method.vector ? x.v.data() : nullptr,
          x.partials.data(), &x.counter, sums, met, method.weighted},
         types, place);
  };
  double *first = &x.sums[3 * (kSums - 1)], *second = first + 3;
  const auto ascend = [&] {
    climb({table, x.ascent, &x.scaling, first, x.backup.data(), x.m.data(), x.m_next.data(), x.v.data(), true}, types,
          place);
  };
  const auto keep = [&] {  // the first gradient, for a mixture
    climb({table, x.ascent, &x.scaling, first, x.backup.data(), nullptr, x.stored.data(), nullptr, true}, types, place);
  };
  const DescentArgs descent = {table, &x.scaling, second, x.backup.data(), x.m.data(), x.m_next.data()};
  const DescentArgs mixing = {table,   &x.scaling, second,          x.backup.data(),    nullptr,
                              nullptr, x.mixtures, x.stored.data(), x.stored_next.data()};
  for (int i = 0; i < kSums; ++i) {
    std::vector<double> again(3);
    norms(kMethods[i], &x.sums[3 * i], nullptr);
    norms(kMethods[i], again.data(), nullptr);  // the counter is 0 again, and other blocks come last
    expect(memcmp(again.data(), &x.sums[3 * i], sizeof(double[3])) == 0, "sums from launch to launch");
  }
  ascend();
  norms(kMethods[0], second, first);
  descend_sgd({descent, x.sgd, x.momentum.data()}, types, place);
  keep();
  descend_sgd({mixing, x.sgd, x.momentum.data()}, types, place);
  ascend();
  for (const DescentArgs& each : {descent, mixing})
    descend_adam({each, x.adam, x.exp_avg.data(), x.exp_avg_sq.data(), x.steps.data(), &x.counter}, types, place);
  ascend();
  restore({table, x.backup.data()}, types, place);
  expect(x.counter == 0, "the counter between launches");
}

// The sums, element after element; those of one access are added up in S.
template <class W> void expect_plain_sums(const Model<W>& x, const std::vector<double>& sums) {
  using S = Scalar<W>;
  const double tolerance = sizeof(S) == 8 ? 1e-10 : kWidth<W> * double(std::numeric_limits<S>::epsilon());
  for (int s = 0; s < kSums; ++s) {
    double expected[3] = {0, 0, 0};
    for (int r = 0, i = 0; r < kRows; ++r)
      for (const int end = i + kSizes[r]; i < end; ++i) {
        if (r == kWithoutGradient) continue;
        const AscentGroup& h = x.ascent[kGroup[r]];
        S d = widen(x.g[i]) * S(x.scaling.grad_scale);
        if (kMethods[s].ema) d = direction(d, widen(x.m[i]), S(h.sigma));
        const double v = kMethods[s].vector ? widen(x.v[i]) : 0;
        expected[1] += d * v;
        expected[2] += v * v;
        if (kMethods[s].weighted && h.adaptive != 0) d = d * widen(x.w[i]);
        expected[0] += double(d) * d;
      }
    for (int k = 0; k < 3; ++k)
      expect(std::abs(sums[3 * s + k] - expected[k]) <= tolerance * expected[0], "sums from a plain loop's");
  }
}

template <class W> void compare(Dtype dtype, double largest) {
  Model<W> before;
  narrow(Scalar<W>(largest), before.g[1000]);
  Model<W> in_threads = before, on_host = before;
  run(in_threads, dtype, {0, nullptr, false});
  run(on_host, dtype, {0, nullptr, true});
  if (is_finite(largest)) expect_plain_sums(before, in_threads.sums);
  expect(same_bits(in_threads.sums, on_host.sums), "sums");
  expect(same_bits(in_threads.w, on_host.w), "weights");
  expect(same_bits(in_threads.backup, on_host.backup), "backup");
  expect(same_bits(in_threads.m_next, on_host.m_next), "m");
  expect(same_bits(in_threads.stored, on_host.stored), "s");
  expect(same_bits(in_threads.stored_next, on_host.stored_next), "the next s");
  expect(same_bits(in_threads.momentum, on_host.momentum), "momentum");
  expect(same_bits(in_threads.exp_avg, on_host.exp_avg), "exp_avg");
  expect(same_bits(in_threads.exp_avg_sq, on_host.exp_avg_sq), "exp_avg_sq");
  expect(same_bits(in_threads.steps, on_host.steps), "steps");
}

// What finished_last promises: all threads of the last block read what any thread of any block wrote.
struct Everyone {
  int *written, *counter, *read;
};
__global__ void everyone(const __grid_constant__ Everyone a) {
  a.written[blockIdx.x * kThreads + threadIdx.x] = 1;
  if (!finished_last(a.counter, gridDim.x)) return;
  for (unsigned b = 0; b < gridDim.x; ++b)
    a.read[threadIdx.x] += a.written[b * kThreads + (threadIdx.x + 1) % kThreads];
}

void compare_everyone() {
  constexpr int kBlocks = 3;
  std::vector<int> written(kBlocks * kThreads), read(kThreads);
  int counter = 0;
  launch(everyone, kBlocks, Everyone{written.data(), &counter, read.data()}, {0, nullptr, false});
  expect(same_bits(read, std::vector<int>(kThreads, kBlocks)), "what all threads wrote");
}

}  // namespace

// "float32" as argument: that type alone.
int main(int count, char**) {
  compare_everyone();
  for (double largest : {1.0, std::numeric_limits<double>::infinity()}) {
    compare<float>(kFloat32, largest);
    if (count > 1) continue;
    compare<double>(kFloat64, largest);
    compare<bf16>(kBfloat16, largest);
  }
  compare<float>(kFloat32, 1e25);  // whose square float cannot hold
}
