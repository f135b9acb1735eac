"""Programs for slices whose machines come and go."""

# Does a step every tenth of a second, saves each, and goes on from there.
_SAVER = """
    import os, pathlib, signal, sys, time
    from launch.contract import report_progress
    me = os.environ["MUSTER_PROCESS_ID"]
    storage = pathlib.Path(os.environ["MUSTER_STORAGE_DIR"])
    storage.mkdir(exist_ok=True)
    saved = storage / ("saved-" + me)
    step = int(saved.read_text()) if saved.exists() else 0
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    print("from", step, flush=True)
    while step < STEPS and not told:
        report_progress(step, "step")
        time.sleep(0.1)
        step += 1
        new = storage / ("new-" + me)
        new.write_text(str(step))
        new.rename(saved)
        print("at", step, flush=True)
    report_progress(step, "step")
    print("told" if told else "done", flush=True)
    sys.exit(0 if step >= STEPS else 75)
"""


def saver(steps: int) -> str:
    """A program of so many steps that can be stopped at any time; it prints `at STEP`."""
    return _SAVER.replace("STEPS", str(steps))
