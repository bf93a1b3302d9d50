"""Bad requests by the hundred: every answer is as described, and none is a fault of the server.

`make fuzz` sends more than twenty thousand and says what became of them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation
from starlette.testclient import TestClient

from trainkit.serve.files import pretty_json, write_atomically
from trainkit.serve.http.app import application
from trainkit.serve.http.settings import Settings

EXAMPLES = int(os.environ.get("TRAINKIT_FUZZ_EXAMPLES", "12"))  # of each route and kind
BYTES_EXAMPLES = int(os.environ.get("TRAINKIT_FUZZ_BYTES_EXAMPLES", str(10 * EXAMPLES)))
GROWTH_MB = 24.0  # of resident memory: caches and pools fill; 20,000 requests kept would be more
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


class NoModels(dict):
    """In place of models, which a description does not need."""

    def observe(self, on_batch):
        pass


DESCRIPTION = TestClient(application(NoModels(), Settings())).get("/openapi.json").json()
SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
# A schema cannot say that data must fit the shape, that a version must be the one served, or that
# a text must hold more than white space; and a deadline of a microsecond passes.
RIGHT = ["2xx", "400", "404", "413", "422", "504"]
SCHEMA.config.checks.positive_data_acceptance.expected_statuses = RIGHT
SCHEMA.config.checks.not_a_server_error.expected_statuses = ["2xx", "3xx", "4xx", "504"]
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}


class Fuzzed:
    """The command in a process of its own, and the statuses of what was sent to it."""

    def __init__(self, process, errors):
        self.process = psutil.Process(process.pid)
        self.address = process.stdout.readline().split()[1]
        self.errors = errors
        self.statuses = Counter()
        self.before = self.held()

    def held(self):
        """Return what a leak would make grow: open files, threads, and resident MB."""
        with self.process.oneshot():
            memory_mb = round(self.process.memory_info().rss / 2**20, 1)
            return self.process.num_fds(), self.process.num_threads(), memory_mb


@pytest.fixture(scope="module")
def fuzzed(golden, tmp_path_factory):
    log = tmp_path_factory.mktemp("fuzz") / "log"
    command = [sys.executable, "-m", "trainkit", "serve", f"golden={golden}", "--port=0"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, "--threads=1", "--drain-seconds=0", "--log-level=warning"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        yield Fuzzed(process, log)
        process.terminate()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def address(fuzzed):
    return fuzzed.address


def right_as_it_is_sent(case):
    """Tell whether all that is wrong is a list of one number in a header: sent, it is a number."""
    wrong = [
        location
        for location, part in case.meta.components.items()
        if part.mode is GenerationMode.NEGATIVE
    ]
    return wrong == [ParameterLocation.HEADER] and all(map(is_number, case.headers.values()))


def is_number(text):
    try:
        return float(text) >= 0
    except ValueError:
        return False


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_described(label, mode, address, fuzzed):
    operation = OPERATIONS[label]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("the route takes nothing that could be wrong")
    version = httpx.get(f"{address}/v2/models/golden").json()["versions"][0]

    @SETTINGS
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def answer(case, served):
        assume(not right_as_it_is_sent(case))
        if served and mode is GenerationMode.POSITIVE:
            right = {"model": "golden", "version": version}
            case.path_parameters = {name: right[name] for name in case.path_parameters or {}}
        response = case.call_and_validate(base_url=address)
        fuzzed.statuses[response.status_code] += 1

    answer()


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address) as client:
        yield client


@settings(SETTINGS, max_examples=BYTES_EXAMPLES)
@given(
    path=st.sampled_from(["/v2/models/golden/infer", "/classify"]),
    body=st.binary(max_size=200),
    headers=st.fixed_dictionaries(
        {},
        optional={
            "Content-Encoding": st.sampled_from(["gzip", "deflate", "identity", "br", ""]),
            "Inference-Header-Content-Length": st.integers(-1, 250).map(str),
            "X-Request-Timeout-Ms": st.sampled_from(["1000", "-1", "1e999", "nan", "x", ""]),
            "X-Request-Id": st.text(st.characters(codec="latin-1", exclude_categories=["C"])),
        },
    ),
)
def test_arbitrary_bytes_are_a_bad_request(client, fuzzed, path, body, headers):
    headers = {name: value.strip().encode("latin-1") for name, value in headers.items()}
    response = client.post(path, content=body, headers=headers)
    fuzzed.statuses[response.status_code] += 1
    assert response.status_code in (400, 413, 415)
    assert list(response.json()) == ["error"]


def test_nothing_was_kept_and_nothing_went_wrong(fuzzed, capsys):
    """It comes last: the same server has had all the requests above."""
    after = fuzzed.held()
    statuses = dict(sorted(fuzzed.statuses.items()))
    bad = sum(count for status, count in statuses.items() if status >= 400)
    told = {"requests": fuzzed.statuses.total(), "bad": bad, "statuses": statuses}
    for name, *values in zip(["files", "threads", "memory_mb"], fuzzed.before, after, strict=True):
        told[name] = values
    with capsys.disabled():
        print(json.dumps(told))
    assert fuzzed.errors.read_text() == ""  # warnings and errors would be there
    queued = [
        line.split()[-1]
        for line in httpx.get(f"{fuzzed.address}/metrics").text.splitlines()
        if line.startswith("trainkit_queue_") and not line.startswith("trainkit_queue_seconds")
    ]
    assert queued == ["0.0", "0.0"]
    assert after[0] <= fuzzed.before[0] + 8  # connections that wait for their client's next request
    assert after[2] < fuzzed.before[2] + GROWTH_MB
    assert {status for status in statuses if status >= 500} <= {504}  # a deadline asked for passed
    if "TRAINKIT_FUZZ_REPORT" in os.environ:
        write_atomically(Path(os.environ["TRAINKIT_FUZZ_REPORT"]), pretty_json(told))
