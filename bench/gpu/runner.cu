// Small cases of every kernel through the C interface, without torch, so that compute-sanitizer has little to
// watch. Outputs and workspace are filled with ones before a call: what is nothing but ones after it was not
// written, and counts as bad. Buffers have their exact size: memcheck sees one byte too far.
//
//     runner [grouped] [unfilled]
//
// grouped: only the cases of CUTLASS's products, which the library must then have. unfilled: nothing is filled,
// and what was not written is not counted: initcheck takes what was filled for written.
//
//     nvcc -std=c++17 -arch=sm_90 runner.cu -I plugins -L DIR -lnemoquant_kernels      for the device
//     g++ -std=c++17 -x c++ -DHOST runner.cu -I plugins -L DIR -lnemoquant_host        for the CPU
//
// A line of JSON as each case begins, one for each bad case, and at the end how many ran; the exit code says
// whether one was bad.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "causal_conv1d/abi.h"
#include "mamba2_scan/abi.h"
#include "routed_experts/abi.h"

// ---- memory, on the device or here

#ifdef HOST
static void* get(size_t size) {
    void* memory;
    if (posix_memalign(&memory, 256, size ? size : 1)) abort();
    return memory;
}
static void put(void* there, const void* here, size_t size) { memcpy(there, here, size); }
static void back(void* here, const void* there, size_t size) { memcpy(here, there, size); }
static void fill(void* there, int value, size_t size) { memset(there, value, size); }
static void drop(void* there) { free(there); }
static const char* finish() { return nullptr; }
#else
#include <cuda_runtime.h>
static void need(cudaError_t error) {
    if (!error) return;
    printf("{\"fatal\": \"%s\"}\n", cudaGetErrorString(error));
    exit(3);
}
static void* get(size_t size) {
    void* memory;
    need(cudaMalloc(&memory, size ? size : 1));
    return memory;
}
static void put(void* there, const void* here, size_t size) {
    need(cudaMemcpy(there, here, size, cudaMemcpyHostToDevice));
}
static void back(void* here, const void* there, size_t size) {
    need(cudaMemcpy(here, there, size, cudaMemcpyDeviceToHost));
}
static void fill(void* there, int value, size_t size) { need(cudaMemset(there, value, size)); }
static void drop(void* there) { need(cudaFree(there)); }
static const char* finish() {
    cudaError_t error = cudaDeviceSynchronize();
    return error ? cudaGetErrorString(error) : nullptr;
}
#endif

static std::vector<void*> owned;  // of the case that runs

static void* own(size_t size) {
    owned.push_back(get(size));
    return owned.back();
}

static void* copied(const void* here, size_t size) {
    void* there = own(size);
    put(there, here, size);
    return there;
}

static bool filled = true;

static void* poisoned(size_t size) {
    void* there = own(size);
    if (filled) fill(there, 0xff, size);
    return there;
}

// How many items of `item` bytes are nothing but ones.
static size_t unwritten(const void* there, size_t size, int item) {
    if (!filled) return 0;
    std::vector<unsigned char> here(size);
    back(here.data(), there, size);
    size_t count = 0;
    for (size_t i = 0; i + item <= size; i += item) {
        bool ones = true;
        for (int k = 0; k < item; ++k) ones &= here[i + k] == 0xff;
        count += ones;
    }
    return count;
}

// ---- numbers: the same on every machine

constexpr int F32 = NEMOQUANT_FLOAT32, F16 = NEMOQUANT_FLOAT16, BF16 = NEMOQUANT_BFLOAT16;

static int size_of(int dtype) { return dtype == F32 ? 4 : 2; }

static uint64_t state_of_rng = 1;
static uint32_t draw() {
    state_of_rng = state_of_rng * 6364136223846793005ULL + 1442695040888963407ULL;
    return uint32_t(state_of_rng >> 33);
}
static float unit() { return float(draw() % 20001) / 10000.0F - 1.0F; }  // -1 to 1

