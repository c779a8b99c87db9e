// The CPU form of tome::match and tome::merge, built by Inductor's own C++ compiler at first use (cpu.py).
//
// Between the matrix products of a transformer, two dozen ATen calls cost more than their arithmetic: here matching is
// a product between two passes, in blocks of rows, and merging is one pass. All loops are parallel over rows, each row
// is summed in the order of `moved`, so results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

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

// The largest entry of a row and the first place where it stands; 0 in a row of NaN.
float largest(const float* row, int64_t length, int64_t* place) {
    float top[kLanes];
    int32_t where[kLanes] = {};
    std::fill_n(top, kLanes, -std::numeric_limits<float>::infinity());
    const int64_t whole = length - length % kLanes;
    for (int64_t j = 0; j < whole; j += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
            const bool more = row[j + l] > top[l];
            top[l] = more ? row[j + l] : top[l];
            where[l] = more ? static_cast<int32_t>(j + l) : where[l];
        }
    }
    for (int64_t j = whole; j < length; ++j) {
        if (row[j] > top[j - whole]) {
            top[j - whole] = row[j];
            where[j - whole] = static_cast<int32_t>(j);
        }
    }
    int64_t best = 0;
    for (int64_t l = 1; l < kLanes; ++l) {
        if (top[l] > top[best] || (top[l] == top[best] && where[l] < where[best])) best = l;
    }
    *place = where[best];
    return top[best];
}

// Sum over heads, then divide by the norm: even positions of the body to src, odd ones to dst.
template <class T>
void directions(const T* metric, int64_t batch, int64_t n, int64_t heads, int64_t d, int64_t step_b, int64_t step_n,
                int64_t step_h, int64_t prefix, int64_t suffix, float* src, float* dst, int threads) {
    const int64_t body = n - prefix - suffix;
    const int64_t odd = prefix % 2;  // sources stand at even positions of the whole sequence
    const int64_t sources = (body - odd + 1) / 2, destinations = body - sources;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < body; ++i) {
            const bool source = (i % 2) == odd;
            const int64_t rank = source ? (i - odd) / 2 : (i - 1 + odd) / 2;
            float* out = source ? src + (b * sources + rank) * d : dst + (b * destinations + rank) * d;
            const T* row = metric + b * step_b + (prefix + i) * step_n;
            float squares[kLanes] = {};
            for (int64_t c = 0; c < d; c += kLanes) {
                const int64_t width = std::min(kLanes, d - c);
                float sum[kLanes] = {};
                for (int64_t h = 0; h < heads; ++h) {
                    const T* at = row + h * step_h + c;
                    if (width == kLanes) {  // a constant length is what the compiler turns into vectors
                        for (int64_t l = 0; l < kLanes; ++l) sum[l] += load(at[l]);
                    } else {
                        for (int64_t l = 0; l < width; ++l) sum[l] += load(at[l]);
                    }
                }
                std::memcpy(out + c, sum, width * sizeof(float));
                for (int64_t l = 0; l < kLanes; ++l) squares[l] += sum[l] * sum[l];
            }
            float square = 0;
            for (int64_t l = 0; l < kLanes; ++l) square += squares[l];
            const float scale = 1.0f / std::max(std::sqrt(square), kSmallestNorm);
            for (int64_t c = 0; c < d; ++c) out[c] *= scale;
        }
    }
}

void merge_sizes(const float* size, const int64_t* assign, const int64_t* keep, const int64_t* moved, float* out,
                 int64_t m, int64_t r) {
    for (int64_t k = 0; k < m; ++k) out[k] = size ? size[keep[k]] : 1.0f;
    for (int64_t j = 0; j < r; ++j) out[assign[moved[j]]] += size ? size[moved[j]] : 1.0f;
}

template <class T>
void add_row(const T* x, const T* y, int64_t from, int64_t width, float* out) {
    for (int64_t c = 0; c < width; ++c) {
        T whole;
        store(&whole, load(x[from + c]) + (y ? load(y[from + c]) : 0.0f));
        out[c] = load(whole);
    }
}

