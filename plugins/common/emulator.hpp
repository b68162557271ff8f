// Runs CUDA kernels on the host: the blocks of a grid one after another, the threads of a block as fibers.
//
// A fiber runs until it waits: at a barrier, or at a warp collective (shuffles, votes, matrix products). The last lane that
// arrives at a collective computes it for all. So threads run in an order that no device would choose, warp after warp, and what
// is missing a barrier shows. More that a device would let pass: shared memory is filled with NaN before each block and has
// guard bytes behind it; threads that wait for each other in vain are an error.
//
// Two choices of a device can be made either way (``Schedule``), since each hides faults that the other shows: asynchronous
// copies happen when they are waited for, or when they are issued (a place that is still read is overwritten); blocks, warps and
// lanes take turns upwards or downwards (who reads what another has yet to write). A right kernel gives the same bits in all four.
// What it can't show: blocks that run at the same time, and anything of time.
//
// One launch at a time in a process. Launches end in NEMOQUANT_OK or an error with its reason; nothing is thrown out of them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(NQ_UCONTEXT)  // the latter for the test of the other way
#define NQ_OWN_SWITCH
#else
#include <ucontext.h>
#endif

#undef __shared__
#define __shared__ static
#undef __constant__
#define __constant__ static const
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __restrict__
#define __restrict__ __restrict

#pragma GCC visibility push(hidden)  // a process may hold several host libraries, each with an emulator of its own

inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;
inline constexpr int warpSize = 32;

