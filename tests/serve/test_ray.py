"""On a local Ray: two replicas of the application, one of which is killed; and a file of texts.

Ray runs in a process of its own, as it does for its users, and every process it starts is gone at
the end.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.errors import InputError
from trainkit.serve.http.exceptions import UnavailableError

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own use of pydantic
    from trainkit.serve import ray_app

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"
TEXTS = [example.text for example in load_sample()[:60]]
QUIET = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
REPLICA = "ray::ServeReplica"
PROGRAM = """
import sys
import ray
from ray import serve
from trainkit.serve.ray_app import app

port, bundle = sys.argv[1:]
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         object_store_memory=100 << 20)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
given = {"bundle": bundle, "name": "golden", "min_replicas": "2", "max_replicas": "2"}
serve.run(app(given))
print("ready", flush=True)
for line in sys.stdin:  # any line: the same with another setting, which replaces every replica
    serve.run(app({**given, "settings": {"batch_tokens": int(line)}}))
    print("ready", flush=True)
serve.shutdown()
ray.shutdown()
"""


def free_port():
    """Return a port that was free: Ray's proxy takes no socket and reports no port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def gone(processes):
    """End what is left, and return it."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()
    return alive


class Cluster:
    """A local Ray that serves the golden bundle with two replicas."""

    def __init__(self, log):
        self.port = free_port()
        self.log = log.open("wb")
        self.driver = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.port), str(GOLDEN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=QUIET,
        )
        self.process = psutil.Process(self.driver.pid)
        self.url = f"http://127.0.0.1:{self.port}"

    def ready(self):
        """Wait until it is deployed; Ray says things of its own in between."""
        return any(line == b"ready\n" for line in self.driver.stdout)

    def named(self, name):
        found = []
        for child in self.process.children(recursive=True):
            try:
                found += [child] if name in " ".join(child.cmdline()) else []
            except psutil.NoSuchProcess:
                continue
        return found

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to pass"
            assert self.driver.poll() is None
            time.sleep(0.1)  # there is nothing to await: Ray tells nobody

    def close(self):
        started = self.process.children(recursive=True)
        try:
            self.driver.communicate(timeout=60)
        finally:
            self.driver.kill()
            self.driver.wait()
            self.log.close()
            left = gone(started)
        assert not left
        assert self.driver.returncode == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    log = tmp_path_factory.mktemp("ray") / "log"
    one = Cluster(log)
    try:
        assert one.ready(), log.read_text()
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def expected():
    return Classifier.load(GOLDEN, threads=1)(TEXTS)


def check(answer, expected):
    """Compare an answer with the library's own."""
    assert answer["model"] == "golden"
    for one, known in zip(answer["predictions"], expected, strict=True):
        assert one["label"] == known.label
        assert one["scores"] == pytest.approx(known.scores, abs=1e-5)


def test_the_application_answers_as_it_does_without_ray(cluster, expected):
    with httpx.Client(base_url=cluster.url) as client:
        answer = client.post("/classify", json={"texts": TEXTS}).json()
        check(answer, expected)
        with pytest.raises(AssertionError):
            check(answer, expected[::-1])
        assert client.get("/v2/health/ready").json()["ready"] is True
        assert client.get("/v2/models/golden").json()["name"] == "golden"
        text = {"name": "text", "datatype": "BYTES", "shape": [1], "data": TEXTS[:1]}
        found = client.post("/v2/models/golden/infer", json={"inputs": [text]}).json()
        (label,) = [one["data"] for one in found["outputs"] if one["name"] == "label"]
        assert label == [expected[0].label]
        refused = client.post("/classify", json={"texts": []})
        assert refused.status_code == 422
        assert list(refused.json()) == ["error"]


class Load:
    """Six clients that ask without a pause and compare every answer.

    ``may_fail``: from when on a request may fail, in the way of a replica that is gone.
    """

    def __init__(self, cluster, expected):
        self.cluster = cluster
        self.expected = expected
        self.may_fail = threading.Event()
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.right = self.retried = 0

    def __enter__(self):
        self.pool = ThreadPoolExecutor(6)
        self.clients = [self.pool.submit(self.client, 11 * seed) for seed in range(6)]
        return self

    def __exit__(self, *error):
        self.done.set()
        self.pool.shutdown()
        for one in self.clients:
            one.result()

    def until_right(self, more):
        """Wait for so many more right answers, or for a client's failure."""
        goal = self.right + more
        self.cluster.until(lambda: self.right >= goal or any(one.done() for one in self.clients))

    def client(self, number):
        with httpx.Client(base_url=self.cluster.url, timeout=30) as client:
            while not self.done.is_set():
                number += 7
                chosen = slice(number % 50, number % 50 + 1 + number % 9)
                check(self.healed(client, TEXTS[chosen]), self.expected[chosen])
                with self.lock:
                    self.right += 1

    def healed(self, client, texts):
        """Ask until there is an answer."""
        for _ in range(50):
            said = "the connection failed"
            try:
                answer = client.post("/classify", json={"texts": texts})
                if answer.status_code == 200:
                    return answer.json()
                said = f"{answer.status_code}: {answer.text}"
            except httpx.TransportError as error:
                said = repr(error)
            else:
                assert answer.status_code in (500, 503), said  # Ray's, for a replica that is gone
            assert self.may_fail.is_set(), said
            with self.lock:
                self.retried += 1
        raise AssertionError(f"retries do not heal it: {said}")