// For every new token the list of tokens that join it, in the order of `moved`: `first`, then `next` of each.
void joining(const int64_t* assign, const int64_t* moved, int64_t batch, int64_t n, int64_t r,
             std::vector<int64_t>& first, std::vector<int64_t>& next) {
    const int64_t m = n - r;
    first.assign(batch * m, -1);
    next.assign(batch * r, -1);
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t j = r - 1; j >= 0; --j) {
            int64_t& head = first[b * m + assign[b * n + moved[b * r + j]]];
            next[b * r + j] = head;
            head = j;
        }
    }
}

// y, where it is not null, is added to x first; the sum is rounded to T, as the add of its own would round it.
template <class T>
void merge_rows(const T* x, const T* y, const float* size, const float* size_out, const int64_t* assign, const int64_t* keep,
                const int64_t* moved, T* out, int64_t batch, int64_t n, int64_t r, int64_t width, int threads) {
    const int64_t m = n - r;
    std::vector<int64_t> first, next;
    joining(assign, moved, batch, n, r, first, next);
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

// One row of a score term as float, no lower than the lowest number: a row that is masked out whole must not be -inf.
template <class T>
void load_row(const T* x, int64_t outer, int64_t inner, int64_t step_outer, int64_t step_inner, float* out) {
    for (int64_t a = 0; a < outer; ++a) {
        const T* at = x + a * step_outer;
        float* to = out + a * inner;
        if (step_inner == 1) {
            for (int64_t c = 0; c < inner; ++c) to[c] = std::max(load(at[c]), std::numeric_limits<float>::lowest());
        } else {
            for (int64_t c = 0; c < inner; ++c) {
                to[c] = std::max(load(at[c * step_inner]), std::numeric_limits<float>::lowest());
            }
        }
    }
}

template <class T>
void merge_bias_rows(const T* x, const int64_t* steps, const float* size, const float* size_out, const int64_t* assign,
                     const int64_t* keep, const int64_t* moved, T* out, int64_t batch, int64_t n, int64_t r,
                     int64_t outer, int64_t inner, int threads) {
    const int64_t m = n - r, width = outer * inner;
    std::vector<int64_t> first, next;
    joining(assign, moved, batch, n, r, first, next);
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
                top = own;
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
                    own[c] = std::max(log_of(mean) + top[c], std::numeric_limits<float>::lowest());
                }
                for (int64_t c = 0; c < width; ++c) store(to + c, own[c]);
            }
        }
    }
}

}  // namespace

extern "C" {

// Both kinds of element, by their size in bytes: 4 is float32, 2 is bfloat16.
void tome_directions(const void* metric, int64_t bytes, int64_t batch, int64_t n, int64_t heads, int64_t d,
                     int64_t step_b, int64_t step_n, int64_t step_h, int64_t prefix, int64_t suffix, float* src,
                     float* dst, int64_t threads) {
    if (bytes == 4) {
        directions(static_cast<const float*>(metric), batch, n, heads, d, step_b, step_n, step_h, prefix, suffix, src,
                   dst, static_cast<int>(threads));
    } else {
        directions(static_cast<const bfloat16*>(metric), batch, n, heads, d, step_b, step_n, step_h, prefix, suffix,
                   src, dst, static_cast<int>(threads));
    }
}

// scores [batch, rows, destinations], the sources from `begin` on -> best and partner, both [batch, sources].
// Equal similarities: the earlier destination.
void tome_best(const float* scores, int64_t batch, int64_t rows, int64_t destinations, int64_t sources, int64_t begin,
               float* best, int64_t* partner, int64_t threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t row = 0; row < batch * rows; ++row) {
        const int64_t to = row / rows * sources + begin + row % rows;
        best[to] = largest(scores + row * destinations, destinations, partner + to);
    }
}

