// The CPU form of tome::match, merge, unmerge and their gradients, built by Inductor's own C++ compiler at first use (cpu.py).
//
// Between the matrix products of a transformer, two dozen ATen calls cost more than their arithmetic: here matching is
// one call, that keeps the largest similarity of each source and never writes the others, and merging is one pass. All
// loops are parallel over rows, each row is summed in the order of `moved`, so results do not depend on the number of
// threads.
//
// First the kernels, on pointers; then the operators of the namespace `tome_cpu`, on tensors. Those use the C functions of
// torch's stable ABI alone: its C++ headers and their boxing take twice the kernels' time to compile.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}

inline void store(float* at, float x) { *at = x; }

// Round to nearest, ties to even; a NaN stays one.
inline void store(bfloat16* at, float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    at->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

constexpr float kSmallestNorm = 1e-12f;
constexpr int64_t kLanes = 32;

// A tile of similarities, kRows sources by kPanel destinations, fills the vector registers but for a few.
#if !defined(TOME_BYTES)
#if defined(__AVX512F__)
#define TOME_BYTES 64
#elif defined(__AVX__)
#define TOME_BYTES 32
#else
#define TOME_BYTES 16
#endif
#endif
constexpr int64_t kBytes = TOME_BYTES, kRows = kBytes == 64 ? 8 : 6, kVectors = kBytes == 64 ? 3 : 2;
using Floats = float __attribute__((vector_size(kBytes)));
using Unaligned = float __attribute__((vector_size(kBytes), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(kBytes)));
constexpr int64_t kWidth = kBytes / static_cast<int64_t>(sizeof(float));
constexpr int64_t kPanel = kVectors * kWidth;
constexpr int64_t kGroup = 8 * kRows;  // sources that go through a panel while it is in the first cache

// Tokens that may merge in one sample: positions `prefix` to `n - suffix`; the even ones of the whole sequence are
// sources.
struct Body {
    int64_t prefix, odd, length, sources, destinations, panels;

    Body(int64_t n, int64_t prefix, int64_t suffix)
        : prefix(prefix),
          odd(prefix % 2),
          length(n - prefix - suffix),
          sources((length - odd + 1) / 2),
          destinations(length - sources),
          panels((destinations + kPanel - 1) / kPanel) {}

    int64_t source(int64_t rank) const { return prefix + odd + 2 * rank; }
    int64_t destination(int64_t rank) const { return prefix + 1 - odd + 2 * rank; }
    // Floats that the directions of one sample take: a row for each source, and panels [panels, d, kPanel].
    int64_t floats(int64_t d) const { return (sources + panels * kPanel) * d; }
};

// The sum over heads of one token divided by its norm, to out[0], out[step], ...; whether it is all zero.
template <class T>
bool direction(const T* row, int64_t heads, int64_t d, int64_t step_h, float* sum, float* out, int64_t step) {
    float squares[kLanes] = {};
    for (int64_t c = 0; c < d; c += kLanes) {
        const int64_t width = std::min(kLanes, d - c);
        float part[kLanes] = {};
        for (int64_t h = 0; h < heads; ++h) {
            const T* at = row + h * step_h + c;
            if (width == kLanes) {  // a constant length is what the compiler turns into vectors
                for (int64_t l = 0; l < kLanes; ++l) part[l] += load(at[l]);
            } else {
                for (int64_t l = 0; l < width; ++l) part[l] += load(at[l]);
            }
        }
        std::memcpy(sum + c, part, width * sizeof(float));
        for (int64_t l = 0; l < kLanes; ++l) squares[l] += part[l] * part[l];
    }
    float square = 0;
    for (int64_t l = 0; l < kLanes; ++l) square += squares[l];
    const float scale = 1.0f / std::max(std::sqrt(square), kSmallestNorm);
    if (step == 1) {
        for (int64_t c = 0; c < d; ++c) out[c] = sum[c] * scale;
    } else {
        for (int64_t c = 0; c < d; ++c) out[c * step] = sum[c] * scale;
    }
    return square == 0.0f;
}

// Products of kRows rows with a panel.
inline void products(const float* const* rows, const float* panel, int64_t d, Floats (*sum)[kVectors]) {
    for (int64_t c = 0; c < d; ++c) {
        Floats along[kVectors];
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
            along[v] = *reinterpret_cast<const Unaligned*>(panel + c * kPanel + v * kWidth);
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int64_t v = 0; v < kVectors; ++v) sum[i][v] += rows[i][c] * along[v];
        }
    }
}

// Similarities of kRows sources with panel `place`; `top` and `where` keep the largest of each lane so far, and its panel.
inline void tile(const float* const* rows, const float* panel, int64_t d, const Floats* bound, int32_t place,
                 Floats (*top)[kVectors], Ints (*where)[kVectors]) {
    Floats sum[kRows][kVectors] = {};
    products(rows, panel, d, sum);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
            const Floats found = sum[i][v] + bound[v];
            const Ints more = found > top[i][v];
            top[i][v] = more ? found : top[i][v];
            where[i][v] = more ? Ints{} + place : where[i][v];
        }
    }
}

