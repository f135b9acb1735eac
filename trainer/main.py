"""The absl app: flags, distributed set-up, train.

    python -m trainer.main --config=FILE --workdir=DIR [--config.x.y=V ...]

`muster run` starts it on every process of a gang. Under another launcher it finds its place
through `jax.distributed`'s own detection, or through the three explicit flags.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from absl import app, flags, logging

from launch import contract
from launch.spec import ConfigError, load_config, plain, train_spec
from trainer import storage, xla_flags
from trainer.command_line import parse_flags
from trainer.exit import run_main
from trainer.preemption import StopSignal

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "workdir", None, "The run directory, on a file system all processes share, or gs://BUCKET/PATH."
)
flags.DEFINE_string("coordinator_address", None, "host:port of process 0, to be told explicitly.")
flags.DEFINE_integer("num_processes", None, "Processes in the gang; with coordinator_address.")
flags.DEFINE_integer("process_id", None, "This process, from 0; with coordinator_address.")
flags.DEFINE_float("initialization_timeout_seconds", 300.0, "How long to wait for all processes.")
# Taken by launch.spec.load_config before absl sees the command line; here for --help.
flags.DEFINE_string("config", None, "A config file; --config.x.y=V overrides a field of it.")


def run(config: Any, stop: StopSignal) -> int:
    """Check the config, join the gang, train. Collective: every process must call this.

    Args:
      config: a ConfigDict; see `launch.spec.TrainSpec` for its fields.
      stop: listens already.

    Returns:
      An exit code of `launch.contract`.
    """
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells its whole life at INFO.
    if not FLAGS.workdir:
        raise ConfigError("", "--workdir is missing; give --workdir=DIR")
    workdir = storage.run_directory(FLAGS.workdir)
    spec = train_spec(config)

    import jax

    from trainer import agreement, compile_cache, distributed, unison
    from trainer.optimizer import make_optimizer
    from trainer.task import load_task

    compile_cache.use(spec.compilation_cache)
    # What can be wrong in these sections is found before anybody waits for anybody.
    make_optimizer(spec.optimizer)
    task = load_task(spec.task, spec.model, spec.data)
    # It would replace the handler of ours, which does more.
    jax.config.update("jax_enable_preemption_service", False)
    place = distributed.initialize(
        coordinator_address=FLAGS.coordinator_address,
        num_processes=FLAGS.num_processes,
        process_id=FLAGS.process_id,
        timeout_seconds=FLAGS.initialization_timeout_seconds,
    )
    if place.num_processes > 1:
        stop.join(agreement.client(), place.process_id, place.num_processes)
    # What is not imported yet would not be compared.
    from trainer.train import train

    record = json.loads(json.dumps(plain(config)))
    unison.check_start(record, task)
    spec = train_spec(config, jax.device_count())
    if distributed.is_lead():
        print(
            f"{place.num_processes} process(es), {jax.device_count()} "
            f"{jax.devices()[0].device_kind} devices, jax {jax.__version__}",
            flush=True,
        )
    return train(spec, task, workdir, record, stop)


def main() -> None:
    """The command line."""

    def program() -> int:
        # Before anything is imported that takes long: whoever never gets here stands out.
        contract.report_progress(0, "init")
        with StopSignal() as stop:
            xla_flags.put(os.environ)  # Before anything imports jax, as a config file might.
            loaded = load_config("config", sys.argv[1:])
            return app_run(loaded.config, [sys.argv[0], *loaded.rest], stop)

    run_main(program)


def app_run(config: Any, argv: list[str], stop: StopSignal) -> int:
    """Run under absl, which parses the flags and sets up logging; returns the exit code."""
    codes: list[int] = []
    with contextlib.suppress(SystemExit):  # absl ends with one, --help with another.
        app.run(lambda _: codes.append(run(config, stop)), argv=argv, flags_parser=parse_flags)
    return codes[0] if codes else contract.EXIT_DONE


if __name__ == "__main__":
    main()
