"""The Kubernetes API as the operator needs it: plain JSON in, plain JSON out.

Invariant: each request has a time limit, is counted, and ends in the object or in one ApiError that says which verb, on what, was answered
how. A request that changes something is sent only while `may_write` holds (the operator is the leader).

Only this module imports the `kubernetes` package: for credentials (in-cluster token rotation, kubeconfig with exec plug-ins) and for its
HTTP layer. Its generated model classes are not used: they cost memory and time for each object.
"""

import asyncio
import json
import logging
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import yaml
from kubernetes.aio import client, config
from kubernetes.aio.config.config_exception import ConfigException

from grpo_operator import labels
from grpo_worker.config.job import GROUP, VERSION

logger = logging.getLogger(__name__)

Document = dict[str, Any]

TIMEOUT_SECONDS = 15.0  # for one answer
ATTEMPTS = 4  # for one request, when the server is busy or away
RETRY_AFTER_LIMIT_SECONDS = 10.0  # a longer wait is the work queue's business
PAGE_OBJECTS = 200  # of a list; a page of pods is some 10 MiB of Python objects
CONNECTIONS = 64
RETRIED = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Resource:
    """A kind of object, as its URL and RBAC name it."""

    group: str  # "" for core
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def name(self) -> str:
        """As RBAC rules and error messages name it: `pods`, `grpojobs.grpo.dev`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


GRPOJOBS = Resource(GROUP, VERSION, "grpojobs", "GRPOJob")
PODS = Resource("", "v1", "pods", "Pod")
SERVICES = Resource("", "v1", "services", "Service")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")
SECRETS = Resource("", "v1", "secrets", "Secret")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
DISRUPTION_BUDGETS = Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
EVENTS = Resource("events.k8s.io", "v1", "events", "Event")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
BY_KIND = {
    resource.kind: resource
    for resource in (
        GRPOJOBS, PODS, SERVICES, CONFIG_MAPS, SECRETS, NETWORK_POLICIES, DISRUPTION_BUDGETS, EVENTS, LEASES,
    )
}  # fmt: skip


class ApiError(Exception):
    """The API server refused, or did not answer. `status` 0: no answer."""

    def __init__(
        self, verb: str, resource: Resource, namespace: str, name: str, status: int, reason: str, message: str
    ):
        where = f" {namespace}/{name}" if name else f" in {namespace}" if namespace else ""
        super().__init__(f"{verb} {resource.name}{where}: {status or 'no answer'} {reason}: {message}")
        self.verb, self.resource, self.namespace, self.name = verb, resource, namespace, name
        self.status, self.reason, self.message = status, reason, message

    @property
    def not_found(self) -> bool:
        return self.status == 404

    @property
    def already_exists(self) -> bool:
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        return self.status == 409 and self.reason != "AlreadyExists"

    @property
    def forbidden(self) -> bool:
        return self.status == 403

    @property
    def namespace_ending(self) -> bool:
        """Nothing can be created in a namespace that is being deleted."""
        return self.forbidden and "is being terminated" in self.message


class NotLeader(Exception):
    """A change was held back: this operator does not (or no longer) hold the Lease."""


class NoCluster(Exception):
    """There is no way to an API server from here."""


@dataclass(frozen=True)
class Credentials:
    """How to reach the API server and as whom; for kopf, which has a client of its own."""

    server: str
    ca_file: str | None
    ca_data: str | bytes | None
    token: str | None
    certificate_file: str | None
    key_file: str | None
    verify: bool


async def _configuration() -> client.Configuration:
    """In-cluster credentials, or those of KUBECONFIG. Raises NoCluster."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except ConfigException as not_in_cluster:
        try:
            await config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration)
        except (ConfigException, OSError, yaml.YAMLError) as error:
            raise NoCluster(
                f"no way to a cluster: not in a pod ({not_in_cluster}), and the kubeconfig file cannot be used ({error}). "
                "Run in a pod with a ServiceAccount, or set KUBECONFIG to a readable file."
            ) from error
    configuration.connection_pool_maxsize = CONNECTIONS
    configuration.retries = None  # retried here, with the server's Retry-After
    return configuration


async def credentials() -> Credentials:
    """Read anew at each call, so a rotated token is found. Raises NoCluster."""
    configuration = await _configuration()
    header = await configuration.get_api_key_with_prefix("BearerToken", alias="authorization") or ""
    return Credentials(
        server=configuration.host,
        ca_file=configuration.ssl_ca_cert,
        ca_data=configuration.ca_cert_data,
        token=header.split(" ", 1)[-1].strip() or None,
        certificate_file=configuration.cert_file,
        key_file=configuration.key_file,
        verify=configuration.verify_ssl,
    )


def collection_path(resource: Resource, namespace: str) -> str:
    root = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
    return f"{root}/namespaces/{quote(namespace)}/{resource.plural}" if namespace else f"{root}/{resource.plural}"