// best and partner of the sources [begin, end): the largest similarity and the rank of its destination, the earlier one
// of equal ones; -inf and 0 where all are NaN. Each pair is summed in one order, whatever the tile or thread.
void best_partners(const Body& body, const float* src, const float* panels, int64_t d, int64_t begin, int64_t end,
                   float* best, int64_t* partner) {
    Floats top[kGroup][kVectors], bound[kVectors] = {};
    Ints where[kGroup][kVectors] = {};
    for (auto& row : top) {
        for (Floats& lane : row) lane = Floats{} - std::numeric_limits<float>::infinity();
    }
    const int64_t count = end - begin;
    for (int64_t p = 0; p < body.panels; ++p) {
        if (p == body.panels - 1) {  // what fills the last panel up is no destination
            for (int64_t l = body.destinations - p * kPanel; l < kPanel; ++l) {
                bound[l / kWidth][l % kWidth] = -std::numeric_limits<float>::infinity();
            }
        }
        for (int64_t i = 0; i < count; i += kRows) {
            const float* rows[kRows];
            for (int64_t k = 0; k < kRows; ++k) rows[k] = src + (begin + std::min(i + k, count - 1)) * d;
            tile(rows, panels + p * d * kPanel, d, bound, static_cast<int32_t>(p), top + i, where + i);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        float most = -std::numeric_limits<float>::infinity();
        int64_t place = 0;
        for (int64_t l = 0; l < kPanel; ++l) {
            const float found = top[i][l / kWidth][l % kWidth];
            const int64_t at = where[i][l / kWidth][l % kWidth] * kPanel + l;
            if (found > most || (found == most && at < place)) {
                most = found;
                place = at;
            }
        }
        best[begin + i] = most;
        partner[begin + i] = place;
    }
}

void merge_sizes(const float* size, const int64_t* assign, const int64_t* keep, const int64_t* moved, float* out,
                 int64_t m, int64_t r) {
    for (int64_t k = 0; k < m; ++k) out[k] = size ? size[keep[k]] : 1.0f;
    for (int64_t j = 0; j < r; ++j) out[assign[moved[j]]] += size ? size[moved[j]] : 1.0f;
}

// Zeros have no direction, but are as alike as tokens can be. null: whether each token of the body is all zero.
void pair_nulls(const Body& body, const char* null, float* best, int64_t* partner) {
    int64_t place = 0;
    while (place < body.destinations && !null[body.destination(place) - body.prefix]) ++place;
    if (place == body.destinations) return;
    for (int64_t i = 0; i < body.sources; ++i) {
        if (!null[body.source(i) - body.prefix]) continue;
        best[i] = 1.0f;
        partner[i] = place;
    }
}

// What `best_partners` found -> what `match_size` returns, for one sample.
void select(const Body& body, const float* best, const int64_t* partner, const float* size, int64_t n, int64_t r,
            int64_t* assign, int64_t* keep, int64_t* moved, float* similarity, float* size_out, float* log_size) {
    std::vector<int64_t> order(body.sources);
    std::vector<char> gone(body.sources, 0);
    for (int64_t i = 0; i < body.sources; ++i) order[i] = i;
    std::partial_sort(order.begin(), order.begin() + r, order.end(), [best](int64_t i, int64_t j) {
        return best[i] > best[j] || (best[i] == best[j] && i < j);
    });
    for (int64_t j = 0; j < r; ++j) gone[order[j]] = 1;

    int64_t place = 0;
    const auto stays = [&](int64_t position) {
        assign[position] = place;
        keep[place++] = position;
    };
    for (int64_t p = 0; p < body.prefix; ++p) stays(p);
    for (int64_t i = 0; i < body.sources; ++i) {
        if (!gone[i]) stays(body.source(i));
    }
    const int64_t begin = place;
    for (int64_t j = 0; j < body.destinations; ++j) stays(body.destination(j));
    for (int64_t p = body.prefix + body.length; p < n; ++p) stays(p);
    for (int64_t j = 0; j < r; ++j) {
        moved[j] = body.source(order[j]);
        similarity[j] = best[order[j]];
        assign[moved[j]] = begin + partner[order[j]];
    }
    merge_sizes(size, assign, keep, moved, size_out, n - r, r);
    for (int64_t k = 0; k < n - r; ++k) log_size[k] = std::log(size_out[k]);
}

constexpr int64_t kScratch = 1 << 20;  // floats that a thread keeps from call to call; samples beyond it take turns

template <class T>
void match(const T* metric, int64_t batch, int64_t n, int64_t heads, int64_t d, int64_t step_b, int64_t step_n,
           int64_t step_h, const float* size, int64_t r, int64_t prefix, int64_t suffix, int64_t* assign, int64_t* keep,
           int64_t* moved, float* similarity, float* size_out, float* log_size, int threads) {
    static thread_local std::vector<float> kept;
    const Body body(n, prefix, suffix);
    const int64_t floats = body.floats(d);
    const int64_t most = std::min(batch, std::max<int64_t>(kScratch / std::max<int64_t>(floats, 1), 1));
    std::vector<float> large;
    std::vector<float>& scratch = most * floats > kScratch ? large : kept;
    if (static_cast<int64_t>(scratch.size()) < most * floats) scratch.resize(most * floats);
    std::vector<float> best(most * body.sources);
    std::vector<int64_t> partner(most * body.sources);
    std::vector<char> null(most * body.length);
    const int64_t even = (body.sources + threads - 1) / threads;  // a few sources on many threads: smaller groups
    const int64_t group = std::clamp((even + kRows - 1) / kRows * kRows, kRows, kGroup);
    float* const directions = scratch.data();  // not `scratch` itself: threads would each see their own
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sum(d);
        for (int64_t start = 0; start < batch; start += most) {
            const int64_t samples = std::min(most, batch - start);
#pragma omp for collapse(2) schedule(static)
            for (int64_t b = 0; b < samples; ++b) {
                for (int64_t i = 0; i < body.length; ++i) {
                    const T* row = metric + (start + b) * step_b + (prefix + i) * step_n;
                    float* src = directions + b * floats;
                    float* panels = src + body.sources * d;
                    const bool source = (i % 2) == body.odd;
                    const int64_t rank = (source ? i - body.odd : i - 1 + body.odd) / 2;
                    float* out = source ? src + rank * d : panels + rank / kPanel * kPanel * d + rank % kPanel;
                    null[b * body.length + i] = direction(row, heads, d, step_h, sum.data(), out, source ? 1 : kPanel);
                }
            }
#pragma omp for collapse(2) schedule(static)
            for (int64_t b = 0; b < samples; ++b) {
                for (int64_t i = 0; i < body.sources; i += group) {
                    const float* src = directions + b * floats;
                    best_partners(body, src, src + body.sources * d, d, i, std::min(i + group, body.sources),
                                  best.data() + b * body.sources, partner.data() + b * body.sources);
                }
            }
#pragma omp for schedule(static)
            for (int64_t b = 0; b < samples; ++b) {
                const int64_t at = start + b;
                pair_nulls(body, null.data() + b * body.length, best.data() + b * body.sources,
                           partner.data() + b * body.sources);
                select(body, best.data() + b * body.sources, partner.data() + b * body.sources,
                       size ? size + at * n : nullptr, n, r, assign + at * n, keep + at * (n - r), moved + at * r,
                       similarity + at * r, size_out + at * (n - r), log_size + at * (n - r));
            }
        }
    }
}

template <class T>
void add_row(const T* x, const T* y, int64_t from, int64_t width, float* out) {
    for (int64_t c = 0; c < width; ++c) {
        T whole;
        store(&whole, load(x[from + c]) + (y ? load(y[from + c]) : 0.0f));
        out[c] = load(whole);
    }
}

