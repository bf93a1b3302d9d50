"""Bad requests by the hundred: every answer is as described, and none is a fault of the server.

TRAINKIT_FUZZ_EXAMPLES=1000 sends about twenty thousand.
"""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from trainkit.serve.http.openapi import document
from trainkit.serve.http.settings import Limits

EXAMPLES = int(os.environ.get("TRAINKIT_FUZZ_EXAMPLES", "12"))  # of each route and kind
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
SCHEMA = schemathesis.openapi.from_dict(document(token=False, version="1", limits=Limits()))
# A schema cannot say that data must fit the shape, that a version must be the one served, or that
# a text must hold more than white space; and a deadline of a microsecond passes.
RIGHT = ["2xx", "400", "404", "413", "422", "504"]
SCHEMA.config.checks.positive_data_acceptance.expected_statuses = RIGHT
SCHEMA.config.checks.not_a_server_error.expected_statuses = ["2xx", "3xx", "4xx", "504"]
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_described(label, mode, address):
    operation = OPERATIONS[label]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("the route takes nothing that could be wrong")
    version = httpx.get(f"{address}/v2/models/golden").json()["versions"][0]

    @SETTINGS
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def answer(case, served):
        if served and mode is GenerationMode.POSITIVE:
            right = {"model": "golden", "version": version}
            case.path_parameters = {name: right[name] for name in case.path_parameters or {}}
        case.call_and_validate(base_url=address)

    answer()


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address) as client:
        yield client


@settings(SETTINGS, max_examples=EXAMPLES * 10)
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
def test_arbitrary_bytes_are_a_bad_request(client, path, body, headers):
    headers = {name: value.strip().encode("latin-1") for name, value in headers.items()}
    response = client.post(path, content=body, headers=headers)
    assert response.status_code in (400, 413, 415)
    assert list(response.json()) == ["error"]