namespace nq::host {

constexpr size_t STACK = 128 * 1024;
constexpr size_t GUARD = 128;               // bytes behind the dynamic shared memory
constexpr unsigned char FILL = 0xff;        // NaN in every floating-point format
constexpr size_t SHARED_LIMIT = 227 * 1024; // of an SM90 or SM100 block
constexpr int CAPABILITY = 120;             // 10 * major + minor: the device that has every instruction of mma.cuh

using Collective = void (*)(void* const* lanes);  // one pointer a lane, null for lanes that are not in it

enum class State { ready, at_barrier, at_collective, done };

struct Copy {
    void* to;
    const void* from;
    bool wanted;
};

struct Fiber {
    State state = State::done;
    uint3 index{};
    unsigned mask = 0;  // the collective that it waits at
    void* data = nullptr;
    Collective collective = nullptr;
    std::vector<Copy> copies;            // not yet waited for
    std::vector<size_t> groups;          // copies in each closed group
    size_t open = 0;                     // copies in the group that is not closed
#if defined(NQ_OWN_SWITCH)
    void* stack_pointer = nullptr;
#else
    ucontext_t context{};
#endif
};

// What a device may do in either way; and, for grids that would take days here, whether the last block is the only one to run.
struct Schedule {
    bool copies_at_issue = false;
    bool downwards = false;
    bool last_block_only = false;
};

struct Machine {
    std::mutex one_launch;
    Schedule schedule;
    size_t shared_limit = SHARED_LIMIT;
    int capability = CAPABILITY;
    std::vector<Fiber> fibers;
    char* stacks = nullptr;
    size_t stack_count = 0;
    size_t threads = 0;  // of the block
    size_t alive = 0;
    size_t waiting = 0;  // at the barrier
    Fiber* current = nullptr;
    std::exception_ptr thrown;
    void (*body)(void*) = nullptr;
    void* closure = nullptr;
    unsigned char* shared = nullptr;
    std::vector<unsigned char> shared_storage;
#if defined(NQ_OWN_SWITCH)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler{};
#endif
};

inline Machine machine;

inline void* dynamic_shared() { return machine.shared; }

// Switching stacks. On x86-64 by hand: swapcontext would make a system call for the signal mask each time.
#if defined(NQ_OWN_SWITCH)
// noipa: the compiler must take it for a call that keeps nothing but what a call keeps; it can't see that other fibers run meanwhile.
__attribute__((naked, noipa)) static void switch_stack([[maybe_unused]] void** save, [[maybe_unused]] void* load) {
    asm volatile(
        "pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "ret\n\t");
}
inline void to_scheduler(Fiber& from) { switch_stack(&from.stack_pointer, machine.scheduler); }
inline void to_fiber(Fiber& to) { switch_stack(&machine.scheduler, to.stack_pointer); }
#else
inline void to_scheduler(Fiber& from) { swapcontext(&from.context, &machine.scheduler); }
inline void to_fiber(Fiber& to) { swapcontext(&machine.scheduler, &to.context); }
#endif

inline void yield() { to_scheduler(*machine.current); }

inline Fiber* warp_of(const Fiber* fiber) {
    const size_t place = static_cast<size_t>(fiber - machine.fibers.data());
    return machine.fibers.data() + place / 32 * 32;
}

inline size_t lanes_of(const Fiber* warp) {
    return std::min<size_t>(32, machine.threads - static_cast<size_t>(warp - machine.fibers.data()));
}

// Computes the collective with this mask if all its lanes that still run have come, and lets them go on.
inline bool complete(Fiber* warp, unsigned mask, Collective collective) {
    void* data[32] = {};
    const size_t lanes = lanes_of(warp);
    for (size_t lane = lanes; lane-- > 0;) {  // downwards: mostly lanes come upwards, so that who is missing is met at once
        const Fiber& fiber = warp[lane];
        if (!(mask >> lane & 1) || fiber.state == State::done) continue;
        if (fiber.state != State::at_collective || fiber.mask != mask || fiber.collective != collective) return false;
        data[lane] = fiber.data;
    }
    collective(data);
    for (size_t lane = 0; lane < lanes; ++lane)
        if (data[lane]) warp[lane].state = State::ready;
    return true;
}

// All lanes of ``mask`` meet; the last one runs ``collective`` over their ``data`` (never null).
inline void meet(unsigned mask, void* data, Collective collective) {
    Fiber& self = *machine.current;
    self.state = State::at_collective;
    self.mask = mask;
    self.data = data;
    self.collective = collective;
    if (!complete(warp_of(&self), mask, collective)) yield();
}

inline void open_barrier() {
    machine.waiting = 0;
    for (size_t i = 0; i < machine.threads; ++i)
        if (machine.fibers[i].state == State::at_barrier) machine.fibers[i].state = State::ready;
}

inline void barrier() {
    machine.current->state = State::at_barrier;
    if (++machine.waiting == machine.alive)
        open_barrier();
    else
        yield();
}

// The current fiber is done: others may have waited for it alone.
inline void finish() {
    Fiber& self = *machine.current;
    self.state = State::done;
    --machine.alive;
    if (machine.alive && machine.waiting == machine.alive) open_barrier();
    Fiber* warp = warp_of(&self);
    for (size_t lane = 0; lane < lanes_of(warp); ++lane)
        if (warp[lane].state == State::at_collective) complete(warp, warp[lane].mask, warp[lane].collective);
}

// What every fiber runs. It never returns: its stack has no caller.
inline void fiber_main() {
    try {
        machine.body(machine.closure);
        finish();
    } catch (...) {
        machine.thrown = std::current_exception();
    }
    to_scheduler(*machine.current);
    __builtin_unreachable();
}

inline void prepare_stacks(size_t count) {
    if (count <= machine.stack_count) return;
    if (machine.stacks) munmap(machine.stacks, machine.stack_count * STACK);
    void* area = mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    machine.stacks = area == MAP_FAILED ? nullptr : static_cast<char*>(area);
    machine.stack_count = machine.stacks ? count : 0;
    if (!machine.stacks) throw std::runtime_error("no memory for the stacks of " + std::to_string(count) + " threads");
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (size_t i = 0; i < count; ++i) mprotect(machine.stacks + i * STACK, page, PROT_NONE);  // overflow traps at its own stack
}

inline void prepare_fiber(Fiber& fiber, size_t i, dim3 block) {
    fiber.state = State::ready;
    fiber.index = {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                   static_cast<unsigned>(i / block.x / block.y)};
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.open = 0;
    char* base = machine.stacks + i * STACK;
#if defined(NQ_OWN_SWITCH)
    void** top = reinterpret_cast<void**>(base + STACK) - 2;  // at entry the stack is 8 bytes off a multiple of 16, as after a call
    *top = reinterpret_cast<void*>(&fiber_main);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = base;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &fiber_main, 0);
#endif
}

inline std::string show(uint3 place) {
    return "(" + std::to_string(place.x) + ", " + std::to_string(place.y) + ", " + std::to_string(place.z) + ")";
}

inline std::string describe(const Fiber& fiber) {
    const std::string text = "thread " + show(fiber.index) + " of block " + show(blockIdx) + " ";
    if (fiber.state == State::at_barrier) return text + "waits at __syncthreads for threads that never come";
    return text + "waits at a warp exchange for lanes of the mask " + std::to_string(fiber.mask) + " that never come";
}

// Turn ``i`` of ``count`` as the schedule has it.
inline size_t in_turn(size_t i, size_t count) { return machine.schedule.downwards ? count - 1 - i : i; }

inline void run_block() {
    Machine& m = machine;
    const size_t warps = (m.threads + 31) / 32;
    while (m.alive) {
        bool moved = false;
        for (size_t warp = 0; warp < warps; ++warp) {
            const size_t first = in_turn(warp, warps) * 32, lanes = std::min<size_t>(32, m.threads - first);
            for (bool again = true; again;) {
                again = false;
                for (size_t lane = 0; lane < lanes; ++lane) {
                    Fiber& fiber = m.fibers[first + in_turn(lane, lanes)];
                    if (fiber.state != State::ready) continue;
                    m.current = &fiber;
                    threadIdx = fiber.index;
                    to_fiber(fiber);
                    if (m.thrown) std::rethrow_exception(std::exchange(m.thrown, nullptr));
                    moved = again = true;
                }
            }
        }
        if (!moved)
            for (size_t i = 0; i < m.threads; ++i)
                if (m.fibers[i].state != State::done) throw std::logic_error(describe(m.fibers[i]));
    }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* closure) {
    Machine& m = machine;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffU || grid.y > 65535 || grid.z > 65535)
        throw std::invalid_argument("a grid that no device takes");
    m.threads = static_cast<size_t>(block.x) * block.y * block.z;
    if (m.threads < 1 || m.threads > 1024) throw std::invalid_argument(std::to_string(m.threads) + " threads in a block, expected 1 to 1024");
    if (shared > m.shared_limit)
        throw std::invalid_argument("more shared memory than the " + std::to_string(m.shared_limit) + " bytes that a block can have");
    prepare_stacks(m.threads);
    if (m.fibers.size() < m.threads) m.fibers.resize(m.threads);
    m.shared_storage.resize(shared + GUARD + 128);
    m.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(m.shared_storage.data()) + 127) / 128 * 128);
    const size_t kept = m.shared_storage.data() + m.shared_storage.size() - m.shared;
    gridDim = grid;
    blockDim = block;
    m.body = body;
    m.closure = closure;
    const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
    for (size_t turn = m.schedule.last_block_only ? blocks - 1 : 0; turn < blocks; ++turn) {
        const size_t place = m.schedule.last_block_only ? turn : in_turn(turn, blocks);
        blockIdx = {static_cast<unsigned>(place % grid.x), static_cast<unsigned>(place / grid.x % grid.y),
                    static_cast<unsigned>(place / grid.x / grid.y)};
        std::memset(m.shared, FILL, kept);
        m.alive = m.threads;
        m.waiting = 0;
        for (size_t i = 0; i < m.threads; ++i) prepare_fiber(m.fibers[i], i, block);
        run_block();
        for (size_t i = shared; i < kept; ++i)
            if (m.shared[i] != FILL)
                throw std::logic_error("block " + show(blockIdx) + " wrote behind its " + std::to_string(shared) + " bytes of shared memory");
    }
}