// The members 0 to `count` of each of m groups in a sample, in their order: `first`, then `next` of each, -1 at the end.
template <class F>
void list_members(int64_t batch, int64_t m, int64_t count, F group, std::vector<int64_t>& first,
                  std::vector<int64_t>& next) {
    first.assign(batch * m, -1);
    next.assign(batch * count, -1);
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t j = count - 1; j >= 0; --j) next[b * count + j] = std::exchange(first[b * m + group(b, j)], j);
    }
}

// For every new token the list of tokens that join it, in the order of `moved`.
void joining(const int64_t* assign, const int64_t* moved, int64_t batch, int64_t n, int64_t m, int64_t r,
             std::vector<int64_t>& first, std::vector<int64_t>& next) {
    const auto group = [=](int64_t b, int64_t j) { return assign[b * n + moved[b * r + j]]; };
    list_members(batch, m, r, group, first, next);
}

// y, where it is not null, is added to x first; the sum is rounded to T, as the add of its own would round it.
template <class T>
void merge_rows(const T* x, const T* y, const float* size, const float* size_out, const int64_t* assign, const int64_t* keep,
                const int64_t* moved, T* out, int64_t batch, int64_t n, int64_t m, int64_t r, int64_t width,
                int threads) {
    std::vector<int64_t> first, next;
    joining(assign, moved, batch, n, m, r, first, next);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sum(width), own(width);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t k = 0; k < m; ++k) {
                const int64_t from = (b * n + keep[b * m + k]) * width;
                T* to = out + (b * m + k) * width;
                int64_t j = first[b * m + k];
                if (j < 0) {
                    if (y) {
                        for (int64_t c = 0; c < width; ++c) store(to + c, load(x[from + c]) + load(y[from + c]));
                    } else {
                        std::memcpy(to, x + from, width * sizeof(T));
                    }
                    continue;
                }
                add_row(x, y, from, width, own.data());
                sum = own;
                const float whole = size_out[b * m + k];
                for (; j >= 0; j = next[b * r + j]) {
                    const int64_t i = b * n + moved[b * r + j];
                    const float share = (size ? size[i] : 1.0f) / whole;
                    for (int64_t c = 0; c < width; ++c) {
                        T joins;
                        store(&joins, load(x[i * width + c]) + (y ? load(y[i * width + c]) : 0.0f));
                        sum[c] += (load(joins) - own[c]) * share;
                    }
                }
                for (int64_t c = 0; c < width; ++c) store(to + c, sum[c]);
            }
        }
    }
}

// unmerge: each old token gets the row of its group. It copies bytes, so it takes any dtype.
void copy_rows(const char* x, const int64_t* index, char* out, int64_t batch, int64_t m, int64_t n, int64_t bytes,
               int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < n; ++i) {
            std::memcpy(out + (b * n + i) * bytes, x + (b * m + index[b * n + i]) * bytes, bytes);
        }
    }
}

// The gradient of unmerge: each group's sum, its tokens in their order.
template <class T>
void sum_rows(const T* grad, const int64_t* index, T* out, int64_t batch, int64_t m, int64_t n, int64_t width,
              int threads) {
    std::vector<int64_t> first, next;
    list_members(batch, m, n, [=](int64_t b, int64_t i) { return index[b * n + i]; }, first, next);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sum(width);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t k = 0; k < m; ++k) {
                T* to = out + (b * m + k) * width;
                int64_t i = first[b * m + k];
                if (i >= 0 && next[b * n + i] < 0) {
                    std::memcpy(to, grad + (b * n + i) * width, width * sizeof(T));
                    continue;
                }
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (; i >= 0; i = next[b * n + i]) {
                    const T* row = grad + (b * n + i) * width;
                    for (int64_t c = 0; c < width; ++c) sum[c] += load(row[c]);
                }
                for (int64_t c = 0; c < width; ++c) store(to + c, sum[c]);
            }
        }
    }
}

// The gradient of merge: each old token gets its share of its group's row.
template <class T>
void share_rows(const T* grad, const float* size, const float* size_out, const int64_t* assign, T* out, int64_t batch,
                int64_t m, int64_t n, int64_t width, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t k = b * m + assign[b * n + i];
            const float share = (size ? size[b * n + i] : 1.0f) / size_out[k];
            const T* from = grad + k * width;
            T* to = out + (b * n + i) * width;
            for (int64_t c = 0; c < width; ++c) store(to + c, load(from[c]) * share);
        }
    }
}

// Products in bfloat16 with the instruction for them. The library behind ATen keeps half a MiB of code for each number of
// rows that it meets, and every layer of a merged model has another: here there is one loop for any number. A row's sum
// has one order, whatever stands beside it.
#if defined(__AVX512BF16__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TOME_PRODUCTS
#endif
#endif
#if defined(TOME_PRODUCTS)
using Sums = float __attribute__((vector_size(64)));
using Pairs16 = int32_t __attribute__((vector_size(64)));  // two bfloat16 in each
using SumsAt = float __attribute__((vector_size(64), aligned(4), may_alias));
using Pairs16At = int32_t __attribute__((vector_size(64), aligned(2), may_alias));
constexpr int64_t kHigh = 6, kAcross = 4, kWide = 16 * kAcross;  // a tile takes 24 of 32 registers

inline Sums add_products(Sums sum, Pairs16 a, Pairs16 b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    return sum;
}

// Between rows i and i + step, i without the bit `step`, the lanes with it are exchanged: with steps 1, 2, 4 and 8 rows
// become columns.
template <int step>
inline void exchange(Pairs16* row) {
#define TOME_FIRST(l) ((l) & step ? 16 + (l) - step : (l))
#define TOME_SECOND(l) ((l) & step ? 16 + (l) : (l) + step)
#define TOME_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        if (i & step) continue;
        const Pairs16 a = row[i], b = row[i + step];
        row[i] = __builtin_shufflevector(a, b, TOME_LANES(TOME_FIRST));
        row[i + step] = __builtin_shufflevector(a, b, TOME_LANES(TOME_SECOND));
    }
}

// `count` rows of pairs, `step` apart -> panel [pairs, kWide], zeros behind the last row.
void pack(const int32_t* rows, int64_t step, int64_t count, int64_t pairs, int32_t* panel) {
    const int64_t whole = count == kWide ? pairs / 16 * 16 : 0;
    for (int64_t c = 0; c < whole; c += 16) {
        for (int64_t n = 0; n < kWide; n += 16) {
            Pairs16 held[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) held[i] = *reinterpret_cast<const Pairs16At*>(rows + (n + i) * step + c);
            exchange<1>(held);
            exchange<2>(held);
            exchange<4>(held);
            exchange<8>(held);
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) *reinterpret_cast<Pairs16*>(panel + (c + i) * kWide + n) = held[i];
        }
    }
    if (count < kWide) std::fill(panel, panel + pairs * kWide, 0);
    for (int64_t n = 0; n < count; ++n) {
        for (int64_t c = whole; c < pairs; ++c) panel[c * kWide + n] = rows[n * step + c];
    }
}

