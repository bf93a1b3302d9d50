"""``trainkit serve`` as a process: its start, signals, new versions, several fronts, its end."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from trainkit.cli import cli
from trainkit.commands.serve import server_settings
from trainkit.serve import Classifier
from trainkit.serve.bundle import Serving, open_bundle, write_serving
from trainkit.serve.http.settings import Limits, Settings

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"
TEXTS = ["Who wrote the Odyssey?", "How far is Mars?", "What does DNA stand for?"]
WAIT_S = 60.0  # for what takes a second on an idle machine


class Served:
    """The command, running; its log lines as they come."""

    def __init__(self, *arguments, environment=None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainkit", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        self.lines = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        said = self.process.stdout.readline().split()
        self.address = said[1] if said else None
        self.admin = said[3] if len(said) > 2 else None

    def _read(self):
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line)
                self.news.notify_all()

    def logged(self, part):
        """Wait for a log line with this part, and return it."""

        def found():
            return next((line for line in self.lines if part in line), None)

        with self.news:
            assert self.news.wait_for(found, WAIT_S), f"{part!r} is not in: {self.lines}"
            return found()

    def pids(self):
        """Return the processes that have answered a request."""
        lines = [json.loads(line) for line in self.lines if line.startswith("{")]
        return {line["pid"] for line in lines if line.get("route") == "/classify"}

    def versions(self):
        """Return the versions that answer now, each asked on a connection of its own."""
        answers = [httpx.post(f"{self.address}/classify", json={"texts": TEXTS}) for _ in range(12)]
        return {answer.json()["version"] for answer in answers}

    def end(self, number=signal.SIGTERM):
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def gone(self):
        """Wait until every process that held standard error is gone."""
        self.reader.join(WAIT_S)
        return not self.reader.is_alive()


class Client(threading.Thread):
    """Posts until the port is closed or it is told to stop; keeps what became of each request."""

    def __init__(self, address):
        super().__init__()
        self.address = address
        self.answers = []
        self.failures = []
        self.stopped = threading.Event()
        self.news = threading.Condition()
        self.start()

    def run(self):
        with httpx.Client(timeout=WAIT_S) as client:
            while not self.stopped.is_set():
                try:
                    answer = client.post(f"{self.address}/classify", json={"texts": TEXTS})
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    self.failures.append(error)
                    continue
                with self.news:
                    self.answers.append(answer)
                    self.news.notify_all()

    def until(self, condition):
        """Wait until an answer fulfils the condition."""
        with self.news:
            assert self.news.wait_for(lambda: any(map(condition, self.answers)), WAIT_S)

    def more(self, count=5):
        """Wait for so many more answers."""
        with self.news:
            wanted = len(self.answers) + count
            assert self.news.wait_for(lambda: len(self.answers) >= wanted, WAIT_S)

    def stop(self):
        self.stopped.set()
        self.join(WAIT_S)

    def statuses(self):
        return {answer.status_code for answer in self.answers}


@pytest.fixture
def serve():
    """Return a function that starts the command; every process of it is gone at the end."""
    started = []

    def start(*arguments, **settings):
        started.append(Served(*arguments, **settings))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(WAIT_S)
            one.process.kill()
        one.process.wait()
        assert one.gone()
        one.process.stdout.close()
        one.process.stderr.close()


@pytest.fixture
def load():
    """Return a function that starts clients; they are stopped at the end."""
    clients = []

    def start(address, count=2):
        clients.extend(made := [Client(address) for _ in range(count)])
        return made

    yield start
    for client in clients:
        client.stop()


@pytest.fixture
def versions(tmp_path):
    """Return two folders with a version of the bundle each, and a link to the first."""
    folders = [tmp_path / "v1", tmp_path / "v2"]
    for batch_size, folder in enumerate(folders, start=8):
        shutil.copytree(GOLDEN, folder)
        write_serving(
            folder, Serving(threads=1, provider="CPUExecutionProvider", batch_size=batch_size)
        )
    link = tmp_path / "questions"
    link.symlink_to(folders[0])
    return [*folders, link]


def version(folder):
    return open_bundle(folder).manifest.sha256[:12]


def point(link, target):
    """Have the link lead elsewhere, at once."""
    new = link.with_name("new-link")
    new.symlink_to(target)
    new.replace(link)


def test_it_says_where_it_is_and_answers_like_the_library(serve):
    server = serve(f"questions={GOLDEN}", "--drain-seconds", "0")
    assert server.address.startswith("http://127.0.0.1:")
    live = httpx.get(f"{server.address}/v2/health/live")
    ready = httpx.get(f"{server.address}/v2/health/ready")
    assert (live.json(), ready.json()) == ({"live": True}, {"ready": True})
    answer = httpx.post(f"{server.address}/classify", json={"texts": TEXTS}).json()
    assert (answer["model"], answer["version"]) == ("questions", version(GOLDEN))
    for found, expected in zip(answer["predictions"], Classifier.load(GOLDEN)(TEXTS), strict=True):
        assert found["label"] == expected.label
        assert found["score"] == pytest.approx(expected.score, abs=1e-6)
    assert server.end(signal.SIGINT) == 0
    assert server.gone()
    assert not any("Odyssey" in line for line in server.lines)


@pytest.fixture
def ipv6():
    """Skip where the machine has no IPv6 loopback address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"there is no ::1 on this machine ({error.strerror})")


