"""A real Kubernetes API server without a node: etcd, kube-apiserver, and on demand the controllers and the scheduler.

RBAC is on. Everything listens on free loopback ports, so any number can run at once. Objects behave as in a cluster (validation,
admission, watches, server-side apply, garbage collection); only nobody runs the pods.
"""

import fcntl
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .build import build
from .certificates import Authority
from .client import Client
from .errors import ClusterError, log_tail
from .host import free_ports, need, run, wait_until
from .kubeconfig import write_kubeconfig
from .processes import Processes
from .recipe import CONTROL_PLANE

START_SECONDS = 60
START_ATTEMPTS = 3
_PREFIX = "grpo-control-plane-"

# Those that keep objects consistent. The others only act on pods, nodes and volumes that nobody runs here, or even delete pods of
# nodes that a test made up.
CONTROLLERS = (
    "clusterrole-aggregation-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
)


def etcd_command(binaries: Path, data: Path, client_port: int, peer_port: int) -> list[str | Path]:
    """etcd on loopback; the data need not survive a power cut, so it never waits for the disk."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        binaries / "etcd",
        f"--data-dir={data}",
        "--unsafe-no-fsync",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
    ]


def apiserver_command(binaries: Path, pki: Path, etcd_port: int, port: int) -> list[str | Path]:
    """kube-apiserver with certificates of `pki`, RBAC and service account tokens."""
    return [
        binaries / "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--secure-port={port}",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        "--authorization-mode=Node,RBAC",
        "--allow-privileged",
        "--service-cluster-ip-range=10.96.0.0/16",
        f"--service-account-key-file={pki}/service-accounts.key",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        "--service-account-issuer=https://kubernetes.default.svc",
    ]


def controller_manager_command(binaries: Path, pki: Path, kubeconfig: Path) -> list[str | Path]:
    return [
        binaries / "kube-controller-manager",
        f"--kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={pki}/service-accounts.key",
        f"--root-ca-file={pki}/ca.crt",
        "--use-service-account-credentials",
        "--leader-elect=false",
    ]


def scheduler_command(binaries: Path, kubeconfig: Path) -> list[str | Path]:
    return [binaries / "kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false"]


class ControlPlane(Client):
    """`with ControlPlane() as api:` an API server of one's own, in seconds; gone at the end, also when the process is killed.

    `controllers` adds the garbage collector, namespaces' ends and default service accounts; `scheduler` the scheduler;
    `apiserver_flags` are given to kube-apiserver besides its own.
    Attributes: `kubeconfig` (an administrator's), `server` (its URL), `directory` (data and logs).
    """

    def __init__(
        self, *, controllers: bool = True, scheduler: bool = False, apiserver_flags: Sequence[str] = ()
    ) -> None:
        self.controllers = controllers
        self.scheduler = scheduler
        self.apiserver_flags = tuple(apiserver_flags)
        self.makes_default_accounts = controllers
        self.server = ""
        self.directory = Path()

    def __enter__(self) -> Self:
        need("openssl", "setpriv")
        self.binaries = build((*CONTROL_PLANE, *(["kube-scheduler"] if self.scheduler else [])))
        _remove_abandoned()
        for attempt in range(1, START_ATTEMPTS + 1):
            self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
            # Held while this process lives: the folder of a process that was killed is free to be removed by the next one.
            self._owner = (self.directory / "owner").open("w")
            fcntl.flock(self._owner, fcntl.LOCK_EX)
            self._processes = Processes(self.directory, attached=True)
            try:
                self._start()
                return self
            except BaseException as error:
                self.stop()
                # Somebody else took one of the ports between our look and the server's start.
                if "address already in use" not in str(error) or attempt == START_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the processes and remove the data."""
        self._processes.kill()
        self._owner.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self, name: str) -> str:
        """The end of the log of etcd, apiserver, controller-manager or scheduler."""
        return log_tail(self._processes.log(name))

    def user_kubeconfig(self, user: str, groups: Sequence[str] = (), *, namespace: str = "default") -> Path:
        """A kubeconfig for any user name and groups: who they are is what RBAC then judges."""
        name = f"user-{len(list(self.directory.glob('*.kubeconfig')))}"
        certificate = self._authority.issue(name, user=user, groups=groups)
        path = self.directory / f"{name}.kubeconfig"
        return write_kubeconfig(
            path, self.server, self._authority.certificate, certificate=certificate, namespace=namespace
        )

    def service_account_token(self, namespace: str, name: str) -> str:
        """A token of an existing service account, good for some hours."""
        return self.kubectl("create", "token", name, "--namespace", namespace, "--duration=8h").strip()

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig that acts as an existing service account, with no more rights than RBAC gives it."""
        path = self.directory / f"service-account-{namespace}-{name}.kubeconfig"
        token = self.service_account_token(namespace, name)
        return write_kubeconfig(path, self.server, self._authority.certificate, token=token, namespace=namespace)

    def as_user(self, kubeconfig: Path) -> Client:
        """kubectl and helm with another kubeconfig."""
        return Client(self.binaries, kubeconfig)

    def _start(self) -> None:
        etcd_port, peer_port, port = free_ports(3)
        pki = self.directory / "pki"
        self._authority = Authority(pki)
        names = ["IP:127.0.0.1", "IP:10.96.0.1", "DNS:localhost", "DNS:kubernetes.default.svc"]
        self._authority.issue("apiserver", user="kube-apiserver", alternative_names=names)
        self._authority.signing_key("service-accounts")
        self.server = f"https://127.0.0.1:{port}"
        self.kubeconfig = self._component_kubeconfig("admin", "admin", ["system:masters"])
        self._processes.start("etcd", etcd_command(self.binaries, self.directory / "etcd", etcd_port, peer_port))
        loopback = [
            *self.apiserver_flags,
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
        ]
        if not self.controllers:
            # Nobody makes the service accounts that this admission plug-in would ask of every pod.
            loopback.append("--disable-admission-plugins=ServiceAccount")
        self._processes.start("apiserver", [*apiserver_command(self.binaries, pki, etcd_port, port), *loopback])
        self._wait("the API server is ready", "apiserver", ["get", "--raw", "/readyz"])
        if self.controllers:
            manager = self._component_kubeconfig("controller-manager", "system:kube-controller-manager")
            command = controller_manager_command(self.binaries, pki, manager)
            self._processes.start(
                "controller-manager", [*command, "--secure-port=0", f"--controllers={','.join(CONTROLLERS)}"]
            )
        if self.scheduler:
            scheduler = self._component_kubeconfig("scheduler", "system:kube-scheduler")
            self._processes.start("scheduler", [*scheduler_command(self.binaries, scheduler), "--secure-port=0"])
        if self.controllers:
            arguments = ["get", "serviceaccount", "default", "--namespace", "default"]
            self._wait("the controllers work", "controller-manager", arguments)

    def _component_kubeconfig(self, name: str, user: str, groups: Sequence[str] = ()) -> Path:
        certificate = self._authority.issue(name, user=user, groups=groups)
        path = self.directory / f"{name}.kubeconfig"
        return write_kubeconfig(path, self.server, self._authority.certificate, certificate=certificate)

    def _wait(self, what: str, log: str, arguments: list[str]) -> None:
        command = [self.binaries / "kubectl", "--kubeconfig", self.kubeconfig, "--request-timeout=5s", *arguments]

        def answered() -> bool:
            self._processes.check()
            return run(command, check=False, timeout_seconds=20).returncode == 0

        wait_until(answered, what, timeout_seconds=START_SECONDS, explain=lambda: self.log(log))


def _remove_abandoned() -> None:
    """Remove the folders of control planes whose owner was killed before it could."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (directory / "owner").open("r+") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            continue  # it lives
        except OSError:
            if time.time() - directory.stat().st_mtime > START_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)


__all__ = ["ClusterError", "ControlPlane"]