// found [kHigh, kWide] = first + rows by panel. Not inlined: its sums then stay in registers.
__attribute__((noinline)) void tile_of(const int32_t* const* rows, const int32_t* panel, int64_t pairs, const float* first,
                                       float* found) {
    Sums sum[kHigh][kAcross];
#pragma GCC unroll 6
    for (int64_t i = 0; i < kHigh; ++i) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kAcross; ++v) sum[i][v] = *reinterpret_cast<const SumsAt*>(first + v * 16);
    }
    for (int64_t c = 0; c < pairs; ++c) {
        Pairs16 along[kAcross];
#pragma GCC unroll 4
        for (int64_t v = 0; v < kAcross; ++v) along[v] = *reinterpret_cast<const Pairs16*>(panel + c * kWide + v * 16);
#pragma GCC unroll 6
        for (int64_t i = 0; i < kHigh; ++i) {
            const Pairs16 pair = Pairs16{} + rows[i][c];
#pragma GCC unroll 4
            for (int64_t v = 0; v < kAcross; ++v) sum[i][v] = add_products(sum[i][v], pair, along[v]);
        }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < kHigh; ++i) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kAcross; ++v) *reinterpret_cast<SumsAt*>(found + i * kWide + v * 16) = sum[i][v];
    }
}

// out [m, n] = x [m, k] by the transpose of weight [n, k], plus bias [n] where it is not null; steps between rows. k is even.
void product(const bfloat16* x, int64_t step_x, const bfloat16* weight, int64_t step_w, const bfloat16* bias,
             bfloat16* out, int64_t m, int64_t n, int64_t k, int threads) {
    const int64_t pairs = k / 2, panels = (n + kWide - 1) / kWide, blocks = (m + kHigh - 1) / kHigh;
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<int32_t> scratch;
        if (static_cast<int64_t>(scratch.size()) < pairs * kWide + 16) scratch.resize(pairs * kWide + 16);
        int32_t* panel = scratch.data();  // to a whole line of the cache: vectors across two take twice as long
        while (reinterpret_cast<uintptr_t>(panel) % 64) ++panel;
        float first[kWide], found[kHigh][kWide];
        int64_t held = -1;
#pragma omp for collapse(2) schedule(static)
        for (int64_t p = 0; p < panels; ++p) {
            for (int64_t i = 0; i < blocks; ++i) {
                const int64_t column = p * kWide, wide = std::min(kWide, n - column);
                if (std::exchange(held, p) != p) {
                    pack(reinterpret_cast<const int32_t*>(weight + column * step_w), step_w / 2, wide, pairs, panel);
                    for (int64_t c = 0; c < kWide; ++c) first[c] = bias && c < wide ? load(bias[column + c]) : 0.0f;
                }
                const int32_t* rows[kHigh];
                for (int64_t r = 0; r < kHigh; ++r) {
                    rows[r] = reinterpret_cast<const int32_t*>(x + std::min(i * kHigh + r, m - 1) * step_x);
                }
                tile_of(rows, panel, pairs, first, found[0]);
                for (int64_t r = 0; r < std::min(kHigh, m - i * kHigh); ++r) {
                    bfloat16* to = out + (i * kHigh + r) * n + column;
                    if (wide == kWide) {  // a constant length is what the compiler turns into vectors
                        for (int64_t c = 0; c < kWide; ++c) store(to + c, found[r][c]);
                    } else {
                        for (int64_t c = 0; c < wide; ++c) store(to + c, found[r][c]);
                    }
                }
            }
        }
    }
}
#endif

// exp and log to float32 precision for x <= 0 and normal x > 0, without branches or calls: loops over them vectorise,
// which those over the library's do only where the compiler may assume that there are no infinities.
inline float exp_of(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float held = std::max(x, -87.0f);
    const float whole = (held * 1.44269504f + kRound) - kRound;
    const float z = (held - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * z + 1.3981999507e-3f;
    y = y * z + 8.3334519073e-3f;
    y = y * z + 4.1665795894e-2f;
    y = y * z + 1.6666665459e-1f;
    y = y * z + 5.0000001201e-1f;
    y = y * z * z + z + 1.0f;
    const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : y * power;
}

inline float log_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int32_t power = (bits - 0x3f3504f3) >> 23;  // mantissas from sqrt(1/2) to sqrt(2)
    const int32_t rest = bits - (power << 23);
    float z;
    std::memcpy(&z, &rest, sizeof z);
    z -= 1.0f;
    float y = 7.0376836292e-2f;
    y = y * z - 1.1514610310e-1f;
    y = y * z + 1.1676998740e-1f;
    y = y * z - 1.2420140846e-1f;
    y = y * z + 1.4249322787e-1f;
    y = y * z - 1.6668057665e-1f;
    y = y * z + 2.0000714765e-1f;
    y = y * z - 2.4999993993e-1f;
    y = y * z + 3.3333331174e-1f;
    const float e = static_cast<float>(power);
    return z + (y * z * z * z - 2.12194440e-4f * e - 0.5f * z * z) + 0.693359375f * e;
}

// PiToMe's energy: for each of n tokens the mean over all of f(cosine), f(x) = x from `margin` on, exp(x - margin) - 1 below.
// Each pair is computed once, for both: a block of rows with one of columns writes the sums of its rows and of its columns
// to `part`, which are added in one order, whatever the threads.
constexpr int64_t kBlock = 48;  // whole tiles of any width
static_assert(kBlock % kRows == 0 && kBlock % kPanel == 0);

struct Pairs {
    int64_t n, d, blocks;
    float margin;
    const float *rows, *panels;  // directions [blocks * kBlock, d] and [.., d, kPanel], zeros behind the last token

    Pairs(int64_t n, int64_t d, float margin) : n(n), d(d), blocks((n + kBlock - 1) / kBlock), margin(margin) {}
    int64_t length() const { return blocks * kBlock; }