@pytest.mark.parametrize(("host", "workers"), [("::1", 1), ("[::1]", 2), ("::", 1)])
def test_it_listens_on_ipv6(host, workers, versions, serve, ipv6):
    first, second, _ = versions
    arguments = ["--host", host, "--workers", workers, "--admin", "[::1]:0", "--drain-seconds=0"]
    server = serve(f"q={first}", *arguments)
    bare = host.strip("[]")
    assert re.fullmatch(rf"http://\[{bare}\]:[1-9]\d*", server.address)
    assert re.fullmatch(r"http://\[::1\]:[1-9]\d*", server.admin)
    server.address = server.address.replace("[::]", "[::1]")  # of all interfaces, one to ask
    assert server.versions() == {version(first)}
    body = {"parameters": {"folder": str(second)}}
    loaded = httpx.post(f"{server.admin}/v2/repository/models/q/load", json=body, timeout=WAIT_S)
    assert loaded.status_code == 200
    assert server.versions() == {version(second)}
    warned = [
        line for line in server.lines if line.startswith("Warning: anyone who reaches http://[")
    ]
    assert len(warned) == (host == "::")


@pytest.mark.parametrize("workers", [1, 2])
def test_no_request_is_lost_at_the_end(workers, serve, load):
    server = serve(GOLDEN, "--workers", workers, "--drain-seconds", "0.5")
    clients = load(server.address, 3)
    for client in clients:
        client.more()
    server.process.terminate()
    for client in clients:
        client.until(lambda answer: answer.headers.get("connection") == "close")
    ready = httpx.get(f"{server.address}/v2/health/ready")
    assert (ready.status_code, ready.json()) == (503, {"ready": False})
    assert server.process.wait(WAIT_S) == 0
    assert server.gone()
    for client in clients:
        client.join(WAIT_S)  # ends by itself: the port is closed
        assert not client.is_alive()
        assert client.failures == []
        assert client.statuses() == {200}