template <class... Parameters, class... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void*, Arguments&&... arguments) {
    auto call = [&] { kernel(arguments...); };
    const std::lock_guard<std::mutex> lock(machine.one_launch);
    try {
        run_grid(grid, block, shared, [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
    } catch (const std::exception& error) {
        return ::nq::fail(NEMOQUANT_LAUNCH_FAILED, "%s, grid %u x %u x %u, block %u x %u x %u, %zu bytes of shared memory: %s", name,
                          grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, error.what());
    }
    return NEMOQUANT_OK;
}

inline void carry_out(const Copy& copy) {
    if (copy.wanted)
        std::memcpy(copy.to, copy.from, 16);
    else
        std::memset(copy.to, 0, 16);
}

// Asynchronous copies: kept until they are waited for, or carried out at once.
inline void copy_async16(void* to, const void* from, bool wanted = true) {
    Fiber& self = *machine.current;
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
        throw std::logic_error("an asynchronous copy of 16 bytes from or to an address that is no multiple of 16");
    const Copy copy{to, from, wanted};
    if (machine.schedule.copies_at_issue) return carry_out(copy);
    self.copies.push_back(copy);
    ++self.open;
}

inline void copy_async_commit() {
    Fiber& self = *machine.current;
    self.groups.push_back(std::exchange(self.open, 0));
}

template <int open>
void copy_async_wait() {
    Fiber& self = *machine.current;
    size_t due = 0, groups = 0;
    while (self.groups.size() - groups > static_cast<size_t>(open)) due += self.groups[groups++];
    for (size_t i = 0; i < due; ++i) carry_out(self.copies[i]);
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(due));
    self.groups.erase(self.groups.begin(), self.groups.begin() + static_cast<std::ptrdiff_t>(groups));
}

// Shuffles: what each lane brings, which lane it asks for, and what it gets.
template <class T>
struct Shuffle {
    T value;
    int source;  // lane of the warp
};

template <class T>
T shuffle(unsigned mask, T value, int source) {
    static_assert(std::is_trivially_copyable_v<T>);
    Shuffle<T> mine{value, source};
    meet(mask, &mine, [](void* const* lanes) {
        T brought[32];
        for (int lane = 0; lane < 32; ++lane)
            if (lanes[lane]) brought[lane] = static_cast<Shuffle<T>*>(lanes[lane])->value;
        for (int lane = 0; lane < 32; ++lane) {
            if (!lanes[lane]) continue;
            auto& asked = *static_cast<Shuffle<T>*>(lanes[lane]);
            if (asked.source < 0 || asked.source > 31 || !lanes[asked.source])
                throw std::logic_error("a shuffle that reads a lane which is not in it");
            asked.value = brought[asked.source];
        }
    });
    return mine.value;
}

inline int lane_id() {
    const Fiber* self = machine.current;
    return static_cast<int>(self - warp_of(self));
}

struct Vote {
    unsigned value;
};

template <class Combine>
unsigned vote(unsigned mask, unsigned value, Combine) {
    Vote mine{value};
    meet(mask, &mine, [](void* const* lanes) {
        unsigned total = Combine::start;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (lanes[lane]) total = Combine::join(total, static_cast<Vote*>(lanes[lane])->value, lane);
        for (unsigned lane = 0; lane < 32; ++lane)
            if (lanes[lane]) static_cast<Vote*>(lanes[lane])->value = total;
    });
    return mine.value;
}

struct Ballot {
    static constexpr unsigned start = 0;
    static unsigned join(unsigned total, unsigned value, unsigned lane) { return total | (value ? 1U << lane : 0U); }
};
struct Sum {
    static constexpr unsigned start = 0;
    static unsigned join(unsigned total, unsigned value, unsigned) { return total + value; }
};
struct Any {
    static constexpr unsigned start = 0;
    static unsigned join(unsigned total, unsigned value, unsigned) { return total | (value != 0); }
};
struct All {
    static constexpr unsigned start = 1;
    static unsigned join(unsigned total, unsigned value, unsigned) { return total & (value != 0); }
};

// T, not deduced from this argument.
template <class T>
struct SameAs {
    using type = T;
};
template <class T>
using Same = typename SameAs<T>::type;

}  // namespace nq::host