    // Sums over the tokens of block `b` for those of block `a` to part[b][a], and the other way round where they differ.
    void add(int64_t a, int64_t b, float* part) const {
        float along[kBlock] = {}, down[kBlock][kPanel] = {};
        for (int64_t p = 0; p < kBlock; p += kPanel) {
            const int64_t count = std::clamp<int64_t>(n - b * kBlock - p, 0, kPanel);
            for (int64_t i = 0; i < kBlock; i += kRows) {
                const float* of[kRows];
                for (int64_t k = 0; k < kRows; ++k) of[k] = rows + (a * kBlock + i + k) * d;
                Floats sum[kRows][kVectors] = {};
                products(of, panels + (b * kBlock + p) * d, d, sum);
                float found[kRows][kPanel];
                std::memcpy(found, sum, sizeof found);
                const int64_t many = std::clamp<int64_t>(n - a * kBlock - i, 0, kRows);
                for (int64_t k = 0; k < many; ++k) spread(found[k], count, along + p, down[i + k]);
            }
        }
        for (int64_t i = 0; i < kBlock; ++i) {
            float sum = 0;
            for (int64_t l = 0; l < kPanel; ++l) sum += down[i][l];
            part[b * length() + a * kBlock + i] = sum;
        }
        if (a != b) std::memcpy(part + a * length() + b * kBlock, along, sizeof along);
    }

   private:
    // f of one row's similarities, added to the sums of its columns and of the row.
    void spread(const float* alike, int64_t count, float* along, float* down) const {
        float held[kPanel];
        for (int64_t l = 0; l < kPanel; ++l) {
            const float x = alike[l], below = exp_of(std::min(x - margin, 0.0f)) - 1.0f;
            held[l] = x >= margin ? x : below;
        }
        for (int64_t l = count; l < kPanel; ++l) held[l] = 0.0f;
        for (int64_t l = 0; l < kPanel; ++l) {
            along[l] += held[l];
            down[l] += held[l];
        }
    }
};

void energy(const float* metric, int64_t batch, int64_t n, int64_t d, float margin, float* out, int threads) {
    Pairs pairs(n, d, margin);
    const int64_t length = pairs.length(), blocks = pairs.blocks;
    std::vector<float> rows(length * d), panels(length * d), part(blocks * length);
    std::vector<char> null(n);
    pairs.rows = rows.data();
    pairs.panels = panels.data();
    const float least = margin <= 0 ? 0.0f : exp_of(-margin) - 1.0f;
    const float most = margin <= 1 ? 1.0f : exp_of(1 - margin) - 1.0f;
    for (int64_t s = 0; s < batch; ++s) {
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> sum(d);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; ++i) {
                null[i] = direction(metric + (s * n + i) * d, 1, d, 0, sum.data(), rows.data() + i * d, 1);
                float* panel = panels.data() + i / kPanel * kPanel * d + i % kPanel;
                for (int64_t c = 0; c < d; ++c) panel[c * kPanel] = rows[i * d + c];
            }
#pragma omp for schedule(dynamic)
            for (int64_t a = 0; a < blocks; ++a) {
                for (int64_t b = a; b < blocks; ++b) pairs.add(a, b, part.data());
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; ++i) {
                float whole = 0;
                for (int64_t b = 0; b < blocks; ++b) whole += part[b * length + i];
                out[s * n + i] = whole / static_cast<float>(n);
            }
        }
        // Zeros have no direction, but are as alike as tokens can be.
        const int64_t zeros = std::count(null.begin(), null.end(), 1);
        for (int64_t i = 0; i < n; ++i) {
            if (null[i]) out[s * n + i] += (most - least) * static_cast<float>(zeros) / static_cast<float>(n);
        }
    }
}

// One row of a score term as float.
template <class T>
void load_row(const T* x, int64_t outer, int64_t inner, int64_t step_outer, int64_t step_inner, float* out) {
    for (int64_t a = 0; a < outer; ++a) {
        const T* at = x + a * step_outer;
        float* to = out + a * inner;
        if (step_inner == 1) {
            for (int64_t c = 0; c < inner; ++c) to[c] = load(at[c]);
        } else {
            for (int64_t c = 0; c < inner; ++c) to[c] = load(at[c * step_inner]);
        }
    }
}

template <class T>
void merge_bias_rows(const T* x, const int64_t* steps, const float* size, const float* size_out, const int64_t* assign,
                     const int64_t* keep, const int64_t* moved, T* out, int64_t batch, int64_t n, int64_t m, int64_t r,
                     int64_t outer, int64_t inner, int threads) {
    const int64_t width = outer * inner;
    std::vector<int64_t> first, next;
    joining(assign, moved, batch, n, m, r, first, next);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> own(width), top(width), sum(width), joins(width);
        const auto row = [&](int64_t b, int64_t i, std::vector<float>& to) {
            load_row(x + b * steps[0] + i * steps[1], outer, inner, steps[2], steps[3], to.data());
        };
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t k = 0; k < m; ++k) {
                T* to = out + (b * m + k) * width;
                row(b, keep[b * m + k], own);
                const int64_t head = first[b * m + k];
                if (head < 0) {
                    for (int64_t c = 0; c < width; ++c) store(to + c, own[c]);
                    continue;
                }
                // Finite, so that a group of -inf alone has no difference of infinities.
                for (int64_t c = 0; c < width; ++c) top[c] = std::max(own[c], std::numeric_limits<float>::lowest());
                for (int64_t j = head; j >= 0; j = next[b * r + j]) {
                    row(b, moved[b * r + j], joins);
                    for (int64_t c = 0; c < width; ++c) top[c] = std::max(top[c], joins[c]);
                }
                const float weight = size ? size[b * n + keep[b * m + k]] : 1.0f;
                for (int64_t c = 0; c < width; ++c) sum[c] = weight * exp_of(own[c] - top[c]);
                for (int64_t j = head; j >= 0; j = next[b * r + j]) {
                    const float more = size ? size[b * n + moved[b * r + j]] : 1.0f;
                    row(b, moved[b * r + j], joins);
                    for (int64_t c = 0; c < width; ++c) sum[c] += more * exp_of(joins[c] - top[c]);
                }
                const float scale = 1.0f / size_out[b * m + k];
                for (int64_t c = 0; c < width; ++c) {
                    const float mean = std::max(sum[c] * scale, std::numeric_limits<float>::min());
                    const float found = std::max(log_of(mean) + top[c], std::numeric_limits<float>::lowest());
                    own[c] = sum[c] > 0.0f ? found : -std::numeric_limits<float>::infinity();
                }
                for (int64_t c = 0; c < width; ++c) store(to + c, own[c]);
            }
        }
    }
}

// -- operators --------------------------------------------------------------------------------------------------------
//
// Arguments and results are those of the same operators in tome_fx/ops/; floating ones are float32 or bfloat16. All
// have the signature that the dispatcher calls: `stack` holds the arguments, then the results.

