"""When a mapped file loses bytes while it is read: zeros and a note, instead of the end of the process.

A file that is truncated, or a disk or server that fails, sends SIGBUS to whoever touches a mapped page that
is gone; by default the process dies without a word. The handler here puts zeros in its place, and in that of
the rest of the file, and notes it, so that the computation comes to an end and ``Checkpoint.check_unchanged``
can say which file it was, before anything is made of the result. (So do Wayland's compositors with their
clients' memory.) Faults at other addresses go to the handler that was there before.

The handler is machine code: Python's own handlers run between bytecodes, which a faulting instruction never
reaches. It calls mmap and sigaction alone, and takes no lock.
"""

import ctypes
import mmap
import signal
import sys
import threading
import weakref
from functools import cache
from typing import Any

import numpy as np

FILES = 4096  # mapped at once
SA_SIGINFO, SA_NODEFER = 4, 0x40000000
MAP_FIXED = 0x10
ADDRESS = 16  # of si_addr in siginfo_t, on 64-bit Linux

# First address of a mapped file, the one after its last, how often it lost pages; the first row's first word
# is the number of rows in use.
_table = np.zeros((1 + FILES, 3), np.int64)
_lock = threading.Lock()  # two checkpoints may be mapped at once, and must not take one row


class _Sigaction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_earlier = _Sigaction()


class Watched:
    """A mapped file of which is noted that it lost pages, as long as the map lives."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._row = _watch(mapped)

    @property
    def lost(self) -> bool:
        """Whether a page was gone when it was used; it and all behind it were zeros from then on."""
        return self._row is not None and bool(_table[self._row, 2])


def _watch(mapped: mmap.mmap) -> int | None:
    """The row of the table for a map; None where nothing can be watched."""
    if not _installed():
        return None
    begin = np.frombuffer(mapped, np.uint8).ctypes.data
    with _lock:
        used = int(_table[0, 0])
        free = np.flatnonzero(_table[1 : 1 + used, 0] == 0)
        row = 1 + (int(free[0]) if free.size else used)
        if row > FILES:
            return None
        _table[row] = begin, begin + len(mapped), 0
        _table[0, 0] = max(used, row)
    weakref.finalize(mapped, _forget, row)
    return row


def _forget(row: int) -> None:
    _table[row] = 0


@cache
def _installed() -> bool:
    """Install the handler; False on another system than 64-bit Linux."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    library = ctypes.CDLL(None)
    ours = _Sigaction(_handler(library), flags=SA_SIGINFO | SA_NODEFER)
    return bool(library.sigaction(signal.SIGBUS, ctypes.byref(ours), ctypes.byref(_earlier)) == 0)


_compiled: list[Any] = []  # must live as long as the process


def _handler(library: ctypes.CDLL) -> int:
    """Compile the handler; returns its address. In C:

    void handle(int number, char *info, void *context) {
        for (long i = 1; i <= table[0][0]; i++)
            if (table[i][0] <= address && address < table[i][1]) {
                long begin = address & -page;    // one mapping to the end: a process has 65,530 at most
                table[i][2]++;
                if (mmap(begin, table[i][1] - begin, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
                    break;
                return;
            }
        sigaction(number, &earlier, NULL);    // the instruction runs again, and the earlier handler gets it
    }
    """
    from llvmlite import binding, ir

    void, whole, long = ir.VoidType(), ir.IntType(32), ir.IntType(64)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(void, [whole, long, long]), "handle")
    number, info, _ = function.args
    begin, test, compare, following, found, done, unknown = (
        function.append_basic_block(name)
        for name in ("begin", "test", "compare", "following", "found", "done", "unknown")
    )
    build = ir.IRBuilder(begin)

    def load(at: Any) -> Any:
        return build.load(build.inttoptr(at, long.as_pointer()))

    def call(name: str, kinds: list[Any], arguments: list[Any]) -> Any:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        kind = ir.FunctionType(long, kinds)
        return build.call(build.inttoptr(long(address), kind.as_pointer()), arguments)

    table, row_bytes = _table.ctypes.data, _table.strides[0]
    address, used = load(build.add(info, long(ADDRESS))), load(long(table))
    build.branch(test)
    build.position_at_end(test)
    i = build.phi(long)
    i.add_incoming(long(1), begin)
    build.cbranch(build.icmp_signed("<=", i, used), compare, unknown)
    build.position_at_end(compare)
    row = build.add(long(table), build.mul(i, long(row_bytes)))
    after_first = build.icmp_unsigned("<=", load(row), address)
    before_last = build.icmp_unsigned("<", address, load(build.add(row, long(8))))
    build.cbranch(build.and_(after_first, before_last), found, following)
    build.position_at_end(following)
    i.add_incoming(build.add(i, long(1)), following)
    build.branch(test)
    build.position_at_end(found)
    lost = build.inttoptr(build.add(row, long(16)), long.as_pointer())
    build.store(build.add(build.load(lost), long(1)), lost)
    page, protection = mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    first = build.and_(address, long(-page))
    length = build.sub(load(build.add(row, long(8))), first)
    mapped = call(
        "mmap",
        [long, long, whole, whole, whole, long],
        [first, length, whole(protection), whole(flags), whole(-1), long(0)],
    )
    build.cbranch(build.icmp_signed("==", mapped, long(-1)), unknown, done)
    build.position_at_end(done)
    build.ret_void()
    build.position_at_end(unknown)
    call("sigaction", [whole, long, long], [number, long(ctypes.addressof(_earlier)), long(0)])
    build.ret_void()

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    parsed = binding.parse_assembly(str(module))
    engine = binding.create_mcjit_compiler(
        parsed, binding.Target.from_default_triple().create_target_machine()
    )
    engine.finalize_object()
    _compiled.append(engine)
    return int(engine.get_function_address("handle"))