// CUDA's names.
inline void __syncthreads() { nq::host::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffU) {
    char none;
    nq::host::meet(mask, &none, [](void* const*) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = nq::host::lane_id();
    return nq::host::shuffle(mask, value, lane / width * width + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = nq::host::lane_id(), source = lane ^ bits;
    return nq::host::shuffle(mask, value, source / width > lane / width ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = nq::host::lane_id(), source = lane - static_cast<int>(delta);
    return nq::host::shuffle(mask, value, source < lane / width * width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = nq::host::lane_id(), source = lane + static_cast<int>(delta);
    return nq::host::shuffle(mask, value, source >= lane / width * width + width ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return nq::host::vote(mask, static_cast<unsigned>(predicate), nq::host::Ballot{});
}
inline int __any_sync(unsigned mask, int predicate) {
    return static_cast<int>(nq::host::vote(mask, static_cast<unsigned>(predicate), nq::host::Any{}));
}
inline int __all_sync(unsigned mask, int predicate) {
    return static_cast<int>(nq::host::vote(mask, static_cast<unsigned>(predicate), nq::host::All{}));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) { return nq::host::vote(mask, value, nq::host::Sum{}); }
inline int __reduce_add_sync(unsigned mask, int value) {
    return static_cast<int>(nq::host::vote(mask, static_cast<unsigned>(value), nq::host::Sum{}));
}

// One fiber runs at a time, so that an atomic operation is a plain one.
template <class T>
T atomicAdd(T* at, nq::host::Same<T> value) {
    return std::exchange(*at, static_cast<T>(*at + value));
}
template <class T>
T atomicMax(T* at, nq::host::Same<T> value) {
    return std::exchange(*at, std::max(*at, value));
}
template <class T>
T atomicMin(T* at, nq::host::Same<T> value) {
    return std::exchange(*at, std::min(*at, value));
}
template <class T>
T atomicExch(T* at, nq::host::Same<T> value) {
    return std::exchange(*at, value);
}
template <class T>
T atomicCAS(T* at, nq::host::Same<T> expected, nq::host::Same<T> value) {
    return *at == expected ? std::exchange(*at, value) : *at;
}

template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
void __stcs(T* at, nq::host::Same<T> value) {
    *at = value;
}

inline float __double2float_rn(double x) {
    float y = static_cast<float>(x);
    asm("" : "+m"(y));  // g++ 12 at -O2 takes double(float(x)) for x where it makes vectors of two such: what rounding leaves became 0
    return y;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0F), 1.0F); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
// Byte i of the result is the one of x (0 to 3) and y (4 to 7) that digit i of ``selector`` names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
    unsigned made = 0;
    for (int i = 0; i < 4; ++i) made |= static_cast<unsigned>(both >> 8 * (selector >> 4 * i & 7U) & 0xffU) << 8 * i;
    return made;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

#pragma GCC visibility pop
