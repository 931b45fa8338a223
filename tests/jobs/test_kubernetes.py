"""The KubeRay files and the Dockerfile: fields that exist, secrets by reference, nothing as root, nothing unpinned.

Fields of KubeRay's own types are those of its published API reference for ray.io/v1 (v1.5 and v1.6); of pods and
containers those of Kubernetes' core/v1 that these files may use. It is not the operator's own schema, and no cluster
was asked: a value that only an API server would refuse is not found here.
"""

from __future__ import annotations

import copy
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "jobs/cluster/kubernetes"


def closed(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def many(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


TEXT, FLAG, WHOLE = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = closed(requests=QUANTITIES, limits=QUANTITIES)
EXEC = closed(("command",), command=many(TEXT))
PROBE = closed(
    ("exec",), exec=EXEC, initialDelaySeconds=WHOLE, periodSeconds=WHOLE, timeoutSeconds=WHOLE, failureThreshold=WHOLE
)
ENV = closed(
    ("name",),
    name=TEXT,
    value=TEXT,
    valueFrom=closed(secretKeyRef=closed(("name", "key"), name=TEXT, key=TEXT)),
)
CONTAINER = closed(
    ("name", "image", "resources", "securityContext", "readinessProbe", "livenessProbe"),
    name=TEXT, image=TEXT, imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    ports=many(closed(("containerPort",), containerPort=WHOLE, name=TEXT)), env=many(ENV),
    envFrom=many(closed(("secretRef",), secretRef=closed(("name",), name=TEXT))), resources=RESOURCES,
    securityContext=closed(
        allowPrivilegeEscalation={"const": False}, capabilities=closed(("drop",), drop={"const": ["ALL"]})
    ),
    readinessProbe=PROBE, livenessProbe=PROBE, lifecycle=closed(preStop=closed(exec=EXEC)),
    volumeMounts=many(closed(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)  # fmt: skip
TERM = closed(
    ("matchExpressions",),
    matchExpressions=many(
        closed(
            ("key", "operator"), key=TEXT, operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
            values=many(TEXT),
        )
    ),
)  # fmt: skip
POD = closed(
    ("containers", "securityContext"),
    terminationGracePeriodSeconds=WHOLE,
    affinity=closed(
        nodeAffinity=closed(requiredDuringSchedulingIgnoredDuringExecution=closed(nodeSelectorTerms=many(TERM)))
    ),
    tolerations=many(
        closed(
            ("key", "operator"), key=TEXT, operator={"enum": ["Equal", "Exists"]}, value=TEXT,
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
    securityContext=closed(
        runAsNonRoot={"const": True}, runAsUser={"type": "integer", "minimum": 1}, runAsGroup=WHOLE, fsGroup=WHOLE,
        seccompProfile=closed(("type",), type={"enum": ["RuntimeDefault"]}),
    ),
    containers=many(CONTAINER),
    volumes=many(
        closed(
            ("name",), name=TEXT, emptyDir=closed(medium={"const": "Memory"}, sizeLimit=QUANTITY),
            configMap=closed(("name",), name=TEXT),
        )
    ),
)  # fmt: skip
TEMPLATE = closed(("spec",), metadata=closed(labels=TEXTS, annotations=TEXTS), spec=POD)
CLUSTER = closed(
    ("headGroupSpec", "workerGroupSpecs"),
    rayVersion=TEXT, suspend=FLAG, managedBy=TEXT, headServiceAnnotations=TEXTS, enableInTreeAutoscaling=FLAG,
    authOptions=closed(mode={"enum": ["disabled", "token"]}),
    autoscalerOptions=closed(
        resources=RESOURCES, image=TEXT, imagePullPolicy=TEXT, idleTimeoutSeconds=WHOLE, version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, env=many(ENV),
    ),
    headGroupSpec=closed(
        ("template",), template=TEMPLATE, rayStartParams=TEXTS, serviceType=TEXT, enableIngress=FLAG
    ),
    workerGroupSpecs=many(
        closed(
            ("groupName", "template"), groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE,
            idleTimeoutSeconds=WHOLE, rayStartParams=TEXTS, template=TEMPLATE, numOfHosts=WHOLE,
        )
    ),
)  # fmt: skip
JOB = closed(
    ("entrypoint", "rayClusterSpec"),
    activeDeadlineSeconds=WHOLE, backoffLimit=WHOLE, rayClusterSpec=CLUSTER, clusterSelector=TEXTS, entrypoint=TEXT,
    submitterConfig=closed(backoffLimit=WHOLE), runtimeEnvYAML=TEXT, jobId=TEXT, entrypointResources=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, ttlSecondsAfterFinished=WHOLE,
    shutdownAfterJobFinishes=FLAG, suspend=FLAG, metadata=TEXTS,
)  # fmt: skip
NAME = closed(("name",), name={"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"}, labels=TEXTS)
SCHEMAS = {
    kind: closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"}, kind={"const": kind}, metadata=NAME, spec=spec,
    )
    for kind, spec in (("RayJob", JOB), ("RayCluster", CLUSTER))
}  # fmt: skip


def load(name: str) -> dict[str, Any]:
    data = yaml.safe_load((FILES / name).read_text())
    assert isinstance(data, dict)
    return data


def cluster_of(data: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = data["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(data: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(data)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.fixture(params=["rayjob.yaml", "raycluster.yaml"])
def data(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


def test_every_field_exists_and_holds_what_it_may(data: dict[str, Any]) -> None:
    jsonschema.validate(data, SCHEMAS[data["kind"]])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: cluster_of(d).update(enableInTreeAutoScaling=True),
        lambda d: pods(d)[1]["containers"][0].update(enviroment=[]),
        lambda d: pods(d)[0]["securityContext"].update(runAsNonRoot=False),
        lambda d: cluster_of(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda d: pods(d)[1]["containers"][0]["resources"]["limits"].update(cpu=16),
    ],
)
def test_what_is_wrong_is_refused(spoil: Any) -> None:
    data = copy.deepcopy(load("rayjob.yaml"))
    spoil(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMAS["RayJob"])


def test_pods_are_whole(data: dict[str, Any]) -> None:
    cluster = cluster_of(data)
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "nothing may starve the driver"
    images = set()
    for pod in pods(data):
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            images.add(container["image"])
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes), "each volume is mounted"
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            assert all("value" not in env or "SECRET" not in env["name"] for env in container.get("env", []))
    assert len(images) == 1, "versions are compared at start: all pods have one image"
    assert not re.search(r"AKIA[0-9A-Z]{16}|secret_access_key: ", yaml.safe_dump(data), re.IGNORECASE)


def test_the_object_store_fits_its_shared_memory(data: dict[str, Any]) -> None:
    for group in cluster_of(data)["workerGroupSpecs"]:
        shared = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == "shared-memory")
        limit = int(shared["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
        assert int(group["rayStartParams"]["object-store-memory"]) < limit


def test_spot_nodes_hold_workers_and_never_the_head(data: dict[str, Any]) -> None:
    head, *workers = pods(data)
    (keep,) = _terms(head)
    spot = {expression["key"] for term in _terms(workers[0]) for expression in term["matchExpressions"]}
    assert {expression["key"] for expression in keep["matchExpressions"]} == spot
    assert {expression["operator"] for expression in keep["matchExpressions"]} <= {"DoesNotExist", "NotIn"}
    gpus = [w["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for w in workers]
    assert gpus == [None, "1"]


def _terms(pod: dict[str, Any]) -> list[dict[str, Any]]:
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    found: list[dict[str, Any]] = required["nodeSelectorTerms"]
    return found


def test_the_image_is_pinned_and_its_user_is_not_root() -> None:
    lines = (ROOT / "jobs/cluster/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    base = next(line for line in lines if line.startswith("ARG BASE=")).partition("=")[2]
    assert re.search(r":\d+\.\d+\.\d+-|@sha256:", base), f"{base} moves"
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 10001:10001"
    (install,) = [line for line in lines if "pip install" in line]
    assert "--constraint" in install
    assert all("snapshot.debian.org" in part for line in lines for part in re.findall(r"deb \[.*?\] (\S+)", line))
    for line in lines:
        for source in re.findall(r"^COPY (.+) \S+$", line):
            assert all((ROOT / name).exists() for name in source.split()), line
