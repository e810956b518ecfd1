"""JSON Schemas for kubeconform out of an API server's own OpenAPI document, since tests use no network.

Invariant: as strict as kubeconform's published `-standalone-strict` schemas: an object with known properties has no others.
"""

import json
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
DEFINITIONS = "_definitions.json"
LOCATION = "{{ .ResourceKind }}{{ .KindSuffix }}.json"


def write_schemas(openapi: Schema, directory: Path) -> None:
    """`openapi` is the answer of /openapi/v2; writes one file a kind, and one that holds what they refer to."""
    definitions = {name: _strict(name, schema) for name, schema in openapi["definitions"].items()}
    (directory / DEFINITIONS).write_text(json.dumps({"definitions": definitions}))
    for name, schema in openapi["definitions"].items():
        for kind in schema.get("x-kubernetes-group-version-kind", []):
            group = [kind["group"].split(".")[0]] if kind["group"] else []
            file = "-".join([kind["kind"].lower(), *group, kind["version"].lower()])
            (directory / f"{file}.json").write_text(json.dumps({"$ref": f"{DEFINITIONS}#/definitions/{name}"}))


def _strict(name: str, schema: Schema) -> Schema:
    if schema.get("format") == "int-or-string" or name.endswith(".api.resource.Quantity"):
        return {"type": ["string", "number"]}
    if name.endswith(".JSON") or ".JSONSchemaPropsOr" in name:  # in a CRD's schema: any JSON
        return {}
    result = _plain(schema)
    if "properties" in schema and "additionalProperties" not in schema:
        result["additionalProperties"] = False
    return result


def _plain(schema: Schema) -> Schema:
    """Without extensions, and without formats and defaults: they say nothing about the shape, and validators differ on them."""
    if schema.get("format") == "int-or-string":
        return {"type": ["string", "integer"]}
    result = {
        key: value for key, value in schema.items() if key not in ("default", "format") and not key.startswith("x-")
    }
    if "properties" in result:
        result["properties"] = {name: _plain(value) for name, value in result["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), dict):
            result[key] = _plain(result[key])
    return result
