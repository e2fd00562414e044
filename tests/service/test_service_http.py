"""Every route of the service, over a real collection: what it answers is what the index answers."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from conftest import make_photo
from jsonschema import Draft202012Validator
from milvus_server import Server
from service.serving import add, cropped, png, refusal, run, serving, settings_of

from delf_milvus import DelfIndex
from delf_milvus.retrieval.answers import Hit
from delf_milvus.service import wire


async def filled(client: httpx.AsyncClient) -> None:
    for seed in range(4):
        assert (await add(client, seed, f"a/{seed}.png", year=1990 + seed, note="x")).status_code == 201


def test_a_photo_as_body_or_in_a_form_finds_what_the_index_finds(tmp_path: Path, tiny_model: Path) -> None:
    settings = settings_of(tmp_path, tiny_model)

    async def asked() -> list[dict[str, Any]]:
        async with serving(settings) as (_, client):
            await filled(client)
            options = {"top": "3", "verified_only": "false", "max_false_alarm": "0.9"}
            raw = await client.post("/v1/search", content=png(cropped(1)), params=options)
            typed = {"content-type": "image/png"}
            typed_raw = await client.post("/v1/search", content=png(cropped(1)), params=options, headers=typed)
            form = await client.post("/v1/search", files={"photo": png(cropped(1))}, data=options)
            part = await client.post("/v1/search?box=10,20,200,180&verified_only=false", content=png(make_photo(2)))
            views = {"parts": "true", "turned": "true", "verified_only": "false", "top": "4"}
            turned = await client.post("/v1/search", files={"photo": png(np.rot90(cropped(3)).copy())}, data=views)
            answers = [raw, typed_raw, form, part, turned]
            assert {answer.status_code for answer in answers} == {200}
            return [answer.json() for answer in answers]

    raw, typed_raw, form, part, turned = run(asked)
    search, verify = settings.search, settings.verify.model_copy(update={"max_false_alarm": 0.9})
    with DelfIndex.open(settings=settings, create=False) as index:
        plain = index.searching(search, verify).search(cropped(1), 3, include_unverified=True)
        box = index.search(make_photo(2), box=(10, 20, 200, 180), include_unverified=True)
        both = search.model_copy(update={"parts": True, "turned": True})
        seen = index.searching(both).search(np.rot90(cropped(3)), 4, include_unverified=True)
    assert plain.hits[0].image_id == "a/1.png"
    for answer, expected in ((raw, plain), (typed_raw, plain), (form, plain), (part, box), (turned, seen)):
        wanted = json.loads(json.dumps(expected.to_dict()))
        for hit in wanted["hits"]:
            assert Path(hit["uri"]).name == ""
            hit["correspondence"] = None
        assert answer["hits"] == wanted["hits"]
        assert answer.keys() == wanted.keys()
        assert {name: answer[name] for name in ("matched", "model", "query_features", "calibrated")} == {
            name: wanted[name] for name in ("matched", "model", "query_features", "calibrated")
        }


@pytest.mark.server
def test_a_service_over_a_server_answers_as_the_index_does(
    milvus: Server, name: str, tmp_path: Path, tiny_model: Path
) -> None:
    settings = settings_of(tmp_path, tiny_model).model_copy(update={"uri": milvus.uri, "collection": name})

    async def asked() -> tuple[Any, list[str]]:
        async with serving(settings) as (_, client):
            await filled(client)
            params = {"top": "2", "verified_only": "false", "filter": "year >= 1991", "max_false_alarm": "0.9"}
            answers = await asyncio.gather(
                *(client.post("/v1/search", content=png(cropped(1)), params=params) for _ in range(4))
            )
            assert len({json.dumps(answer.json()["hits"]) for answer in answers}) == 1
            assert (await client.get("/readyz")).status_code == 200
            page = (await client.get("/v1/images", params={"after": "a/1.png", "filter": "year <= 1992"})).json()
            assert (await client.delete("/v1/images/a%2F3.png")).status_code == 200
            return answers[0].json(), [image["image_id"] for image in page["images"]]

    answer, listed = run(asked)
    assert listed == ["a/2.png"]
    verify = settings.verify.model_copy(update={"max_false_alarm": 0.9})
    with DelfIndex.open(settings=settings, create=False) as index:
        assert [record.image_id for record in index.list()] == ["a/0.png", "a/1.png", "a/2.png"]
        index.add(make_photo(3), "a/3.png", {"year": 1993})
        found = index.searching(verify=verify).search(cropped(1), 2, filter="year >= 1991", include_unverified=True)
    assert [hit["image_id"] for hit in answer["hits"]] == [hit.image_id for hit in found.hits]
    assert answer["hits"][0]["image_id"] == "a/1.png"
    assert answer["hits"][0]["transform"] == found.hits[0].to_dict()["transform"]


def test_inliers_are_told_on_request(tmp_path: Path, tiny_model: Path) -> None:
    async def asked() -> Any:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            await filled(client)
            params = {"correspondences": "true", "verified_only": "false"}
            answer = await client.post("/v1/search", content=png(make_photo(1)), params=params)
            return answer.json()["hits"][0]

    hit = run(asked)
    points = hit["correspondence"]
    ends = np.array(points["query_points"]), np.array(points["image_points"])
    assert len(ends[0]) == len(ends[1]) == len(points["residuals"]) >= 20
    transform = np.array(hit["transform"])
    residuals = np.linalg.norm(ends[0] @ transform[:, :2].T + transform[:, 2] - ends[1], axis=1)
    assert residuals == pytest.approx(points["residuals"], abs=0.05)


def test_filters_are_expressions_or_objects_whose_values_are_data(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            await filled(client)

            async def found(filter: str) -> set[str]:
                params = {"verified_only": "false", "filter": filter}
                answer = await client.post("/v1/search", content=png(make_photo(1)), params=params)
                assert answer.status_code == 200, answer.text
                listed = (await client.get("/v1/images", params={"filter": filter})).json()["images"]
                ids = {hit["image_id"] for hit in answer.json()["hits"]}
                assert ids == {image["image_id"] for image in listed}
                return ids

            assert await found("year > 1991") == await found('{"year": {">": 1991}}') == {"a/2.png", "a/3.png"}
            assert await found('{"year": {"in": [1990, 1993]}}') == {"a/0.png", "a/3.png"}
            for bad in ("year >", "missing == 1", '{"year": "1) or (1 == 1"}', '{"year": ', "[1]"):
                answer = await client.post("/v1/search", content=png(make_photo(1)), params={"filter": bad})
                refusal(answer, 422, "invalid_argument")
                refusal(await client.get("/v1/images", params={"filter": bad}), 422, "invalid_argument")

    run(main)


def test_a_life_of_images(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            assert (await client.get("/v1/images")).json() == {"images": [], "next": None}
            one = await add(client, 0, "a/photo", year=1990)
            assert one.json() == {"stored": [{"image_id": "a/photo", "features": 60, "replaced": False}], "failed": []}
            again = await client.post("/v1/images", content=png(make_photo(1)), params={"id": "a/photo"})
            assert (again.status_code, again.json()["stored"][0]["replaced"]) == (201, True)
            kept = await client.post(
                "/v1/images", content=png(make_photo(2)), params={"id": "a/photo", "replace": "false"}
            )
            assert "a/photo" in refusal(kept, 409, "exists")
            several = await client.post(
                "/v1/images",
                files=[("photo", (f"{seed}.png", png(make_photo(seed)))) for seed in (3, 4, 5)],
                data={"metadata": '{"year": 2001, "tags": ["x", 1]}'},
            )
            assert [stored["image_id"] for stored in several.json()["stored"]] == ["3.png", "4.png", "5.png"]
            pages, after = [], ""
            while True:
                page = (await client.get("/v1/images", params={"limit": 2, "after": after})).json()
                pages.append([image["image_id"] for image in page["images"]])
                if (after := page["next"]) is None:
                    break
            assert pages == [["3.png", "4.png"], ["5.png", "a/photo"]]
            assert (await client.get("/v1/images?prefix=a")).json()["images"][0]["image_id"] == "a/photo"
            image = (await client.get("/v1/images/4.png")).json()
            assert image["metadata"] == {"year": 2001, "tags": ["x", 1]}
            assert (image["width"], image["height"], image["feature_count"], image["photo"]) == (320, 240, 60, False)
            # An id with a slash is one segment; "a/photo" unencoded is the photo of "a".
            assert (await client.get("/v1/images/a%2Fphoto")).json()["image_id"] == "a/photo"
            assert "'a'" not in refusal(await client.get("/v1/images/a/photo"), 404, "not_found")
            for path in ("/v1/images/none", "/v1/images/none/photo", "/v1/images/none/thumbnail", "/v1/images/%2e%2e"):
                refusal(await client.get(path), 404, "not_found")
            assert (await client.delete("/v1/images/a%2Fphoto")).json() == {"deleted": ["a/photo"]}
            refusal(await client.delete("/v1/images/a%2Fphoto"), 404, "not_found")

    run(main)


def test_of_several_photos_each_that_fails_is_named(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            files = [("photo", ("good.png", png(make_photo(1)))), ("photo", ("bad.png", b"no photo"))]
            some = await client.post("/v1/images", files=files)
            assert some.status_code == 207
            assert [one["image_id"] for one in some.json()["stored"]] == ["good.png"]
            (failed,) = some.json()["failed"]
            assert (failed["image_id"], failed["error"]["kind"]) == ("bad.png", "unsupported_format")
            for data in ({"id": ["one"]}, {"id": ["same", "same"]}, {"metadata": ["{}", "{}", "{}"]}, {"nope": "1"}):
                refusal(await client.post("/v1/images", files=files, data=data), 422, "invalid_argument")
            for metadata in ("[]", "{", '{"year": NaN}', "[" * 100_000):
                answer = await client.post("/v1/images", files=files[:1], data={"metadata": metadata})
                refusal(answer, 422, "invalid_argument")
            wrong = await client.post("/v1/images", files=files[:1], data={"metadata": '{"year": "soon"}'})
            assert "year" in refusal(wrong, 422, "invalid_input")
            refusal(await client.post("/v1/images", content=png(make_photo(1))), 422, "invalid_argument")
            too_long = await client.post("/v1/images", content=png(make_photo(1)), params={"id": "x" * 4000})
            refusal(too_long, 422, "invalid_input")

    run(main)


def test_hostile_metadata_is_refused_or_can_be_read_again(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            for number, (metadata, status) in enumerate(
                (
                    (r'{"a": "\ud800"}', 422),
                    (r'{"\udc00": 1}', 422),
                    ('{"a": ' + "[" * 300 + "]" * 300 + "}", 422),
                    ('{"a": ' + '{"b":' * 900 + "1" + "}" * 900 + "}", 422),
                    ('{"image_key": 1}', 422),
                    ('{"a": "' + "x" * 70_000 + '"}', 422),
                    ('{"year": 1e400}', 422),
                    ('{"a": ' + "[" * 60 + "]" * 60 + "}", 201),
                    (r'{"a": "\u0000\ud83d\ude00"}', 201),
                    ('{"a": 99999999999999999999}', 201),
                )
            ):
                data = {"id": f"{number}", "metadata": metadata}
                answer = await client.post("/v1/images", files={"photo": png(make_photo(number))}, data=data)
                assert answer.status_code == status, metadata[:40]
                shown = await client.get(f"/v1/images/{number}")
                assert shown.status_code == (200 if status == 201 else 404)
            found = await client.post("/v1/search?verified_only=false", content=png(make_photo(8)))
            assert found.json()["hits"][0]["metadata"]["a"] == "\0😀"

    run(main)


def test_options_that_make_no_sense_are_told_in_one_sentence(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            await add(client, 1)
            for options, word in (
                ({"top": "0"}, "top"),
                ({"top": "many"}, "top"),
                ({"box": "1,2,3"}, "four numbers"),
                ({"box": "900,900,950,950"}, "box"),
                ({"box": "nan,0,1,1"}, "box"),
                ({"max_false_alarm": "2"}, "max_false_alarm"),
                ({"verfied_only": "true"}, "verfied_only"),
            ):
                raw = await client.post("/v1/search", content=png(make_photo(1)), params=options)
                form = await client.post("/v1/search", files={"photo": png(make_photo(1))}, data=options)
                for answer in (raw, form):
                    assert word in refusal(answer, 422, "invalid_argument")
            twice = await client.post("/v1/search", files={"photo": png(make_photo(1))}, data={"top": ["1", "2"]})
            refusal(twice, 422, "invalid_argument")
            for path, kind, status in (("/nowhere", "not_found", 404), ("/v1/status", "method_not_allowed", 405)):
                refusal(await client.post(path), status, kind)
            refusal(await client.get("/v1/images?limit=0"), 422, "invalid_argument")

    run(main)


def test_photos_are_shown_from_the_folders_that_were_allowed_alone(tmp_path: Path, tiny_model: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed, outside):
        folder.mkdir()
        for seed in range(3):
            (folder / f"{seed}.png").write_bytes(png(make_photo(seed)))
    (allowed / "link.png").symlink_to(outside / "1.png")
    settings = settings_of(tmp_path, tiny_model, photos=(allowed,))
    with DelfIndex.open(settings=settings) as index:
        index.ingest([allowed], id_prefix="in/")
        index.ingest([outside], id_prefix="out/")
        # A path that only begins like the folder, and one that climbs out of it.
        index.add(allowed / "0.png", "sibling", uri=f"{allowed}-other/0.png")
        index.add(allowed / "0.png", "climbing", uri=f"{allowed}/../outside/0.png")
    (allowed / "2.png").write_bytes(png(make_photo(9)))

    async def main() -> None:
        async with serving(settings) as (_, client):
            photo = await client.get("/v1/images/in%2F0.png/photo")
            assert photo.content == (allowed / "0.png").read_bytes()
            assert photo.headers["content-type"] == "image/png"
            assert photo.headers["x-content-type-options"] == "nosniff"
            etag = {"If-None-Match": photo.headers["etag"]}
            assert (await client.get("/v1/images/in%2F0.png/photo", headers=etag)).status_code == 304
            small = await client.get("/v1/images/in%2F0.png/thumbnail?side=64")
            assert PIL.Image.open(io.BytesIO(small.content)).size == (64, 48)
            large = await client.get("/v1/images/in%2F0.png/thumbnail?side=1000")
            assert PIL.Image.open(io.BytesIO(large.content)).size == (320, 240)
            assert (await client.get("/v1/images/in%2F0.png")).json()["photo"] is True
            for image_id in ("out%2F0.png", "in%2Flink.png", "sibling", "climbing"):
                assert (await client.get(f"/v1/images/{image_id}")).json()["photo"] is False, image_id
                for what in ("photo", "thumbnail"):
                    refusal(await client.get(f"/v1/images/{image_id}/{what}"), 404, "not_found")
            # What was put in the place of the photo is another one.
            for what in ("photo", "thumbnail"):
                assert "changed" in refusal(await client.get(f"/v1/images/in%2F2.png/{what}"), 404, "not_found")
            refusal(await client.get("/v1/images/in%2F0.png/thumbnail?side=1"), 422, "invalid_argument")
            refusal(await client.get("/v1/images/in%2F0.png/thumbnail?side=99999"), 422, "invalid_argument")

    run(main)


def test_by_default_no_photo_is_kept_or_shown(tmp_path: Path, tiny_model: Path) -> None:
    settings = settings_of(tmp_path, tiny_model)
    (tmp_path / "1.png").write_bytes(png(make_photo(1)))
    with DelfIndex.open(settings=settings) as index:
        index.add(tmp_path / "1.png", "1.png")

    async def main() -> None:
        async with serving(settings) as (_, client):
            await add(client, 2)
            for image_id in ("1.png", "2.png"):
                refusal(await client.get(f"/v1/images/{image_id}/photo"), 404, "not_found")
                record = (await client.get(f"/v1/images/{image_id}")).json()
                assert (record["photo"], record["uri"], record["root"]) == (False, "", "")
            told = (await client.get("/v1/status")).json()
            assert (told["service"]["photos"], told["store"]["uri"]) == (False, "")
            assert str(tmp_path) not in (await client.post("/v1/search", content=png(make_photo(1)))).text

    run(main)


def test_uploads_are_kept_as_long_as_their_image_is_stored(tmp_path: Path, tiny_model: Path) -> None:
    uploads = tmp_path / "uploads"

    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model, uploads=uploads, show_uris=True)) as (_, client):
            await add(client, 1, "../../etc/passwd")
            record = (await client.get("/v1/images/..%2F..%2Fetc%2Fpasswd")).json()
            assert Path(record["uri"]).parent == uploads
            assert Path(record["uri"]).read_bytes() == png(make_photo(1))
            shown = await client.get("/v1/images/..%2F..%2Fetc%2Fpasswd/photo")
            assert shown.content == png(make_photo(1))
            await add(client, 2, "../../etc/passwd")
            assert [path.read_bytes() for path in uploads.iterdir()] == [png(make_photo(2))]
            # What fails leaves no file, and not that of the image it would have replaced.
            bad = await client.post("/v1/images", content=b"bad", params={"id": "../../etc/passwd"})
            refusal(bad, 415, "unsupported_format")
            refusal(await client.post("/v1/images", content=b"bad", params={"id": "new"}), 415, "unsupported_format")
            assert [path.read_bytes() for path in uploads.iterdir()] == [png(make_photo(2))]
            await client.delete("/v1/images/..%2F..%2Fetc%2Fpasswd")
            assert list(uploads.iterdir()) == []

    run(main)


def test_status_health_and_metrics(tmp_path: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with serving(settings_of(tmp_path, tiny_model)) as (service, client):
            await filled(client)
            assert (await client.get("/healthz")).text == "ok\n"
            assert (await client.get("/readyz")).json() == {
                "ready": True,
                "database": True,
                "model": True,
                "breaker": "closed",
            }
            told = (await client.get("/v1/status")).json()
            assert (told["store"]["images"], told["store"]["fields"]) == (4, {"year": "integer=0"})
            assert told["service"]["keys"] is False
            assert told["service"]["may_write"] is True
            await client.post("/v1/search", content=png(make_photo(1)))
            await client.post("/v1/search", content=b"no photo")
            assert (await client.request("SURPRISE", "/v1/search")).status_code == 405
            assert (await client.get("/nowhere/at/all")).status_code == 404
            metrics = (await client.get("/metrics")).text
            for line in (
                'delf_milvus_requests_total{method="POST",route="/v1/search",status="200"} 1.0',
                'delf_milvus_requests_total{method="POST",route="/v1/images",status="201"} 4.0',
                'delf_milvus_requests_total{method="GET",route="other",status="404"} 1.0',
                'delf_milvus_errors_total{kind="unsupported_format"} 1.0',
                'delf_milvus_stage_seconds_count{stage="extract"} 1.0',
                'delf_milvus_stage_seconds_count{stage="queue"} 1.0',
                "delf_milvus_queue_length 0.0",
            ):
                assert line in metrics.splitlines(), line
            assert "SURPRISE" not in metrics
            assert "nowhere" not in metrics
            service.model_loaded = False
            unready = await client.get("/readyz")
            assert (unready.status_code, unready.json()["model"]) == (503, False)

    run(main)


def test_a_database_that_is_away_is_not_ready_and_a_503(tmp_path: Path, tiny_model: Path) -> None:
    settings = settings_of(tmp_path, tiny_model)
    with DelfIndex.open(settings=settings) as index:
        index.add(make_photo(1), "1.png")

    async def main() -> None:
        async with serving(settings) as (service, client):
            service.index._index.store.close()
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["database"]) == (503, False)
            answer = await client.post("/v1/search", content=png(make_photo(1)))
            assert str(tmp_path) not in refusal(answer, 503, "database_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            assert (await client.get("/healthz")).status_code == 200

    run(main)


def test_the_description_of_the_api_is_whole_and_its_examples_fit(tmp_path: Path, tiny_model: Path) -> None:
    async def asked() -> Any:
        async with serving(settings_of(tmp_path, tiny_model)) as (_, client):
            return (await client.get("/v1/openapi.json")).json()

    api = run(asked)
    assert set(api["paths"]) == {
        *("/v1/search", "/v1/images", "/v1/images/{image_id}", "/v1/images/{image_id}/photo"),
        *("/v1/images/{image_id}/thumbnail", "/v1/status", "/healthz", "/readyz", "/metrics"),
    }
    for name, schema in api["components"]["schemas"].items():
        if "example" in schema:
            validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": api["components"]})
            assert list(validator.iter_errors(schema["example"])) == []
    assert "example" in api["components"]["schemas"]["SearchAnswer"]
    assert "HTTPValidationError" not in api["components"]["schemas"]
    form = api["paths"]["/v1/search"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"].keys() == {"photo", *wire.SearchOptions.model_fields}
    errors = {"400", "401", "403", "413", "415", "422", "429", "503", "504"}
    assert errors <= api["paths"]["/v1/search"]["post"]["responses"].keys()


def test_hits_have_the_fields_of_the_command_line() -> None:
    none = np.empty((0, 2), np.float32)
    values: dict[str, Any] = dict.fromkeys(Hit.__dataclass_fields__, None) | {"metadata": {}}
    values["correspondence"] = none
    assert set(wire.HitAnswer.model_fields) == Hit(**values).to_dict().keys() | {"correspondence"}
