"""The HTTP half of `tests.testing.gcs`: requests in, JSON and bytes out."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    """One connection; it stays open from request to request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *unused: object) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        from tests.testing.gcs import ApiError, error_body

        body = self._body()
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            name = self._uploaded_name(query, body)
            self.storage.admit(f"{self.command} {unquote(url.path)}?{unquote(url.query)}{name}")
            self._route(url.path, query, body)
        except ApiError as error:
            self._answer(error.status, error_body(error) if error.status != 304 else b"")
        except ConnectionError:  # gcsfs drops the slower one of two requests.
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    @property
    def storage(self) -> Any:
        return self.server.storage  # type: ignore[attr-defined]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _uploaded_name(self, query: dict[str, str], body: bytes) -> str:
        """The name of the object that an upload is of, where the URL does not say it."""
        if query.get("upload_id") in self.storage.uploads:
            return f"&name={self.storage.uploads[query['upload_id']][1]}"
        if query.get("uploadType") in ("multipart", "resumable") and "name" not in query:
            match = re.search(rb'"name": ?"([^"]+)"', body)
            return f"&name={match[1].decode()}" if match else ""
        return ""

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Type" not in headers:
            self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, record: Mapping[str, Any]) -> None:
        self._answer(200, json.dumps(record).encode())

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if match := re.fullmatch(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o", path):
            return self._upload(unquote(match[1]), query, body)
        match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if not match:
            return self._answer(404, b"{}")
        bucket, name = unquote(match[1]), match[2]
        if name is None and path.rstrip("/").endswith("/o"):
            return self._json(self.storage.listing(bucket, query))
        if name is None:
            self.storage.objects(bucket)
            return self._json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        if self.command == "POST":
            return self._copy(bucket, name, query)
        name = unquote(name)
        if self.command == "DELETE":
            self.storage.delete(bucket, name, query)
            return self._answer(204)
        stored = self.storage.get(bucket, name, query)
        if query.get("alt") == "media" or path.startswith("/download/"):
            return self._media(stored)
        return self._json(self.storage.resource(bucket, name, stored))

    def _media(self, stored: Any) -> None:
        data, status = stored.data, 200
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(stored.generation),
            "x-goog-hash": f"crc32c={stored.crc32c}",
        }
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(data)
            if match[1]:
                start, end = int(match[1]), min(int(match[2] or size - 1) + 1, size)
            else:
                start, end = max(0, size - int(match[2])), size
            if start >= size:
                return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
            data, status = data[start:end], 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._answer(status, data, headers)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            return self._resumed(query["upload_id"], body)
        if kind == "resumable":
            self.storage.objects(bucket, write=True)
            name = query.get("name") or json.loads(body)["name"]
            number = secrets.token_hex(8)
            self.storage.uploads[number] = (bucket, name, query, bytearray())
            where = f"{self.storage.url}/upload/storage/v1/b/{bucket}/o"
            where += f"?uploadType=resumable&upload_id={number}"
            return self._answer(200, b"", {"Location": where})
        if kind == "multipart":
            boundary = re.search(r"""boundary=["']?([^"';]+)["']?""", self.headers["Content-Type"])
            assert boundary, "a multipart upload without a boundary"
            parts = re.split(rb"\r?\n?--" + re.escape(boundary[1].encode()) + rb"\r?\n?", body)
            head, body = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts[1:3])
            name = json.loads(head)["name"]
        else:
            name = query["name"]
        stored = self.storage.put(bucket, name, body, query)
        self._json(self.storage.resource(bucket, name, stored))

    def _resumed(self, number: str, body: bytes) -> None:
        bucket, name, query, data = self.storage.uploads[number]
        data += body
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total == "*":
            return self._answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        del self.storage.uploads[number]
        stored = self.storage.put(bucket, name, bytes(data), query)
        self._json(self.storage.resource(bucket, name, stored))

    def _copy(self, bucket: str, rest: str, query: dict[str, str]) -> None:
        match = re.fullmatch(r"(.+)/(rewriteTo|copyTo|moveTo)/(?:b/([^/]+)/)?o/(.+)", rest)
        assert match, rest
        name, target = unquote(match[1]), unquote(match[3] or bucket)
        source = self.storage.get(bucket, name, {})
        stored = self.storage.put(target, unquote(match[4]), source.data, query)
        if match[2] == "moveTo":
            self.storage.delete(bucket, name, {})
        resource = self.storage.resource(target, unquote(match[4]), stored)
        self._json({"done": True, "resource": resource} if match[2] == "rewriteTo" else resource)
