"""A real HTTP server of known behaviour, for the tests of the load generator.

``python slow_server.py '{"service_s": 0.005}'`` prints its port and serves until its standard input
is closed. One worker serves requests in order of arrival and takes ``service_s`` for each. An
answer is due at an absolute time, so that late timers do not add up: with Poisson arrivals this is
the M/D/1 queue. GET /seen tells what came in. It imports the standard library alone.
"""

import asyncio
import json
import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Server:
    """``every`` 10 does ``fault`` to each tenth request; ``stall_at`` is a request's number."""

    service_s: float = 0.0
    stall_at: int = 0
    stall_s: float = 1.0
    every: int = 0
    fault: str = ""
    free_at: float = 0.0
    requests: int = 0
    open: int = 0
    most_open: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while await self.exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left
        finally:
            self.open -= 1
            writer.close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read one request and answer it; False ends the connection."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path = first.split()[1]
        if path == "/seen":
            seen = (self.requests, self.most_open, self.headers, self.sizes)
            names = ("requests", "most_open", "headers", "sizes")
            return respond(writer, 200, dict(zip(names, seen, strict=True)))
        self.requests, self.headers = self.requests + 1, headers
        document = json.loads(body)
        texts = document["texts"] if "texts" in document else document["inputs"][0]["data"]
        self.sizes.append(len(texts))
        number = self.requests
        await self.work()
        if self.every and number % self.every == 0:
            return await self.fail(writer)
        return respond(writer, 200, answer(path, texts))

    async def work(self) -> None:
        """Wait until the one worker has done this request."""
        now = asyncio.get_running_loop().time()
        service_s = self.stall_s if self.requests == self.stall_at else self.service_s
        self.free_at = max(self.free_at, now) + service_s
        await asyncio.sleep(self.free_at - now)

    async def fail(self, writer: asyncio.StreamWriter) -> bool:
        match self.fault:
            case "reset":
                writer.transport.abort()
                return False
            case "half":
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"predic')
                return False
            case "hang":
                await asyncio.sleep(3600)
            case "not json":
                return respond(writer, 200, b"{oops")
            case "too few":
                return respond(writer, 200, {"predictions": []})
            case "not http":
                writer.write(b"hello\r\n\r\n")
                return False
        return respond(writer, int(self.fault), {"error": "as asked"})


def answer(path: str, texts: list[str]) -> dict[str, Any]:
    if path.endswith("/infer"):
        output = {"name": "label", "shape": [len(texts)], "datatype": "BYTES"}
        return {"model_name": "m", "outputs": [output | {"data": ["NUM"] * len(texts)}]}
    return {"predictions": [{"label": "NUM", "probability": 0.9} for _ in texts]}


def respond(writer: asyncio.StreamWriter, status: int, document: Any) -> bool:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    return True


async def main() -> None:
    server = Server(**json.loads(sys.argv[1]))
    listening = await asyncio.start_server(server.connection, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


asyncio.run(main())
