"""Containers for a job's processes: by pyxis, which is srun's, or by Apptainer."""

from __future__ import annotations

import os
from pathlib import Path

from launch.backends.host_plan import ROOT
from launch.spec import SlurmSpec


def wrap(slurm: SlurmSpec, run_dir: Path) -> tuple[list[str], list[str]]:
    """What starts an agent, and so its processes, inside of the container.

    Args:
      slurm: the image, and what is to be seen in it.
      run_dir: seen in it as well, as Muster's code and the current directory are.

    Returns:
      Options of srun, and the words before the agent's command.
    """
    if slurm.container is None:
        return [], []
    needed = [str(run_dir), str(ROOT), os.getcwd()]
    mounts = [*(f"{path}:{path}" for path in dict.fromkeys(needed)), *slurm.container_mounts]
    if slurm.container_runtime == "pyxis":
        return [
            f"--container-image={slurm.container}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={os.getcwd()}",
        ], []
    gpus = ["--nv"] if slurm.gpus is not None else []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", *gpus, *binds, "--pwd", os.getcwd(), slurm.container]
