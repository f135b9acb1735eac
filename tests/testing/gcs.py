"""A fake of Google Cloud Storage's JSON API on loopback, for gcsfs and tensorstore.

Strongly consistent, like the real one: an object is there whole or not at all, every write makes a
new generation, preconditions are honoured, listings come in pages. What a test may do to it:
`fail` answers the next requests with an error, `hold` keeps them waiting, `forbid_writes` makes a
bucket read-only, and `buckets` is there to be looked at and tampered with.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import ThreadingHTTPServer
from urllib.parse import quote

from tests.testing.gcs_http import Handler

PAGE = 7  # Entries of a listing's page at most: so small that every test turns pages.


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # noqa: PLW2901
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> str:
    """As Google writes it: base64 of the four bytes, the highest first."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return base64.b64encode((value ^ 0xFFFFFFFF).to_bytes(4, "big")).decode()


@dataclasses.dataclass
class Stored:
    """An object: its bytes, and what was noted of them when they came."""

    data: bytes
    generation: int
    crc32c: str
    md5: str


class ApiError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str = ""):
        self.status = status
        super().__init__(message or f"status {status}")


@dataclasses.dataclass
class _Fault:
    pattern: re.Pattern[str]
    status: int
    left: int


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *unused: object) -> None:
        """Clients come and go, and are killed; anything else is a mistake here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*unused)  # type: ignore[arg-type]


class FakeGcs:
    """The storage, and the server that speaks for it."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Stored]] = {}
        # "METHOD /path?query" in the order of their coming; uploads end in "name=OBJECT".
        self.requests: list[str] = []
        self.uploads: dict[str, tuple[str, str, Mapping[str, str], bytearray]] = {}
        self.lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_001)
        self._faults: list[_Fault] = []
        self._held: list[tuple[re.Pattern[str], threading.Event, bool]] = []
        self._read_only: set[str] = set()
        self.latency_seconds = 0.0  # before each answer
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.storage = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="fake_gcs", daemon=True
        ).start()

    @property
    def env(self) -> dict[str, str]:
        """What makes a process talk to this server and ask nobody for credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # tensorstore's
            "NO_GCE_CHECK": "true",  # gcsfs then takes no time to find that this is no machine
            "GCE_METADATA_HOST": "127.0.0.1:1",  # of Google's.
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ---- For tests ----

    def bucket(self, name: str) -> dict[str, Stored]:
        """Make an empty bucket."""
        self.buckets[name] = {}
        return self.buckets[name]

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Names of a bucket's objects, without the prefix that they all have."""
        with self.lock:
            found = sorted(self.buckets[bucket])
        return [name.removeprefix(prefix) for name in found if name.startswith(prefix)]

    def flip(self, bucket: str, name: str, where: int) -> None:
        """Flip a bit behind the storage's back: what is noted of the object stays as it was."""
        stored = self.buckets[bucket][name]
        data = bytearray(stored.data)
        data[where] ^= 1
        stored.data = bytes(data)

    def fail(self, status: int, count: int, pattern: str = "") -> None:
        """Answer the next `count` requests whose "METHOD /path?query" matches with an error."""
        with self.lock:
            self._faults.append(_Fault(re.compile(pattern), status, count))

    def wait_for(self, pattern: str, timeout_seconds: float = 30.0) -> None:
        """Wait until a request has come that matches."""
        deadline = time.monotonic() + timeout_seconds
        while not any(re.search(pattern, request) for request in list(self.requests)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.requests[-50:]}"
            time.sleep(0.01)

    def failures_left(self) -> int:
        """How many of the failures asked for have not happened yet."""
        return sum(fault.left for fault in self._faults)

    def forgive(self) -> None:
        """Take back all failures that have not happened, and let all buckets be written."""
        self._faults.clear()
        self._read_only.clear()

    @contextlib.contextmanager
    def hold(self, pattern: str, *, lose: bool = False) -> Iterator[None]:
        """Answer no request that matches before the end of the `with`; `lose`: nor do it then."""
        held = (re.compile(pattern), threading.Event(), lose)
        with self.lock:
            self._held.append(held)
        try:
            yield
        finally:
            self._held.remove(held)
            held[1].set()

    def forbid_writes(self, bucket: str) -> None:
        """Make a bucket read-only."""
        self._read_only.add(bucket)

    # ---- For the handler ----

    def admit(self, request: str) -> None:
        """Note a request; hold it back or refuse it where a test said so."""
        with self.lock:
            self.requests.append(request)
            held = [entry[1:] for entry in self._held if entry[0].search(request)]
        time.sleep(self.latency_seconds)
        for event, lose in held:
            event.wait(60)
            if lose:
                raise ApiError(503, "lost")
        with self.lock:
            for fault in self._faults:
                if fault.left and fault.pattern.search(request):
                    fault.left -= 1
                    raise ApiError(fault.status, "injected")

    def objects(self, bucket: str, *, write: bool = False) -> dict[str, Stored]:
        """A bucket's objects."""
        if bucket not in self.buckets:
            raise ApiError(404, "The specified bucket does not exist.")
        if write and bucket in self._read_only:
            raise ApiError(403, "caller does not have storage.objects.create access")
        return self.buckets[bucket]

    def get(self, bucket: str, name: str, query: Mapping[str, str]) -> Stored:
        """An object that meets the preconditions."""
        with self.lock:
            stored = self.objects(bucket).get(name)
            self._check(stored, query)
            if stored is None or query.get("generation", stored.generation) not in (
                stored.generation,
                str(stored.generation),
            ):
                raise ApiError(404, f"No such object: {bucket}/{name}")
            return dataclasses.replace(stored)

    def put(self, bucket: str, name: str, data: bytes, query: Mapping[str, str]) -> Stored:
        """Write a whole object."""
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        stored = Stored(data, next(self._generations), crc32c(data), md5)
        with self.lock:
            objects = self.objects(bucket, write=True)
            self._check(objects.get(name), query)
            objects[name] = stored
        return stored

    def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        """Remove an object."""
        with self.lock:
            objects = self.objects(bucket, write=True)
            self._check(objects.get(name), query)
            if objects.pop(name, None) is None:
                raise ApiError(404, f"No such object: {bucket}/{name}")

    def listing(self, bucket: str, query: Mapping[str, str]) -> dict:
        """A page of a listing."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        with self.lock:
            objects = dict(self.objects(bucket))
        entries: dict[str, str] = {}  # what a page counts -> "prefix" or "item"
        for name in sorted(objects):
            if not name.startswith(prefix):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                entries[prefix + head + delimiter] = "prefix"
            else:
                entries[name] = "item"
        token = query.get("pageToken", "")
        names = [
            name
            for name in entries
            if name > token
            and name >= query.get("startOffset", "")
            and not ("endOffset" in query and name >= query["endOffset"])
        ]
        page = names[: min(PAGE, int(query.get("maxResults", PAGE)))]
        answer: dict = {"kind": "storage#objects"}
        answer["items"] = [
            self.resource(bucket, name, objects[name]) for name in page if entries[name] == "item"
        ]
        answer["prefixes"] = [name for name in page if entries[name] == "prefix"]
        if len(page) < len(names):
            answer["nextPageToken"] = page[-1]
        return answer

    def resource(self, bucket: str, name: str, stored: Stored) -> dict:
        """What the API says of an object."""
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{stored.generation}",
            "name": name,
            "bucket": bucket,
            "mediaLink": f"{self.url}/download/storage/v1/b/{bucket}/o/{quote(name, safe='')}",
            "generation": str(stored.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(stored.data)),
            "crc32c": stored.crc32c,
            "md5Hash": stored.md5,
            "timeCreated": "2026-01-01T00:00:00.000000Z",
            "updated": "2026-01-01T00:00:00.000000Z",
        }

    @staticmethod
    def _check(stored: Stored | None, query: Mapping[str, str]) -> None:
        generation = str(stored.generation) if stored else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise ApiError(412, "At least one of the pre-conditions you specified did not hold.")
        if query.get("ifGenerationNotMatch") == generation:
            raise ApiError(304)


@functools.cache
def shared() -> FakeGcs:
    """The one server of this test process: tensorstore may ask the environment only once."""
    return FakeGcs()


def error_body(error: ApiError) -> bytes:
    """The JSON that goes with an error."""
    return json.dumps({"error": {"code": error.status, "message": str(error)}}).encode()
