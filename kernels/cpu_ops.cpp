// The operations of kernels/reference.py for CPUs with AVX-512. kernels/native.py compiles this file on first use.
//
// Adapter rows, keys and values are read in place in the arena and never gathered. The order of every sum is fixed, so
// a token's results do not depend on the rest of the batch.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using std::int64_t;

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef uint16_t ShortVec __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};

// Load and store LANES numbers, or `count` numbers at the end of a row. A short load fills the other lanes with zero.

inline Vec widened(ShortVec x) { return (Vec)(__builtin_convertvector(x, BitVec) << 16); }

inline ShortVec rounded(Vec x) {
    BitVec bits = (BitVec)x;
    BitVec even = bits + 0x7FFF + ((bits >> 16) & 1);  // round to nearest, ties to even
    return __builtin_convertvector((x == x ? even : bits | 0x400000) >> 16, ShortVec);
}

inline Vec load(const float* from) { return (Vec)_mm512_loadu_ps(from); }
inline Vec load(const float* from, int count) { return (Vec)_mm512_maskz_loadu_ps((1u << count) - 1, from); }
inline Vec load(const BFloat16* from) { return widened((ShortVec)_mm256_loadu_si256((const __m256i*)from)); }
inline Vec load(const BFloat16* from, int count) {
    return widened((ShortVec)_mm256_maskz_loadu_epi16((1u << count) - 1, from));
}

inline void store(float* to, Vec x) { _mm512_storeu_ps(to, (__m512)x); }
inline void store(float* to, Vec x, int count) { _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)x); }
inline void store(BFloat16* to, Vec x) { _mm256_storeu_si256((__m256i*)to, (__m256i)rounded(x)); }
inline void store(BFloat16* to, Vec x, int count) {
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)rounded(x));
}

inline Vec as_stored(const float*, Vec x) { return x; }
inline Vec as_stored(const BFloat16*, Vec x) { return widened(rounded(x)); }

// Calls body(first, count) for each LANES numbers of a row. `count` is the constant LANES except in the last call.
template <class Body>
inline void each_vector(int64_t size, Body body) {
    int64_t first = 0;
    for (; first + LANES <= size; first += LANES) body(first, LANES);
    if (first < size) body(first, int(size - first));
}

// Sums over lanes. `sum_of` (one vector) and `sums_of` (LANES vectors at once) add in the same order.

inline float sum_of(Vec x) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

