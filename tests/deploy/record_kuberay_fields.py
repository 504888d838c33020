"""Writes kuberay_fields.json anew: which fields KubeRay's custom resources have, as its published definitions say.

Run it with a folder that holds ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, and their version:

    python -m tests.deploy.record_kuberay_fields FOLDER v1.7.0

What is kept are names, types, choices and what is required, as a JSON schema that knows no other field. Objects that are alike
are kept once.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FIELDS = Path(__file__).with_name("kuberay_fields.json")
KEPT = ("type", "enum", "required", "minimum")
UNUSED = {
    "affinity",
    "ephemeralContainers",
    "gcsFaultToleranceOptions",
    "historyServerOptions",
    "headService",
    "lifecycle",
}
"""Large, and in no file of deploy/: anything is taken for right there."""

Schema = dict[str, Any]


class Recorder:
    """Strips schemas and keeps each kind of object once."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def strip(self, name: str, schema: Mapping[str, Any]) -> Schema:
        """What is kept of a field's schema; objects by reference."""
        if name in UNUSED:
            return {}
        if schema.get("x-kubernetes-int-or-string"):
            return {"type": ["integer", "string"]}
        kept: Schema = {key: schema[key] for key in KEPT if key in schema}
        if "items" in schema:
            kept["items"] = self.strip(name, schema["items"])
        if isinstance(schema.get("additionalProperties"), Mapping):
            kept["additionalProperties"] = self.strip(name, schema["additionalProperties"])
        if "properties" in schema:
            kept["properties"] = {key: self.strip(key, value) for key, value in schema["properties"].items()}
            kept["additionalProperties"] = False
            return {"$ref": f"#/$defs/{self._keep(name, kept)}"}
        return kept

    def _keep(self, name: str, schema: Schema) -> str:
        digest = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()[:8]
        self.definitions[f"{name}-{digest}"] = schema
        return f"{name}-{digest}"


def published(file: Path, version: str = "v1") -> Mapping[str, Any]:
    """The schema of the `spec` of a custom resource."""
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    schema = next(one for one in versions if one["name"] == version)["schema"]["openAPIV3Schema"]
    return schema["properties"]["spec"]


def inner(schema: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The schema of a field by its path; lists count as their items."""
    for key in path.split("."):
        schema = schema.get("items", schema)["properties"][key]
    return schema


def main(folder: Path, version: str) -> None:
    """Write the file."""
    recorder = Recorder()
    cluster = published(folder / "ray.io_rayclusters.yaml")
    volumes = inner(cluster, "headGroupSpec.template.spec.volumes")
    kinds = {
        "RayCluster": recorder.strip("spec", cluster),
        "RayJob": recorder.strip("spec", published(folder / "ray.io_rayjobs.yaml")),
        # Kubernetes' own kinds, of which the same definitions speak.
        "PersistentVolumeClaim": recorder.strip("claim", inner(volumes, "ephemeral.volumeClaimTemplate.spec")),
        "ingress": recorder.strip("ingress", inner(cluster, "networkPolicy.head.ingressRules")),
    }
    origin = f"github.com/ray-project/kuberay {version}, ray-operator/config/crd/bases"
    definitions = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(kind)}" for name, kind in sorted(recorder.definitions.items())
    )
    FIELDS.write_text(f'{{"origin": "{origin}",\n"kinds": {json.dumps(kinds)},\n"$defs": {{\n{definitions}\n}}}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
