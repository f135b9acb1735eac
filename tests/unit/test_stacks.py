"""What is read from faulthandler's dumps. The dumps are of real gangs, with shorter paths."""

from __future__ import annotations

import pytest

from launch.events import Stacks
from launch.stacks import compare, main_thread, waits_in_jax, where

SITE = "/venv/lib/python3.11/site-packages"


def dump(*frames: str, before: str = "") -> str:
    lines = "".join(f"  File {frame}\n" for frame in frames)
    return f"{before}Current thread 0x00007f87c6e82b80 (most recent call first):\n{lines}"


# A jitted call waits in C++, below the caller's frame; sleeping looks the same.
JITTED = dump('"/home/u/prog.py", line 29 in <module>')
SLEEPING = dump('"/home/u/prog.py", line 20 in <module>')
SPINNING = dump(
    '"/usr/lib/python3.11/re/__init__.py", line 166 in match',
    '"/home/u/prog.py", line 26 in <module>',
)
SYNC = dump(
    f'"{SITE}/jax/experimental/multihost_utils.py", line 134 in _handle_array_process_allgather',
    f'"{SITE}/jax/_src/tree_util.py", line 399 in tree_map',
    '"/home/u/prog.py", line 31 in <module>',
)
BLOCKED = dump(
    f'"{SITE}/jax/_src/array.py", line 500 in block_until_ready',
    '"/home/u/prog.py", line 34 in <module>',
)
COMPILING = dump(
    f'"{SITE}/jax/_src/compiler.py", line 300 in backend_compile_and_load',
    '"/home/u/prog.py", line 29 in <module>',
)
FUTURE = dump(
    '"/usr/lib/python3.11/threading.py", line 320 in wait',
    f'"{SITE}/jax/_src/array.py", line 500 in _value',
    '"/home/u/prog.py", line 34 in <module>',
)
WORKER = (
    "Thread 0x00007f0000000001 [reader] (most recent call first):\n"
    f'  File "{SITE}/jax/_src/array.py", line 500 in _value\n\n'
)


def test_the_main_thread_is_the_last_one_and_its_newest_frame_the_first():
    frames = main_thread(dump('"/home/u/prog.py", line 20 in <module>', before=WORKER))
    assert [str(frame) for frame in frames] == ["<module> at /home/u/prog.py:20"]
    first = 'Current thread 0x1 (most recent call first):\n  File "/a.py", line 1 in f\n\n'
    assert main_thread(first + JITTED.replace("Current thread", "Thread"))[0].file.endswith(
        "prog.py"
    )


def test_where_threads_are_cut_off_the_one_that_took_the_signal_is_the_main_one():
    text = SLEEPING + "\n" + WORKER + "...\n"
    assert main_thread(text)[0].line == "20"


@pytest.mark.parametrize("text", ["", "garbage", "Thread 0x1 (most recent call first):\n", "..."])
def test_a_text_without_frames_has_no_main_thread(text):
    assert main_thread(text) == ()
    assert where(main_thread(text)) == ""


@pytest.mark.parametrize(
    ("text", "waits"),
    [
        (SYNC, True),
        (BLOCKED, True),
        (FUTURE, True),
        (COMPILING, False),
        (SPINNING, False),
        (SLEEPING, False),
        (dump('"/app/trainer/agreement.py", line 150 in _get'), True),
        (dump('"/usr/lib/python3.11/threading.py", line 320 in wait'), False),
    ],
)
def test_waiting_in_jax_is_told_from_work(text, waits):
    assert waits_in_jax(main_thread(text)) is waits


def test_a_library_call_is_shown_with_the_users_own_line():
    assert where(main_thread(SPINNING)) == (
        "match at /usr/lib/python3.11/re/__init__.py:166, called from /home/u/prog.py:26"
    )
    assert where(main_thread(SLEEPING)) == "<module> at /home/u/prog.py:20"


CASES = {
    "one sleeps, the others are in a jitted call": ([JITTED, SLEEPING, JITTED, JITTED], [1]),
    "one sleeps, the others wait in several places": ([JITTED, SLEEPING, BLOCKED, JITTED], [1]),
    "one spins, the others sync": ([SYNC, SYNC, SPINNING, BLOCKED], [2]),
    "one of two does not wait": ([BLOCKED, SLEEPING], [1]),
    "one of two sleeps, the other is in a jitted call": ([JITTED, SLEEPING], []),
    "one compiles": ([JITTED, JITTED, COMPILING], [2]),
    "all wait": ([SYNC, SYNC, SYNC], []),
    "all are elsewhere": ([SLEEPING, COMPILING, SPINNING], []),
    "most do not wait": ([SYNC, SLEEPING, SPINNING, COMPILING], []),
    "none answers": (["", "", ""], []),
}


@pytest.mark.parametrize("name", CASES)
def test_the_process_that_does_not_wait_stands_out(name):
    texts, odd = CASES[name]
    stacks = {i: Stacks(i, text, "S") for i, text in enumerate(texts)}
    assert list(compare(stacks).odd) == odd


def test_a_busy_process_without_an_answer_stands_out_and_a_sleeping_one_does_not():
    stacks = {i: Stacks(i, SYNC, "S") for i in range(3)}
    assert compare({**stacks, 3: Stacks(3, "", "R")}).odd == (3,)
    assert compare({**stacks, 3: Stacks(3, "", "S")}).odd == ()


def test_the_place_where_most_wait_is_told():
    texts = [JITTED, SLEEPING, JITTED, JITTED]
    in_user_code = compare({i: Stacks(i, text) for i, text in enumerate(texts)})
    assert (in_user_code.waiting, in_user_code.where_waiting) == (
        (0, 2, 3),
        "at /home/u/prog.py:29",
    )
    texts = [SYNC, SLEEPING, BLOCKED, SYNC]
    in_jax = compare({i: Stacks(i, text) for i, text in enumerate(texts)})
    assert in_jax.where_waiting == "in the collective"
