"""A whole Kubernetes of one node on this machine: `up` makes it in seconds, `down` leaves nothing of it.

One at a time: a lock that the node's etcd holds for as long as it lives. The lock's file names the folder, so `down` finds a node whose
`up` was interrupted anywhere. What stays on purpose: built binaries, images (containerd's and the registry's).
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from . import cgroups, containerd, network
from .build import binaries_directory, build, say
from .certificates import Authority
from .client import Client
from .control_plane import apiserver_command, controller_manager_command, etcd_command, scheduler_command
from .errors import ClusterError, log_tail
from .host import cache_directory, free_ports, need, need_root, run, wait_until, write_json
from .kubeconfig import write_kubeconfig
from .processes import Processes, alive, end_processes, processes_of

LOCK = Path("/run/grpo-e2e.lock")
NODE = "node-0"
START_SECONDS = 90
COMMANDS = ("openssl", "runc", "iptables", "conntrack", "ip")


class Node(Client):
    """The running node: kubectl, helm, its registry's port, faked GPUs, volumes."""

    def __init__(self, directory: Path) -> None:
        state = json.loads((directory / "state.json").read_text())
        super().__init__(Path(state["binaries"]), directory / "admin.kubeconfig")
        self.directory = directory
        self.ctr = containerd.Ctr(self.binaries, directory)

    @property
    def registry_port(self) -> int:
        """The loopback port of the node's image registry; another one after each start."""
        return int(json.loads((self.directory / "state.json").read_text())["registry_port"])

    def image(self, name: str) -> str:
        """The name by which pods ask for an image that was loaded."""
        return containerd.image_reference(name)

    def log(self, name: str) -> str:
        """The end of a log of the node: etcd, apiserver, controller-manager, scheduler, containerd, kubelet, proxy, coredns, registry."""
        return log_tail(self.directory / "log" / f"{name}.log")

    def set_gpus(self, count: int) -> None:
        """Let the node claim this many GPUs: pods that ask for nvidia.com/gpu are scheduled and counted; no device is there."""
        patch = [
            {"op": "add", "path": f"/status/{field}/nvidia.com~1gpu", "value": str(count)}
            for field in ("capacity", "allocatable")
        ]
        self.kubectl("patch", "node", NODE, "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}")

    def create_volume(self, namespace: str, claim: str, size: str = "10Gi") -> Path:
        """A bound PersistentVolumeClaim that any number of pods write; returns its folder on this machine."""
        name = f"{namespace}-{claim}"
        path = self.directory / "volumes" / name
        path.mkdir(parents=True)
        hostname = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
        specification = {
            "capacity": {"storage": size},
            "accessModes": ["ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            # `local` and not `hostPath`: the kubelet applies a pod's fsGroup to it, as to a real volume.
            "local": {"path": str(path)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [hostname]}]}},
            "claimRef": {"namespace": namespace, "name": claim},
        }
        wanted = {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": name,
            "resources": {"requests": {"storage": size}},
        }
        volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": specification}
        self.apply(volume)
        claim_metadata = {"name": claim, "namespace": namespace}
        document = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": claim_metadata, "spec": wanted}
        self.apply(document)
        return path

    def healthy(self) -> bool:
        command = [self.binaries / "kubectl", "--kubeconfig", self.kubeconfig, "--request-timeout=5s"]
        return run([*command, "get", "--raw", "/readyz"], check=False, timeout_seconds=20).returncode == 0


def running() -> Node | None:
    """The node that runs on this machine, if it is of this recipe, its start came to the end and it answers."""
    directory = _recorded()
    if directory is None or not (directory / "ready").exists():
        return None
    node = Node(directory)
    return node if node.binaries == binaries_directory() and node.healthy() else None


def up() -> Node:
    """Start the node; the one that runs already when there is one. A failed start leaves nothing behind."""
    need_root("A Kubernetes node")
    need(*COMMANDS)
    binaries = build()
    node = running()
    if node is not None:
        return node
    started = time.monotonic()
    directory = cache_directory() / "node"
    with _locked() as lock:
        if _recorded() is not None:
            say("An earlier node was not ended: ending it.")
            _clean()
        _refuse_other_nodes()
        lock.write(str(directory))
        lock.flush()
        try:
            _Start(directory, binaries, lock.fileno()).run()
        except BaseException:
            say("The node did not start; removing what was started.")
            _clean()
            raise
    say(f"Node ready in {time.monotonic() - started:.1f} s: export KUBECONFIG={directory}/admin.kubeconfig")
    return Node(directory)


