import json

import pytest
import schemathesis
from client_http_service import ADA, BATCH, CONFIG, new_client, served, two_tenants
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode

from inft.client.api.configuration import configuration_schema
from inft.client.operations import KINDS
from params.client_resolve import training_config

ANSWERS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
CLIENT, FUTURE, ARTIFACT = "/v1/training_clients/{client_id}", "/v1/futures/{future_id}", "/v1/artifacts/{artifact_id}"
OPERATIONS = (
    "get /v1/training_clients",
    "post /v1/training_clients",
    f"get {CLIENT}",
    *(f"post {CLIENT}/{kind}" for kind in KINDS),
    f"get {FUTURE}",
    f"get {FUTURE}/result",
    f"post {FUTURE}/cancel",
    f"get {ARTIFACT}",
    f"get {ARTIFACT}/content",
    "get /v1/audit_logs",
    "get /v1/health",
    f"delete {CLIENT}",  # the last, since what it deletes is then not there for the others
)
EXAMPLES = settings(
    max_examples=6, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("openapi")
    with served(directory, keys=two_tenants(directory)) as found:
        yield found


@pytest.fixture(scope="module")
def http(shared):
    with shared.client(ADA) as client:
        yield client


@pytest.fixture(scope="module")
def ids(http):
    """Things that are there, so that made-up requests come further than 404."""
    path = new_client(http)
    future = http.post(f"{path}/save_state", json={}).json()
    return {
        "client_id": path.rpartition("/")[2],
        "future_id": future["id"],
        "artifact_id": future["result"]["artifact_id"],
    }


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_made_up_requests_are_answered_as_the_description_says(shared, ids, operation, mode):
    method, path = operation.split()
    described = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")[path][method]
    checks = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in ANSWERS]
    assert len(checks) == len(ANSWERS)

    waits = any(parameter["name"] == "wait" for parameter in described.definition.raw.get("parameters", ()))

    @EXAMPLES
    @given(described.as_strategy(generation_mode=mode))
    def check(case):
        case.path_parameters = {name: ids.get(name, value) for name, value in (case.path_parameters or {}).items()}
        if waits:  # an operation that was made up may wait for the numbers before it
            case.query = {**(case.query or {}), "wait": 0.1}
        case.call_and_validate(headers={"Authorization": f"Bearer {ADA}"}, checks=checks)

    check()


def test_every_path_is_tried(document):
    found = {f"{method} {path}" for path, methods in document["paths"].items() for method in methods}
    assert found == set(OPERATIONS)


@pytest.fixture(scope="module")
def document(http):
    return http.get("/openapi.json").json()


def test_every_operation_declares_its_errors_and_has_a_text(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            responses = set(operation["responses"])
            assert {"401", "403", "422", "429"} <= responses, (method, path)
            assert ("404" in responses) == ("{" in path), (method, path)
            if "requestBody" in operation:
                assert {"413", "415", "503"} <= responses, (method, path)
            assert operation["description"], (method, path)
            assert operation["security"] == [{"HTTPBearer": []}]
            for status, response in operation["responses"].items():
                assert response["description"]
                if int(status) >= 400:
                    [content] = response["content"].values()
                    assert content["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}


def test_the_configurations_schema_says_what_the_engine_takes():
    schema = configuration_schema()
    validator = Draft202012Validator(schema)
    for example in schema["examples"]:
        training_config(example)
    for config, good in [
        (CONFIG, True),
        ({"model_ref": "x", "dp_config": {"dataset_size": 10, "noise_multiplier": 1.0}, "lora_config": None}, True),
        ({"model_ref": "x", "dp_config": {"noise_multiplier": 1.0}}, False),
        ({}, False),
        ({"model_ref": "x", "batch_size": 0}, False),
        ({"model_ref": "x", "optimizer": {"name": "lion"}}, False),
        ({"model_ref": "x", "optimizer": {"betas": [0.9]}}, False),
        ({"model_ref": "x", "learning_rate": 1.0}, False),
    ]:
        assert validator.is_valid(config) is good, config
        if good:
            training_config(config)
        else:
            with pytest.raises(ValueError, match=r"\w"):
                training_config(config)
    assert schema["properties"]["batch_size"]["description"] == "most rows of one forward_backward"
    assert json.dumps(schema, allow_nan=False)


def test_the_documents_examples_are_accepted(http, document):
    schemas = document["components"]["schemas"]
    batch = schemas["ForwardBackwardRequest"]["properties"]["batch"]
    assert batch["examples"]
    path = new_client(http)
    for example in [*batch["examples"], BATCH]:
        answer = http.post(f"{path}/forward_backward?wait=20", json={"batch": example})
        assert answer.status_code == 200, answer.text
