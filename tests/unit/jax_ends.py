"""How processes of real 4-process gangs ended (JAX 0.10.2 on CPU, Gloo): last lines, shortened."""

from __future__ import annotations

_GAVE_UP = (
    "F1125 12:02:36.727580    6046 client.h:80] Terminating process because the JAX distributed "
    "service detected fatal errors. This most likely indicates that another task died; see the "
    "other task logs for more details. absl::Status: "
)
_CHECK = ("*** Check failure stack trace: ***", "    @     0x7f6b7387a82e  std::_Function_handler")
_GLOO_TRACEBACK = (
    "Traceback (most recent call last):",
    '  File "/home/u/prog.py", line 29, in <module>',
    "    arr = f(arr)",
    "          ^^^^^^",
)
GLOO_MESSAGE = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection "
    "closed by peer [127.0.0.1]:55015"
)
GLOO_RESET = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error "
    "[127.0.0.1]:4258: Connection reset by peer"
)

# Process 1 was killed; this one was in a collective, raised, and waited in its way out.
PEER_KILLED = (
    *_GLOO_TRACEBACK,
    f"ValueError: {GLOO_MESSAGE}",
    "E1125 12:03:01.544065    6269 coordination_service.cc:1520] [130965436] Shutdown barrier in "
    "coordination service has failed:",
    "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat "
    "timeout. This indicates that the remote task has failed, got preempted, or crashed "
    "unexpectedly.",
    f"{_GAVE_UP}INTERNAL: Shutdown barrier has failed.",
    *_CHECK,
)

# Process 0 was killed, and the coordination service with it.
LEAD_KILLED = (
    *_GLOO_TRACEBACK,
    f"ValueError: {GLOO_RESET}",
    "E1125 12:03:03.969430    6398 coordination_service_agent.cc:289] Polled an error from "
    "coordination service (this can be an error from this or another task).",
    f"{_GAVE_UP}UNAVAILABLE: Failed to send RPC to coordination service.",
    ':UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}',
    *_CHECK,
)

# Process 1 got SIGSTOP; the others waited in the collective until its heartbeat was missed.
PEER_STOPPED = (
    f"{_GAVE_UP}UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):",
    "1",
    "The tasks have crashed. Check the task logs for an earlier error, or scheduler events (e.g. "
    "preemption, eviction) to debug further.",
    "",
    "RPC: /xla.coordination.CoordinationService/PollForError",
    *_CHECK,
)

# Process 1 was on its way out, of an exception or with code 0, while the others trained.
PEER_LEFT = (
    f"{_GAVE_UP}INTERNAL: Shutdown barrier has failed.",
    "Barrier result: 'DEADLINE_EXCEEDED: Barrier timed out. Id: Shutdown::8305582012180638814::0. "
    "This usually happens because a task triggered the barrier too early or too slowly.",
    "# of tasks that reached the barrier: 1/4.",
    "The first task at the barrier: 1. Some timed out task names:",
    "3",
    "0",
    *_CHECK,
)

# Process 1 itself, which raised: the exception comes first, and then all die of the barrier.
RAISED_THEN_ABORTED = (
    "Traceback (most recent call last):",
    '  File "/home/u/prog.py", line 15, in <module>',
    '    raise ValueError("the data is bad at step 20")',
    "ValueError: the data is bad at step 20",
    "E1125 12:02:36.726825    6046 coordination_service_agent.cc:289] Polled an error from "
    "coordination service (this can be an error from this or another task).",
    *PEER_LEFT,
)

# Process 3 never came to jax.distributed.initialize.
NEVER_CAME = (
    f"{_GAVE_UP}DEADLINE_EXCEEDED: Deadline Exceeded",
    "",
    "RPC: /xla.coordination.CoordinationService/RegisterTask",
    *_CHECK,
)

HOST_MEMORY = (
    "Traceback (most recent call last):",
    '  File "/home/u/prog.py", line 27, in <module>',
    "    x = bytearray(1 << 50)",
    "        ^^^^^^^^^^^^^^^^^^",
    "MemoryError",
)

DEVICE_MEMORY = (
    "Traceback (most recent call last):",
    '  File "/home/u/prog.py", line 28, in <module>',
    "    y = jnp.zeros((1 << 46,), jnp.float32)",
    '  File "/venv/lib/python3.11/site-packages/jax/_src/dispatch.py", line 88, in apply_primitive',
    "    outs = fun(*args)",
    "           ^^^^^^^^^^",
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 281474976710656 "
    "bytes.",
    "--------------------",
    "For simplicity, JAX has removed its internal frames from the traceback of the following "
    "exception. Set JAX_TRACEBACK_FILTERING=off to include these.",
)