def down() -> None:
    """End the node and remove all that it made on this machine. Ending a node that is not there is no error."""
    need_root("Ending the node")
    started = time.monotonic()
    if _recorded() is None:
        say("No node runs on this machine.")
        return
    _clean()
    say(f"Node ended in {time.monotonic() - started:.1f} s.")


def purge() -> None:
    """Forget also the images that outlive a node."""
    down()
    for directory in (containerd.image_store(), cache_directory() / "registry"):
        shutil.rmtree(directory, ignore_errors=True)


class _Start:
    """One start of the node, in order; `_clean` undoes it from any point."""

    def __init__(self, directory: Path, binaries: Path, lock: int) -> None:
        self.directory = directory
        self.binaries = binaries
        self.lock = lock
        directory.mkdir(parents=True, exist_ok=True)
        self.registry_port, self.etcd_port, self.peer_port = free_ports(3)
        state = {"binaries": str(binaries), "registry_port": self.registry_port, "sysctls": network.read_sysctls()}
        write_json(directory / "state.json", state)
        self.processes = Processes(directory, attached=False)
        self.authority = Authority(directory / "pki")
        self.node = Node(directory)
        sbin = ":/usr/local/sbin:/usr/sbin:/sbin"
        self.environment = {"PATH": f"{binaries}:{os.environ.get('PATH', '')}{sbin}"}

    def run(self) -> None:
        cgroups.make()
        network.make_bridge()
        self._certificates()
        self._control_plane_starts()
        self._runtime()  # while the API server starts
        self._registry()
        self._wait("the API server is ready", "apiserver", self.node.healthy)
        self._controllers()
        self._kubelet()
        self._services()
        ready = ["get", "node", NODE, "-o", "jsonpath={.status.conditions[?(@.type=='Ready')].status}"]
        self._wait("the node is ready", "kubelet", lambda: self._asks(*ready) == "True")
        account = ["get", "serviceaccount", "default", "-o", "name"]
        self._wait("the controllers work", "controller-manager", lambda: self._asks(*account) != "")
        (self.directory / "ready").touch()

    def _certificates(self) -> None:
        names = [f"IP:{address}" for address in ("127.0.0.1", "10.96.0.1", network.NODE_ADDRESS)]
        names += ["DNS:localhost", "DNS:kubernetes.default", "DNS:kubernetes.default.svc"]
        self.authority.issue("apiserver", user="kube-apiserver", alternative_names=names)
        self.authority.issue("kubelet", user=NODE, alternative_names=[f"DNS:{NODE}", f"IP:{network.NODE_ADDRESS}"])
        self.authority.signing_key("service-accounts")
        users = {
            "admin": ("admin", ["system:masters"]),
            "controller-manager": ("system:kube-controller-manager", []),
            "scheduler": ("system:kube-scheduler", []),
            "proxy": ("system:kube-proxy", []),
            "node": (f"system:node:{NODE}", ["system:nodes"]),
        }
        for name, (user, groups) in users.items():
            certificate = self.authority.issue(name, user=user, groups=groups)
            path = self.directory / f"{name}.kubeconfig"
            server = f"https://{network.NODE_ADDRESS}:6443"
            write_kubeconfig(path, server, self.authority.certificate, certificate=certificate)

    def _control_plane_starts(self) -> None:
        pki = self.directory / "pki"
        etcd = etcd_command(self.binaries, self.directory / "etcd", self.etcd_port, self.peer_port)
        self.processes.start("etcd", etcd, pass_descriptors=[self.lock])
        apiserver = [
            *apiserver_command(self.binaries, pki, self.etcd_port, 6443),
            f"--bind-address={network.NODE_ADDRESS}",
            f"--advertise-address={network.NODE_ADDRESS}",
            f"--kubelet-client-certificate={pki}/admin.crt",
            f"--kubelet-client-key={pki}/admin.key",
            f"--kubelet-certificate-authority={pki}/ca.crt",
            "--kubelet-preferred-address-types=InternalIP",
        ]
        self.processes.start("apiserver", apiserver)

    def _runtime(self) -> None:
        plugins = [
            {
                "type": "bridge",
                "bridge": network.BRIDGE,
                "isGateway": True,
                "ipMasq": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(self.directory / "addresses"),
                    "ranges": [[{"subnet": network.POD_CIDR}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        (self.directory / "cni").mkdir()
        conflist = {"cniVersion": "1.0.0", "name": "grpo-e2e", "plugins": plugins}
        write_json(self.directory / "cni" / "10-pods.conflist", conflist)
        hosts = self.directory / "registries" / "localhost" / "hosts.toml"
        hosts.parent.mkdir(parents=True)
        capabilities = 'capabilities = ["pull", "resolve"]'
        hosts.write_text(f'[host."http://127.0.0.1:{self.registry_port}"]\n  {capabilities}\n')
        (self.directory / "containerd.toml").write_text(containerd.configuration(self.directory, self.binaries))
        self._start_containerd()
        if self.node.ctr.remove_pods():
            # A node that was killed left them in the store; containerd has read them into its memory.
            end_processes([pid for pid, name in processes_of(self.directory).items() if name == "containerd"])
            self._start_containerd()
        archive = self.directory / "pause.tar"
        containerd.pause_archive(self.binaries, archive)
        self.node.ctr.run("images", "import", archive)

    def _start_containerd(self) -> None:
        command = [self.binaries / "containerd", "--config", self.directory / "containerd.toml"]
        self.processes.start("containerd", command, environment=self.environment)
        self._wait("containerd answers", "containerd", self.node.ctr.answers)

    def _registry(self) -> None:
        document = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {
                "filesystem": {"rootdirectory": str(cache_directory() / "registry")},
                "delete": {"enabled": True},
            },
            "http": {"addr": f"127.0.0.1:{self.registry_port}"},
        }
        path = write_json(self.directory / "registry.yaml", document)
        # The exporter of traces would look for a collector.
        environment = {"OTEL_TRACES_EXPORTER": "none"}
        self.processes.start("registry", [self.binaries / "registry", "serve", path], environment=environment)

    def _controllers(self) -> None:
        pki = self.directory / "pki"
        manager = controller_manager_command(self.binaries, pki, self.directory / "controller-manager.kubeconfig")
        self.processes.start("controller-manager", [*manager, "--secure-port=0"])
        scheduler = scheduler_command(self.binaries, self.directory / "scheduler.kubeconfig")
        self.processes.start("scheduler", [*scheduler, "--secure-port=0"])

    def _kubelet(self) -> None:
        pki = self.directory / "pki"
        document: dict[str, Any] = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": network.NODE_ADDRESS,
            "healthzPort": 0,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": f"{pki}/ca.crt"},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{pki}/kubelet.crt",
            "tlsPrivateKeyFile": f"{pki}/kubelet.key",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{cgroups.NAME}",
            "failCgroupV1": False,  # machines with control groups of version 1 serve as well
            "failSwapOn": False,
            "oomScoreAdj": 0,  # a container that plays the machine may lack CAP_SYS_RESOURCE
            "containerRuntimeEndpoint": f"unix://{self.directory}/containerd.sock",
            "clusterDNS": [network.CLUSTER_DNS],
            "clusterDomain": "cluster.local",
            "podCIDR": network.POD_CIDR,
            "enforceNodeAllocatable": [],
            "localStorageCapacityIsolation": False,
            # The images are ours to keep and the disk is shared: a test must not fail because the machine's disk is rather full.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        }
        command = [
            self.binaries / "kubelet",
            f"--kubeconfig={self.directory}/node.kubeconfig",
            f"--config={write_json(self.directory / 'kubelet.yaml', document)}",
            f"--hostname-override={NODE}",
            f"--node-ip={network.NODE_ADDRESS}",
            f"--root-dir={self.directory}/kubelet",
            f"--cert-dir={self.directory}/kubelet-pki",
        ]
        self.processes.start("kubelet", command, environment=self.environment)

    def _services(self) -> None:
        document = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": f"{self.directory}/proxy.kubeconfig"},
            "mode": "iptables",
            "clusterCIDR": network.POD_CIDR,
            "hostnameOverride": NODE,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
        path = write_json(self.directory / "proxy.yaml", document)
        command = [self.binaries / "kube-proxy", f"--config={path}"]
        self.processes.start("proxy", command, environment=self.environment)
        (self.directory / "Corefile").write_text(
            f".:1053 {{\n  bind {network.NODE_ADDRESS}\n  kubernetes cluster.local {{\n"
            f"    kubeconfig {self.directory}/admin.kubeconfig\n  }}\n  cache 5\n}}\n"
        )
        self.processes.start("coredns", [self.binaries / "coredns", "-conf", self.directory / "Corefile"])
        protocols = {"dns": "UDP", "dns-tcp": "TCP"}
        ports = [{"name": name, "port": 53, "targetPort": 1053, "protocol": each} for name, each in protocols.items()]
        metadata = {"name": "kube-dns", "namespace": "kube-system"}
        specification = {"clusterIP": network.CLUSTER_DNS, "ports": ports}
        self.node.apply({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": specification})
        slice_metadata = {**metadata, "labels": {"kubernetes.io/service-name": "kube-dns"}}
        self.node.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": slice_metadata,
                "addressType": "IPv4",
                "ports": [{"name": name, "port": 1053, "protocol": each} for name, each in protocols.items()],
                "endpoints": [{"addresses": [network.NODE_ADDRESS], "conditions": {"ready": True}}],
            }
        )

    def _asks(self, *arguments: str) -> str:
        command = [self.binaries / "kubectl", "--kubeconfig", self.node.kubeconfig, "--request-timeout=5s"]
        return run([*command, *arguments], check=False, timeout_seconds=20).stdout.strip()

    def _wait(self, what: str, log: str, condition: Any) -> None:
        def holds() -> bool:
            self.processes.check()
            return bool(condition())

        wait_until(holds, what, timeout_seconds=START_SECONDS, explain=lambda: self.node.log(log))


def _recorded() -> Path | None:
    """The folder of the node that was started last and not ended."""
    try:
        text = LOCK.read_text().strip()
    except FileNotFoundError:
        return None
    return Path(text) if text else None


@contextmanager
def _locked() -> Iterator[TextIO]:
    with LOCK.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"Another node runs or starts on this machine, in {_recorded()}. End it: python -m e2e.cluster down"
            ) from None
        yield lock


def _refuse_other_nodes() -> None:
    """Two kubelets on one machine would fight over ports and packet filter rules."""
    for entry in Path("/proc").iterdir():
        try:
            name = (entry / "comm").read_text().strip() if entry.name.isdigit() else ""
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name in ("kubelet", "kube-proxy") and alive([int(entry.name)]):
            raise ClusterError(f"A Kubernetes node runs on this machine already ({name}, process {entry.name}).")


def _clean() -> None:
    """Undo a start from any point: processes, mounts, network, control groups, data; then forget the folder."""
    directory = _recorded()
    if directory is None:
        return
    _end_all_processes(directory)
    for mount in _mounts_below(directory, containerd.image_store()):
        run(["umount", "--lazy", mount], check=False)
    network.remove_bridge()
    network.remove_rules()
    cgroups.remove()
    state = directory / "state.json"
    if state.exists():
        network.write_sysctls(json.loads(state.read_text())["sysctls"])
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise ClusterError(f"{directory} could not be removed; see what still uses it.")
    with LOCK.open("r+") as lock:
        lock.truncate()


def _end_all_processes(directory: Path) -> None:
    """The kubelet first, or it would start again what ends; then pods; then politely what keeps images; then the rest at once."""
    processes = processes_of(directory)
    end_processes([pid for pid, name in processes.items() if name == "kubelet"])
    if "containerd" in processes.values() and (directory / "state.json").exists():
        try:
            Node(directory).ctr.remove_pods()
        except ClusterError as error:
            say(f"containerd does not remove its pods ({error}); their processes end all the same.")
    end_processes(cgroups.members(), grace_seconds=0)
    keepers = [pid for pid, name in processes_of(directory).items() if name in ("containerd", "registry")]
    end_processes(keepers)
    end_processes(list(processes_of(directory)), grace_seconds=0)


def _mounts_below(*directories: Path) -> list[str]:
    """Mount points inside the folders, inner ones first."""
    points = [
        line.split()[1].encode().decode("unicode_escape") for line in Path("/proc/mounts").read_text().splitlines()
    ]
    inside = [point for point in points if any(Path(point).is_relative_to(each) for each in directories)]
    return sorted(inside, reverse=True)
