"""JSON Schemas of what delf-milvus stores, reads and prints, made from the classes themselves.

    python -m delf_milvus.schemas schemas/

writes one file for each, and the reference pages of commands and settings beside them; `make schemas` does that for
the folder of the repository, and a test keeps it current. An import checks its manifest against the class that the
manifest's schema is made from.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, create_model

from delf_milvus import reference
from delf_milvus.errors import UsageError
from delf_milvus.evaluation.comparison import Comparison
from delf_milvus.evaluation.report import EvaluationReport
from delf_milvus.ingestion.extraction import ExtractReport
from delf_milvus.ingestion.pipeline import IngestReport
from delf_milvus.planning.coefficients import CoefficientFile
from delf_milvus.planning.model import Plan
from delf_milvus.retrieval.answers import Hit, SearchResult
from delf_milvus.settings import Settings
from delf_milvus.store.feature_store import StoreStatus
from delf_milvus.store.schema import CollectionSpec, features_spec, images_spec
from delf_milvus.store.transfer import ExportReport, ImportReport, Manifest

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_PACKED = "keypoints"


def schemas() -> dict[str, dict[str, Any]]:
    """Every schema by the name of its file, `<name>.schema.json`."""
    hit = _printed(Hit, without=("correspondence",))
    made = {
        "features": _row(features_spec(dim=1)),
        "images": _row(images_spec(dim=1, chunks=1)),
        "settings": TypeAdapter(Settings).json_schema(),
        "search_result": TypeAdapter(_printed(SearchResult, hits=list[hit])).json_schema(mode="serialization"),  # type: ignore[valid-type]
        "ingest_report": TypeAdapter(_printed(IngestReport, failed=int)).json_schema(mode="serialization"),
        "extract_report": TypeAdapter(_printed(ExtractReport, failed=int)).json_schema(mode="serialization"),
        "status": TypeAdapter(_printed(StoreStatus)).json_schema(mode="serialization"),
        "export_manifest": TypeAdapter(Manifest).json_schema(),
        "export_report": TypeAdapter(_printed(ExportReport)).json_schema(mode="serialization"),
        "evaluation_report": TypeAdapter(_printed(EvaluationReport)).json_schema(mode="serialization"),
        "evaluation_comparison": TypeAdapter(_printed(Comparison)).json_schema(mode="serialization"),
        "plan": TypeAdapter(_printed(Plan)).json_schema(mode="serialization"),
        "coefficients": TypeAdapter(CoefficientFile).json_schema(),
        "import_report": TypeAdapter(_printed(ImportReport)).json_schema(mode="serialization"),
    }
    return {
        name: {"$schema": DIALECT, "$id": f"urn:delf-milvus:{name}", **schema} for name, schema in sorted(made.items())
    }


def write(folder: Path) -> list[Path]:
    """Write all schemas and reference pages into a folder, which must exist; returns their paths in order."""
    paths = reference.write(folder)
    for name, schema in schemas().items():
        path = folder / f"{name}.schema.json"
        path.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        paths.append(path)
    return sorted(paths)


def _printed(kind: type[Any], without: tuple[str, ...] = (), **more: Any) -> type[Any]:
    """A model of what a dataclass prints: its fields, all of them required, but for some, and with others."""
    hints = get_type_hints(kind)
    types = {one.name: hints[one.name] for one in dataclasses.fields(kind) if one.name not in without} | more
    fields: dict[str, Any] = {name: (type_, Field()) for name, type_ in types.items()}
    config = ConfigDict(extra="forbid", title=kind.__name__)
    model: type[Any] = create_model(kind.__name__, __config__=config, __doc__=inspect.getdoc(kind), **fields)
    return model


def _row(spec: CollectionSpec) -> dict[str, Any]:
    """A row of a collection as JSON. What Milvus is told of a field is under `x-milvus`.

    The length of a vector is the model's, and packed features fill as many fields as the collection was made with.
    """
    properties: dict[str, Any] = {}
    for field in spec.fields:
        milvus: dict[str, Any] = {"type": field.type, "primary": field.primary}
        if field.type == "VARCHAR":
            milvus["max_length"] = field.size
        kinds: dict[str, dict[str, Any]] = {
            "INT64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            "FLOAT": {"type": "number"},
            "DOUBLE": {"type": "number"},
            "BOOL": {"type": "boolean"},
            # Milvus counts bytes, of which a character has at least one.
            "VARCHAR": {"type": "string", "maxLength": field.size},
            "FLOAT_VECTOR": {"type": "array", "items": {"type": "number"}, "minItems": 1},
        }
        properties[field.name] = {**kinds[field.type], "description": field.description, "x-milvus": milvus}
    schema: dict[str, Any] = {
        "title": f"Row of <collection>{spec.suffix}",
        "description": spec.description,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": spec.dynamic,
    }
    if _PACKED in properties:
        schema["patternProperties"] = {f"^{_PACKED}_[1-9][0-9]*$": properties[_PACKED]}
    return schema


def main(arguments: list[str]) -> None:
    """Write the schemas into the folder that is given. Raises UsageError without one."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise UsageError("Usage: python -m delf_milvus.schemas FOLDER, which must exist.")
    for path in write(Path(arguments[0])):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        raise SystemExit(str(error)) from None
