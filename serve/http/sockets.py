"""A socket to listen on, and uvicorn on it: signals are the caller's, and no request is lost."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from trainkit.serve.errors import InputError

BACKLOG = 2048
FIRST_REQUEST_S = 1.0  # that a new connection has for its request once no more are accepted


def bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, not yet listening; an IPv6 host may be in brackets.

    On ``::`` it accepts IPv4 too, unless the system is configured otherwise. Raises ``InputError``
    if the host is unknown or the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise InputError(
            f"the host {host!r} is not known here; give an address of this machine, "
            "such as 127.0.0.1."
        ) from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise listen_error(joined(host, port), error) from None
    made.setblocking(False)
    return made


def listen(listener: socket.socket) -> None:
    """Open the port. With SO_REUSEADDR two may bind an address, and the second fails only here."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise listen_error(joined(*listener.getsockname()[:2]), error) from None


def listen_error(where: str, error: OSError) -> InputError:
    """Say why an address cannot be had."""
    remedy = {
        errno.EADDRINUSE: "another program listens there; end it, or choose another port "
        "(0: a free one)",
        errno.EACCES: "ports below 1024 need a right of their own; choose another",
        errno.EADDRNOTAVAIL: "it is no address of this machine; choose one that is",
    }.get(error.errno or 0, f"{error.strerror}; choose another address")
    return InputError(f"cannot listen on {where}: {remedy}.")


def is_loopback(listener: socket.socket) -> bool:
    """Tell whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """Return the address of a bound socket."""
    return f"http://{joined(*listener.getsockname()[:2])}"


def joined(host: str, port: int) -> str:
    """Write a host and a port as a URL does, with brackets around IPv6."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn on a socket that listens; :meth:`run_until` is its whole life."""

    def __init__(self, app: ASGIApp, listener: socket.socket, grace_s: float) -> None:
        config = uvicorn.Config(
            app,
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
        )
        config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # goes to wait_for
        super().__init__(config)
        self.listener = listener

    async def run_until(self, leave: asyncio.Event, now: asyncio.Event) -> None:
        """Serve until ``leave``, then finish what is in flight; ``now`` cuts that short."""
        serving = asyncio.create_task(self.serve([self.listener]))
        try:
            await first(leave.wait(), asyncio.shield(serving))
            self.should_exit = True
            await first(now.wait(), asyncio.shield(serving))
            self.force_exit = now.is_set()
            await serving
        finally:
            serving.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and answer every accepted connection."""
        loop = asyncio.get_running_loop()
        end = loop.time() + FIRST_REQUEST_S
        with self.listener.dup() as backlog:  # stays open when the server closes its own
            await self._stop_accepting()
            await self._accept_all(backlog, end)
        # uvicorn closes a connection that has no request; a new one's first is on its way.
        while self._awaits_first_request() and loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)
        left: list[asyncio.Task[None]] = list(self.server_state.tasks)  # if the grace time is over
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        open_still: list[Any] = list(self.server_state.connections)
        for connection in open_still:
            connection.transport.abort()
        await asyncio.sleep(0)  # a transport closes in the loop's next turn

    async def _stop_accepting(self) -> None:
        """Close asyncio's servers, once what they accepted last has become a connection.

        A server that is closed in between drops it unanswered.
        """
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
        await asyncio.sleep(0.01)
        for server in self.servers:
            server.close()

    async def _accept_all(self, backlog: socket.socket, end: float) -> None:
        """Take the connections that the system has accepted, until ``end``."""
        backlog.setblocking(False)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(BlockingIOError):
            while loop.time() < end:
                connection, _ = backlog.accept()
                connection.setblocking(False)
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    def _awaits_first_request(self) -> bool:
        connections: set[Any] = (
            self.server_state.connections
        )  # the class depends on the installed parser
        return any(connection.cycle is None for connection in connections)


async def first(*awaited: Any) -> None:
    """Wait for the first of several; the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in awaited]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
