"""The KubeRay files and the Dockerfile: fields that exist, secrets by reference, nothing as root, nothing unpinned.

Fields of KubeRay's own types are those of its published API reference for ray.io/v1 (v1.5 and v1.6); of pods and
containers those of Kubernetes' core/v1 that these files may use. It is not the operator's own schema, and no cluster
was asked: a value that only an API server would refuse is not found here.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
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
SECCOMP = {
    "oneOf": [
        closed(("type",), type={"const": "RuntimeDefault"}),
        # "a descending path, relative to the kubelet's configured seccomp profile location"
        closed(
            ("type", "localhostProfile"),
            type={"const": "Localhost"}, localhostProfile={"type": "string", "pattern": r"^\w+(/\w+)*\.json$"},
        ),
    ]
}  # fmt: skip
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
        seccompProfile=SECCOMP,
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
# The seccomp part of OCI's runtime-spec, which is what a kubelet hands to containerd and CRI-O: not Docker's own form,
# whose "includes" and "archMap" containerd would pass over.
OCI_SECCOMP = closed(
    ("defaultAction", "syscalls"),
    defaultAction={"const": "SCMP_ACT_ERRNO"}, defaultErrnoRet=WHOLE, architectures=many({"const": "SCMP_ARCH_X86_64"}),
    syscalls=many(
        closed(
            ("names", "action"),
            names=many({"type": "string", "pattern": r"^[a-z0-9_]+$"}),
            action={"enum": ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"]},
            errnoRet=WHOLE,
            args=many(
                closed(
                    ("index", "value", "op"), index={"type": "integer", "minimum": 0, "maximum": 5}, value=WHOLE,
                    valueTwo=WHOLE, op={"enum": ["SCMP_CMP_NE", "SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ"]},
                )
            ),
        )
    ),
)  # fmt: skip
DAEMON_SET = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "apps/v1"}, kind={"const": "DaemonSet"}, metadata=closed(("name",), name=TEXT, namespace=TEXT),
    spec=closed(
        ("selector", "template"),
        selector=closed(("matchLabels",), matchLabels=TEXTS),
        template=closed(
            ("metadata", "spec"),
            metadata=closed(("labels",), labels=TEXTS),
            spec=closed(
                ("containers",),
                automountServiceAccountToken={"const": False}, terminationGracePeriodSeconds=WHOLE, nodeSelector=TEXTS,
                tolerations=many(closed(("operator",), operator={"const": "Exists"})),
                containers=many(
                    closed(
                        ("name", "image", "resources", "securityContext"),
                        name=TEXT, image=TEXT, imagePullPolicy=TEXT, command=many(TEXT), resources=RESOURCES,
                        volumeMounts=many(closed(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=FLAG)),
                        securityContext=closed(
                            ("capabilities",),
                            runAsUser=WHOLE, allowPrivilegeEscalation={"const": False},
                            readOnlyRootFilesystem={"const": True}, seccompProfile=SECCOMP,
                            capabilities=closed(("drop",), drop={"const": ["ALL"]}),
                        ),
                    )
                ),
                volumes=many(
                    closed(
                        ("name",), name=TEXT, configMap=closed(("name",), name=TEXT),
                        hostPath=closed(("path",), path=TEXT, type={"enum": ["DirectoryOrCreate", "Directory"]}),
                    )
                ),
            ),
        ),
    ),
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
    # The head's too: left to itself Ray takes a third of the memory, finds /dev/shm too small, and uses the disk.
    cluster = cluster_of(data)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
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


def test_workers_run_under_the_profile_that_is_put_on_nodes_and_the_head_under_the_usual_one(
    data: dict[str, Any],
) -> None:
    jsonschema.validate(json.loads((FILES / "seccomp.json").read_text()), OCI_SECCOMP)
    daemon = load("seccomp.yaml")
    jsonschema.validate(daemon, DAEMON_SET)
    (container,) = daemon["spec"]["template"]["spec"]["containers"]
    assert daemon["spec"]["selector"]["matchLabels"] == daemon["spec"]["template"]["metadata"]["labels"]
    head, *workers = [pod["securityContext"]["seccompProfile"] for pod in pods(data)]
    assert head == {"type": "RuntimeDefault"}
    for worker in workers:
        assert f"/node/{worker['localhostProfile']};" in container["command"][-1]
    assert container["image"] == pods(data)[0]["containers"][0]["image"]


def test_the_profile_is_copied_by_the_daemon_as_a_whole_file(tmp_path: Path) -> None:
    (container,) = load("seccomp.yaml")["spec"]["template"]["spec"]["containers"]
    shell, options, script = container["command"]
    for name in ("profile", "node"):
        (tmp_path / name).mkdir()
        script = script.replace(f"/{name}/", f"{tmp_path / name}/")
    shutil.copy(FILES / "seccomp.json", tmp_path / "profile" / "strict.json")
    for _ in range(2):
        subprocess.run([shell, options, script.replace("sleep infinity", "true")], check=True)
        assert [path.name for path in (tmp_path / "node" / "lrm").iterdir()] == ["strict.json"]
    assert (tmp_path / "node/lrm/strict.json").read_bytes() == (FILES / "seccomp.json").read_bytes()


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
