"""The files of deploy/: sound against Kubernetes' schemas, and in step with `trainkit serve`.

KServe publishes its schema inside a cluster only. Its predictor is a pod's specification with a few
fields of its own; the pod is checked against Kubernetes' schema and the fields against a list.
Where the kserve package is installed, its models check the whole too.
"""

import copy
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

from trainkit.commands.serve import named, serve

kubernetes_validate = pytest.importorskip("kubernetes_validate")

DEPLOY = Path(__file__).parents[1] / "deploy"
VERSION = "1.30"  # the oldest that the files are meant for, and the newest that the package knows
VERSIONS = [VERSION, "1.37"]
EXIT_S = 5
COUNT = {"type": "integer", "minimum": 0}
# Of kserve 0.21's V1beta1PredictorSpec, those that are not a pod's.
PREDICTOR = {
    "minReplicas": COUNT,
    "maxReplicas": COUNT,
    "scaleMetric": {"enum": ["concurrency", "rps", "cpu", "memory"]},
    "scaleTarget": COUNT,
    "timeout": COUNT,
}
SERVICE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1beta1"},
        "kind": {"const": "InferenceService"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["predictor"],
            "additionalProperties": False,
            "properties": {"predictor": {"type": "object", "properties": PREDICTOR}},
        },
    },
}


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def plain(kind):
    (found,) = [one for one in documents("kubernetes.yaml") if one["kind"] == kind]
    return found


def pods():
    """Return each file's pod: its name and its specification."""
    (service,) = documents("kserve.yaml")
    predictor = service["spec"]["predictor"]
    kserve = {key: value for key, value in predictor.items() if key not in PREDICTOR}
    kubernetes = plain("Deployment")["spec"]["template"]["spec"]
    return {"kserve.yaml": kserve, "kubernetes.yaml": kubernetes}


def as_pod(spec):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "checked"}, "spec": spec}


def options(spec):
    """Return what `trainkit serve` makes of the container's arguments."""
    (container,) = spec["containers"]
    assert container["command"] == ["trainkit", "serve"]
    return click.Command.make_context(serve, "serve", list(container["args"])).params


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_sound_in_kubernetes_own_schema(version):
    found = documents("kubernetes.yaml")
    kinds = ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"]
    assert [one["kind"] for one in found] == kinds
    for one in found:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_inference_service_is_a_sound_pod_with_fields_of_its_own(version):
    (service,) = documents("kserve.yaml")
    jsonschema.validate(service, SERVICE)
    kubernetes_validate.validate(as_pod(pods()["kserve.yaml"]), version, strict=True)


def test_a_misspelt_field_and_a_wrong_type_are_found():
    for name, spec in pods().items():
        misspelt, mistyped = copy.deepcopy(spec), copy.deepcopy(spec)
        misspelt["containers"][0]["readinesProbe"] = {}
        mistyped["terminationGracePeriodSeconds"] = "soon"
        for wrong in (misspelt, mistyped):
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(as_pod(wrong), VERSION, strict=True)
        assert name.endswith(".yaml")
    (service,) = documents("kserve.yaml")
    service["spec"]["predictor"]["scaleMetric"] = "luck"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(service, SERVICE)


@pytest.mark.parametrize("name", ["kserve.yaml", "kubernetes.yaml"])
def test_a_pod_gets_the_time_that_its_server_takes_to_end(name):
    spec = pods()[name]
    given = options(spec)
    takes = given["drain_s"] + given["grace_s"] + EXIT_S
    assert spec["terminationGracePeriodSeconds"] >= takes
    assert given["drain_s"] >= 5  # for every proxy of the cluster to hear of it


@pytest.mark.parametrize("name", ["kserve.yaml", "kubernetes.yaml"])
def test_ports_probes_and_cores_are_those_of_the_server(name):
    spec = pods()[name]
    given = options(spec)
    (container,) = spec["containers"]
    (port,) = container["ports"]
    assert given["host"] == "0.0.0.0"
    assert given["port"] == port["containerPort"]
    for probe, path in (
        ("startupProbe", "/v2/health/live"),
        ("livenessProbe", "/v2/health/live"),
        ("readinessProbe", "/v2/health/ready"),
    ):
        asked = container[probe]["httpGet"]
        assert asked["path"] == path
        assert asked["port"] in (port["name"], port["containerPort"])
    assert container["resources"]["limits"]["cpu"].isdigit()  # whole cores, as threads are
    assert container["resources"]["requests"]["cpu"] == container["resources"]["limits"]["cpu"]


def test_the_plain_objects_belong_together():
    deployment = plain("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    budget = plain("PodDisruptionBudget")["spec"]
    scaler = plain("HorizontalPodAutoscaler")["spec"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert plain("Service")["spec"]["selector"] == labels
    assert budget["selector"]["matchLabels"] == labels
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]  # two owners would fight over it
    assert scaler["minReplicas"] > budget["maxUnavailable"]
    (port,) = plain("Service")["spec"]["ports"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert port["targetPort"] in [one["name"] for one in container["ports"]]


def test_the_inference_service_names_its_model_and_speaks_v2():
    (service,) = documents("kserve.yaml")
    (container,) = service["spec"]["predictor"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert container["name"] == "kserve-container"
    assert environment["PROTOCOL"] == "v2"
    assert "STORAGE_URI" in environment
    # KServe's clients ask for the model by the service's name.
    assert named(options(pods()["kserve.yaml"])["bundles"]) == {
        service["metadata"]["name"]: "/mnt/models"
    }


def test_kserves_own_models_know_every_field():
    kserve = pytest.importorskip("kserve")
    from kubernetes import client

    def unknown(value, kind, path):
        if kind.startswith("list["):
            return [
                fault
                for number, one in enumerate(value)
                for fault in unknown(one, kind[5:-1], f"{path}[{number}]")
            ]
        model = getattr(kserve, kind, None) or getattr(client, kind, None)
        if not hasattr(model, "attribute_map"):
            return []
        types = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
        faults = [f"{path}.{key}" for key in value if key not in types]
        known = ((key, one) for key, one in value.items() if key in types)
        return faults + [
            fault for key, one in known for fault in unknown(one, types[key], f"{path}.{key}")
        ]

    (service,) = documents("kserve.yaml")
    assert unknown(service, "V1beta1InferenceService", "") == []
    service["spec"]["predictor"]["maxReplica"] = 8
    service["spec"]["predictor"]["containers"][0]["imagePolicy"] = "Never"
    assert unknown(service, "V1beta1InferenceService", "") == [
        ".spec.predictor.maxReplica",
        ".spec.predictor.containers[0].imagePolicy",
    ]
