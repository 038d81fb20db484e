"""A Google Cloud Storage of this machine, for tests: python -m tests.bucket_server PORT

Runs gcp-storage-emulator in memory, and adds what that lacks: conditions on generations, the
generations of downloads, and a bucket for which there is no permission. Buckets: BUCKETS.
"""

import pathlib
import socket
import subprocess
import sys
import time
from typing import Any, Self

BUCKETS = ("bucket", "forbidden", "read-only")


def _refusal(request: Any, storage: Any) -> tuple[int, str] | None:
    """Returns the status and message with which a request is refused, or None."""
    bucket = request.params.get("bucket_name")
    if bucket == "forbidden" or (bucket == "read-only" and request.method != "GET"):
        return 403, "someone does not have storage.objects access"
    if "ifGenerationMatch" in request.query:
        if (name := request.params.get("object_id")) is None:
            given = request.query.get("name")
            name = given[0] if given else request.data.get("meta", request.data)["name"]
        wanted = request.query["ifGenerationMatch"][0]
        return None if _generation(storage, bucket, name) == wanted else (412, "conditionNotMet")
    return None


def _generation(storage: Any, bucket: str, name: str) -> str:
    from gcp_storage_emulator.exceptions import NotFound

    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def _strict(handler: Any) -> Any:
    from http import HTTPStatus

    def handle(request: Any, response: Any, storage: Any) -> None:
        if refused := _refusal(request, storage):
            response.status = HTTPStatus(refused[0])
            response.json({"error": {"code": refused[0], "message": refused[1]}})
            return
        handler(request, response, storage)
        if request.method == "GET" and (name := request.params.get("object_id")):
            generation = _generation(storage, request.params["bucket_name"], name)
            response["x-goog-generation"] = generation

    return handle


def serve(port: int) -> None:
    """Serves until the process is ended."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import buckets

    for _, handlers in server.HANDLERS:
        handlers |= {method: _strict(handler) for method, handler in handlers.items()}
    # It serves one connection after the other.
    server.server.HTTPServer.request_queue_size = 1000
    server.RequestHandler.timeout = 10
    running = server.create_server("127.0.0.1", port, in_memory=True)
    for name in BUCKETS:
        buckets.create_bucket(name, running._storage)
    running.run()


class BucketServer:
    """A context manager that serves in another process. `environment` is that of its clients."""

    def __enter__(self) -> Self:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bucket_server", str(port)],
            cwd=pathlib.Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # a traceback per connection that a client closes
        )
        url = f"http://127.0.0.1:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # Nobody looks for Google's own metadata server.
            "GCE_METADATA_HOST": "127.0.0.1:1",
        }
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    return self
            time.sleep(0.05)
        self.__exit__()
        raise TimeoutError("the bucket server did not start")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
