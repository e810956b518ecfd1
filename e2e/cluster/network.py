"""The node's network on this machine: one bridge of its own name, and the removal of every rule that pods and Services left.

Only rules and chains of Kubernetes (KUBE-*) and of the pods' network plug-ins (CNI-*) are touched; the machine's own stay.
"""

import re
import shutil
from pathlib import Path

from .host import run

BRIDGE = "grpo-e2e0"
NODE_ADDRESS = "10.244.0.1"
POD_CIDR = "10.244.0.0/24"
CLUSTER_DNS = "10.96.0.10"
SYSCTLS = ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables")

_OURS = re.compile(r"(KUBE|CNI)-[\w-]+")


def read_sysctls() -> dict[str, str]:
    """The values to restore at the end."""
    return {name: path.read_text().strip() for name in SYSCTLS if (path := Path("/proc/sys") / name).exists()}


def write_sysctls(values: dict[str, str]) -> None:
    for name, value in values.items():
        (Path("/proc/sys") / name).write_text(value)


def make_bridge() -> None:
    """The bridge that pods hang on; its address is the node's."""
    run(["ip", "link", "add", BRIDGE, "type", "bridge"])
    run(["ip", "address", "add", f"{NODE_ADDRESS}/24", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])
    if shutil.which("modprobe"):
        run(["modprobe", "br_netfilter"], check=False)
    write_sysctls(dict.fromkeys(read_sysctls(), "1"))


def bridge_exists() -> bool:
    return Path("/sys/class/net", BRIDGE).exists()


def remove_bridge() -> None:
    if bridge_exists():
        run(["ip", "link", "delete", BRIDGE])


def removal(saved: str) -> str:
    """From what iptables-save printed, the input of `iptables-restore --noflush` that removes our chains and the jumps to them."""
    lines: list[str] = []
    flushes: list[str] = []
    deletions: list[str] = []
    for line in saved.splitlines():
        if line.startswith("*"):
            lines.append(line)
            flushes, deletions = [], []
        elif line.startswith(":"):
            chain = line[1:].split()[0]
            if _OURS.fullmatch(chain):
                flushes.append(f"-F {chain}")
                deletions.append(f"-X {chain}")
        elif line.startswith("-A "):
            chain = line.split()[1]
            target = re.search(r"-[jg] (\S+)", line)
            if not _OURS.fullmatch(chain) and target and _OURS.fullmatch(target[1]):
                lines.append(f"-D {line[3:]}")
        elif line == "COMMIT":
            lines += [*flushes, *deletions, line]
    return "\n".join(lines) + "\n"


def kubernetes_chains() -> list[str]:
    """Chains of Kubernetes and CNI that the machine's packet filter holds, with IPv6."""
    found: list[str] = []
    for family in ("iptables", "ip6tables"):
        if shutil.which(f"{family}-save"):
            saved = run([f"{family}-save"]).stdout
            found += [line[1:].split()[0] for line in saved.splitlines() if line.startswith(":")]
    return [chain for chain in found if _OURS.fullmatch(chain)]


def remove_rules() -> None:
    for family in ("iptables", "ip6tables"):
        if not shutil.which(f"{family}-save"):
            continue
        saved = run([f"{family}-save"]).stdout
        if _OURS.search(saved):
            run([f"{family}-restore", "--noflush"], input_text=removal(saved))
