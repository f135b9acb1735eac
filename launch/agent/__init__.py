"""One per host: start this host's processes, keep their output, watch, kill, write exit records.

Runs on a bare Python 3.9 before anything is installed: this package and `launch.contract` import
nothing but the standard library and one another, and are copied to hosts that have no Muster.

It talks JSON, one object a line, over standard input and output, which may be a connection to
another machine (see `connect`). Its first line of input is the plan:

    {"schema": 1, "host": NAME, "lease_seconds": S, "max_grace_seconds": S, "max_log_bytes": N,
     "hook": DIRECTORY or null, "tells_signals": true or false,
     "complaints": FILE or absent, for the agent's own standard error, "processes": [
        {"process_id": ID, "argv": [...], "env": {...over the agent's own...}, "log": FILE,
         "exit_record": FILE, "progress": FILE, "failure": FILE, "stacks": FILE,
         "deadline": FILE}, ...]}

Then it takes commands: `{"command": "lease", "echo": X}`, `stop` (SIGTERM; with `"seconds": S`
until the kill, which the deadline file then says) and `kill` (SIGKILL) for every process group, and
`stacks`. It reports events: `started`, `not_started`, `pulse` (the answer
to a lease, with the progress that is new), `raised` (a process recorded an exception), `exited`,
`stacks`, `signalled` (with `tells_signals`: who decides over the machine told the agent to stop;
without, that counts as the owner's end), and `done` as the last. Times in events are seconds of
this host's monotonic clock.

Nothing outlives the lease. A lease counts from the last answer before it, which was given before
the owner sent it: so whoever has waited a lease's time in vain knows that the processes are gone.
End of input means at once that the owner is gone: stop, wait `max_grace_seconds`, kill.

How nothing is left behind: every process leads a session and process group of its own; when it
ends, its group is killed before its id is free again. The agent is the 'subreaper', so whatever
left its group becomes the agent's own child, and is killed at the end. Should the agent be killed,
the kernel kills the processes (PR_SET_PDEATHSIG), and the launcher, a subreaper too, the rest.
"""
