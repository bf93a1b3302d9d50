"""The description: a valid OpenAPI 3.1 document that names every route, as the server gives it."""

import copy

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from openapi_spec_validator.validation.exceptions import OpenAPIValidationError
from starlette.testclient import TestClient

from trainkit.serve.http.app import application
from trainkit.serve.http.settings import Settings


class NoModels(dict):
    """In place of models, which a description does not need."""

    def observe(self, on_batch):
        pass


@pytest.fixture(scope="module")
def description(address):
    return httpx.get(f"{address}/openapi.json").json()


@pytest.mark.parametrize("token", [False, True])
def test_it_is_valid_and_the_validator_can_say_no(token):
    secret = {"headers": {"Authorization": "Bearer open-sesame"}}
    app = application(NoModels(), Settings(), token="open-sesame" if token else None)
    found = TestClient(app).get("/openapi.json", **secret).json()
    OpenAPIV31SpecValidator(found).validate()
    assert ("securitySchemes" in found["components"]) == token
    wrong = copy.deepcopy(found)
    del wrong["paths"]["/v2/models/{model}"]["parameters"]
    with pytest.raises(OpenAPIValidationError):
        OpenAPIV31SpecValidator(wrong).validate()


def test_every_route_is_described_and_nothing_else(description):
    routes = application(NoModels(), Settings()).routes
    served = {(route.path, method) for route in routes for method in route.methods - {"HEAD"}}
    described = {
        (path, method.upper())
        for path, item in description["paths"].items()
        for method in item.keys() - {"parameters"}
    }
    assert served == described


def test_answers_are_as_described(description, address):
    def check(response, path, method="get"):
        responses = description["paths"][path][method]["responses"]
        schema = responses[str(response.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(response.json(), schema | {"components": description["components"]})

    for path in ("/v2", "/models", "/v2/health/live", "/v2/health/ready"):
        check(httpx.get(address + path), path)
    check(httpx.get(f"{address}/v2/models/golden"), "/v2/models/{model}")
    check(httpx.get(f"{address}/v2/models/golden/ready"), "/v2/models/{model}/ready")
    check(httpx.get(f"{address}/v2/models/x"), "/v2/models/{model}")
    body = {"texts": ["How far is Mars?"]}
    check(httpx.post(f"{address}/classify", json=body), "/classify", "post")
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["How far is Mars?"]}
    answer = httpx.post(f"{address}/v2/models/golden/infer", json={"inputs": [tensor]})
    check(answer, "/v2/models/{model}/infer", "post")
