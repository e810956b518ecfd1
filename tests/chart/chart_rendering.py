"""Renders the chart with values and finds objects in what comes out."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "grpo-operator"
KUBE_VERSION = "v1.36.3"

Document = dict[str, Any]


class RenderError(Exception):
    """Helm refused; its words."""


@dataclass(frozen=True)
class Chart:
    """`values` are given as JSON, so that they reach Helm with their types."""

    helm: Path

    def text(self, values: Document | None = None, *, release: str = "grpo-operator", namespace: str = "grpo-system", kube_version: str = KUBE_VERSION) -> str:  # fmt: skip
        """All manifests as YAML. Raises RenderError."""
        command = [self.helm, "template", release, CHART, "--namespace", namespace, "--kube-version", kube_version]
        done = subprocess.run(
            [*command, "--values", "-"],
            input=json.dumps(values or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            raise RenderError(done.stderr)
        return done.stdout

    def render(self, values: Document | None = None, **options: str) -> list[Document]:
        """All manifests, parsed. Raises RenderError."""
        documents = yaml.load_all(self.text(values, **options), Loader=yaml.CSafeLoader)
        return [document for document in documents if document]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def one(documents: list[Document], kind: str, name: str) -> Document:
    """The object of that kind and name."""
    found = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    assert len(found) == 1, (
        f"{len(found)} of {kind} {name} among {[d['metadata']['name'] for d in of_kind(documents, kind)]}"
    )
    return found[0]


def operator_pod(documents: list[Document]) -> Document:
    """The pod template of the Deployment."""
    (deployment,) = of_kind(documents, "Deployment")
    template: Document = deployment["spec"]["template"]
    return template


def arguments(documents: list[Document]) -> dict[str, str]:
    """Flags of the operator's command line, by name."""
    flags = operator_pod(documents)["spec"]["containers"][0]["args"]
    return dict(flag.removeprefix("--").split("=", 1) for flag in flags)
