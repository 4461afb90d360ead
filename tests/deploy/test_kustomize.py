# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The Kustomize component, built by a real kubectl onto manifests that know nothing of it.

The bases are ours, in the shape of what SGLang, LWS and others publish.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sglang_weight_exporter.settings import DEFAULT_PORT, PREFIX

BASES = Path(__file__).parent / "bases"
COMPONENT = Path(__file__).parents[2] / "deploy" / "kustomize"
MOUNT = "/run/sglang-weight-exporter"
SIDECAR, HOOKS = "weight-exporter", "weight-hooks"
KINDS = ["deployment", "statefulset", "job", "leaderworkerset"]

Manifest = dict[str, Any]
Build = Callable[..., list[Manifest]]


@pytest.fixture
def build(tmp_path: Path, kubectl: Any) -> Build:
    """Builds a base with components, as a user's kustomization.yaml does."""

    def build(
        base: str | list[Manifest], components: tuple[str, ...] = (".",), **more: Any
    ) -> list[Manifest]:
        manifests = objects(base) if isinstance(base, str) else base
        (tmp_path / "sglang.yaml").write_text(yaml.safe_dump_all(manifests))
        shutil.copytree(COMPONENT, tmp_path / "component", dirs_exist_ok=True)
        kustomization = {
            "resources": ["sglang.yaml"],
            "components": [str(Path("component") / name) for name in components],
            **more,
        }
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = kubectl("kustomize", tmp_path)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return build


def objects(base: str) -> list[Manifest]:
    return list(yaml.safe_load_all((BASES / f"{base}.yaml").read_text()))