template <int WIDTH>
inline Vec folded(Vec a, Vec b) {  // adds the two halves of every WIDTH lanes: first a's sums, then b's
    IntVec low, high;
    for (int i = 0; i < LANES; ++i) {
        low[i] = i / (WIDTH / 2) * WIDTH + i % (WIDTH / 2);
        high[i] = low[i] + WIDTH / 2;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lane i of sums_of(x) is the sum of x[PLACE[i]].
constexpr int PLACE[LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

inline Vec sums_of(const Vec* x) {
    Vec a[8], b[4];
    for (int i = 0; i < 8; ++i) a[i] = folded<16>(x[i], x[i + 8]);
    for (int i = 0; i < 4; ++i) b[i] = folded<8>(a[i], a[i + 4]);
    return folded<2>(folded<4>(b[0], b[2]), folded<4>(b[1], b[3]));
}

// e^x to 2 units in the last place: 2^n through the exponent bits, the rest by its Taylor series. Returns 0 for
// x < -87 and infinity for x > 88.
inline Vec exp_of(Vec x) {
    Vec bounded = x > 88.0f ? Vec{} : x;
    Vec n = bounded * 1.44269504f + 12582912.0f - 12582912.0f;   // round to the nearest integer
    Vec rest = bounded - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts; the first is exact
    Vec series = Vec{} + 1.0f / 5040;
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        series = series * rest + factor;
    IntVec exponent = __builtin_convertvector(bounded == bounded ? n : Vec{}, IntVec);
    Vec power = (Vec)((exponent + 127) << 23);
    Vec above = x > 88.0f ? Vec{} + std::numeric_limits<float>::infinity() : series * power;
    return x < -87.0f ? Vec{} : above;
}

// Segmented LoRA.

struct Module {  // `LoraGroup.addresses` writes these structs
    const int32_t* ranks;
    int64_t ranks_stride;
    const float* scalings;
    int64_t scalings_stride;
    const int64_t* table_starts;
    int64_t table_starts_stride;
    const int64_t* a_rows;
    const int64_t* b_rows;
    int64_t h_column;
    int64_t out_column;
    int64_t width;
};

struct Group {
    const int32_t* token_starts;
    int64_t num_segments;
    const Module* modules;
    int64_t num_modules;
};

inline const int64_t* entries(const int64_t* table, const Module& module, int64_t segment) {
    return table + module.table_starts[segment * module.table_starts_stride];
}

inline int64_t rank_of(const Module& module, int64_t segment) { return module.ranks[segment * module.ranks_stride]; }

constexpr int64_t TOKENS = 32;  // tokens per task, all of one segment

// Splits each segment into tasks of at most TOKENS tokens and calls body(module, segment, first token, end token, next
// task's module, next task's segment) for every module in which the segment has a rank.
template <class Body>
void each_task(const Group& group, int threads, Body body) {
    struct Task {
        const Module* module;
        int64_t segment, first, end;
    };
    std::vector<Task> tasks;
    for (int64_t s = 0; s < group.num_segments; ++s)
        for (int64_t first = group.token_starts[s]; first < group.token_starts[s + 1]; first += TOKENS)
            for (int64_t m = 0; m < group.num_modules; ++m) {
                const Module& module = group.modules[m];
                int64_t end = std::min<int64_t>(first + TOKENS, group.token_starts[s + 1]);
                if (rank_of(module, s) > 0) tasks.push_back({&module, s, first, end});
            }
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (size_t i = 0; i < tasks.size(); ++i) {
        const Task& later = tasks[std::min(i + 1, tasks.size() - 1)];
        body(*tasks[i].module, tasks[i].segment, tasks[i].first, tasks[i].end, *later.module, later.segment);
    }
}

// The rows of one matrix, and those of the next task. Reading a row prefetches the next task's row, because rows are
// scattered over the arena and the CPU cannot predict them.
template <class T>
struct Rows {
    const T* arena;
    const int64_t* own;
    const int64_t* later;

    Rows from(int64_t r) const { return {arena, own + r, later + r}; }
    Vec at(int64_t r, int64_t column, int count) const {
        fetch(r, column);
        return load(arena + own[r] + column, count);
    }
    Vec at(int64_t r, int64_t column) const {
        fetch(r, column);
        return load(arena + own[r] + column);
    }
    void fetch(int64_t r, int64_t column) const {
        constexpr int LINE = 64 / sizeof(T);
        if (column % LINE == 0) __builtin_prefetch(arena + later[r] + column);
    }
};

template <class T>
Rows<T> rows_of(const T* arena, const int64_t* Module::*table, const Module& module, int64_t segment,
                const Module& later, int64_t later_segment) {
    const int64_t* own = entries(module.*table, module, segment);
    bool is_enough = rank_of(later, later_segment) >= rank_of(module, segment);
    return {arena, own, is_enough ? entries(later.*table, later, later_segment) : own};
}

// h[t][r] = scaling * x[t] . a[r] for NUM_T tokens and NUM_R rows.
template <int NUM_T, int NUM_R, class T>
inline void shrink_tile(const T* x, int64_t x_stride, int64_t size, Rows<T> rows, float scaling, float* h,
                        int64_t h_stride) {
    Vec sums[NUM_T][NUM_R] = {};
    each_vector(size, [&](int64_t d, int count) {
        Vec a[NUM_R];
        for (int r = 0; r < NUM_R; ++r) a[r] = rows.at(r, d, count);
        for (int t = 0; t < NUM_T; ++t) {
            Vec own = load(x + t * x_stride + d, count);
            for (int r = 0; r < NUM_R; ++r) sums[t][r] += own * a[r];
        }
    });
    for (int t = 0; t < NUM_T; ++t)
        for (int r = 0; r < NUM_R; ++r) h[t * h_stride + r] = scaling * sum_of(sums[t][r]);
}

template <int NUM_T, int MOST_R, class T>
inline void shrink_rows(const T* x, int64_t x_stride, int64_t size, Rows<T> rows, int64_t rank, float scaling,
                        float* h, int64_t h_stride) {
    int64_t r = 0;
    for (; r + MOST_R <= rank; r += MOST_R)
        shrink_tile<NUM_T, MOST_R>(x, x_stride, size, rows.from(r), scaling, h + r, h_stride);
    for (; r < rank; ++r) shrink_tile<NUM_T, 1>(x, x_stride, size, rows.from(r), scaling, h + r, h_stride);
}

template <class T>
void shrink(const Group& group, const T* x, int64_t x_stride, int64_t size, const T* arena, float* h, int64_t h_stride,
            int threads) {
    each_task(group, threads, [&](const Module& module, int64_t s, int64_t t, int64_t end, const Module& later,
                                int64_t later_s) {
        int64_t rank = rank_of(module, s);
        float scaling = module.scalings[s * module.scalings_stride];
        Rows<T> rows = rows_of(arena, &Module::a_rows, module, s, later, later_s);
        float* own = h + module.h_column;
        for (; t + 4 <= end; t += 4)
            shrink_rows<4, 4>(x + t * x_stride, x_stride, size, rows, rank, scaling, own + t * h_stride, h_stride);
        for (; t < end; ++t)
            shrink_rows<1, 8>(x + t * x_stride, x_stride, size, rows, rank, scaling, own + t * h_stride, h_stride);
    });
}

// out[t] += h[t] @ b for NUM_T tokens.
template <int NUM_T, class T, class O>
inline void expand_tokens(const float* h, int64_t h_stride, int64_t rank, Rows<T> rows, O* out,
                          int64_t out_stride, int64_t width) {
    constexpr int WIDE = 4;
    int64_t f = 0;
    for (; f + WIDE * LANES <= width; f += WIDE * LANES) {
        Vec sums[NUM_T][WIDE] = {};
        for (int64_t r = 0; r < rank; ++r)
            for (int i = 0; i < WIDE; ++i) {
                Vec b = rows.at(r, f + i * LANES);
                for (int t = 0; t < NUM_T; ++t) sums[t][i] += h[t * h_stride + r] * b;
            }
        for (int t = 0; t < NUM_T; ++t)
            for (int i = 0; i < WIDE; ++i) {
                O* own = out + t * out_stride + f + i * LANES;
                store(own, load(own) + sums[t][i]);
            }
    }
    each_vector(width - f, [&](int64_t rest, int count) {
        Vec sums[NUM_T] = {};
        for (int64_t r = 0; r < rank; ++r) {
            Vec b = rows.at(r, f + rest, count);
            for (int t = 0; t < NUM_T; ++t) sums[t] += h[t * h_stride + r] * b;
        }
        for (int t = 0; t < NUM_T; ++t) {
            O* own = out + t * out_stride + f + rest;
            store(own, load(own, count) + sums[t], count);
        }
    });
}

template <class T, class O>
void expand(const Group& group, const float* h, int64_t h_stride, const T* arena, O* out, int64_t out_stride,
            int threads) {
    each_task(group, threads, [&](const Module& module, int64_t s, int64_t t, int64_t end, const Module& later,
                                int64_t later_s) {
        int64_t rank = rank_of(module, s);
        Rows<T> rows = rows_of(arena, &Module::b_rows, module, s, later, later_s);
        const float* own_h = h + module.h_column;
        O* own = out + module.out_column;
        for (; t + 4 <= end; t += 4)
            expand_tokens<4>(own_h + t * h_stride, h_stride, rank, rows, own + t * out_stride, out_stride,
                             module.width);
        for (; t < end; ++t)
            expand_tokens<1>(own_h + t * h_stride, h_stride, rank, rows, own + t * out_stride, out_stride,
                             module.width);
    });
}

// Paged attention.

struct Pages {  // one layer's keys and values; strides in elements
    const void* keys;
    const void* values;
    int64_t page_stride;
    int64_t page_tokens;
    int64_t token_stride;
    int64_t num_kv_heads;
    int64_t head_dim;
};

// Walks through a sequence's tokens in order.
template <class T>
struct Cursor {
    const T* base;
    const int32_t* table;
    const Pages& pages;
    int64_t page, offset;

    Cursor(const T* base, const int32_t* table, const Pages& pages, int64_t token)
        : base(base), table(table), pages(pages), page(token / pages.page_tokens), offset(token % pages.page_tokens) {}

    const T* next() {
        const T* here = base + table[page] * pages.page_stride + offset * pages.token_stride;
        if (++offset == pages.page_tokens) offset = 0, ++page;
        return here;
    }
};

// Prefetches a head that is read soon: pages are scattered over the arena, and the CPU cannot predict them.
template <int NUM_VECS, class T>
inline void fetch(const T* head) {
    constexpr int LINE = 64 / sizeof(T);
    for (int i = 0; i < NUM_VECS * LANES; i += LINE) __builtin_prefetch(head + i);
}

constexpr int MOST_ROWS = 4;

// Attention of NUM_ROWS (query, head) pairs that read the same keys. Row i sees the keys first[i] <= key < end[i].
template <int NUM_ROWS, int NUM_VECS, class T>
void attend(const T* const* q, T* const* out, const int64_t* first, const int64_t* end, const int32_t* table,
            const Pages& pages, int64_t head, float scale, std::vector<float>& scratch) {
    int64_t begin = *std::min_element(first, first + NUM_ROWS), stop = *std::max_element(end, end + NUM_ROWS);
    int64_t stride = (stop - begin + LANES - 1) / LANES * LANES;
    if (int64_t(scratch.size()) < NUM_ROWS * stride) scratch.resize(NUM_ROWS * stride);
    Vec own_q[NUM_ROWS][NUM_VECS], most[NUM_ROWS], lane;
    for (int i = 0; i < LANES; ++i) lane[i] = float(i);
    for (int i = 0; i < NUM_ROWS; ++i) {
        most[i] = Vec{} - std::numeric_limits<float>::infinity();
        for (int v = 0; v < NUM_VECS; ++v) own_q[i][v] = load(q[i] + v * LANES);
    }
    const T* key_base = (const T*)pages.keys + head * pages.head_dim;
    int64_t to_value = (const T*)pages.values - (const T*)pages.keys;
    Cursor<T> keys(key_base, table, pages, begin), ahead(key_base, table, pages, begin + LANES);
    for (int64_t at = begin; at < stop; at += LANES) {
        Vec parts[NUM_ROWS][LANES];
        const T* key = nullptr;
        for (int c = 0; c < LANES; ++c) {
            if (at + c < stop) key = keys.next();  // beyond the end, repeat the last key
            if (at + c + LANES < stop) fetch<NUM_VECS>(ahead.next());
            fetch<NUM_VECS>(key + to_value);
            for (int i = 0; i < NUM_ROWS; ++i) parts[i][PLACE[c]] = own_q[i][0] * load(key);
            for (int v = 1; v < NUM_VECS; ++v) {
                Vec k = load(key + v * LANES);
                for (int i = 0; i < NUM_ROWS; ++i) parts[i][PLACE[c]] += own_q[i][v] * k;
            }
        }
        for (int i = 0; i < NUM_ROWS; ++i) {
            Vec scores = sums_of(parts[i]) * scale;
            IntVec is_seen = (lane < float(end[i] - at)) & (lane >= float(first[i] - at));
            scores = is_seen ? scores : Vec{} - std::numeric_limits<float>::infinity();
            most[i] = scores > most[i] ? scores : most[i];
            store(&scratch[i * stride + at - begin], scores);
        }
    }
    float over_total[NUM_ROWS];
    for (int i = 0; i < NUM_ROWS; ++i) {
        float largest = most[i][0];
        for (int c = 1; c < LANES; ++c) largest = std::max(largest, most[i][c]);
        Vec total = {};
        for (int64_t c = 0; c < stride; c += LANES) {
            Vec weights = exp_of(load(&scratch[i * stride + c]) - largest);
            store(&scratch[i * stride + c], weights);
            total += weights;
        }
        over_total[i] = 1.0f / sum_of(total);
    }
    constexpr int STEP = NUM_VECS % 2 ? 1 : 2;
    for (int v = 0; v < NUM_VECS; v += STEP) {
        Vec sums[NUM_ROWS][STEP] = {};
        Cursor<T> values((const T*)pages.values + head * pages.head_dim + v * LANES, table, pages, begin);
        for (int64_t c = 0; c < stop - begin; ++c) {
            const T* value = values.next();
            for (int j = 0; j < STEP; ++j) {
                Vec x = load(value + j * LANES);
                for (int i = 0; i < NUM_ROWS; ++i) sums[i][j] += scratch[i * stride + c] * x;
            }
        }
        for (int i = 0; i < NUM_ROWS; ++i)
            for (int j = 0; j < STEP; ++j) store(out[i] + (v + j) * LANES, sums[i][j] * over_total[i]);
    }
}

struct Sequences {
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* tables;
    int64_t table_stride;
    int64_t count;
    int64_t window;  // 0 means none
    int64_t num_heads;
    int64_t q_stride;  // from token to token
};

template <int NUM_VECS, class T>
void attend_head(const Sequences& all, const Pages& pages, const T* q, T* out, float scale, int64_t n, int64_t head,
                 std::vector<float>& scratch) {
    int64_t group = all.num_heads / pages.num_kv_heads, start = all.query_starts[n];
    int64_t num_query = all.query_starts[n + 1] - start, before = all.context_lens[n] - num_query;
    const T* queries[MOST_ROWS];
    T* outs[MOST_ROWS];
    int64_t first[MOST_ROWS], end[MOST_ROWS];
    for (int64_t row = 0; row < num_query * group; row += MOST_ROWS) {
        int num_rows = int(std::min<int64_t>(MOST_ROWS, num_query * group - row));
        for (int i = 0; i < num_rows; ++i) {
            int64_t query = (row + i) / group, column = (head * group + (row + i) % group) * pages.head_dim;
            queries[i] = q + (start + query) * all.q_stride + column;
            outs[i] = out + (start + query) * all.num_heads * pages.head_dim + column;
            end[i] = before + query + 1;
            first[i] = all.window ? std::max<int64_t>(0, end[i] - all.window) : 0;
        }
        const int32_t* table = all.tables + n * all.table_stride;
        switch (num_rows) {
            case 1: attend<1, NUM_VECS>(queries, outs, first, end, table, pages, head, scale, scratch); break;
            case 2: attend<2, NUM_VECS>(queries, outs, first, end, table, pages, head, scale, scratch); break;
            case 3: attend<3, NUM_VECS>(queries, outs, first, end, table, pages, head, scale, scratch); break;
            default: attend<4, NUM_VECS>(queries, outs, first, end, table, pages, head, scale, scratch);
        }
    }
}

template <int NUM_VECS, class T>
void attend_all(const Sequences& all, const Pages& pages, const T* q, T* out, float scale, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < all.count * pages.num_kv_heads; ++task)
            attend_head<NUM_VECS>(all, pages, q, out, scale, task / pages.num_kv_heads, task % pages.num_kv_heads,
                                  scratch);
    }
}

template <class T>
void attention(const Sequences& all, const Pages& pages, const T* q, T* out, float scale, int threads) {
    switch (pages.head_dim / LANES) {
        case 1: return attend_all<1>(all, pages, q, out, scale, threads);
        case 2: return attend_all<2>(all, pages, q, out, scale, threads);
        case 3: return attend_all<3>(all, pages, q, out, scale, threads);
        case 4: return attend_all<4>(all, pages, q, out, scale, threads);
        case 6: return attend_all<6>(all, pages, q, out, scale, threads);
        case 8: return attend_all<8>(all, pages, q, out, scale, threads);
    }
}

// Operations on single rows.

template <class T>
void norm(const T* x, int64_t x_stride, const T* weight, T* out, int64_t num_rows, int64_t size, float eps) {
    for (int64_t row = 0; row < num_rows; ++row, x += x_stride, out += size) {
        Vec squares = {};
        each_vector(size, [&](int64_t d, int count) {
            Vec own = load(x + d, count);
            squares += own * own;
        });
        float factor = 1.0f / std::sqrt(sum_of(squares) / float(size) + eps);
        each_vector(size, [&](int64_t d, int count) {
            store(out + d, load(weight + d, count) * as_stored(x, load(x + d, count) * factor), count);
        });
    }
}

template <class T>
void turn(T* x, int64_t x_stride, const T* cos, const T* sin, int64_t num_tokens, int64_t num_heads, int64_t half) {
    for (int64_t t = 0; t < num_tokens; ++t, cos += half, sin += half)
        for (int64_t n = 0; n < num_heads; ++n) {
            T *low = x + t * x_stride + n * 2 * half, *high = low + half;
            each_vector(half, [&](int64_t i, int count) {
                Vec a = load(low + i, count), b = load(high + i, count);
                Vec c = load(cos + i, count), s = load(sin + i, count);
                store(low + i, a * c - b * s, count);
                store(high + i, b * c + a * s, count);
            });
        }
}

template <class T>
void gate(const T* x, int64_t x_stride, T* out, int64_t num_rows, int64_t size) {
    for (int64_t row = 0; row < num_rows; ++row, x += x_stride, out += size)
        each_vector(size, [&](int64_t i, int count) {
            Vec g = load(x + i, count);
            store(out + i, g / (1.0f + exp_of(-g)) * load(x + size + i, count), count);
        });
}

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1 };  // the codes of `Dtype` in kernels/native.py

