"""`ejk.testing.interpret` runs anybody's Triton kernel, and its checks catch what is wrong with it.

The kernels here know nothing of `ejk`.
"""

import re

import jax
import numpy as np
import pytest
import triton
import triton.language as tl

from ejk.testing import (
    DeadlockError,
    MemoryAccessError,
    RaceError,
    interpret,
    memory_checked,
    shuffled,
)

pytestmark = pytest.mark.fast
F32 = np.dtype(np.float32)


def out(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


@triton.jit
def scaled_sum_kernel(x_ptr, y_ptr, z_ptr, n, scale, bias, SIZE: tl.constexpr = 4):
    offs = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    if y_ptr is not None:
        x += tl.load(y_ptr + offs, mask=offs < n, other=0.0)
    x *= scale
    if bias is not None:
        x += bias
    tl.store(z_ptr + offs, x, mask=offs < n)


X, Y = np.arange(6, dtype=F32), np.full(6, 10, F32)


def test_arguments_are_those_of_a_launch():
    for kernel in (
        scaled_sum_kernel,
        triton.autotune([triton.Config({})], key=[])(scaled_sum_kernel),
    ):
        by_place = interpret(kernel, X, Y, out(6), 6, 0.5, None, grid=(2,), num_warps=8)
        by_name = interpret(
            kernel, grid=lambda meta: (triton.cdiv(meta["n"], meta["SIZE"]),),
            x_ptr=jax.numpy.asarray(X), y_ptr=Y, z_ptr=out(6), n=np.int64(6),
            scale=np.float32(0.5), bias=None, SIZE=2,
        )  # fmt: skip
        for stored in (by_place, by_name):
            assert [*stored] == ["z_ptr"]
            np.testing.assert_array_equal(stored["z_ptr"], (X + Y) / 2)
    alone = interpret(scaled_sum_kernel, X, None, out(6), 6, True, 2.5, grid=2)["z_ptr"]
    np.testing.assert_array_equal(alone, X + 2.5)


@triton.jit
def types_kernel(a, b, c, d, e, f, z_ptr):
    tl.static_assert(a.dtype == tl.int1)
    tl.static_assert(b.dtype == tl.int32)
    tl.static_assert(c.dtype == tl.int64)
    tl.static_assert(d.dtype == tl.uint64)
    tl.static_assert(e.dtype == tl.float32)
    tl.static_assert(f.dtype == tl.int32)
    tl.store(z_ptr, 1)


def test_numbers_have_the_types_that_triton_gives_them():
    z = out(1, dtype=np.int32)
    numbers = True, -(2**31), 2**31, 2**63, 1e-60, np.int64(3)
    assert interpret(types_kernel, *numbers, z, grid=1)["z_ptr"] == 1


@triton.jit
def place_kernel(z_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(z_ptr + index, x * 100 + y * 10 + z)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_grids_of_three_axes(seed):
    def run():
        return interpret(place_kernel, out(24, dtype=np.int32), grid=(3, 4, 2))["z_ptr"]

    if seed is None:
        z = run()
    else:
        with shuffled(seed):
            z = run()
    assert z.reshape(2, 4, 3)[1, 3, 2] == 231
    assert len(np.unique(z)) == 24


def test_a_program_of_several_axes_is_named_by_its_position():
    message = re.escape(
        "place_kernel, program (1, 2, 1): store outside 'z_ptr' (76 bytes), 1 of 1 lanes, "
        "the first 4 bytes past its end"
    )
    with pytest.raises(MemoryAccessError, match=f"^{message}$"):
        interpret(place_kernel, out(19, dtype=np.int32), grid=(3, 4, 2))


READ_ONLY = np.zeros(6, F32)
READ_ONLY.flags.writeable = False
WRONG = {
    "an argument is missing": (
        dict(arguments=(X, Y)), TypeError,
        r"scaled_sum_kernel\(x_ptr, .*\): missing a required argument: 'z_ptr'",
    ),
    "an argument is unknown": (
        dict(named={"BLOCK": 8}), TypeError, "got an unexpected keyword argument 'BLOCK'",
    ),
    "an output is an array": (
        dict(arguments=(X, Y, np.zeros(6, F32), 6, 1.0, None)), ValueError,
        r"scaled_sum_kernel has nothing to store to: pass jax.ShapeDtypeStruct\(shape, dtype\)",
    ),
    "an argument is of no kind": (
        dict(arguments=("X", Y, out(6), 6, 1.0, None)), TypeError,
        "x_ptr must be an array, .* not str",
    ),
    "an input is not contiguous": (
        dict(arguments=(np.zeros((3, 6), F32).T[0], Y, out(6), 6, 1.0, None)), ValueError,
        r"x_ptr has strides \(24,\), and must be C-contiguous: pass np.ascontiguousarray",
    ),
    "the grid is empty": (
        dict(grid=(2, 0)), ValueError, r"grid=\(2, 0\) must be one to three integers of 1 or more",
    ),
    "the grid has four axes": (dict(grid=(1, 1, 1, 1)), ValueError, "one to three integers"),
    "what is in place is a shape": (
        dict(in_place=["z_ptr"]), TypeError,
        "in_place names 'z_ptr', which must be a NumPy array .* not ShapeDtypeStruct",
    ),
    "what is in place is unknown": (dict(in_place=["w"]), TypeError, "in_place names 'w'"),
    "what is in place is read-only": (
        dict(arguments=(X, READ_ONLY, out(6), 6, 1.0, None), in_place=["y_ptr"]),
        ValueError, "y_ptr is changed in place, and is read-only, .*: pass np.array of it",
    ),
    "arrays share memory": (
        dict(arguments=(X, X[:4], out(6), 6, 1.0, None), in_place=["y_ptr"]), ValueError,
        "y_ptr is changed in place, and shares memory with x_ptr",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls(wrong):
    changes, error, message = WRONG[wrong]
    call = dict(arguments=(X, Y, out(6), 6, 1.0, None), named={}, grid=2) | changes
    arguments, named = call.pop("arguments"), call.pop("named")
    with pytest.raises(error, match=message):
        interpret(scaled_sum_kernel, *arguments, **named, **call)


# What `memory_checked` sees. Four programs; `z` is an output of eight items, `state` is in place.


@triton.jit
def mistaken_kernel(x_ptr, state_ptr, z_ptr, MISTAKE: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, 2)
    z_ptrs = z_ptr + 2 * pid + offs
    if MISTAKE == "load of an output":
        tl.store(z_ptrs, tl.load(z_ptrs))
    elif MISTAKE == "load of half an output":
        tl.store(z_ptr + 2 * pid, 1.0)
        tl.debug_barrier()
        tl.load(z_ptrs)
    elif MISTAKE == "no barrier after a store":
        tl.store(z_ptrs, 1.0)
        tl.load(z_ptrs)
    elif MISTAKE == "stores to one address":
        tl.store(z_ptr + 2 * (pid % 3) + offs, 1.0)
    elif MISTAKE == "store, then load":
        tl.store(z_ptrs, 1.0)
        tl.debug_barrier()
        if pid > 0:
            tl.load(z_ptrs - 1)
    elif MISTAKE == "load, then store":
        if pid == 3:
            tl.store(state_ptr, 1.0)
        tl.load(state_ptr + offs)
    elif MISTAKE == "load by two, then store by the second":
        if pid < 2:
            x = tl.load(state_ptr)
            if pid == 1:
                tl.store(state_ptr, x)
    elif MISTAKE == "store of halves of an item":
        halves = state_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        if pid == 0:
            tl.store(state_ptr, 1.0)
        elif pid == 1:
            tl.store(halves + 3, 1)  # of the next item
        elif pid == 2:
            tl.store(halves + 1, 1)
    elif MISTAKE == "a store to an input":
        tl.store(x_ptr + pid, 1.0)
    elif MISTAKE == "plain among atomic":
        tl.atomic_add(state_ptr, 1.0)
        if pid == 2:
            tl.store(state_ptr, 0.0)
    elif MISTAKE == "an atomic that its own block alone sees":
        tl.atomic_add(state_ptr, 1.0, scope="cta")
    elif MISTAKE == "an atomic on an output":
        tl.atomic_add(z_ptr, 1.0)
    else:
        tl.static_assert(MISTAKE == "none")
        state = tl.load(state_ptr + pid)
        tl.store(state_ptr + pid, state + tl.load(x_ptr + 3 - pid))
        tl.store(z_ptrs, 1.0)
        tl.debug_barrier()
        tl.store(z_ptrs, tl.load(z_ptrs) + 1)
        tl.load(z_ptr + offs * 100, mask=offs > 1)


MISTAKES = {
    "load of an output": (
        MemoryAccessError,
        "mistaken_kernel, program 0: load of 'z_ptr' at byte 0, which no program has stored, "
        "2 of 2 lanes",
    ),
    "load of half an output": (
        MemoryAccessError,
        "mistaken_kernel, program 0: load of 'z_ptr' at byte 4, which no program has stored, "
        "1 of 2 lanes",
    ),
    "no barrier after a store": (
        RaceError,
        "mistaken_kernel: program 0 loads byte 0 of 'z_ptr', which it has stored, before a barrier",
    ),
    "stores to one address": (
        RaceError, "mistaken_kernel: programs 0 and 3 both store byte 0 of 'z_ptr'",
    ),
    "store, then load": (
        RaceError, "mistaken_kernel: programs 0 and 1 store and load byte 4 of 'z_ptr'",
    ),
    "load, then store": (
        RaceError, "mistaken_kernel: programs 2 and 3 load and store byte 0 of 'state_ptr'",
    ),
    "load by two, then store by the second": (
        RaceError, "mistaken_kernel: programs 0 and 1 load and store byte 0 of 'state_ptr'",
    ),
    "store of halves of an item": (
        RaceError, "mistaken_kernel: programs 0 and 2 both store byte 2 of 'state_ptr'",
    ),
    "a store to an input": (
        MemoryAccessError, "mistaken_kernel, program 0: store to 'x_ptr', which is an input",
    ),
    "plain among atomic": (
        RaceError, "mistaken_kernel: programs 2 and 3 store and load byte 0 of 'state_ptr'",
    ),
    "an atomic that its own block alone sees": (
        RaceError, "mistaken_kernel: programs 0 and 1 store and load byte 0 of 'state_ptr'",
    ),
    "an atomic on an output": (
        MemoryAccessError,
        "mistaken_kernel, program 0: load of 'z_ptr' at byte 0, which no program has stored, "
        "1 of 1 lanes",
    ),
}  # fmt: skip


def run_mistaken(mistake):
    state = np.zeros(4, F32)
    with memory_checked():
        return interpret(
            mistaken_kernel, X[:4], state, out(8), mistake, grid=4, in_place=["state_ptr"]
        )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake):
    error, message = MISTAKES[mistake]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        run_mistaken(mistake)


def test_a_sound_kernel_is_not_accused():
    stored = run_mistaken("none")
    np.testing.assert_array_equal(stored["state_ptr"], X[3::-1])
    np.testing.assert_array_equal(stored["z_ptr"], 2)


# Kernels whose programs talk to each other, in the two ways that are sound, and unsound ones.


@triton.jit
def last_arrival_kernel(x_ptr, count_ptr, parts_ptr, z_ptr, SEM: tl.constexpr, RESET: tl.constexpr):
    pid, num = tl.program_id(0), tl.num_programs(0)
    tl.store(parts_ptr + pid, tl.load(x_ptr + pid) * 2)
    if tl.atomic_add(count_ptr, 1, sem=SEM) == num - 1:
        total = 0.0
        for i in range(num):
            total += tl.load(parts_ptr + i)
        tl.store(z_ptr, total)
        if RESET:
            tl.store(count_ptr, 0)


def last_arrival(sem, reset=True):
    count = np.zeros(1, np.int32)
    with memory_checked():
        stored = interpret(
            last_arrival_kernel, X, count, out(6), out(1), sem, reset, grid=6,
            in_place=["count_ptr"],
        )  # fmt: skip
    return stored["z_ptr"], count


@pytest.mark.parametrize("seed", range(3))
def test_a_counter_of_arrivals_orders_programs(seed):
    with shuffled(seed):
        z, count = last_arrival("acq_rel")
    assert (z, count) == (30, 0)


@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release"])
def test_a_counter_that_orders_nothing_is_a_race(sem):
    with pytest.raises(RaceError, match="programs 0 and 5 store and load byte 0 of 'parts_ptr'"):
        last_arrival(sem)


@triton.jit
def wait_kernel(flag_ptr, z_ptr, VOLATILE: tl.constexpr):
    pid = tl.program_id(0)
    if pid > 0:
        if VOLATILE:
            while tl.load(flag_ptr + pid - 1, volatile=True) == 0:
                pass
        else:
            while tl.atomic_cas(flag_ptr + pid - 1, 1, 1) == 0:
                pass
        before = tl.load(z_ptr + pid - 1)
        tl.store(z_ptr + pid, before + 1)
    else:
        tl.store(z_ptr, 1)
    tl.atomic_xchg(flag_ptr + pid, 1)


def wait(volatile):
    flags, z = np.zeros(5, np.int32), out(5, dtype=np.int32)
    return interpret(wait_kernel, flags, z, volatile, grid=5, in_place=["flag_ptr"])["z_ptr"]


def test_a_chain_of_flags_runs_in_order():
    with memory_checked():
        np.testing.assert_array_equal(wait(volatile=False), [1, 2, 3, 4, 5])


@pytest.mark.parametrize("volatile", [True, False])
def test_a_program_that_waits_for_a_later_one_is_an_error(volatile):
    message = "wait_kernel, program [1-4]: loads 'flag_ptr' 10000 times, and nothing changes"
    with shuffled(0), pytest.raises(DeadlockError, match=message):
        wait(volatile)


def test_a_flag_that_is_not_atomic_is_a_race():
    with memory_checked(), pytest.raises(RaceError, match="store and load byte 0 of 'flag_ptr'"):
        wait(volatile=True)


@triton.jit
def atomics_kernel(x_ptr, old_ptr, OPERATION: tl.constexpr):
    offs = tl.arange(0, 4)
    x_ptrs = x_ptr + offs // 2
    value = (offs + 1).to(x_ptr.dtype.element_ty)
    if OPERATION == "add":
        old = tl.atomic_add(x_ptrs, value, mask=offs < 3)
    elif OPERATION == "max":
        old = tl.atomic_max(x_ptrs, value, mask=offs < 3)
    elif OPERATION == "min":
        old = tl.atomic_min(x_ptrs, value, mask=offs < 3)
    elif OPERATION == "xchg":
        old = tl.atomic_xchg(x_ptrs, value, mask=offs < 3)
    elif OPERATION == "and":
        old = tl.atomic_and(x_ptrs, value, mask=offs < 3)
    elif OPERATION == "or":
        old = tl.atomic_or(x_ptrs, value, mask=offs < 3)
    else:
        tl.static_assert(OPERATION == "xor")
        old = tl.atomic_xor(x_ptrs, value, mask=offs < 3)
    tl.store(old_ptr + offs, old, mask=offs < 3)


ATOMICS = {  # of 2 and 5 with 1, 2 and 3: what is there after, and what each lane found
    "add": ([5, 8], [2, 3, 5]),
    "max": ([2, 5], [2, 2, 5]),
    "min": ([1, 3], [2, 1, 5]),
    "xchg": ([2, 3], [2, 1, 5]),
    "and": ([0, 1], [2, 0, 5]),
    "or": ([3, 7], [2, 3, 5]),
    "xor": ([1, 6], [2, 3, 5]),
}


CASES = [(operation, dtype) for operation in ATOMICS for dtype in ("int32", "uint32")]
CASES += [(operation, "float32") for operation in ("add", "max", "min", "xchg")]


@pytest.mark.parametrize(("operation", "dtype"), [*CASES, ("add", "bfloat16"), ("add", "float16")])
def test_atomics(operation, dtype):
    x = np.array([2, 5]).astype(dtype)
    with memory_checked():
        stored = interpret(
            atomics_kernel, x, out(4, dtype=x.dtype), operation, grid=1, in_place=["x_ptr"]
        )
    after, found = ATOMICS[operation]
    np.testing.assert_array_equal(x, np.array(after).astype(dtype))
    np.testing.assert_array_equal(stored["old_ptr"][:3], np.array(found).astype(dtype))


@triton.jit
def running_sum_kernel(x_ptr, z_ptr):
    tl.atomic_add(z_ptr, tl.load(x_ptr + tl.program_id(0)))


def test_an_order_that_shows_in_the_bits_is_caught():
    x = np.array([1e8, 1.0, -1e8, 1.0], F32)

    def run():
        z = np.zeros(1, F32)
        interpret(running_sum_kernel, x, z, grid=4, in_place=["z_ptr"])
        return z.tobytes()

    results = set()
    for seed in range(4):
        with shuffled(seed), memory_checked():  # which finds no race: the sum is atomic
            results.add(run())
    assert len(results) > 1
    with shuffled(2):
        first = run()
        assert run() == first


@triton.jit
def masked_kernel(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0))


@pytest.mark.parametrize("size", [1, 2])
def test_masked_lanes_hold_what_is_said(size):
    """Also where it is one zero, which Python takes for nothing."""
    stored = interpret(masked_kernel, X[:size], out(size), 0, SIZE=size, grid=1)
    np.testing.assert_array_equal(stored["y_ptr"], np.zeros(size, F32))
