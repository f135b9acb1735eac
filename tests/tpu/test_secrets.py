"""What must not leave the user's machine, or not be seen: it is not."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from launch import contract

TELLS_IF_IT_KNOWS = """
    import os, pathlib, time
    storage = pathlib.Path(os.environ["MUSTER_STORAGE_DIR"])
    storage.mkdir(exist_ok=True)
    saw = os.environ["API_TOKEN"] == "s3cret-" + "of-the-tests"
    (storage / ("knows-" + os.environ["MUSTER_PROCESS_ID"])).write_text(str(saw))
    time.sleep(2)
"""


def test_a_secret_reaches_the_program_and_is_nowhere_else(gang, cloud):
    secret = "s3cret-of-the-tests"
    muster = gang(env={"API_TOKEN": secret}, setup=("sleep 1",))
    lines: set[bytes] = set()
    over = threading.Event()
    threading.Thread(target=_sample_command_lines, args=(lines, over), daemon=True).start()
    done = muster.run("--process=all", program=TELLS_IF_IT_KNOWS)
    over.set()
    assert done.returncode == contract.EXIT_DONE, done.stderr
    knows = [path.read_text() for path in muster.storage.glob("*/knows-*")]
    assert knows == ["True", "True"]
    state = muster.folder.parent / "state"
    files = [path for folder in (muster.workdir, state) for path in folder.rglob("*")]
    assert [
        str(path) for path in files if path.is_file() and secret.encode() in path.read_bytes()
    ] == []
    assert any(b"launch.agent.served" in line for line in lines)
    assert [line for line in lines if secret.encode() in line] == []
    assert secret not in done.stdout + done.stderr
    assert secret not in repr(cloud.api.requests)


def _sample_command_lines(lines: set[bytes], over: threading.Event) -> None:
    """Collect the command lines of all processes of this machine."""
    while not over.wait(0.05):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                    lines.add(file.read())


@pytest.mark.parametrize(
    ("file", "size", "says"),
    [(".env", 10, "tpu.send_code"), ("data.bin", 11 << 20, "tpu.max_file_bytes")],
)
def test_code_that_must_not_leave_is_named_before_anything_is_asked_for(
    gang, cloud, file, size, says
):
    muster = gang()
    (muster.folder / file).write_bytes(b"x" * size)
    done = muster.run(program="print('hello')")
    assert done.returncode == contract.EXIT_CONFIG, done.stderr
    [line] = done.stderr.splitlines()
    assert file in line
    assert says in line
    assert ".gitignore" in line
    assert cloud.api.requests == []
