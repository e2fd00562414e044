"""A value of a filter is data, whatever it contains: on a real Milvus Lite it matches the rows that have it, and no
other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import MODEL, random_items

from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore

HOSTILE = [
    *(
        '"',
        "'",
        "\\",
        '\\"',
        '\\\\"',
        '" or "1" == "1',
        "' or '1' == '1",
        '") or (tag != "',
        "{tag}",
        "{0}",
        "$meta",
        "%",
    ),
    *(
        "_",
        "a%",
        "",
        " ",
        "\n",
        "\t\r",
        "\\n",
        "\\u0041",
        "\\x41",
        "true",
        "null",
        "[1]",
        "ü塔\U0001f5fc",
        "\u2028",
        "\x07",
    ),
    *('image_id != ""', "a" * 1024, "\\" * 100, "--", "/* */", "#", ";", "`", "\ufeff", "e\u0301", "é"),
]
texts = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.sampled_from("\"'\\{}[]()%_$ab=! orn\nü"), max_size=25),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    path: Path = tmp_path_factory.mktemp("escapes") / "a.db"
    settings = StoreSettings(fields={"tag": "text=", "year": "integer=0"})
    with FeatureStore.open(str(path), "delf", MODEL, settings, max_features=10) as opened:
        items = random_items(1, len(HOSTILE), 1)
        opened.write(
            [
                (replace(record, image_id=f"{number}{tag[:200]}", metadata={"tag": tag, "year": number}), features)
                for number, ((record, features), tag) in enumerate(zip(items, HOSTILE, strict=True))
            ]
        )
        yield opened


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, texts)
def test_a_value_matches_the_rows_that_have_it_and_no_other(store: FeatureStore, first: str, second: str) -> None:
    def found(where: object) -> set[int]:
        return {int(record.metadata["year"]) for record in store.list(where=where)}  # type: ignore[arg-type]

    every = range(len(HOSTILE))
    assert found({"tag": first}) == {n for n in every if HOSTILE[n] == first}
    assert found({"tag": {"!=": first}}) == {n for n in every if HOSTILE[n] != first}
    assert found({"tag": {"in": [first, second]}}) == {n for n in every if HOSTILE[n] in (first, second)}
    assert found({"tag": first, "year": {">=": 5}}) == {n for n in every if HOSTILE[n] == first and n >= 5}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts.filter(bool))
def test_an_id_shows_and_deletes_the_image_of_that_id_and_no_other(store: FeatureStore, image_id: str) -> None:
    ids = {f"{number}{tag[:200]}" for number, tag in enumerate(HOSTILE)}
    assert set(store.records([image_id])) == {image_id} & ids
    assert {one.image_id for one in store.list(prefix=image_id)} == {one for one in ids if one.startswith(image_id)}
    if image_id not in ids:
        assert list(store.delete([image_id])) == []
    assert store.count_images() == len(ids)