static void* values(size_t count, int dtype, float scale = 1, float shift = 0) {
    std::vector<unsigned char> here(count * size_of(dtype));
    for (size_t i = 0; i < count; ++i) {
        const float value = unit() * scale + shift;
        if (dtype == F32) {
            memcpy(&here[4 * i], &value, 4);
        } else if (dtype == BF16) {
            uint32_t bits;
            memcpy(&bits, &value, 4);
            const uint16_t upper = uint16_t(bits >> 16);
            memcpy(&here[2 * i], &upper, 2);
        } else {
            const _Float16 half = _Float16(value);
            memcpy(&here[2 * i], &half, 2);
        }
    }
    return copied(here.data(), here.size());
}

static float* floats(size_t count, float scale = 1, float shift = 0) {
    return static_cast<float*>(values(count, F32, scale, shift));
}

// Bytes from `low` to below `high`; none whose lower seven bits are `skip`.
static void* bytes(size_t count, int low, int high, int skip = -1) {
    std::vector<unsigned char> here(count);
    for (auto& byte : here) {
        do byte = uint8_t(low + draw() % (high - low));
        while (skip >= 0 && (byte & 0x7f) == skip);
    }
    return copied(here.data(), count);
}

// ---- results

static int ran = 0, bad = 0;

// What is printed last names the case that hangs or crashes.
static void begins(const std::string& name) { printf("{\"begins\": \"%s\"}\n", name.c_str()); }

static void report(const std::string& name, int code, size_t left) {
    const char* error = finish();
    ++ran;
    if (code || left || error) {
        ++bad;
        printf("{\"case\": \"%s\", \"code\": %d, \"reason\": \"%s\", ", name.c_str(), code,
               code ? nemoquant_last_error() : "");
        printf("\"unwritten\": %zu, \"device\": \"%s\"}\n", left, error ? error : "");
    }
    if (error) exit(4);  // every later call would get the same
    for (void* memory : owned) drop(memory);
    owned.clear();
}

// A letter and its number: " B2".
static std::string with(const char* letter, int64_t number) {
    return std::string(" ") + letter + std::to_string(number);
}

// ---- the scan

struct ScanCase {
    int64_t batch, length, heads, head_dim, groups, state;
    int dtype, state_dtype, segments;
    bool stochastic, in_place;
};

static void scan(const ScanCase& c) {
    const std::string sizes = with("B", c.batch) + with("L", c.length) + with("H", c.heads);
    const std::string dtypes = with("dtype", c.dtype) + with("state", c.state_dtype);
    const std::string head = with("P", c.head_dim) + with("N", c.state);
    const std::string name = "scan" + sizes + head + dtypes + with("seg", c.segments);
    begins(name);
    const int64_t inner = c.heads * c.head_dim, shared = c.groups * c.state, positions = c.batch * c.length;
    const int64_t states = c.batch * inner * c.state;
    nemoquant_mamba2_scan_args a{};
    a.batch = c.batch, a.length = c.length, a.heads = c.heads, a.head_dim = c.head_dim;
    a.groups = c.groups, a.state = c.state;
    a.x_position_stride = inner, a.x_batch_stride = c.length * inner;
    a.b_position_stride = a.c_position_stride = shared;
    a.b_batch_stride = a.c_batch_stride = c.length * shared;
    a.dt_position_stride = c.heads, a.dt_batch_stride = c.length * c.heads;
    a.dtype = a.dt_dtype = a.y_dtype = c.dtype;
    a.state_dtype = c.state_dtype, a.segments = c.segments;
    a.dt_max = 1e30F, a.philox_rounds = 5;
    a.x = values(positions * inner, c.dtype);
    a.b = values(positions * shared, c.dtype);
    a.c = values(positions * shared, c.dtype);
    a.dt = values(positions * c.heads, c.dtype);
    a.a = floats(c.heads, 1, -1.5F);
    a.d = floats(c.heads);
    a.dt_bias = floats(c.heads, 1, -2);
    void* state = values(states, c.state_dtype);
    a.state_in = state;
    a.state_out = c.in_place ? state : poisoned(states * size_of(c.state_dtype));
    a.y = poisoned(positions * inner * size_of(c.dtype));
    if (c.stochastic) {
        const int64_t seed = 12345;
        a.seed = static_cast<int64_t*>(copied(&seed, sizeof seed));
        a.rounding = 1;
    }
    const size_t workspace = nemoquant_mamba2_scan_workspace(&a);
    a.workspace = workspace ? poisoned(workspace) : nullptr;
    const int code = nemoquant_mamba2_scan(&a, nullptr);
    finish();
    size_t left = 0;
    if (!code) {
        const int item = size_of(c.dtype), state_item = size_of(c.state_dtype);
        left = unwritten(a.y, positions * inner * item, item);
        if (!c.in_place) left += unwritten(a.state_out, states * state_item, state_item);
    }
    report(name, code, left);
}

