"""A fake of Google's TPU API that the real gcloud talks to: v2, and v2alpha1 as if it were v2.

It answers what `gcloud compute tpus tpu-vm` and `queued-resources` ask, in the test's own process.
Its methods are in tpu_api_methods.py; what becomes of nodes is in tpu_api_nodes.py, and of queued
resources in tpu_api_queued.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.testing.tpu_api_http import serving
from tests.testing.tpu_api_methods import Request, TpuMethods
from tests.testing.tpu_api_state import ApiError, Json

TOKEN = "ya29.token-of-the-tests"
ACCOUNT = "tester@example.com"
_OVERRIDES = ("TPU", "COMPUTE", "OSLOGIN", "CLOUDRESOURCEMANAGER", "SERVICEUSAGE")
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


@dataclasses.dataclass
class _Fault:
    method: str
    pattern: str
    error: ApiError
    times: int
    after: int
    effect: bool
    drop: bool


class TpuApi(TpuMethods):
    """The fake. Start it with `running`."""

    def __init__(self, folder: Path, addresses: Sequence[str], project: str = "test-project"):
        """Make it.

        Args:
          folder: for gcloud's files.
          addresses: of the VMs that there may be at a time.
          project: the only one there is.
        """
        super().__init__(addresses, project)
        self.folder = folder
        self.requests: list[Request] = []
        # Called when a request has taken effect, before it is answered.
        self.on_request: Callable[[Request], None] | None = None
        self._port = 0
        self._faults: list[_Fault] = []

    @property
    def home(self) -> Path:
        """The home directory that gcloud sees: its ssh key and known hosts are there."""
        return self.folder / "home"

    @property
    def env(self) -> dict[str, str]:
        """What gcloud needs in its environment to talk to this server and to nobody else."""
        here = f"http://127.0.0.1:{self._port}/"
        return {
            **{f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": here for name in _OVERRIDES},
            "CLOUDSDK_CONFIG": str(self.folder / "gcloud"),
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(self.folder / "token"),
            "CLOUDSDK_CORE_ACCOUNT": ACCOUNT,
            "CLOUDSDK_CORE_PROJECT": self.project,
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_FILE_LOGGING": "true",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
            "CLOUDSDK_SURVEY_DISABLE_PROMPTS": "true",
            "HOME": str(self.home),
            "LOGNAME": "root",  # Who gcloud's ssh logs in as.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Serve; at the end no VM is left on."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.folder / "token").write_text(TOKEN)
        with serving(self._answer) as self._port:
            try:
                yield
            finally:
                self.end()

    def fault(
        self,
        method: str,
        pattern: str,
        *,
        status: int = 503,
        code: str | None = None,
        message: str = "made by the test",
        times: int = 1,
        after: int = 0,
        effect: bool = False,
        drop: bool = False,
    ) -> None:
        """Answer the next requests of a kind by an error.

        Args:
          method: e.g. GET.
          pattern: a regular expression that is searched in paths (without the query).
          status: of HTTP.
          code: as Google names it, e.g. UNAVAILABLE; without it, that of the status.
          message: text.
          times: how many requests.
          after: how many are let through before.
          effect: the request takes effect; only the answer is the error.
          drop: the connection is closed without an answer.
        """
        error = ApiError(status, code or _CODES.get(status, "UNKNOWN"), message)
        with self.lock:
            self._faults.append(_Fault(method, pattern, error, times, after, effect, drop))

    def clear_faults(self) -> None:
        """Answer all requests well from now on."""
        with self.lock:
            self._faults.clear()

    def mutations(self) -> list[Request]:
        """The requests that ask for a change."""
        return [one for one in self.requests if one.changes]

    def _answer(
        self, method: str, path: str, query: dict[str, str], body: Any, agent: str
    ) -> tuple[int, Any] | None:
        with self.lock:
            request = Request(len(self.requests), method, path, query, body, agent)
            self.requests.append(request)
            fault = self._take_fault(method, path)
        status, answer = 200, None
        try:
            if fault and not fault.effect:
                raise fault.error
            answer = self.do(request)
            if fault:
                raise fault.error
        except ApiError as error:
            status, answer = error.status, _error_body(error)
        request.status = 0 if fault and fault.drop else status
        if self.on_request:
            self.on_request(request)
        return None if fault and fault.drop else (status, answer)

    def _take_fault(self, method: str, path: str) -> _Fault | None:
        for fault in list(self._faults):
            if fault.method == method and re.search(fault.pattern, path):
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
                return fault
        return None


def _error_body(error: ApiError) -> Json:
    """An error as Google's APIs write it."""
    body: Json = {"code": error.status, "message": error.message, "status": error.code}
    if error.reason:
        kind = "type.googleapis.com/google.rpc.ErrorInfo"
        metadata = {"service": "tpu.googleapis.com"}
        detail = {"@type": kind, "reason": error.reason, "domain": "googleapis.com"}
        body["details"] = [{**detail, "metadata": metadata}]
    return {"error": body}
