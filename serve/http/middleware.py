"""What every request passes: its id, the token, its log line, and the limits of its body."""

import asyncio
import hmac
import logging
import math
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainkit.serve.http.exceptions import ClientGoneError, HTTPError
from trainkit.serve.http.messages import Error

T = TypeVar("T")

OTHER = "other"  # the route of unknown paths: labels stay few
GONE = 499  # nginx's status for a client that went away; only the log has it
LOGGER = logging.getLogger("trainkit.serve.http")


class RequestLog(msgspec.Struct):
    """One request's log line and metrics; times in seconds."""

    request_id: str
    method: str
    started: float
    route: str = OTHER
    status: int = 0
    error: str = ""  # kind of the error, never its sentence
    model: str = ""
    version: str = ""
    texts: int = 0
    tokens: int = 0
    tokenize_s: float | None = None
    queue_s: float | None = None
    infer_s: float | None = None
    total_s: float = 0.0

    def fields(self) -> dict[str, Any]:
        """Return the fields of the log line; none contains text of the request."""
        found: dict[str, Any] = {}
        for name, value in msgspec.structs.asdict(self).items():
            if name == "started" or value in ("", None):
                continue
            if name.endswith("_s"):
                name, value = f"{name[:-2]}_ms", round(value * 1000, 3)
            found[name] = value
        return found


class RequestMiddleware:
    """ASGI middleware: request id, bearer token, ``Connection: close`` while draining, log line.

    ``observe`` gets the log of each request after its answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        public: Collection[str],
        draining: Callable[[], bool],
        observe: Callable[[RequestLog], None],
    ) -> None:
        self.app = app
        self.token = None if token is None else token.encode()
        self.public = public
        self.draining = draining
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; anything else passes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        log = RequestLog(_request_id(scope), scope["method"], time.perf_counter())
        scope["trainkit.log"] = log

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                log.status = message["status"]
                message["headers"] = [*message["headers"], *self._headers(log)]
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            if self._is_allowed(scope):
                await self.app(scope, receive, answer)
            else:
                log.error = "token"
                message = "the token is missing or wrong; send Authorization: Bearer TOKEN."
                headers = {"WWW-Authenticate": "Bearer"}
                await json_response(Error(message), 401, headers)(scope, receive, answer)
        except ClientGoneError:
            log.status, log.error = GONE, "client gone"
        except Exception:  # a traceback must not reach the client
            LOGGER.exception("unexpected error", extra={"fields": {"request_id": log.request_id}})
            log.error = "unexpected"
            if not log.status:
                message = f"the server failed; its log has request {log.request_id}."
                await json_response(Error(message), 500)(scope, receive, answer)
        finally:
            log.route = getattr(scope.get("endpoint"), "path", OTHER)
            log.total_s = time.perf_counter() - log.started
            self.observe(log)
            LOGGER.info("", extra={"fields": log.fields()})

    def _headers(self, log: RequestLog) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", log.request_id.encode())]
        return [*headers, (b"connection", b"close")] if self.draining() else headers

    def _is_allowed(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.token is None or path in self.public:
            return True
        scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
        return hmac.compare_digest(token.strip(), self.token) and scheme.lower() == b"bearer"


def json_response(
    content: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a struct as JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _request_id(scope: Scope) -> str:
    sent = header(scope, b"x-request-id")
    if sent and len(sent) <= 64 and sent.isascii() and sent.decode("ascii").isprintable():
        return sent.decode("ascii")
    return uuid.uuid4().hex


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header of this name, which is in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


def header_timeout_s(scope: Scope) -> float:
    """Return what X-Request-Timeout-Ms asks for, in seconds; infinity without it."""
    sent = header(scope, b"x-request-timeout-ms")
    if sent is None:
        return math.inf
    try:
        timeout_ms = float(sent)
    except ValueError:
        timeout_ms = math.nan
    if not 0 < timeout_ms < math.inf:
        raise HTTPError(400, "X-Request-Timeout-Ms must be a number of milliseconds above 0.")
    return timeout_ms / 1000


def _decompressor(scope: Scope) -> Any:
    encoding = (header(scope, b"content-encoding") or b"identity").strip().lower()
    if encoding == b"identity":
        return None
    if encoding in (b"gzip", b"x-gzip"):
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    if encoding == b"deflate":  # RFC 9110: in zlib's format, not bare
        return zlib.decompressobj()
    message = "Content-Encoding must be gzip, deflate or identity."
    raise HTTPError(415, message, Accept_Encoding="gzip, deflate")


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Read and decompress a body of at most ``limit`` bytes, as sent and decompressed."""
    too_large = HTTPError(413, f"the body is larger than {limit} bytes; send fewer texts.")
    decompressor = _decompressor(scope)
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > limit:
        raise too_large
    pieces, sent, size = [], 0, 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        piece = message.get("body", b"")
        more = message.get("more_body", False)
        sent += len(piece)
        if decompressor is not None:
            piece = _decompressed(decompressor, piece, limit - size + 1)
        size += len(piece)
        if max(sent, size) > limit:
            raise too_large
        pieces.append(piece)
    if decompressor is not None and (not decompressor.eof or decompressor.unused_data):
        raise HTTPError(400, "the compressed body does not end where its data ends.")
    return b"".join(pieces)


def _decompressed(decompressor: Any, piece: bytes, limit: int) -> bytes:
    try:
        found: bytes = decompressor.decompress(piece, limit)
    except zlib.error:
        raise HTTPError(400, "the body is not what Content-Encoding says.") from None
    return found


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; cancel it and raise ``ClientGoneError`` if the client disconnects first.

    The body must have been read before.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
