"""The API server that the other tests of this folder rely on is a real one, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from apiserver import config_map
from e2e.cluster import ClusterError, ControlPlane
from e2e.cluster.host import wait_until
from e2e.cluster.processes import processes_of

ROLE = """
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [configmaps], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: default}]
"""


def test_it_says_the_version_it_was_built_from(control_plane: ControlPlane) -> None:
    assert '"gitVersion": "v1.36.3"' in control_plane.kubectl("get", "--raw", "/version")


def test_objects_are_validated(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.apply(config_map(namespace, "good", key="value"))
    assert control_plane.get("configmap", "good", "-n", namespace)["data"] == {"key": "value"}
    with pytest.raises(ClusterError, match="RFC 1123"):
        control_plane.apply(config_map(namespace, "Not_A_Name"))


def test_an_object_whose_owner_is_gone_is_collected(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.apply(config_map(namespace, "owner"))
    uid = control_plane.get("configmap", "owner", "-n", namespace)["metadata"]["uid"]
    child = config_map(namespace, "child")
    child["metadata"]["ownerReferences"] = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}]
    control_plane.apply(child)
    control_plane.kubectl("delete", "configmap", "owner", "-n", namespace)

    def gone() -> bool:
        return "child" not in control_plane.kubectl("get", "configmaps", "-n", namespace, "-o", "name")

    wait_until(gone, "the child is collected", timeout_seconds=30)


def test_a_user_has_the_rights_of_rbac_and_no_others(control_plane: ControlPlane, namespace: str) -> None:
    stranger = control_plane.as_user(control_plane.user_kubeconfig("alice", ["developers"]))
    assert "alice" in stranger.kubectl("auth", "whoami") and "developers" in stranger.kubectl("auth", "whoami")
    with pytest.raises(ClusterError, match="Forbidden"):
        stranger.kubectl("get", "configmaps", "-n", namespace)


def test_a_service_account_has_the_rights_of_its_role_and_no_others(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl(
        "apply", "-n", namespace, "-f", "-", input_text=ROLE.replace("default}", f"default, namespace: {namespace}}}")
    )
    control_plane.apply(config_map(namespace, "seen", key="value"))
    account = control_plane.as_user(control_plane.service_account_kubeconfig(namespace, "default"))
    assert account.get("configmap", "seen", "-n", namespace)["data"] == {"key": "value"}
    with pytest.raises(ClusterError, match="Forbidden"):
        account.kubectl("delete", "configmap", "seen", "-n", namespace)


def test_the_end_of_the_block_ends_the_processes_and_removes_the_data(control_plane: ControlPlane) -> None:
    with ControlPlane(controllers=False) as another:
        directory = another.directory
        assert directory != control_plane.directory
        assert set(processes_of(directory).values()) == {"etcd", "kube-apiserver"}
    assert not processes_of(directory)
    assert not directory.exists()


def test_a_killed_test_process_takes_its_servers_along() -> None:
    program = (
        "import signal; from e2e.cluster import ControlPlane\n"
        "with ControlPlane(controllers=False) as api: print(api.directory, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=_root()) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        try:
            assert set(processes_of(directory).values()) == {"etcd", "kube-apiserver"}
        finally:
            os.kill(owner.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(directory), f"the processes of {directory} end", timeout_seconds=10)
    with ControlPlane(controllers=False):
        assert not directory.exists()  # the next one removes the data that the killed one could not


def _root() -> Path:
    return Path(__file__).parents[2]
