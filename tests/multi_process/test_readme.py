"""The README's own text, run as its reader would run it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.testing.gangs import MusterCommand

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_task_of_the_readme_trains_on_two_processes_and_is_short(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    task, config = blocks
    assert len(task.splitlines()) < 60
    (tmp_path / "my_task.py").write_text(task)
    (tmp_path / "my_config.py").write_text(config)
    muster = MusterCommand(tmp_path, devices_per_process=4)
    done = muster.run(f"--config={tmp_path}/my_config.py")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [
        json.loads(line) for line in (muster.workdir / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {line["step"]: line["loss"] for line in lines}
    assert losses[100] < 0.4  # The variance of what it learns is 2.4.
    assert {path.name for path in (muster.workdir / "checkpoints").iterdir()} >= {"50", "100"}
    ledger = json.loads((muster.workdir / "ledger.json").read_text())
    specs = {leaf["name"]: leaf["spec"] for leaf in ledger["leaves"]}
    assert specs["model.up.kernel"] == "P(None, 'fsdp')"
    muster.check_nothing_is_left()
