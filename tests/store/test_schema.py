import json
import subprocess
import sys

import pytest
from store_samples import MODEL

from delf_milvus.store.schema import CollectionFacts, features_spec, images_spec, keypoint_fields, to_pymilvus


@pytest.mark.parametrize("spec", [features_spec(40), images_spec(40, 3)])
def test_pymilvus_accepts_both_collections(spec: object) -> None:
    schema = to_pymilvus(spec)
    schema.verify()
    assert schema.primary_field.name in {"feature_key", "image_key"}
    assert [field.params["dim"] for field in schema.fields if "dim" in field.params] == [40]


def test_each_chunk_of_the_packed_features_has_a_field() -> None:
    names = [field.name for field in images_spec(40, 3).fields]
    assert keypoint_fields(3) == ["keypoints", "keypoints_1", "keypoints_2"]
    assert set(keypoint_fields(3)) <= set(names)


def test_facts_of_a_collection_come_back() -> None:
    for facts in (CollectionFacts(MODEL, 2), CollectionFacts(MODEL, 2, indexed=80, indexed_choice="spread")):
        assert CollectionFacts.from_json(facts.to_json()) == facts


def test_facts_of_before_there_was_a_choice_index_all_features() -> None:
    values = json.loads(CollectionFacts(MODEL, 2).to_json())
    del values["indexed"], values["indexed_choice"]
    assert CollectionFacts.from_json(json.dumps(values)) == CollectionFacts(MODEL, 2)


@pytest.mark.parametrize("change", [{"indexed": -1}, {"indexed": "x"}, {"indexed_choice": "best"}])
def test_facts_of_an_impossible_choice_are_refused(change: dict[str, object]) -> None:
    values = {**json.loads(CollectionFacts(MODEL, 2).to_json()), **change}
    with pytest.raises(ValueError):  # noqa: PT011 -- the message depends on what is wrong
        CollectionFacts.from_json(json.dumps(values))


@pytest.mark.parametrize(
    "text", ["", "null", "{}", "[]", '{"schema_version": 1, "chunks": "x"}', '{"schema_version": 1, "chunks": 1}']
)
def test_other_facts_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- the message depends on what is wrong
        CollectionFacts.from_json(text)


def test_facts_of_another_schema_version_are_refused() -> None:
    text = CollectionFacts(MODEL, 2).to_json().replace('"schema_version": 1', '"schema_version": 2')
    with pytest.raises(ValueError, match="schema version 2"):
        CollectionFacts.from_json(text)


def test_the_store_is_imported_without_pymilvus_and_torch() -> None:
    code = (
        "import sys, delf_milvus.store.feature_store, delf_milvus.store.keys, delf_milvus.store.codec;"
        "sys.exit(any(name in sys.modules for name in ('pymilvus', 'milvus_lite', 'torch', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
