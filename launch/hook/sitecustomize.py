"""Imported by every Python that a gang's process starts, because the agent puts this directory on
PYTHONPATH: lets the agent take the process's stacks, and tells which exception ends it.

Standard library only, Python 3.9 and up. It is active in the first Python of a process alone, not
in those that this one starts, and must never be the reason why a program fails.
"""

import os
import sys

STACKS_SIGNAL_OFFSET = 7  # SIGRTMIN + 7, as the agent sends it.
_HOOKED = "MUSTER_HOOKED"
_HERE = os.path.dirname(os.path.abspath(__file__))


def _activate():
    """Set up what the agent needs."""
    stacks = os.environ.get("MUSTER_STACKS_FILE")
    owner = os.environ.get(_HOOKED)
    # An exec keeps the process id: then this is still the gang's own process.
    if not stacks or owner not in (None, str(os.getpid())):
        return
    os.environ[_HOOKED] = str(os.getpid())
    _offer_stacks(stacks)
    _watch_exceptions()
    _watch_exit()


def _offer_stacks(path):
    """Write all threads' stacks at a signal, by a handler in C: it works also while the
    interpreter is stuck in a call into C that holds its lock."""
    import faulthandler
    import signal

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    number = signal.SIGRTMIN + STACKS_SIGNAL_OFFSET
    faulthandler.register(number, file=fd, all_threads=True, chain=False)
    if not faulthandler.is_enabled():
        faulthandler.enable()  # A crash tells its stacks on stderr, which is the log.


def _watch_exceptions():
    """Record the exception that ends the program."""
    pid, before = os.getpid(), sys.excepthook

    def record(kind, error, trace):
        if os.getpid() == pid and issubclass(kind, Exception):
            contract = _contract()
            if contract is not None:
                contract.record_failure(error.with_traceback(trace))
        before(kind, error, trace)

    sys.excepthook = record


def _watch_exit():
    """Say that the program is leaving: its way out may wait for others, for minutes."""
    import threading

    pid = os.getpid()

    def leave():
        contract = _contract() if os.getpid() == pid else None
        if contract is not None:
            contract.report_exit()

    # Before the handlers of `atexit`, of which JAX's is the one that waits.
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(leave)


def _contract():
    """Muster's contract, also where Muster is not installed; None where it is not there."""
    if "launch.contract" in sys.modules:  # It knows what the program has reported.
        return sys.modules["launch.contract"]
    import importlib.util

    try:
        path = os.path.join(os.path.dirname(_HERE), "contract.py")
        spec = importlib.util.spec_from_file_location("_muster_contract", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["_muster_contract"] = module  # Where dataclasses look for their own module.
        spec.loader.exec_module(module)
    except Exception:  # A copy without it, or another version of Python: then there is none.
        return None
    return module


def _chain():
    """Import the sitecustomize that this one hides, if there is one."""
    import importlib.machinery
    import importlib.util

    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


try:
    _activate()
except Exception as error:
    sys.stderr.write("muster: this process is watched less closely: %s\n" % error)
_chain()
