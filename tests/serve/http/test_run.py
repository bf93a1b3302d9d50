"""A front's parts: the address, the signals, and an end that cuts nobody off."""

import asyncio
import socket
from types import SimpleNamespace

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from trainkit.serve.errors import InputError
from trainkit.serve.http.run import Control, LoadOrder, ModelReloader, Shutdown, WorkerReport
from trainkit.serve.http.sockets import DrainingServer, bound, is_loopback, listen, url

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


def test_a_bound_address_says_itself():
    with bound("127.0.0.1", 0) as listener:
        assert url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert is_loopback(listener)
    with bound("0.0.0.0", 0) as listener:
        assert not is_loopback(listener)


def test_an_ipv6_address_is_in_brackets():
    try:
        listener = bound("::1", 0)
    except InputError:
        pytest.skip("there is no ::1 on this machine")
    with listener, bound("[::1]", 0) as bracketed:
        for one in (listener, bracketed):
            assert url(one).startswith("http://[::1]:")
            assert is_loopback(one)


def test_the_second_to_listen_on_an_address_is_refused():
    with bound("127.0.0.1", 0) as one, bound(*one.getsockname()) as other:
        listen(one)
        with pytest.raises(InputError, match="another program listens there"):
            listen(other)


def test_signals_drain_first_and_then_end():
    async def main():
        stop = Shutdown(drain_s=60)
        assert await stop.unless(asyncio.sleep(0, "done")) == "done"
        waiting = asyncio.ensure_future(stop.wait())
        stop.signal()
        await asyncio.sleep(0)
        assert (stop.drain.is_set(), stop.now.is_set()) == (True, False)
        assert await stop.unless(asyncio.sleep(60, "done")) is None
        stop.signal()
        await waiting
        assert stop.now.is_set()
        assert stop.leave.is_set()

    asyncio.run(main())


class Serving:
    """A server whose only route answers once ``answer`` is set; ``asked`` says it was reached."""

    def __init__(self, grace_s=5.0):
        self.asked, self.answer = asyncio.Event(), asyncio.Event()
        self.leave, self.now = asyncio.Event(), asyncio.Event()
        self.listener = bound("127.0.0.1", 0)
        listen(self.listener)
        app = Starlette(routes=[Route("/", self.route)])
        server = DrainingServer(app, self.listener, grace_s)
        self.address = self.listener.getsockname()
        self.running = asyncio.ensure_future(server.run_until(self.leave, self.now))

    async def route(self, request):
        self.asked.set()
        await self.answer.wait()
        return PlainTextResponse("here you are")

    async def connect(self):
        return await asyncio.open_connection(*self.address)


async def closed(*writers):
    for writer in writers:
        writer.close()
        await writer.wait_closed()


def test_what_is_in_flight_is_finished_and_nothing_new_is_taken():
    async def main():
        server = Serving()
        reader, writer = await server.connect()
        writer.write(REQUEST)
        await server.asked.wait()
        server.leave.set()
        while True:  # until the port is closed
            try:
                await closed((await server.connect())[1])
            except ConnectionError:
                break
        assert not server.running.done()
        server.answer.set()
        answer = await reader.read()
        await server.running
        await closed(writer)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"here you are")

    asyncio.run(main())


def test_a_connection_that_nobody_took_yet_is_answered():
    """The system accepts it before the server does, which meanwhile was told to leave."""

    async def main():
        server = Serving()
        server.answer.set()
        reader, writer = await server.connect()
        writer.write(REQUEST)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")  # it is up
        await closed(writer)
        with socket.create_connection(server.address) as waiting:  # blocks the loop: not accepted
            server.leave.set()
            waiting.setblocking(False)
            loop = asyncio.get_running_loop()
            await asyncio.sleep(0.05)
            await loop.sock_sendall(waiting, REQUEST)
            assert (await loop.sock_recv(waiting, 1000)).startswith(b"HTTP/1.1 200")
        await server.running

    asyncio.run(main())


@pytest.mark.parametrize("cut", ["grace", "signal"])
def test_the_end_is_bounded(cut):
    async def main():
        server = Serving(grace_s=0.2 if cut == "grace" else 60)
        _, writer = await server.connect()
        writer.write(REQUEST)
        await server.asked.wait()
        server.leave.set()
        if cut == "signal":
            server.now.set()
        await asyncio.wait_for(server.running, 5)
        await closed(writer)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "said", "exit_code"),
    [
        (InputError("no such folder."), "no such folder.", 2),
        (OSError("no process"), "no process", 1),
        (MemoryError(), "MemoryError", 1),
    ],
)
def test_an_order_that_fails_is_reported_and_the_next_one_is_obeyed(error, said, exit_code, caplog):
    """Whatever it fails with: the front goes on serving what it serves."""
    orders = []

    class Models(dict):
        async def reload(self, name, folder):
            orders.append(name)
            if name == "bad":
                raise error
            return self[name]

    async def main():
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        control = Control(*await asyncio.open_connection(sock=theirs))
        models = Models(one=SimpleNamespace(version="1"))
        obeying = asyncio.ensure_future(control.obey(ModelReloader(models)))
        for name in ("bad", "one"):
            control.orders.put_nowait(LoadOrder(name))
        answers = [
            msgspec.json.decode(await reader.readline(), type=WorkerReport) for _ in ("bad", "one")
        ]
        obeying.cancel()
        await closed(writer, control.writer)
        return answers

    refused, done = asyncio.run(main())
    assert refused == WorkerReport({"one": "1"}, said, exit_code)
    assert done == WorkerReport({"one": "1"})
    assert orders == ["bad", "one"]
    (told,) = [record for record in caplog.records if "is refused" in record.message]
    assert bool(told.exc_info) == (exit_code == 1)