// Calls body with a number of the C++ type that the code stands for.
template <class Body>
inline void with_type(Dtype dtype, Body body) {
    if (dtype == BFLOAT16)
        body(BFloat16{});
    else
        body(0.0f);
}

}  // namespace

// The functions that Python calls. `dtype` is the type behind the untyped pointers.

extern "C" {

void lora_shrink(Dtype dtype, const Group* group, const void* x, int64_t x_stride, int64_t size, const void* arena,
                 float* h, int64_t h_stride, int threads) {
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        shrink(*group, (const T*)x, x_stride, size, (const T*)arena, h, h_stride, threads);
    });
}

// A bfloat16 arena adds to bfloat16 or float32 outputs, a float32 arena only to float32.
void lora_expand(Dtype dtype, Dtype out_dtype, const Group* group, const float* h, int64_t h_stride, const void* arena,
                 void* out, int64_t out_stride, int threads) {
    if (dtype == FLOAT32)
        expand(*group, h, h_stride, (const float*)arena, (float*)out, out_stride, threads);
    else
        with_type(out_dtype, [&](auto number) {
            expand(*group, h, h_stride, (const BFloat16*)arena, (decltype(number)*)out, out_stride, threads);
        });
}

void paged_attention(Dtype dtype, const Sequences* all, const Pages* pages, const void* q, void* out, float scale,
                     int threads) {
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        attention(*all, *pages, (const T*)q, (T*)out, scale, threads);
    });
}