static void scans(int dtype) {
    for (int64_t length : {1, 3, 33, 70, 200}) scan({2, length, 4, 64, 2, 128, dtype, F32, 0, false, false});
    scan({1, 70, 2, 64, 1, 256, dtype, F32, 0, false, false});
    scan({1, 70, 2, 64, 1, 96, dtype, BF16, 0, false, false});
    scan({1, 70, 2, 128, 1, 64, dtype, F16, 0, true, false});
    scan({1, 2, 3, 48, 1, 16, dtype, F16, 0, true, false});
    scan({1, 1, 4, 64, 2, 128, dtype, F32, 0, false, true});
    scan({1, 200, 2, 64, 1, 128, dtype, F32, dtype == F32 ? 0 : 3, false, true});
}

// ---- the convolution

struct ConvCase {
    int64_t batch, length, channels, kernel, stride;  // of positions; 0: channels
    int dtype, y_dtype;
    bool in_place = false;  // the state
};

static void convolution(const ConvCase& c) {
    const std::string sizes = with("B", c.batch) + with("L", c.length) + with("C", c.channels);
    const std::string name = "conv" + sizes + with("K", c.kernel) + with("dtype", c.dtype);
    begins(name);
    const int64_t positions = c.batch * c.length, states = c.batch * c.channels * (c.kernel - 1);
    nemoquant_causal_conv1d_args a{};
    a.batch = c.batch, a.length = c.length, a.channels = c.channels, a.kernel = c.kernel;
    a.x_stride = c.stride, a.dtype = c.dtype, a.y_dtype = c.y_dtype;
    a.x = values((positions - 1) * (c.stride ? c.stride : c.channels) + c.channels, c.dtype);
    a.weight = floats(c.channels * c.kernel);
    a.bias = floats(c.channels);
    void* state = values(states, c.dtype);
    a.state_in = state;
    a.y = poisoned(positions * c.channels * size_of(c.y_dtype));
    a.state_out = c.in_place ? state : poisoned(states * size_of(c.dtype));
    const int code = nemoquant_causal_conv1d(&a, nullptr);
    finish();
    size_t left = 0;
    if (!code) {
        left = unwritten(a.y, positions * c.channels * size_of(c.y_dtype), size_of(c.y_dtype));
        if (!c.in_place) left += unwritten(a.state_out, states * size_of(c.dtype), size_of(c.dtype));
    }
    report(name, code, left);
}

static void convolutions(int dtype, int y_dtype) {
    convolution({2, 1, 516, 4, 0, dtype, y_dtype});
    convolution({2, 70, 516, 4, 0, dtype, y_dtype});
    convolution({1, 70, 7, 3, 9, dtype, y_dtype});
    convolution({2, 67, 36, 2, 0, dtype, y_dtype});
    convolution({1, 70, 36, 4, 100, dtype, y_dtype});
    convolution({1, 70, 7, 4, 8, dtype, y_dtype});
    convolution({2, 4, 516, 4, 0, dtype, y_dtype, true});
}

// ---- the experts

constexpr int ON_BF16 = NEMOQUANT_EXPERTS_BF16, ON_FP8 = NEMOQUANT_EXPERTS_FP8;  // formats
constexpr int ON_W4A16 = NEMOQUANT_EXPERTS_W4A16, ON_NVFP4 = NEMOQUANT_EXPERTS_NVFP4;
constexpr int AUTO = NEMOQUANT_EXPERTS_AUTO, GROUPED = NEMOQUANT_EXPERTS_GROUPED;

struct ExpertsCase {
    int64_t tokens, chosen, experts, input, width;
    int format, dtype, tile, slab, products;
};

