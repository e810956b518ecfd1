"""Machines on a network that can be cut: network namespaces on one bridge, nothing of which reaches the host's own network.

A machine is a thread with an event loop whose sockets, and those of the threads that it starts, are in its namespace; or a process that is
started there.
"""

import asyncio
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
CLONE_NEWNET = 0x40000000


def missing() -> str:
    """Why no network can be made here; '' when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [tool for tool in ("ip", "iptables") if shutil.which(tool) is None]
    if tools:
        return f"not installed: {', '.join(tools)} (Debian: iproute2, iptables)"
    probe = f"g{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    filters = subprocess.run(["ip", "netns", "exec", probe, "iptables", "-L"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return f"no packet filter here: {filters.stderr.strip()}" if filters.returncode else ""


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class Machine:
    """One namespace, and a thread in it."""

    def __init__(self, namespace: str, address: str) -> None:
        self.namespace, self.address = namespace, address
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=namespace, daemon=True)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, T], limit_seconds: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_seconds)

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def process(self, command: Sequence[str], **keywords: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], **keywords)

    def close(self) -> None:
        self.do(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self) -> None:
        handle = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        assert ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET) == 0
        os.close(handle)
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


class Network:
    """Machines by name. `cut` drops what goes from one to another, both ways, without a word to either."""

    def __init__(self, *names: str) -> None:
        self._hub = f"g{os.getpid()}-hub"
        self._machines: dict[str, Machine] = {}
        run("ip", "netns", "add", self._hub)
        try:
            run("ip", "-n", self._hub, "link", "add", "name", "hub", "type", "bridge")
            run("ip", "-n", self._hub, "link", "set", "hub", "up")
            for number, name in enumerate(names, start=1):
                self._add(name, f"g{os.getpid()}-{number}", f"10.203.77.{number}", f"port{number}")
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def cut(self, one: str, other: str) -> None:
        self._filter("-A", one, other)

    def heal(self, one: str, other: str) -> None:
        self._filter("-D", one, other)

    def close(self) -> None:
        for machine in self._machines.values():
            machine.close()
            run("ip", "netns", "del", machine.namespace)
        run("ip", "netns", "del", self._hub)

    def _add(self, name: str, namespace: str, address: str, port: str) -> None:
        run("ip", "netns", "add", namespace)
        self._machines[name] = Machine(namespace, address)
        wire = ("type", "veth", "peer", "name", "wire", "netns", namespace)
        run("ip", "-n", self._hub, "link", "add", "name", port, *wire)
        run("ip", "-n", self._hub, "link", "set", port, "master", "hub", "up")
        run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "wire")
        for link in ("wire", "lo"):
            run("ip", "-n", namespace, "link", "set", link, "up")

    def _filter(self, action: str, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            source = self[there].address
            where = ("ip", "netns", "exec", self[here].namespace)
            run(*where, "iptables", "-w", action, "INPUT", "-s", source, "-j", "DROP")
