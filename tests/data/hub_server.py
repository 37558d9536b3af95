"""A hub of one small data set on this machine: enough of the real one's answers for its client libraries."""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "a" * 40
LANGUAGES = ("en", "ur")
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {code}\n  data_files:\n  - split: train\n    path: {code}/train-*\n" for code in LANGUAGES
)


def parquet(language: str, pictures: list[bytes]) -> bytes:
    stream = io.BytesIO()
    columns = {
        "image": [{"bytes": content, "path": None} for content in pictures],
        "title": [f"{language} {number}" for number in range(len(pictures))],
        "content": ["news"] * len(pictures),
        "caption": [f"caption {number} in {language}" for number in range(len(pictures))],
    }
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


@contextmanager
def serve(*, pictures: list[bytes], refusal: tuple[int, str] | None = None) -> Iterator[str]:
    """Serve the data set o/n, or refuse its files with a status and error code; yields the address."""
    files = {f"{code}/train-00000-of-00001.parquet": parquet(code, pictures) for code in LANGUAGES}
    files["README.md"] = (CARD + "---\n").encode()

    def entry(path: str) -> dict[str, object]:
        if path in LANGUAGES:
            return {"type": "directory", "path": path, "oid": path}
        return {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *values: object) -> None:
            """Stay silent."""

        def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            found = [entry(path) for path in asked if path in files or path in LANGUAGES]
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if tree := re.match(r"/api/datasets/o/n/tree/[^/]+/?(.*)$", path):
                whole = tree[1] or "recursive=true" in self.path.lower()
                paths = [file for file in files if file.startswith(tree[1])] if whole else [*LANGUAGES, "README.md"]
                below = [entry(path) for path in paths]
                self.answer(200, json.dumps(below).encode(), Content_Type="application/json")
            elif path.startswith("/api/datasets/o/n"):
                about = {"id": "o/n", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "tags": []}
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif not (file := re.match(r"/datasets/o/n/resolve/[^/]+/(.*)$", path)):
                self.answer(401, X_Error_Code="RepoNotFound")
            elif refusal:
                self.answer(refusal[0], X_Error_Code=refusal[1])
            elif file[1] not in files:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                tag = hashlib.sha1(files[file[1]]).hexdigest()
                self.answer(200, files[file[1]], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