def test_every_curl_line_of_the_document_works(versions, serve):
    first, second, _ = versions
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", document, re.DOTALL)
    server = serve(f"questions={first}", "--admin", "127.0.0.1:0", "--drain-seconds", "0")
    lines = "".join(blocks).replace("curl -s ", "curl -s -f -o /dev/null -w '%{http_code}\\n' ")
    values = {"URL": server.address, "ADMIN": server.admin, "NAME": "questions"}
    environment = os.environ | values | {"FOLDER": str(second)}
    done = subprocess.run(
        ["sh", "-e", "-c", lines], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["200"] * document.count("curl -s "), done.stderr
    assert server.versions() == {version(second)}


def test_a_second_signal_ends_it_at_once(serve):
    server = serve(GOLDEN, "--drain-seconds", "600")
    server.process.terminate()
    while httpx.get(f"{server.address}/v2/health/ready").status_code == 200:
        pass
    assert server.end() == 1


def test_hanging_up_swaps_the_version_and_no_request_fails(versions, serve, load):
    first, second, link = versions
    old, new = version(first), version(second)
    server = serve(link, "--drain-seconds", "0")
    (client, _) = clients = load(server.address)
    client.more()
    point(link, second)
    server.process.send_signal(signal.SIGHUP)
    client.until(lambda answer: answer.json()["version"] == new)
    (second / "model.onnx").write_bytes(b"damaged")
    server.process.send_signal(signal.SIGHUP)
    assert str(link) in server.logged("refused")
    client.more()
    for one in clients:
        one.stop()
        assert one.failures == []
        assert one.statuses() == {200}
    seen = [answer.json()["version"] for answer in client.answers]
    assert sorted(set(seen), key=seen.index) == [old, new]
    assert server.versions() == {new}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_admin_address_loads_a_version_everywhere(workers, versions, serve):
    first, second, _ = versions
    server = serve(f"q={first}", "--admin", "127.0.0.1:0", "--workers", workers)
    url = f"{server.admin}/v2/repository/models/q/load"
    (second / "tokenizer.json").write_text("{}")
    refused = httpx.post(url, json={"parameters": {"folder": str(second)}}, timeout=WAIT_S)
    assert refused.status_code == 400
    assert "tokenizer.json" in refused.json()["error"]
    assert server.versions() == {version(first)}
    shutil.copy(GOLDEN / "tokenizer.json", second)
    loaded = httpx.post(url, json={"parameters": {"folder": str(second)}}, timeout=WAIT_S)
    assert (loaded.status_code, loaded.json()["version"]) == (200, version(second))
    assert server.versions() == {version(second)}
    (model,) = httpx.post(f"{server.admin}/v2/repository/index").json()
    assert (model["name"], model["version"], model["state"]) == ("q", version(second), "READY")
    assert httpx.post(f"{server.address}/v2/repository/index").status_code == 404


def test_a_front_that_is_killed_is_replaced_while_the_other_answers(serve, load):
    server = serve(GOLDEN, "--workers", "2", "--drain-seconds", "0")
    while len(server.pids()) < 2:  # whichever front is quicker takes a connection
        (client,) = load(server.address, 1)
        client.more()
    before = server.pids()
    os.kill(victim := min(before), signal.SIGKILL)
    assert f"(pid {victim}) ended with -9" in server.logged("ended with")
    answer = httpx.post(f"{server.address}/classify", json={"texts": TEXTS}, timeout=WAIT_S)
    assert answer.status_code == 200
    server.logged("is back")
    while not server.pids() - before:
        (client,) = load(server.address, 1)
        client.more(2)
    total = sum(
        float(line.split()[-1])
        for line in httpx.get(f"{server.address}/metrics").text.splitlines()
        if line.startswith("trainkit_requests_total") and 'route="/classify"' in line
    )
    assert total > 0
    assert server.end() == 0


def test_no_front_outlives_its_supervisor(serve):
    server = serve(GOLDEN, "--workers", "2")
    server.process.kill()
    server.process.wait()
    assert server.gone()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_bundle_among_good_ones_starts_nothing(workers, versions, serve):
    first, second, _ = versions
    (second / "model.onnx").write_bytes(b"damaged")
    server = serve(first, second, "--workers", workers)
    assert server.process.wait(WAIT_S) == 2
    assert server.gone()
    assert server.address is None
    errors = [line for line in server.lines if line.startswith("Error: ")]
    assert len(errors) == 1
    assert str(second / "model.onnx") in errors[0]


def test_the_token_comes_from_a_file_or_the_environment(serve, tmp_path):
    file = tmp_path / "token"
    file.write_text("open-sesame\n")
    file.chmod(0o644)
    right = {"Authorization": "Bearer open-sesame"}
    for given in (
        serve(GOLDEN, "--token-file", file, "--drain-seconds", "0"),
        serve(GOLDEN, "--drain-seconds", "0", environment={"TRAINKIT_TOKEN": "open-sesame"}),
    ):
        assert httpx.get(f"{given.address}/v2").status_code == 401
        assert httpx.get(f"{given.address}/v2", headers=right).status_code == 200
        assert given.end() == 0
        assert ("chmod 600" in "".join(given.lines)) == ("--token-file" in given.process.args)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ["Missing argument"]),
        ([GOLDEN, GOLDEN], ["both be named 'bundle'", "NAME=FOLDER"]),
        ([f"a b={GOLDEN}"], ["'a b' is not a valid model name", "letters, digits"]),
        (["q="], ["has no folder"]),
        ([GOLDEN, "--port", "70000"], ["70000"]),
        ([GOLDEN, "--workers", "0"], ["0"]),
        ([GOLDEN, "--timeout", "0"], ["--timeout"]),
        ([GOLDEN, "--max-tokens", "99", "--queue-tokens", "98"], ["--queue-tokens 98"]),
        ([GOLDEN, "--host", "no-such-host.invalid"], ["'no-such-host.invalid' is not known"]),
        ([GOLDEN, "--host", "192.0.2.1"], ["192.0.2.1", "no address of this machine"]),
        ([GOLDEN, "--admin", "8001"], ["'8001' is not HOST:PORT"]),
        ([GOLDEN, "--admin", "::1:8001"], ["'::1:8001' is not HOST:PORT", "[::1]:8001"]),
        ([GOLDEN, "--admin", "[::1]:65536"], ["'[::1]:65536' is not HOST:PORT"]),
        ([GOLDEN, "--port", "0", "--admin", "0.0.0.0:0"], ["needs a token", "--token-file"]),
        ([GOLDEN, "--token-file", "nowhere"], ["token file nowhere", "check the path"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, told, refused):
    refused("serve", *arguments, told=told)


def test_a_port_in_use_is_named(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(
            "serve", GOLDEN, "--port", port, told=[f"127.0.0.1:{port}", "another program listens"]
        )


def test_an_ipv6_port_in_use_is_named(refused, ipv6):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        told = [f"[::1]:{port}", "another program listens"]
        refused("serve", GOLDEN, "--host", "::1", "--port", port, told=told)


def test_a_token_that_is_none_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("two words\n")
    (tmp_path / "token").chmod(0o600)
    refused("serve", GOLDEN, "--token-file", tmp_path / "token", told=["holds no token"])
    monkeypatch.setenv("TRAINKIT_TOKEN", "")
    refused("serve", GOLDEN, told=["TRAINKIT_TOKEN holds no token"])


def test_each_option_of_the_server_is_its_setting():
    options = {
        "--threads": 3,
        "--provider": "CPUExecutionProvider",
        "--batch-tokens": 1001,
        "--max-wait-ms": 1.5,
        "--queue-tokens": 1003,
        "--timeout": 2.5,
        "--max-body": 1005,
        "--max-texts": 1006,
        "--max-characters": 1007,
        "--max-tokens": 1002,
    }
    given = [str(part) for option in options.items() for part in option]
    context = cli.commands["serve"].make_context("serve", [str(GOLDEN), *given])
    assert server_settings(**context.params) == Settings(
        threads=3,
        providers=("CPUExecutionProvider",),
        batch_tokens=1001,
        max_wait_ms=1.5,
        queue_tokens=1003,
        timeout_s=2.5,
        limits=Limits(body_bytes=1005, texts=1006, characters=1007, tokens=1002),
    )
