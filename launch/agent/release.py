"""The last thing that an agent does when nobody comes back for its run: it asks the cloud to delete
the machine it is on, so that nobody pays for it any more."""

import sys
import time
import urllib.error

from launch.agent import cloud

_TRIES = 5
_WAIT_SECONDS = 10.0


def release(plan):
    """Ask for the deletion of what the plan names, as the machine's own service account.

    Args:
      plan: `metadata`, the metadata server; `api`, the root of Cloud TPU's; `resources`, full names
        (`projects/P/locations/Z/queuedResources/Q`), each one's deletion taking the nodes along.
    """
    for resource in plan["resources"]:
        for number in range(_TRIES):
            try:
                _delete(plan, resource)
                break
            except (OSError, ValueError, KeyError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code in (404, 409):
                    break  # It is gone, or somebody else deletes it.
                sys.stderr.write("cannot delete %s: %s\n" % (resource, error))
                sys.stderr.flush()
                if number + 1 < _TRIES:
                    time.sleep(_WAIT_SECONDS)


def _delete(plan, resource):
    force = "?force=true" if "/queuedResources/" in resource else ""
    cloud.request(plan["metadata"], plan["api"] + "v2/" + resource + force, "DELETE")
    sys.stderr.write("nobody has come back: asked for the deletion of %s\n" % resource)
    sys.stderr.flush()