def test_a_killed_replica_costs_a_retry_and_never_a_wrong_answer(cluster, expected):
    victim, other = cluster.named(REPLICA)
    helpers = victim.children(recursive=True)
    assert helpers  # its inference process
    with Load(cluster, expected) as load:
        load.until_right(50)
        load.may_fail.set()
        victim.send_signal(signal.SIGKILL)
        assert not gone([victim, *helpers])  # it leaves none behind
        cluster.until(lambda: len(cluster.named(REPLICA)) == 2)
        load.until_right(100)
    assert load.retried < 20
    assert other in cluster.named(REPLICA)


def test_a_new_deployment_under_load_costs_no_request(cluster, expected):
    before = cluster.named(REPLICA)
    with Load(cluster, expected) as load:
        load.until_right(50)
        cluster.driver.stdin.write(b"1024\n")
        cluster.driver.stdin.flush()
        assert cluster.ready()
        load.until_right(50)
    after = cluster.named(REPLICA)
    assert len(after) == 2
    assert not set(before) & set(after)
    assert load.retried == 0


def test_the_health_check_fails_while_a_model_is_not_ready():
    def checked(*ready):
        models = {str(number): SimpleNamespace(ready=one) for number, one in enumerate(ready)}
        asyncio.run(ray_app.Replica.check_health(SimpleNamespace(models=models)))

    checked(True, True)
    with pytest.raises(UnavailableError, match="not ready: 1"):
        checked(True, False)


def test_arguments_are_strings_or_a_configs_values(tmp_path):
    given = ray_app._arguments(
        {"bundle": "b", "max_replicas": "4", "settings": {"batch_tokens": 4096}}
    )
    assert (given.max_replicas, given.settings.batch_tokens) == (4, 4096)
    (deployment,) = [
        ray_app.app({"bundle": str(tmp_path / "topics"), "cpus": "2"})._bound_deployment
    ]
    name, folder, settings = deployment.init_args
    assert (name, folder, settings.threads) == ("topics", str(tmp_path / "topics"), 2)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "bundle"),
        ({"bundle": "b", "replicas": "2"}, "replicas"),
        ({"bundle": "b", "cpus": "0.5"}, "cpus"),
        ({"bundle": "b", "min_replicas": "3"}, "max_replicas at least"),
        ({"bundle": "b", "target_requests": "nan"}, "target_requests"),
    ],
)
def test_a_wrong_argument_is_said(args, told):
    with pytest.raises(InputError, match=told):
        ray_app.app(args)


def predict(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "trainkit", "predict", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={name: value for name, value in QUIET.items() if name != "RAY_ADDRESS"},
    )


def test_the_number_of_workers_changes_no_byte(tmp_path):
    texts = TEXTS * 60  # 3600: four chunks
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"question": text}) for text in texts))
    common = (GOLDEN, "--file", file, "--text-column", "question", "--output")
    contents = []
    ways = ([], ["--workers", 1], ["--ray", "--workers", 1], ["--ray", "--workers", 2])
    for number, options in enumerate(ways):
        output = tmp_path / f"{number}.jsonl"
        done = predict(*common, output, *options)
        assert done.returncode == 0, done.stderr
        assert TEXTS[0] not in done.stderr
        contents.append(output.read_bytes())
    assert len(set(contents)) == 1
    found = [json.loads(one) for one in contents[0].splitlines()]
    assert [one["text"] for one in found] == texts
    assert [one["line"] for one in found] == list(range(1, len(texts) + 1))
    expected = Classifier.load(GOLDEN)(texts)
    for one, other in zip(found, expected, strict=True):  # other threads, so not to the bit
        assert one["label"] == other.label
        assert one["scores"] == pytest.approx(other.scores, abs=1e-5)


def test_options_that_do_not_belong_together_are_said(tmp_path):
    for arguments in (["--ray"], ["Who ?", "--workers", 2], ["--file", tmp_path / "a.txt"]):
        done = predict(GOLDEN, *arguments)
        assert done.returncode == 2
        assert "both" in done.stderr
    file = tmp_path / "a.txt"
    file.write_text("Who ?\n\n")
    done = predict(GOLDEN, "--ray", "--file", file, "--output", tmp_path / "out")
    assert (done.returncode, "line 2: empty text" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
