"""The API server as the commands see it: a few JSON requests, and a person's kubeconfig.

Invariant: each request has a time limit and ends with a document or with one error for a person; nothing of the Kubernetes client
reaches the other modules, and nothing here waits or retries.
"""

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_operator import labels
from grpo_operator.cli.api_errors import Asked, NotThere, Unreachable, explain
from grpo_worker.config.job import GROUP, KIND, VERSION
from grpo_worker.errors import ConfigError, GRPOError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

REQUEST_SECONDS = 30.0
CONNECT_SECONDS = 10.0
STREAM_SECONDS = 300.0  # longest silence of a log stream before it is opened again
PAGE = 500
FIELD_MANAGER = "grpo-submit"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Json = dict[str, Any]
Query = Mapping[str, str | int | bool]


class Cluster:
    """One API server, and the namespace that is meant when none is named."""

    def __init__(self, client: "ApiClient", name: str, namespace: str) -> None:
        self._client = client
        self.name = name
        self.namespace = namespace

    def job(self, namespace: str, name: str) -> Json:
        """Raises NotThere."""
        return self._json("GET", _jobs(namespace, name), Asked("get", f"{KIND} {name}", namespace, self.name))

    def find_job(self, namespace: str, name: str) -> Json | None:
        try:
            return self.job(namespace, name)
        except NotThere:
            return None

    def jobs(self, namespace: str | None) -> list[Json]:
        """The jobs of a namespace; None: of all."""
        asked = Asked("list", f"{KIND}s", namespace or "(all)", self.name)
        return self._list(_jobs(namespace), {}, asked)

    def apply_job(self, namespace: str, document: Json, *, dry_run: bool, force: bool) -> Json:
        """Server-side apply, so that fields which others set (a scale, a suspension) stay theirs."""
        name = document["metadata"]["name"]
        query: dict[str, str | int | bool] = {
            "fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", "force": force,
        }  # fmt: skip
        if dry_run:
            query["dryRun"] = "All"
        asked = Asked("patch", f"{KIND} {name}", namespace, self.name)
        return self._json("PATCH", _jobs(namespace, name), asked, query, document, APPLY_PATCH)

    def patch_job(self, namespace: str, name: str, patch: Json, field_manager: str) -> Json:
        asked = Asked("patch", f"{KIND} {name}", namespace, self.name)
        return self._json("PATCH", _jobs(namespace, name), asked, {"fieldManager": field_manager}, patch, MERGE_PATCH)

    def events(self, namespace: str, uid: str) -> list[Json]:
        """The events on the object with this UID."""
        path = f"/api/v1/namespaces/{namespace}/events"
        return self._list(
            path, {"fieldSelector": f"involvedObject.uid={uid}"}, Asked("list", "events", namespace, self.name)
        )

    def has_claim(self, namespace: str, claim: str) -> bool:
        """Whether the PersistentVolumeClaim exists."""
        path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{claim}"
        try:
            self._json("GET", path, Asked("get", f"PersistentVolumeClaim {claim}", namespace, self.name))
        except NotThere:
            return False
        return True

    def pods(self, namespace: str, selector: str) -> list[Json]:
        path = f"/api/v1/namespaces/{namespace}/pods"
        return self._list(path, {"labelSelector": selector}, Asked("list", "pods", namespace, self.name))

    def pod(self, namespace: str, name: str) -> Json:
        """Raises NotThere."""
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        return self._json("GET", path, Asked("get", f"pod {name}", namespace, self.name))

    def log(self, namespace: str, pod: str, query: Query) -> Iterator[str]:
        """The lines of a pod's log, as they come. Raises GRPOError; a stream that falls silent or breaks off raises Unreachable."""
        import urllib3

        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        asked = Asked("get", f"the log of pod {pod}", namespace, self.name)
        response = self._send("GET", path, asked, {"container": labels.CONTAINER, **query}, timeout=STREAM_SECONDS)
        rest = b""
        try:
            if response.status != 200:
                raise explain(response.status, response.data, asked)
            for chunk in response.stream(16384, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            if rest:
                yield rest.decode(errors="replace")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(f"the log of pod {pod} broke off: {_cause(error)}") from error
        finally:
            response.release_conn()
            response.close()

    def execute(self, namespace: str, pod: str, command: list[str]) -> bytes:
        """What a command prints in the worker's container of a pod. Raises GRPOError."""
        import websocket
        from kubernetes.client import CoreV1Api
        from kubernetes.client.exceptions import ApiException
        from kubernetes.stream import stream

        asked = Asked("create", f"an exec in pod {pod}", namespace, self.name)
        websocket.setdefaulttimeout(CONNECT_SECONDS)
        try:
            opened = stream(
                CoreV1Api(self._client).connect_get_namespaced_pod_exec, pod, namespace, container=labels.CONTAINER,
                command=command, stdin=False, stdout=True, stderr=True, tty=False, binary=True, _preload_content=False,
            )  # fmt: skip
            try:
                opened.run_forever(timeout=REQUEST_SECONDS)
                if opened.is_open():
                    raise Unreachable(f"{self.name}: pod {pod} did not answer within {REQUEST_SECONDS:.0f} s")
                said: bytes = opened.read_stdout()
                if opened.returncode:
                    words = opened.read_stderr().decode(errors="replace").strip()
                    raise ConfigError(f"{self.name}: a command in pod {pod} ended with {opened.returncode}: {words}")
            finally:
                opened.close()
        except ApiException as error:
            if not error.status:
                raise Unreachable(f"{self.name}: no way into pod {pod}: {error.reason}") from error
            raise explain(error.status, str(error.body or error.reason).encode(), asked) from error
        except (websocket.WebSocketException, OSError) as error:
            raise Unreachable(f"{self.name}: the way into pod {pod} broke off: {_cause(error)}") from error
        return said

    def _list(self, path: str, query: Query, asked: Asked) -> list[Json]:
        """All pages of a list."""
        items: list[Json] = []
        token = ""
        while True:
            page = self._json("GET", path, asked, {**query, "limit": PAGE, **({"continue": token} if token else {})})
            items += page.get("items") or []
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return items

    def _json(
        self, method: str, path: str, asked: Asked, query: Query | None = None, body: Json | None = None, kind: str = ""
    ) -> Json:
        import urllib3

        response = self._send(method, path, asked, query or {}, body, kind)
        try:
            data: bytes = response.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(f"{self.name}: the API server's answer broke off: {_cause(error)}") from error
        if not 200 <= response.status < 300:
            raise explain(response.status, data, asked)
        try:
            document: Json = json.loads(data)
        except ValueError as error:
            raise ConfigError(
                f"{self.name}: {self._client.configuration.host} does not answer like an API server."
            ) from error
        return document

    def _send(
        self,
        method: str,
        path: str,
        asked: Asked,
        query: Query,
        body: Json | None = None,
        kind: str = "",
        timeout: float = REQUEST_SECONDS,
    ) -> Any:
        """The raw answer. Raises Unreachable when there is none."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        headers = {"Accept": "application/json"} if kind or not path.endswith("/log") else {}
        if kind:
            headers["Content-Type"] = kind
        pairs = [(key, str(value).lower() if isinstance(value, bool) else value) for key, value in query.items()]
        try:
            request = self._client.param_serialize(
                method, path, query_params=pairs, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            return self._client.call_api(*request, _request_timeout=(CONNECT_SECONDS, timeout)).response
        except (urllib3.exceptions.HTTPError, OSError, ApiException) as error:
            raise Unreachable(
                f"{self.name}: no answer from the API server at {self._client.configuration.host}: {_cause(error)}. "
                "Is the cluster up, and is this the right --context?"
            ) from error


def connect(options: argparse.Namespace) -> Cluster:
    """The cluster that the options name: a kubeconfig, or inside a pod its service account. Raises ConfigError."""
    try:
        from kubernetes import client
        from kubernetes.config import ConfigException
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"commands for a cluster need the Kubernetes client ({error}): pip install 'grpo-operator[cli]'"
        ) from error
    import yaml

    configuration = client.Configuration()
    try:
        name, namespace = _load(configuration, options.kubeconfig, options.context)
    except (ConfigException, yaml.YAMLError, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"kubeconfig {_kubeconfig(options.kubeconfig)}: {error}") from error
    configuration.retries = False  # who calls decides whether to ask again
    return Cluster(client.ApiClient(configuration), name, options.namespace or namespace)


def command_line(command: str, options: argparse.Namespace, namespace: str) -> str:
    """`grpo COMMAND` for the same cluster and namespace, to be pasted into a shell."""
    words = ["grpo", *command.split(), "-n", namespace]
    for name in ("context", "kubeconfig"):
        if value := getattr(options, name, None):
            words += [f"--{name}", value]
    return shlex.join(words)


def transient(error: GRPOError) -> bool:
    """Whether the same request may work in a moment."""
    return isinstance(error, Unreachable)


def _load(configuration: Any, kubeconfig: str | None, context: str | None) -> tuple[str, str]:
    """Fill `configuration`; a name of the cluster for messages, and the default namespace."""
    from kubernetes.config import load_incluster_config
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    paths = _kubeconfig(kubeconfig)
    merged = KubeConfigMerger(paths)
    if merged.config is None:
        if kubeconfig is None and context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=configuration)
            return "this pod's cluster", (SERVICE_ACCOUNT / "namespace").read_text().strip()
        raise ConfigError(f"no kubeconfig at {paths}. Name one with --kubeconfig or KUBECONFIG.")
    known = [str(entry["name"]) for entry in merged.config.value.get("contexts") or ()]
    chosen = context or merged.config.value.get("current-context")
    if not chosen or chosen not in known:
        said = f"no context {chosen!r}" if chosen else "no current context"
        raise ConfigError(f"kubeconfig {paths}: {said}. Choose with --context: {', '.join(known) or 'there are none'}.")
    loader = KubeConfigLoader(
        config_dict=merged.config, active_context=chosen, config_base_path=None, config_persister=merged.save_changes
    )
    loader.load_and_set(configuration)
    return f"context {chosen}", loader.current_context["context"].get("namespace") or "default"


def _kubeconfig(path: str | None) -> str:
    return path or os.environ.get("KUBECONFIG") or "~/.kube/config"


def _jobs(namespace: str | None, name: str = "") -> str:
    scope = f"/namespaces/{namespace}" if namespace else ""
    return f"/apis/{GROUP}/{VERSION}{scope}/grpojobs" + (f"/{name}" if name else "")


def _cause(error: BaseException) -> str:
    """The innermost reason of a failed connection, without the objects around it."""
    inner: BaseException = error
    while following := inner.__cause__ or inner.__context__ or getattr(inner, "reason", None):
        if not isinstance(following, BaseException):
            break
        inner = following
    return (inner.strerror if isinstance(inner, OSError) else None) or str(inner) or type(inner).__name__