void store_kv(int64_t token_bytes, const char* k, int64_t k_bytes, const char* v, int64_t v_bytes, char* keys,
              char* values, int64_t page_bytes, int64_t page_tokens, const int64_t* slots, int64_t num_tokens) {
    for (int64_t t = 0; t < num_tokens; ++t) {
        int64_t to = slots[t] / page_tokens * page_bytes + slots[t] % page_tokens * token_bytes;
        std::memcpy(keys + to, k + t * k_bytes, token_bytes);
        std::memcpy(values + to, v + t * v_bytes, token_bytes);
    }
}

void rms_norm(Dtype dtype, const void* x, int64_t x_stride, const void* weight, void* out, int64_t num_rows,
              int64_t size, float eps) {
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        norm((const T*)x, x_stride, (const T*)weight, (T*)out, num_rows, size, eps);
    });
}

void rotate(Dtype dtype, void* x, int64_t x_stride, const void* cos, const void* sin, int64_t num_tokens,
            int64_t num_heads, int64_t half) {
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        turn((T*)x, x_stride, (const T*)cos, (const T*)sin, num_tokens, num_heads, half);
    });
}

// Each number of `bits` has the bits of LANES tokens.
void mask_logits(float* logits, int64_t stride, const int64_t* rows, int64_t num_rows, const uint16_t* bits,
                 int64_t num_words, int64_t size) {
    const __m512 never = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t r = 0; r < num_rows; ++r, bits += 2 * num_words) {
        float* row = logits + rows[r] * stride;
        each_vector(size, [&](int64_t first, int count) {
            uint32_t denied = ~uint32_t(bits[first / LANES]) & ((1u << count) - 1);
            _mm512_mask_storeu_ps(row + first, __mmask16(denied), never);
        });
    }
}

void silu_mul(Dtype dtype, const void* x, int64_t x_stride, void* out, int64_t num_rows, int64_t size) {
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        gate((const T*)x, x_stride, (T*)out, num_rows, size);
    });
}
}
