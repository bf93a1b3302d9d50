"""The application on a real server: uvicorn in a thread, on a port of the system's choice."""

import asyncio
import contextlib
import socket
import threading
from pathlib import Path

import pytest
import uvicorn

from trainkit.serve.http.app import application
from trainkit.serve.http.model import Models
from trainkit.serve.http.settings import Settings

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle"


@contextlib.contextmanager
def serving(settings=None, **options):
    """Serve the golden bundle as "golden"; gives the address, and the models to look into."""
    settings = settings or Settings(threads=1)
    started, found = threading.Event(), {}
    listener = socket.create_server(("127.0.0.1", 0))

    async def main():
        models = await Models.load({"golden": GOLDEN}, settings)
        config = uvicorn.Config(
            application(models, settings, **options), log_config=None, access_log=False, ws="none"
        )
        found["server"], found["models"] = uvicorn.Server(config), models
        serve = asyncio.create_task(found["server"].serve([listener]))
        found["loop"] = asyncio.get_running_loop()
        started.set()
        try:
            await serve
        finally:
            await models.close(1)

    def run():
        try:
            asyncio.run(main())
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", found
    finally:
        if "server" in found:
            found["server"].should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def serve():
    """Give the context manager to tests that want other settings."""
    return serving


@pytest.fixture(scope="module")
def address():
    """Give the address of a server with the default settings."""
    with serving() as (url, _):
        yield url