using Shape = std::vector<int64_t>;

void check(AOTITorchError failed) {
    if (failed) throw std::runtime_error("tome_cpu: torch could not do what a kernel asked for");
}

// What a function of the C ABI writes to its last argument.
template <class T, class F>
T asked(F function, AtenTensorHandle of) {
    T found;
    check(function(of, &found));
    return found;
}

// A reference to a tensor; none for an optional argument that is not there.
class Tensor {
   public:
    explicit Tensor(AtenTensorHandle held = nullptr) : held(held) {}
    Tensor(Tensor&& other) noexcept : held(std::exchange(other.held, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(held, other.held);
        return *this;
    }
    ~Tensor() {
        if (held) aoti_torch_delete_tensor_object(held);
    }

    int64_t dim() const { return asked<int64_t>(aoti_torch_get_dim, held); }
    int64_t numel() const { return asked<int64_t>(aoti_torch_get_numel, held); }
    int32_t dtype() const { return asked<int32_t>(aoti_torch_get_dtype, held); }
    int64_t size(int64_t d) const { return asked<int64_t*>(aoti_torch_get_sizes, held)[d]; }
    int64_t stride(int64_t d) const { return asked<int64_t*>(aoti_torch_get_strides, held)[d]; }
    Shape shape() const {
        const int64_t* sizes = asked<int64_t*>(aoti_torch_get_sizes, held);
        return Shape(sizes, sizes + dim());
    }
    bool there() const { return held; }
    AtenTensorHandle get() const { return held; }
    // Null for no tensor.
    template <class T>
    T* data() const {
        return held ? static_cast<T*>(asked<void*>(aoti_torch_get_data_ptr, held)) : nullptr;
    }
    // The same values in the order of their dims.
    Tensor dense() &&;
    StableIValue result() && { return reinterpret_cast<StableIValue>(std::exchange(held, nullptr)); }

   private:
    AtenTensorHandle held;
};

Tensor empty(const Shape& shape, int32_t dtype) {
    Shape strides(shape.size());
    for (int64_t d = static_cast<int64_t>(shape.size()) - 1, step = 1; d >= 0; --d) {
        strides[d] = step;
        step *= std::max<int64_t>(shape[d], 1);
    }
    AtenTensorHandle made;
    check(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                   aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

Tensor Tensor::dense() && {
    if (!held || asked<bool>(aoti_torch_is_contiguous, held)) return std::move(*this);
    Tensor out = empty(shape(), dtype());
    check(aoti_torch_copy_(out.held, held, false));
    return out;
}

std::string named(int32_t dtype, const Shape& shape, bool more) {
    std::string text = dtype == aoti_torch_dtype_float32()    ? "float32 ["
                       : dtype == aoti_torch_dtype_bfloat16() ? "bfloat16 ["
                       : dtype == aoti_torch_dtype_int64()    ? "int64 ["
                                                              : "of another dtype, [";
    for (const int64_t length : shape) text += std::to_string(length) + ", ";
    if (more) return text + "...]";
    if (!shape.empty()) text.resize(text.size() - 2);
    return text + "]";
}

// The kernels read by these shapes: a tensor that has another is refused. more: any dims may follow.
void expect(const char* name, const Tensor& x, const Shape& wanted, int32_t dtype, bool more = false) {
    if (!x.there()) return;
    const int64_t* sizes = asked<int64_t*>(aoti_torch_get_sizes, x.get());
    const int64_t rank = x.dim(), leading = static_cast<int64_t>(wanted.size());
    if (x.dtype() == dtype && (more ? rank >= leading : rank == leading) && std::equal(wanted.begin(), wanted.end(), sizes)) {
        return;
    }
    throw std::invalid_argument(std::string(name) + " must be " + named(dtype, wanted, more) + " to fit the sample axes and "
                                "tokens of the others, and is " + named(x.dtype(), x.shape(), false));
}

// An index of tokens, int64 [*sample, n].
Tensor indices(const char* name, Tensor&& x) {
    if (x.dim() < 1 || x.dtype() != aoti_torch_dtype_int64()) {
        throw std::invalid_argument(std::string(name) + " must be int64 [*sample, n], and is " +
                                    named(x.dtype(), x.shape(), false));
    }
    return std::move(x).dense();
}

// The arguments of a call in their order. Each is ours and is taken once.
struct Arguments {
    const StableIValue* next;

    Tensor tensor() { return Tensor(reinterpret_cast<AtenTensorHandle>(*next++)); }
    // An optional argument is a pointer to its value, on the heap.
    Tensor optional() {
        auto* at = reinterpret_cast<StableIValue*>(*next++);
        if (!at) return Tensor();
        Tensor held(reinterpret_cast<AtenTensorHandle>(*at));
        delete at;
        return held;
    }
    int64_t number() { return static_cast<int64_t>(*next++); }
    double real() {
        double found;
        std::memcpy(&found, next++, sizeof found);
        return found;
    }
    bool flag() {
        bool found;
        std::memcpy(&found, next++, sizeof found);
        return found;
    }
};

// Calls with T{} for the element type of x.
template <class F>
void by_dtype(const Tensor& x, F call) {
    const int32_t dtype = x.dtype();
    if (dtype == aoti_torch_dtype_float32()) {
        call(float{});
    } else if (dtype == aoti_torch_dtype_bfloat16()) {
        call(bfloat16{});
    } else {
        throw std::invalid_argument("tome_cpu: float32 or bfloat16 only");
    }
}

int threads() {
    uint32_t found;
    check(torch_get_num_threads(&found));
    return static_cast<int>(found);
}

// The shape of x with another length of dim d.
Shape resized(const Tensor& x, int64_t d, int64_t length) {
    Shape shape = x.shape();
    shape[d] = length;
    return shape;
}

// A dense index is where the kernels read and write.
void check_range(const Tensor& index, int64_t end) {
    const int64_t* at = index.data<const int64_t>();
    if (!std::all_of(at, at + index.numel(), [end](int64_t i) { return i >= 0 && i < end; })) {
        throw std::out_of_range("an index of tokens or groups is out of range");
    }
}

// What a merge needs of a matching: assign [*sample, n], keep [*sample, m], moved [*sample, r]; m is n - r, or more where
// rows stay that stand for nothing.
struct Index {
    Tensor assign, keep, moved;
    int64_t lead, n, r, m, batch;

    explicit Index(Arguments& given)
        : assign(indices("assign", given.tensor())),
          keep(indices("keep", given.tensor())),
          moved(indices("moved", given.tensor())),
          lead(assign.dim() - 1),
          n(assign.size(lead)),
          r(moved.size(lead)),
          m(std::min(std::max(keep.size(lead), n - r), n)),
          batch(n ? assign.numel() / n : 0) {
        const int32_t whole = aoti_torch_dtype_int64();
        expect("moved", moved, rows(std::min(r, n)), whole);
        expect("keep", keep, rows(m), whole);
        check_range(assign, m);
        check_range(keep, n);
        check_range(moved, n);
    }

    // [*sample, length]
    Shape rows(int64_t length) const { return resized(assign, lead, length); }
    void expect_sizes(const Tensor& size, const Tensor& size_out) const {
        expect("size", size, rows(n), aoti_torch_dtype_float32());
        expect("size_out", size_out, rows(m), aoti_torch_dtype_float32());
    }
    // [*sample, m, *rest] of an x [*sample, n, *rest].
    Shape merged(const Tensor& x) const { return resized(x, lead, m); }
};

struct Axis {
    int64_t length = 1, step = 0;
};

// The dims from `start` to `stop` as the fewest axes that address them; those of length 1 are left out.
std::vector<Axis> axes(const Tensor& x, int64_t start, int64_t stop) {
    std::vector<Axis> found;
    for (int64_t d = start; d < stop; ++d) {
        const int64_t length = x.size(d), step = x.stride(d);
        if (length == 1) continue;
        if (!found.empty() && found.back().step == length * step) {
            found.back() = {found.back().length * length, step};
        } else {
            found.push_back({length, step});
        }
    }
    return found;
}

void match_size(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    Tensor metric = given.tensor();
    const Tensor size = given.optional().dense();
    const int64_t r = given.number(), prefix = given.number(), suffix = given.number();
    const bool heads = given.flag();

    const int64_t last = metric.dim() - 1, lead = last - (heads ? 2 : 1);
    if (lead < 0) throw std::invalid_argument("metric must be [*sample, N, d], with heads [*sample, N, h, d]");
    std::vector<Axis> samples = axes(metric, 0, lead);
    if (samples.size() > 1 || (metric.size(last) > 1 && metric.stride(last) != 1)) {
        metric = std::move(metric).dense();
        samples = axes(metric, 0, lead);
    }
    const Axis sample = samples.empty() ? Axis{} : samples[0];
    const int64_t n = metric.size(lead), many = heads ? metric.size(lead + 1) : 1;
    if (r < 0 || prefix < 0 || suffix < 0 || 2 * r > n - prefix - suffix) {
        throw std::invalid_argument("r must be 0 to (N - prefix - suffix) // 2");
    }
    const int64_t step_h = heads ? metric.stride(lead + 1) : 0;
    Shape shape = metric.shape();
    shape.resize(lead + 1);
    expect("size", size, shape, aoti_torch_dtype_float32());
    const auto made = [&shape](int64_t length, int32_t dtype) {
        shape.back() = length;
        return empty(shape, dtype);
    };
    const int32_t whole = aoti_torch_dtype_int64(), real = aoti_torch_dtype_float32();
    Tensor assign = made(n, whole), keep = made(n - r, whole), moved = made(r, whole);
    Tensor similarity = made(r, real), size_out = made(n - r, real), log_size = made(n - r, real);
    by_dtype(metric, [&](auto element) {
        match(metric.data<const decltype(element)>(), sample.length, n, many, metric.size(last), sample.step,
              metric.stride(lead), step_h, size.data<const float>(), r, prefix, suffix, assign.data<int64_t>(),
              keep.data<int64_t>(), moved.data<int64_t>(), similarity.data<float>(), size_out.data<float>(),
              log_size.data<float>(), threads());
    });
    for (Tensor* out : {&assign, &keep, &moved, &similarity, &size_out, &log_size}) *stack++ = std::move(*out).result();
}

void merge_of(const Tensor& x, const Tensor& y, Arguments given, StableIValue* stack) {
    const Tensor size = given.optional().dense(), size_out = given.tensor().dense();
    const Index index(given);
    expect("x", x, index.rows(index.n), x.dtype(), true);
    expect("y", y, x.shape(), x.dtype());
    index.expect_sizes(size, size_out);
    Tensor out = empty(index.merged(x), x.dtype());
    const int64_t rows = index.batch * index.n, width = rows ? x.numel() / rows : 0;
    by_dtype(x, [&](auto element) {
        using T = decltype(element);
        merge_rows(x.data<const T>(), y.data<const T>(), size.data<const float>(), size_out.data<const float>(),
                   index.assign.data<const int64_t>(), index.keep.data<const int64_t>(),
                   index.moved.data<const int64_t>(), out.data<T>(), index.batch, index.n, index.m, index.r, width,
                   threads());
    });
    *stack = std::move(out).result();
}

void merge(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    const Tensor x = given.tensor().dense();
    merge_of(x, Tensor(), given, stack);
}

void merge_add(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    const Tensor x = given.tensor().dense(), y = given.tensor().dense();
    merge_of(x, y, given, stack);
}

void merge_backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    const Tensor grad = given.tensor().dense();
    const Tensor size = given.optional().dense(), size_out = given.tensor().dense();
    const Index index(given);
    expect("grad", grad, index.rows(index.m), grad.dtype(), true);
    index.expect_sizes(size, size_out);
    Tensor out = empty(resized(grad, index.lead, index.n), grad.dtype());
    const int64_t m = index.m, rows = index.batch * m, width = rows ? grad.numel() / rows : 0;
    by_dtype(grad, [&](auto element) {
        using T = decltype(element);
        share_rows(grad.data<const T>(), size.data<const float>(), size_out.data<const float>(),
                   index.assign.data<const int64_t>(), out.data<T>(), index.batch, m, index.n, width, threads());
    });
    *stack = std::move(out).result();
}

// An index of groups [*sample, n] and the numbers of groups and of elements in the rows of x [*sample, m, *rest].
struct Groups {
    int64_t lead, n, m, batch, width;

    // rows: how many x has to have, -1 for any number.
    Groups(const Tensor& x, const Tensor& index, int64_t rows, int64_t groups)
        : lead(index.dim() - 1), n(index.size(lead)), m(groups), batch(n ? index.numel() / n : 0), width(1) {
        Shape shape = index.shape();
        shape.pop_back();
        if (rows >= 0) shape.push_back(rows);
        expect(rows < 0 ? "x" : "grad", x, shape, x.dtype(), true);
        if (x.dim() <= lead) throw std::invalid_argument("x must be [*sample, groups, *rest] for an index [*sample, n]");
        if (rows < 0) m = x.size(lead);
        for (int64_t d = lead + 1; d < x.dim(); ++d) width *= x.size(d);
        check_range(index, m);
    }
};

void unmerge(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    const Tensor x = given.tensor().dense(), index = indices("index", given.tensor());
    const Groups groups(x, index, -1, 0);
    Tensor out = empty(resized(x, groups.lead, groups.n), x.dtype());
    const int64_t bytes = groups.width * static_cast<int64_t>(aoti_torch_dtype_element_size(x.dtype()));
    copy_rows(x.data<const char>(), index.data<const int64_t>(), out.data<char>(), groups.batch, groups.m, groups.n, bytes,
              threads());
    *stack = std::move(out).result();
}

void unmerge_backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    const Tensor grad = given.tensor().dense(), index = indices("index", given.tensor());
    const int64_t count = given.number();
    if (count < 0) throw std::invalid_argument("groups must be 0 or more");
    const Groups groups(grad, index, index.size(index.dim() - 1), count);
    Tensor out = empty(resized(grad, groups.lead, groups.m), grad.dtype());
    by_dtype(grad, [&](auto element) {
        using T = decltype(element);
        sum_rows(grad.data<const T>(), index.data<const int64_t>(), out.data<T>(), groups.batch, groups.m, groups.n,
                 groups.width, threads());
    });
    *stack = std::move(out).result();
}

// x is read through its strides: terms that all samples share are expanded, and those of windows transposed.
void merge_bias(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    Tensor x = given.tensor();
    const Tensor size = given.optional().dense(), size_out = given.tensor().dense();
    const Index index(given);
    expect("x", x, index.rows(index.n), x.dtype(), true);
    index.expect_sizes(size, size_out);
    std::vector<Axis> samples = axes(x, 0, index.lead), rest = axes(x, index.lead + 1, x.dim());
    if (samples.size() > 1 || rest.size() > 2) {
        x = std::move(x).dense();
        samples = axes(x, 0, index.lead);
        rest = axes(x, index.lead + 1, x.dim());
    }
    rest.insert(rest.begin(), 2 - rest.size(), Axis{});
    const int64_t steps[] = {samples.empty() ? 0 : samples[0].step, x.stride(index.lead), rest[0].step, rest[1].step};
    Tensor out = empty(index.merged(x), x.dtype());
    by_dtype(x, [&](auto element) {
        using T = decltype(element);
        merge_bias_rows(x.data<const T>(), steps, size.data<const float>(), size_out.data<const float>(),
                        index.assign.data<const int64_t>(), index.keep.data<const int64_t>(),
                        index.moved.data<const int64_t>(), out.data<T>(), index.batch, index.n, index.m, index.r,
                        rest[0].length, rest[1].length, threads());
    });
    *stack = std::move(out).result();
}

void merge_size(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    const Tensor size = given.optional().dense();
    const Index index(given);
    expect("size", size, index.rows(index.n), aoti_torch_dtype_float32());
    Tensor out = empty(index.merged(index.assign), aoti_torch_dtype_float32());
    const float* before = size.data<const float>();
    const int64_t m = index.m;
    for (int64_t b = 0; b < index.batch; ++b) {
        merge_sizes(before ? before + b * index.n : nullptr, index.assign.data<const int64_t>() + b * index.n,
                    index.keep.data<const int64_t>() + b * m, index.moved.data<const int64_t>() + b * index.r,
                    out.data<float>() + b * m, m, index.r);
    }
    *stack = std::move(out).result();
}

void energy_of(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    const Tensor metric = given.tensor().dense();
    const float margin = static_cast<float>(given.real());
    if (metric.dim() != 3 || metric.dtype() != aoti_torch_dtype_float32()) {
        throw std::invalid_argument("metric must be float32 [batch, N, d]");
    }
    const int64_t batch = metric.size(0), n = metric.size(1);
    Tensor out = empty({batch, n}, aoti_torch_dtype_float32());
    energy(metric.data<const float>(), batch, n, metric.size(2), margin, out.data<float>(), threads());
    *stack = std::move(out).result();
}

#if defined(TOME_PRODUCTS)
void product_of(StableIValue* stack, uint64_t, uint64_t) {
    Arguments given{stack};
    Tensor x = given.tensor();
    const Tensor weight = given.tensor(), bias = given.optional().dense();
    const int32_t half = aoti_torch_dtype_bfloat16();
    if (x.dim() != 2 || x.dtype() != half || weight.dim() != 2) {
        throw std::invalid_argument("x and weight must be bfloat16 [m, k] and [k, n]");
    }
    const int64_t m = x.size(0), k = x.size(1), n = weight.size(1);
    expect("weight", weight, {k, n}, half);
    expect("bias", bias, {n}, half);
    if (k % 2 || weight.stride(0) != 1 || weight.stride(1) % 2) {
        throw std::invalid_argument("weight must be the transpose of a dense [n, k], k even");
    }
    if (x.stride(1) != 1) x = std::move(x).dense();
    Tensor out = empty({m, n}, half);
    product(x.data<const bfloat16>(), x.stride(0), weight.data<const bfloat16>(), weight.stride(1), bias.data<const bfloat16>(),
            out.data<bfloat16>(), m, n, k, threads());
    *stack = std::move(out).result();
}
#endif

}  // namespace

// Registers the operators for CPU tensors, for good, in a namespace that has their schemas (cpu.py); whether it could.
extern "C" bool tome_register(const char* name) {
    TorchLibraryHandle library;
    if (aoti_torch_library_init_impl(name, "CPU", __FILE__, __LINE__, &library)) return false;
#if defined(TOME_PRODUCTS)
    if (aoti_torch_library_impl(library, "product", product_of)) return false;
#endif
    return !aoti_torch_library_impl(library, "match_size", match_size) &&
           !aoti_torch_library_impl(library, "energy", energy_of) &&
           !aoti_torch_library_impl(library, "merge", merge) &&
           !aoti_torch_library_impl(library, "merge_add", merge_add) &&
           !aoti_torch_library_impl(library, "merge_bias", merge_bias) &&
           !aoti_torch_library_impl(library, "merge_size", merge_size) &&
           !aoti_torch_library_impl(library, "merge_backward", merge_backward) &&
           !aoti_torch_library_impl(library, "unmerge", unmerge) &&
           !aoti_torch_library_impl(library, "unmerge_backward", unmerge_backward);
}