static void experts(const ExpertsCase& c) {
    const std::string sizes = with("T", c.tokens) + with("k", c.chosen) + with("E", c.experts);
    const std::string kind = with("format", c.format) + with("dtype", c.dtype) + with("tile", c.tile);
    const std::string name = "experts" + sizes + with("I", c.input) + with("M", c.width) + kind;
    begins(name);
    nemoquant_routed_experts_args a{};
    a.tokens = c.tokens, a.chosen = c.chosen, a.experts = c.experts, a.input = c.input, a.width = c.width;
    a.format = c.format, a.dtype = c.dtype, a.tile = c.tile, a.slab = c.slab, a.products = c.products;
    a.x = values(c.tokens * c.input, c.dtype);
    a.expert_weights = floats(c.tokens * c.chosen, 0.5F, 0.5F);
    std::vector<int64_t> ids(c.tokens * c.chosen);
    for (auto& id : ids) id = draw() % 17 == 0 ? -1 : draw() % c.experts;  // some are no expert's
    a.expert_ids = static_cast<int64_t*>(copied(ids.data(), ids.size() * 8));
    const bool four = c.format >= ON_W4A16, inputs = c.format == ON_FP8 || c.format == ON_NVFP4;
    const size_t count = c.experts * c.width * c.input;
    const auto weight = [&] {
        if (c.format == ON_BF16) return values(count, BF16, 0.05F);
        return four ? bytes(count / 2, 0, 256) : bytes(count, 0, 256, 0x7f);  // 0x7f is E4M3's NaN
    };
    const auto scales = [&] { return floats(c.experts, 1e-3F, 2e-3F); };
    a.up = weight(), a.down = weight();
    const auto block_scales = [&] { return bytes(count / 16, 0x30, 0x41); };
    if (four) a.up_block_scales = block_scales(), a.down_block_scales = block_scales();
    if (c.format != ON_BF16) a.up_global_scale = scales(), a.down_global_scale = scales();
    if (inputs) a.up_input_scale = scales(), a.down_input_scale = scales();
    a.y = poisoned(c.tokens * c.input * size_of(c.dtype));
    const int32_t none = 0;
    a.skipped = static_cast<int32_t*>(copied(&none, sizeof none));
    a.workspace = poisoned(nemoquant_routed_experts_workspace(&a));
    const int code = nemoquant_routed_experts(&a, nullptr);
    finish();
    const size_t left = code ? 0 : unwritten(a.y, c.tokens * c.input * size_of(c.dtype), size_of(c.dtype));
    report(name, code, left);
}

static void mixtures(int format) {
    for (int tile : {8, 32, 64}) {
        experts({40, 3, 8, 256, 352, format, BF16, tile, 0, AUTO});
        experts({5, 2, 4, 160, 96, format, BF16, tile, 0, AUTO});
    }
    experts({600, 2, 4, 64, 96, format, BF16, 0, 0, AUTO});    // several blocks of pairs: arrange, scatter
    experts({300, 2, 4, 64, 96, format, BF16, 0, 100, AUTO});  // slabs
    for (int dtype : {F32, F16}) experts({30, 2, 4, 160, 96, format, dtype, 0, 0, AUTO});
}

static void grouped_mixtures(int format) {
    experts({400, 3, 8, 256, 352, format, BF16, 0, 0, GROUPED});
    experts({7, 2, 8, 160, 224, format, BF16, 0, 0, GROUPED});
}

static void all_but_grouped() {
    for (int dtype : {F32, F16, BF16}) {
        scans(dtype);
        for (int y_dtype : {F32, dtype}) convolutions(dtype, y_dtype);
    }
    scan({1, 2111, 2, 64, 1, 128, BF16, F32, 0, false, false});
    for (int format = 0; format <= ON_NVFP4; ++format) mixtures(format);
}

int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);  // into a file too: a case that hangs or crashes loses nothing
    bool grouped = false;
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "grouped")) {
            grouped = true;
        } else if (!strcmp(argv[i], "unfilled")) {
            filled = false;
        } else {
            fprintf(stderr, "runner: no argument %s; expected of: grouped unfilled\n", argv[i]);
            return 2;
        }
    }
    if (grouped) {
        for (int format : {ON_BF16, ON_FP8}) grouped_mixtures(format);
    } else {
        all_but_grouped();
    }
    printf("{\"ran\": %d, \"bad\": %d}\n", ran, bad);
    return bad != 0;
}