// What `tome_best` found -> what `match_size` returns. Equal similarities: the earlier source first.
// size [batch, n] may be null: all tokens are one original token each.
void tome_select(const float* best, const int64_t* partner, const float* size, int64_t batch, int64_t n, int64_t r,
                 int64_t prefix, int64_t suffix, int64_t* assign, int64_t* keep, int64_t* moved, float* similarity,
                 float* size_out, float* log_size, int64_t threads) {
    const int64_t body = n - prefix - suffix, odd = prefix % 2;
    const int64_t sources = (body - odd + 1) / 2, destinations = body - sources, m = n - r;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
        std::vector<int64_t> order(sources);
        std::vector<char> gone(sources, 0);
        const float* score = best + b * sources;
        for (int64_t i = 0; i < sources; ++i) order[i] = i;
        std::partial_sort(order.begin(), order.begin() + r, order.end(), [score](int64_t i, int64_t j) {
            return score[i] > score[j] || (score[i] == score[j] && i < j);
        });
        for (int64_t j = 0; j < r; ++j) gone[order[j]] = 1;

        int64_t* to = assign + b * n;
        int64_t* from = keep + b * m;
        int64_t place = 0;
        const auto stays = [&](int64_t position) {
            to[position] = place;
            from[place++] = position;
        };
        for (int64_t p = 0; p < prefix; ++p) stays(p);
        for (int64_t i = 0; i < sources; ++i) {
            if (!gone[i]) stays(prefix + odd + 2 * i);
        }
        const int64_t begin = place;
        for (int64_t j = 0; j < destinations; ++j) stays(prefix + 1 - odd + 2 * j);
        for (int64_t p = n - suffix; p < n; ++p) stays(p);
        for (int64_t j = 0; j < r; ++j) {
            const int64_t position = prefix + odd + 2 * order[j];
            moved[b * r + j] = position;
            similarity[b * r + j] = score[order[j]];
            to[position] = begin + partner[b * sources + order[j]];
        }
        merge_sizes(size ? size + b * n : nullptr, to, from, moved + b * r, size_out + b * m, m, r);
        for (int64_t k = 0; k < m; ++k) log_size[b * m + k] = std::log(size_out[b * m + k]);
    }
}

void tome_merge(const void* x, const void* y, int64_t bytes, const float* size, const float* size_out,
                const int64_t* assign, const int64_t* keep, const int64_t* moved, void* out, int64_t batch, int64_t n,
                int64_t r, int64_t width, int64_t threads) {
    if (bytes == 4) {
        merge_rows(static_cast<const float*>(x), static_cast<const float*>(y), size, size_out, assign, keep, moved,
                   static_cast<float*>(out), batch, n, r, width, static_cast<int>(threads));
    } else {
        merge_rows(static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(y), size, size_out, assign, keep,
                   moved, static_cast<bfloat16*>(out), batch, n, r, width, static_cast<int>(threads));
    }
}

// x [batch, n, outer, inner] with the strides `steps` (elements) -> out [batch, n - r, outer, inner], contiguous.
void tome_merge_bias(const void* x, const int64_t* steps, int64_t bytes, const float* size, const float* size_out,
                     const int64_t* assign, const int64_t* keep, const int64_t* moved, void* out, int64_t batch,
                     int64_t n, int64_t r, int64_t outer, int64_t inner, int64_t threads) {
    if (bytes == 4) {
        merge_bias_rows(static_cast<const float*>(x), steps, size, size_out, assign, keep, moved,
                        static_cast<float*>(out), batch, n, r, outer, inner, static_cast<int>(threads));
    } else {
        merge_bias_rows(static_cast<const bfloat16*>(x), steps, size, size_out, assign, keep, moved,
                        static_cast<bfloat16*>(out), batch, n, r, outer, inner, static_cast<int>(threads));
    }
}

// float32 [batch, N']: how many original tokens stand behind each new one.
void tome_merge_size(const float* size, const int64_t* assign, const int64_t* keep, const int64_t* moved, float* out,
                     int64_t batch, int64_t n, int64_t r) {
    const int64_t m = n - r;
    for (int64_t b = 0; b < batch; ++b) {
        merge_sizes(size ? size + b * n : nullptr, assign + b * n, keep + b * m, moved + b * r, out + b * m, m, r);
    }
}
}
