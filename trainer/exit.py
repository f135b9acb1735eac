"""How a process ends: with its exit code, at once, and with the reason said. Imports no jax."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from launch import contract
from launch.spec import ConfigError


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run the program and end the process with its exit code.

    An error on one process of a gang must end that process at once: Python's own way out waits in
    JAX's shutdown barrier for the others, which wait for this one, until all of them are aborted
    and nothing says who was the cause.
    """
    try:
        code = main() or contract.EXIT_DONE
    except ConfigError as error:
        contract.record_failure(error)
        print(f"error: {error}", file=sys.stderr)
        _leave(contract.EXIT_CONFIG)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        if code not in (contract.EXIT_DONE, contract.EXIT_RESUMABLE):
            _leave(code)
    except BaseException as error:
        contract.record_failure(error)
        traceback.print_exc()
        _leave(contract.EXIT_FAILED)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End now, with everything said."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
