"""The JobSet manifest against JobSet's own schema, which includes Kubernetes' schema of pods."""

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from megatrain.launch.config import K8sCluster
from megatrain.launch.k8s import manifest, object_name

HERE = Path(__file__).parent
TEMPLATE = HERE.parents[2] / "launchers" / "k8s" / "jobset.yaml"
OVERRIDES = ("run.name=Big_Run/1", "data.path=my text's.txt", "optim.lr=1e-3")


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused, as the API server does for objects whose keys it lists."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "additionalProperties" not in found:
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    text = gzip.decompress((HERE / "jobset.schema.json.gz").read_bytes())
    return Draft202012Validator(strict(json.loads(text)["schema"]))


def cluster(**keys: object) -> K8sCluster:
    return K8sCluster(**({"container": "registry.example.com/mt:1", "volume": "runs"} | keys))  # type: ignore[arg-type]


def made(found: K8sCluster) -> dict[str, Any]:
    return dict(yaml.safe_load(manifest(TEMPLATE, found, "Big_Run/1", OVERRIDES)))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"nodes": 4, "memory": "512Gi", "cpus": 64, "queue": "training", "node_selector": ("a.b/pool=h100",)},
        {
            "nodes": 2,
            "gpus_per_node": 0,
            "processes_per_node": 3,
            "env": ("A=b c: d", "B="),
            "setup": ("echo hello",),
        },
    ],
)
def test_it_fits_the_schema(schema: Draft202012Validator, keys: dict[str, object]) -> None:
    errors = [
        f"{error.json_path}: {error.message[:200]}" for error in schema.iter_errors(made(cluster(**keys)))
    ]
    assert errors == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "two"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "contaners"), []),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
    ],
)
def test_the_schema_sees_mistakes(schema: Draft202012Validator, path: tuple[Any, ...], value: object) -> None:
    broken = made(cluster())
    place: Any = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not schema.is_valid(broken)


def test_pods_meet_at_the_first_ones_name() -> None:
    job = made(cluster(nodes=4))
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = pod["template"]["spec"]["containers"]
    name = job["metadata"]["name"]
    assert name == "big-run-1"
    (script,) = container["args"]
    assert f"--master-addr={name}-node-0-0.{name} " in script
    assert "--node-rank=$JOB_COMPLETION_INDEX" in script
    assert {"name": "MEGATRAIN_EXPECT_WORLD", "value": "32"} in container["env"]
    assert (pod["completions"], pod["parallelism"], pod["completionMode"]) == (4, 4, "Indexed")


@pytest.mark.parametrize(("torchrun", "own", "expected"), [(0, None, 0), (1, 3, 3), (1, 2, 2), (1, None, 1)])
def test_a_pod_ends_with_the_runs_own_exit_code(
    tmp_path: Path, torchrun: int, own: int | None, expected: int
) -> None:
    """Its shell commands run with a stand-in for Python: the schema says nothing about them."""
    (container,) = made(cluster())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    if own is not None:
        (tmp_path / "exit").write_text(f"{own}\n")
    stand_in = f'python() {{ printf "%s\\n" "$@" > arguments; return {torchrun}; }}\n'
    environment = {
        "PATH": "/usr/bin:/bin",
        "JOB_COMPLETION_INDEX": "0",
        "MEGATRAIN_EXIT_FILE": str(tmp_path / "exit"),
    }
    script = stand_in + container["args"][0]
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=False, timeout=60)
    assert done.returncode == expected
    assert (tmp_path / "arguments").read_text().splitlines()[-3:] == list(OVERRIDES)


def test_names_are_those_of_hosts() -> None:
    assert object_name("A/very=long,name" * 5) == "a-very-long-namea-very-long-namea-very-l"
    assert object_name("--") == "run"