class Api:
    """The API server. Use as an async context manager."""

    def __init__(
        self,
        observe: Callable[[str, str, str], None] = lambda verb, resource, code: None,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._observe = observe
        self.may_write = may_write
        self._client: client.ApiClient | None = None

    async def __aenter__(self) -> "Api":
        self._client = client.ApiClient(await _configuration())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()

    @property
    def server(self) -> str:
        return "" if self._client is None else str(self._client.configuration.host)

    # ---- reads

    async def get(self, resource: Resource, namespace: str, name: str) -> Document:
        return await self._request("get", "GET", resource, namespace, name)

    async def can_list(self, resource: Resource, namespace: str) -> None:
        """Raises ApiError when listing is refused or the resource is not served."""
        await self._request("list", "GET", resource, namespace, query={"limit": "1"})

    async def pages(self, resource: Resource, namespace: str, label_selector: str = "") -> AsyncIterator[Document]:
        """A complete list, in pages: the whole of a large one would fill the memory."""
        token = ""
        while True:
            query = {"limit": str(PAGE_OBJECTS)}
            if label_selector:
                query["labelSelector"] = label_selector
            if token:
                query["continue"] = token
            page = await self._request("list", "GET", resource, namespace, query=query)
            yield page
            token = page["metadata"].get("continue") or ""
            if not token:
                return

    # ---- changes

    async def create(self, document: Document, dry_run: bool = False) -> Document:
        resource, namespace = BY_KIND[document["kind"]], document["metadata"].get("namespace", "")
        query = {"fieldManager": labels.MANAGER} | ({"dryRun": "All"} if dry_run else {})
        return await self._request("create", "POST", resource, namespace, body=document, query=query)

    async def replace(self, document: Document) -> Document:
        """Refused with a conflict when the document's resourceVersion is not the newest."""
        resource, metadata = BY_KIND[document["kind"]], document["metadata"]
        query = {"fieldManager": labels.MANAGER}
        return await self._request(
            "update", "PUT", resource, metadata.get("namespace", ""), metadata["name"], body=document, query=query
        )

    async def apply(self, document: Document, subresource: str = "") -> Document:
        """Server-side apply. A uid in the document is a precondition."""
        resource, metadata = BY_KIND[document["kind"]], document["metadata"]
        return await self._request(
            "patch", "PATCH", resource, metadata.get("namespace", ""), metadata["name"],
            subresource=subresource, body=document, query={"fieldManager": labels.MANAGER, "force": "true"},
            content_type="application/apply-patch+yaml",
        )  # fmt: skip

    async def merge(self, resource: Resource, namespace: str, name: str, patch: Document) -> Document:
        """JSON merge patch. An empty patch changes nothing and answers with the object, without the verb `get`."""
        return await self._request(
            "patch", "PATCH", resource, namespace, name,
            body=patch, query={"fieldManager": labels.MANAGER}, content_type="application/merge-patch+json",
        )  # fmt: skip

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str = "", grace_seconds: int | None = None
    ) -> Document:
        """Dependents go in the background. With `uid`, an object of the same name but another uid is refused as a conflict."""
        options: Document = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._request("delete", "DELETE", resource, namespace, name, body=options)

    # ---- one request

    async def _request(
        self,
        verb: str,
        method: str,
        resource: Resource,
        namespace: str,
        name: str = "",
        *,
        subresource: str = "",
        body: Document | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Document:
        assert self._client is not None, "use as an async context manager"
        url = self._client.configuration.host + collection_path(resource, namespace)
        url += "".join(f"/{quote(part)}" for part in (name, subresource) if part)
        if query:
            url += "?" + urlencode(query)
        label = f"{resource.plural}/{subresource}" if subresource else resource.plural
        for attempt in range(1, ATTEMPTS + 1):
            if method != "GET" and resource is not LEASES and not self.may_write():
                raise NotLeader(f"{verb} {resource.name} {namespace}/{name}")
            status, retry_after, answer = await self._once(method, url, body, content_type)
            self._observe(verb, label, str(status) if status else "none")
            if 200 <= status < 300:
                return answer
            if attempt < ATTEMPTS and (status in RETRIED or status == 0) and retry_after <= RETRY_AFTER_LIMIT_SECONDS:
                await asyncio.sleep(max(retry_after, 0.2 * 2**attempt) * random.uniform(1.0, 1.25))
                continue
            break
        raise ApiError(
            verb, resource, namespace, name, status, str(answer.get("reason") or ""), str(answer.get("message") or "")
        )

    async def _once(
        self, method: str, url: str, body: Document | None, content_type: str
    ) -> tuple[int, float, Document]:
        """HTTP status (0: no answer), the wait that the server asks for in seconds, and the answer."""
        assert self._client is not None
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": labels.MANAGER}
        try:
            await self._client.update_params_for_auth(headers, [], ["BearerToken"], url, method, body)
            response = await self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            )
            text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return 0, 0.0, {"reason": type(error).__name__, "message": str(error) or "no answer in time"}
        try:
            answer = json.loads(text)
        except ValueError:  # a proxy's page, or the server's plain words
            answer = {"reason": response.reason, "message": text[:500].decode(errors="replace")}
        try:
            retry_after = float(response.headers.get("Retry-After") or 0)
        except ValueError:  # a date: left to the next attempts' own pauses
            retry_after = 0.0
        return response.status, retry_after, answer if isinstance(answer, dict) else {"message": str(answer)}