def templates(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The pod templates of all workloads, in the order of the file."""
    for manifest in manifests:
        if manifest["kind"] in {"Deployment", "StatefulSet", "Job"}:
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield from (group[key] for key in ("leaderTemplate", "workerTemplate") if key in group)


def containers(template: Manifest, key: str = "containers") -> dict[str, Manifest]:
    return {container["name"]: container for container in template["spec"].get(key, [])}


def env(container: Manifest) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in container.get("env", [])}


@pytest.mark.release("deployments")
@pytest.mark.parametrize("base", KINDS)
def test_what_is_built_fits_the_kubernetes_api(build: Build, base: str) -> None:
    for components in [(".",), (".", "user-1000"), (".", "arbitrary-user")]:
        built = build(base, components)
        for manifest in built:
            if manifest["kind"] != "LeaderWorkerSet":
                kubernetes_validate.validate(manifest, "1.34", strict=True)
        # A LeaderWorkerSet's templates are the API's own; the rest of it is not touched.
        for template in templates(built):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}}
            kubernetes_validate.validate({**pod, "template": template}, "1.34", strict=True)


@pytest.mark.parametrize("base", KINDS)
def test_nothing_of_the_base_changes_but_the_engine_s_container(build: Build, base: str) -> None:
    before, after = (
        sorted(manifests, key=lambda manifest: str(manifest["kind"]))  # Kustomize orders by kind.
        for manifests in (objects(base), build(base))
    )
    for old, new in zip(templates(before), templates(after), strict=True):
        engine = old["spec"]["containers"][0]
        changed = containers(new)[engine["name"]]
        assert new["spec"]["containers"][0] is changed
        added = {"env", "volumeMounts"}
        assert {key: changed[key] for key in changed if key not in added} == {
            key: engine[key] for key in engine if key not in added
        }
        for key in added:
            for entry in engine.get(key, []):
                assert entry in changed[key] or entry["name"] == "PYTHONPATH"
        for key, ours in (("containers", ()), ("initContainers", (HOOKS, SIDECAR))):
            others = containers(old, key)
            others.pop(engine["name"], None)
            assert others.items() <= containers(new, key).items()
            assert list(containers(new, key)) == [*containers(old, key), *ours]
        new["metadata"]["labels"].pop("sglang-weights")
        assert new["metadata"]["labels"] == old.get("metadata", {}).get("labels", {})
        assert [volume for volume in new["spec"]["volumes"] if volume["name"] != MOUNT[5:]] == (
            old["spec"].get("volumes", [])
        )
        for part in (new, old):
            for key in ("containers", "initContainers", "volumes"):
                part["spec"].pop(key, None)
            part.pop("metadata", None)
    # Templates are emptied by now of all that may differ: Service, replicas and the rest are as
    # they were.
    assert after == before


@pytest.mark.parametrize("base", KINDS)
def test_the_engine_and_the_sidecar_meet_in_one_directory(build: Build, base: str) -> None:
    for template in templates(build(base)):
        engine = template["spec"]["containers"][0]
        added = containers(template, "initContainers")
        sidecar, hooks = added[SIDECAR], added[HOOKS]
        directories = {env(each)[PREFIX + "RUNTIME_DIR"] for each in (engine, sidecar)}
        assert directories == {f"{MOUNT}/store"}  # Below the mount, which belongs to root.
        mount = {"name": MOUNT[5:], "mountPath": MOUNT}
        assert all(mount in each["volumeMounts"] for each in (engine, sidecar, hooks))
        assert env(engine)[PREFIX + "SERVE"] == "off"
        assert sidecar["image"] == hooks["image"] == "sglang-weight-exporter"


@pytest.mark.parametrize("base", KINDS)
def test_the_sidecar_is_the_engine_s_user_and_no_reason_to_be_unready(
    build: Build, base: str
) -> None:
    for components, user in (((".",), 0), ((".", "user-1000"), 1000)):
        for template in templates(build(base, components)):
            engine = template["spec"]["containers"][0]
            sidecar = containers(template, "initContainers")[SIDECAR]
            # SGLang's images run as root.
            of_the_pod = template["spec"].get("securityContext", {}).get("runAsUser", 0)
            assert engine.get("securityContext", {}).get("runAsUser", of_the_pod) == user
            assert sidecar["securityContext"]["runAsUser"] == user
            assert not {"readinessProbe", "livenessProbe", "startupProbe"} & sidecar.keys()
            assert sidecar["ports"] == [{"name": "weights", "containerPort": DEFAULT_PORT}]
            assert env(sidecar)["NVIDIA_VISIBLE_DEVICES"] == "all"
            assert "nvidia.com/gpu" not in str(sidecar["resources"])
            assert template["metadata"]["labels"]["sglang-weights"] == "scrape"


@pytest.mark.parametrize("base", KINDS)
def test_a_job_ends_and_the_last_spans_are_sent(build: Build, base: str) -> None:
    """A native sidecar: started before the engine, ended after it, and not waited for."""
    for template in templates(build(base)):
        added = containers(template, "initContainers")
        assert [each.get("restartPolicy") for each in (added[HOOKS], added[SIDECAR])] == [
            None,
            "Always",
        ]


#: https://kubernetes.io/docs/concepts/security/pod-security-standards, of each container.
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("user", ["user-1000", "arbitrary-user"])
def test_what_is_added_fits_the_restricted_profile(build: Build, base: str, user: str) -> None:
    for template in templates(build(base, (".", user))):
        of_the_pod = template["spec"].get("securityContext", {})
        for name in (HOOKS, SIDECAR):
            rights = containers(template, "initContainers")[name]["securityContext"]
            assert rights.items() >= RESTRICTED.items()
            assert rights["readOnlyRootFilesystem"]
            assert rights.get("runAsNonRoot", of_the_pod.get("runAsNonRoot"))
            # What the restricted profile allows: any but root. OpenShift: none named.
            assert rights.get("runAsUser") == {"user-1000": 1000, "arbitrary-user": None}[user]
        if user == "arbitrary-user":
            assert "runAsUser" not in of_the_pod


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("user", ["user-1000", "arbitrary-user"])
def test_an_engine_that_is_not_root_has_a_home(build: Build, base: str, user: str) -> None:
    for template in templates(build(base, (".", user))):
        engine = template["spec"]["containers"][0]
        assert env(engine)["USER"]
        assert {"name": "home", "mountPath": env(engine)["HOME"]} in engine["volumeMounts"]
        assert {"name": "home", "emptyDir": {}} in template["spec"]["volumes"]
        if user == "user-1000":
            assert template["spec"]["securityContext"]["fsGroup"] == 1000


def test_images_names_and_namespaces_are_changed_as_always(build: Build) -> None:
    image = {"name": "sglang-weight-exporter", "newName": "registry.example/w", "newTag": "0.1.0"}
    (group,) = build("leaderworkerset", images=[image], namespace="serving", namePrefix="blue-")
    assert (group["metadata"]["name"], group["metadata"]["namespace"]) == (
        "blue-deepseek",
        "serving",
    )
    for template in templates([group]):
        assert (
            containers(template, "initContainers")[SIDECAR]["image"] == "registry.example/w:0.1.0"
        )
        assert containers(template, "initContainers")[HOOKS]["image"] == "registry.example/w:0.1.0"


def test_a_group_without_a_leader_takes_the_workers_component(build: Build) -> None:
    (group,) = objects("leaderworkerset")
    del group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    (built,) = build([group], ("workers",))
    assert "leaderTemplate" not in built["spec"]["leaderWorkerTemplate"]
    assert SIDECAR in containers(next(templates([built])), "initContainers")
    # With the other one a leader would be made of the sidecar alone: the API refuses it, loudly.
    (built,) = build([group])
    leader = built["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="'name' is a required property"):
        kubernetes_validate.validate({**pod, "template": leader}, "1.34", strict=True)


# --- the hooks ----------------------------------------------------------------------------------


def copied(template: Manifest, volume: Path) -> dict[str, str]:
    """Run the init container's command on a directory; returns the engine's environment."""
    python, *arguments = containers(template, "initContainers")[HOOKS]["command"]
    assert python == "python3"
    for _ in range(2):  # An init container may run again in the same pod.
        command = [argument.replace(MOUNT, str(volume)) for argument in arguments]
        subprocess.run([sys.executable, *command], check=True, cwd="/")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    engine = env(template["spec"]["containers"][0])
    ours = {key: value.replace(MOUNT, str(volume)) for key, value in engine.items() if value}
    return {**inherited, **ours}


LOOK = """
import json, subprocess, sys
armed = any(type(finder).__name__ == "PostImportHook" for finder in sys.meta_path)
report = {"armed": armed, "path": sys.path[1:]}
if len(sys.argv) == 1:
    child = [sys.executable, __file__, "child"]
    report["child"] = json.loads(subprocess.check_output(child))
print(json.dumps(report))
"""


@pytest.mark.parametrize("base", ["deployment", "statefulset"])
def test_the_copied_hooks_load_in_every_python_of_the_engine(
    build: Build, base: str, tmp_path: Path
) -> None:
    template = next(templates(build(base)))
    venv.create(tmp_path / "image", symlinks=True)  # A Python that has no such package.
    (tmp_path / "look.py").write_text(LOOK)
    (tmp_path / "elsewhere").mkdir()
    environ = copied(template, tmp_path / "volume")
    environ.pop("SGLANG_WEIGHT_EXPORTER_DISABLED", None)
    python = tmp_path / "image" / "bin" / "python"
    done = subprocess.run(
        [python, tmp_path / "look.py"],
        env=environ,
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    engine = json.loads(done.stdout)
    own = {"deployment": [], "statefulset": ["/sgl-workspace/aiter", "/sgl-workspace/mori"]}[base]
    for process in (engine, engine["child"]):
        assert process["armed"]
        # What the image's own list is, behind what the container asked for; neither the volume nor
        # the directory that the engine was started in.
        assert process["path"][: len(own)] == own
        assert not [path for path in process["path"] if str(tmp_path / "volume") in path]
        assert str(tmp_path / "elsewhere") not in process["path"]
