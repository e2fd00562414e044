import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from delf_milvus.errors import InputError, UsageError
from delf_milvus.ingestion.scan import Failure, Listing, Photo, Scan, read_listing, scan


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def ids(scanned: Scan) -> list[str]:
    return [photo.image_id for photo in scanned.photos]


def listing(folder: Path, text: str, name: str = "list.csv") -> Listing:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_listing(path)


def test_photos_at_any_depth_are_found_in_order_by_suffix(tmp_path: Path) -> None:
    make(tmp_path, "b.JPG", "a/z.png", "a/b/c.Tiff", "notes.txt", "jpg", "a/movie.mp4", "x.jp2", "y.jfif")
    scanned = scan([tmp_path])
    assert ids(scanned) == ["a/b/c.Tiff", "a/z.png", "b.JPG", "x.jp2", "y.jfif"]
    assert scanned.failures == []
    assert scanned.roots == [tmp_path]
    assert scanned.photos[0] == Photo(tmp_path / "a" / "b" / "c.Tiff", "a/b/c.Tiff", tmp_path)


def test_an_empty_folder_has_no_photos(tmp_path: Path) -> None:
    assert scan([tmp_path]) == Scan([], [], [tmp_path])


def test_hidden_files_and_folders_are_skipped_unless_given(tmp_path: Path) -> None:
    make(tmp_path, ".hidden.jpg", ".cache/a.jpg", "seen.jpg")
    assert ids(scan([tmp_path])) == ["seen.jpg"]
    assert ids(scan([tmp_path / ".cache"])) == ["a.jpg"]


def test_a_file_given_itself_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    make(tmp_path, "photo.raw", "other.jpg")
    scanned = scan([tmp_path / "photo.raw"], id_prefix="p/")
    assert scanned.photos == [Photo(tmp_path / "photo.raw", "p/photo.raw", tmp_path)]
    assert scanned.roots == []


def test_the_prefix_precedes_every_id(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b/c.jpg")
    assert ids(scan([tmp_path], id_prefix="shop:")) == ["shop:a.jpg", "shop:b/c.jpg"]


def test_paths_are_absolute_though_given_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    scanned = scan([Path("photos")])
    assert scanned.photos == [Photo(tmp_path / "photos" / "a.jpg", "a.jpg", tmp_path / "photos")]
    assert ids(scan([Path()])) == ["photos/a.jpg"]


def test_one_folder_spelled_in_several_ways_is_taken_once(tmp_path: Path) -> None:
    make(tmp_path, "photos/a.jpg")
    (tmp_path / "alias").symlink_to("photos")
    root = tmp_path / "photos"
    scanned = scan([root, Path(f"{root}/"), tmp_path / "photos" / ".." / "photos", tmp_path / "alias", root / "a.jpg"])
    assert ids(scanned) == ["a.jpg"]


def test_a_folder_below_another_given_one_is_taken_once(tmp_path: Path) -> None:
    make(tmp_path, "a/b.jpg")
    assert ids(scan([tmp_path, tmp_path / "a"])) == ["a/b.jpg"]


def test_a_path_that_does_not_exist_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\\nsuch does not exist") as caught:
        scan([tmp_path, tmp_path / "no\nsuch"])
    assert caught.value.exit_code == 5
    with pytest.raises(InputError, match="is not a path"):
        scan([Path("a\0b")])


def test_two_folders_with_one_relative_path_are_a_usage_error_that_names_both(tmp_path: Path) -> None:
    make(tmp_path, "one/x/a.jpg", "two/x/a.jpg")
    with pytest.raises(UsageError) as caught:
        scan([tmp_path / "one", tmp_path / "two"])
    for part in ("x/a.jpg", str(tmp_path / "one/x/a.jpg"), str(tmp_path / "two/x/a.jpg"), "--id-prefix"):
        assert part in str(caught.value)


def test_a_hard_link_with_the_same_id_is_the_same_file(tmp_path: Path) -> None:
    make(tmp_path, "one/a.jpg")
    (tmp_path / "two").mkdir()
    os.link(tmp_path / "one/a.jpg", tmp_path / "two/a.jpg")
    assert ids(scan([tmp_path / "one", tmp_path / "two"])) == ["a.jpg"]


def test_loops_of_linked_folders_end(tmp_path: Path) -> None:
    make(tmp_path, "a/photo.jpg")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "self").symlink_to(".")
    scanned = scan([tmp_path])
    assert ids(scanned) == ["a/photo.jpg"]
    assert scanned.failures == []


def test_linked_folders_are_followed_once_unless_told_otherwise(tmp_path: Path) -> None:
    make(tmp_path, "photos/a.jpg", "elsewhere/b.jpg", "elsewhere/c/d.jpg")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "second").symlink_to(tmp_path / "elsewhere")
    assert ids(scan([tmp_path / "photos"])) == ["a.jpg", "link/b.jpg", "link/c/d.jpg"]
    assert ids(scan([tmp_path / "photos"], follow_links=False)) == ["a.jpg"]


def test_a_link_to_a_folder_beside_it_changes_no_id(tmp_path: Path) -> None:
    make(tmp_path, "real/deep/a.jpg")
    (tmp_path / "alias").symlink_to("real/deep")
    assert ids(scan([tmp_path])) == ["real/deep/a.jpg"]


def test_linked_files_are_photos_of_their_own(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert ids(scan([tmp_path], follow_links=False)) == ["a.jpg", "b.jpg"]


def test_broken_links_are_failures(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop").symlink_to("loop")
    scanned = scan([tmp_path])
    assert ids(scanned) == ["a.jpg"]
    assert [failure.path for failure in scanned.failures] == [str(tmp_path / "gone.jpg"), str(tmp_path / "loop")]
    assert scanned.failures[0].error == f"{tmp_path / 'gone.jpg'} is a broken link."
    assert "cannot be read: Too many levels of symbolic links" in scanned.failures[1].error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
def test_folders_without_permission_are_failures(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "secret/b.jpg")
    (tmp_path / "secret").chmod(0)
    try:
        scanned = scan([tmp_path])
    finally:
        (tmp_path / "secret").chmod(0o700)
    assert ids(scanned) == ["a.jpg"]
    assert "cannot be read: Permission denied" in scanned.failures[0].error


def test_folders_that_the_system_fails_to_list_are_failures_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.jpg", "bad/b.jpg", "good/c.jpg")
    real = os.scandir

    def scandir(path: Path) -> "os._ScandirIterator[str]":
        if Path(path).name == "bad":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    scanned = scan([tmp_path])
    assert ids(scanned) == ["a.jpg", "good/c.jpg"]
    assert scanned.failures == [
        Failure(str(tmp_path / "bad"), f"{tmp_path / 'bad'} cannot be read: Permission denied.")
    ]
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        scan([tmp_path / "bad"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_are_failures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    scanned = scan([tmp_path])
    assert [failure.error for failure in scanned.failures] == [f"{tmp_path / 'pipe.jpg'} is not a regular file."]


@pytest.mark.parametrize(
    "name", ["a b.jpg", 'it\'s "q".jpg', "🗼 ❤.jpg", "two\nlines.jpg", "é塔/ñ.jpg", "back\\slash.jpg"]
)
def test_names_of_every_kind_are_ids(name: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    assert ids(scan([tmp_path])) == [name]


def test_names_that_are_not_utf8_are_failures(tmp_path: Path) -> None:
    try:
        make(tmp_path, "ok.jpg", "bad\udcff.jpg", "folder\udcfe/a.jpg")
    except OSError:
        pytest.skip("the file system takes valid UTF-8 only")
    scanned = scan([tmp_path])
    assert ids(scanned) == ["ok.jpg"]
    assert [failure.path for failure in scanned.failures] == [
        f"{tmp_path}/bad\\xff.jpg",
        f"{tmp_path}/folder\\xfe/a.jpg",
    ]
    assert all("not valid UTF-8" in failure.error for failure in scanned.failures)
    json.dumps([failure.error for failure in scanned.failures], ensure_ascii=False).encode()


def test_ids_above_the_limit_are_failures(tmp_path: Path) -> None:
    make(tmp_path, "é.jpg")
    assert len(scan([tmp_path], id_prefix="p" * (1024 - 6)).photos) == 1
    scanned = scan([tmp_path], id_prefix="p" * (1024 - 5))
    assert scanned.photos == []
    assert "more than 1024 bytes" in scanned.failures[0].error


def test_a_prefix_that_is_not_utf8_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prefix"):
        scan([tmp_path], id_prefix="\udcff")


def test_a_deep_tree_needs_no_recursion(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(300):
            os.mkdir("d")
            os.chdir("d")
        Path("a.jpg").touch()
    finally:
        os.chdir(here)
    assert ids(scan([tmp_path])) == ["d/" * 300 + "a.jpg"]


def test_a_csv_names_the_photos_with_ids_and_metadata(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "sub/b.raw", "c.jpg", ".hidden.jpg")
    rows = listing(
        tmp_path, '\ufeffid,path,shop,note\nA,a.jpg,1,"x, y"\n,./sub//b.raw,2,"two\nlines"\nH,.hidden.jpg,,\n'
    )
    scanned = scan([tmp_path], id_prefix="p/", listing=rows)
    assert [(photo.image_id, photo.path, dict(photo.metadata)) for photo in scanned.photos] == [
        ("p/A", tmp_path / "a.jpg", {"shop": "1", "note": "x, y"}),
        ("p/H", tmp_path / ".hidden.jpg", {"shop": "", "note": ""}),
        ("p/sub/b.raw", tmp_path / "sub/b.raw", {"shop": "2", "note": "two\nlines"}),
    ]
    assert scanned.roots == [tmp_path]


def test_jsonl_keeps_the_types_of_metadata(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    metadata = {"n": 3, "f": 0.5, "ok": True, "none": None, "list": [1, "b"], "object": {"k": "v\u2028w"}}
    text = json.dumps({"path": "a.jpg", "id": "A", **metadata}, ensure_ascii=False)
    scanned = scan([tmp_path], listing=listing(tmp_path, f"\n{text}\r\n\n", "list.jsonl"))
    assert scanned.photos == [Photo(tmp_path / "a.jpg", "A", tmp_path, metadata)]


def test_absolute_paths_of_a_listing_are_found_below_their_folder(tmp_path: Path) -> None:
    make(tmp_path, "one/a.jpg", "two/b.jpg")
    (tmp_path / "alias").symlink_to("two")
    rows = listing(tmp_path, f"path\n{tmp_path}/one/a.jpg\n{tmp_path}/alias/b.jpg\n")
    scanned = scan([tmp_path / "one", tmp_path / "two"], listing=rows)
    assert [(photo.image_id, photo.root) for photo in scanned.photos] == [
        ("a.jpg", tmp_path / "one"),
        ("b.jpg", tmp_path / "two"),
    ]


def test_a_listing_gives_a_single_file_its_id(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg")
    scanned = scan([tmp_path / "a.jpg"], listing=listing(tmp_path, "path,id\na.jpg,A\n"))
    assert ids(scanned) == ["A"]


def test_listed_photos_that_are_missing_are_failures(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "folder/b.jpg")
    scanned = scan([tmp_path], listing=listing(tmp_path, "path\na.jpg\ngone.jpg\nfolder\n"))
    assert ids(scanned) == ["a.jpg"]
    folder, gone = scanned.failures
    assert folder.path == str(tmp_path / "folder")
    assert "line 4, but is a folder" in folder.error
    assert gone.path == str(tmp_path / "gone.jpg")
    assert "line 3, but does not exist" in gone.error


def test_a_listed_path_in_two_folders_is_a_usage_error(tmp_path: Path) -> None:
    make(tmp_path, "one/a.jpg", "two/a.jpg")
    with pytest.raises(UsageError, match=r"a\.jpg is both .*one/a\.jpg and .*two/a\.jpg"):
        scan([tmp_path / "one", tmp_path / "two"], listing=listing(tmp_path, "path\na.jpg\n"))


def test_a_listed_path_outside_of_the_folders_is_an_input_error(tmp_path: Path) -> None:
    make(tmp_path, "one/a.jpg", "two/b.jpg")
    rows = listing(tmp_path, f"path\n{tmp_path}/one/../two/b.jpg\n")
    with pytest.raises(InputError, match=r"line 2: .*two/b\.jpg lies outside"):
        scan([tmp_path / "one"], listing=rows)


def test_one_photo_listed_relative_and_absolute_is_an_input_error(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(InputError, match=r"line 3: .*also the photo of line 2"):
        scan([tmp_path], listing=listing(tmp_path, f"path,id\na.jpg,1\n{tmp_path}/a.jpg,2\n"))
    with pytest.raises(InputError, match=r"line 3: the id b\.jpg is also that of line 2"):
        scan([tmp_path], listing=listing(tmp_path, f"path,id\na.jpg,b.jpg\n{tmp_path}/b.jpg,\n"))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("l.csv", "file,id\na.jpg,1\n", "line 1: it must name the columns"),
        ("l.csv", "path,x,x\na.jpg,1,2\n", "line 1: it must name the columns"),
        ("l.csv", "path;id\na.jpg;1\n", "line 1: it must name the columns"),
        ("l.csv", "", "is empty"),
        ("l.csv", "path,id\na.jpg,1\nb.jpg\n", "line 3: it has 1 values for 2 columns"),
        ("l.csv", "path,id\na.jpg,1\nb.jpg,2,3\n", "line 3: it has 3 values"),
        ("l.csv", 'path,id\n"two\nlines",1\nb.jpg\n', "line 4: it has 1 values"),
        ("l.csv", 'path,id\na.jpg,1\n"b"x,2\n', "line 3: it is not CSV"),
        ("l.csv", 'path,id\na.jpg,1\n"b.jpg,2\n', "line 3: it is not CSV"),
        ("l.csv", "path\na.jpg\n\n./a.jpg\n", r"line 4: the path a\.jpg is also that of line 2"),
        ("l.csv", "path,id\na.jpg,1\nb.jpg,1\n", "line 3: the id 1 is also that of line 2"),
        ("l.csv", "path,id\na.jpg,b.jpg\nb.jpg,\n", r"line 3: the id b\.jpg is also that of line 2"),
        ("l.csv", "path,id\n,1\n", "line 2: path must be"),
        ("l.csv", "path\n../a.jpg\n", "line 2: .* leaves the folder"),
        ("l.csv", "path\nx/../../a.jpg\n", "line 2: .* leaves the folder"),
        ("l.csv", "path\n..\n", "line 2: .* leaves the folder"),
        ("l.jsonl", '{"path": "a.jpg"}\n{"path": "b.jpg"\n', "line 2: it is not a JSON object"),
        ("l.jsonl", '["a.jpg"]\n', "line 1: it is not a JSON object"),
        ("l.jsonl", "[" * 100_000, "line 1: it is not a JSON object"),
        ("l.jsonl", '{"path": "a.jpg", "n": NaN}\n', "line 1: it is not a JSON object"),
        ("l.jsonl", '{"path": "a.jpg", "n": "\\ud800"}\n', "line 1: it escapes half of a surrogate pair"),
        ("l.jsonl", '{"id": "a"}\n', "line 1: path must be"),
        ("l.jsonl", '{"path": 3}\n', "line 1: path must be"),
        ("l.jsonl", '{"path": "a\\u0000.jpg"}\n', "line 1: path must be"),
        ("l.jsonl", '{"path": "a.jpg", "id": 3}\n', "line 1: id must be text"),
        ("l.jsonl", '\n{"path": "a.jpg"}\n{"path": "a.jpg"}\n', "line 3: the path"),
    ],
)
def test_malformed_listings_are_input_errors_with_the_line(name: str, text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        listing(tmp_path, text, name)
    assert "\n" not in str(caught.value)


def test_a_listing_that_is_not_utf8_is_an_input_error_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"path\na.jpg\n\xe9.jpg\n")
    with pytest.raises(InputError, match="line 3: it is not valid UTF-8"):
        read_listing(tmp_path / "l.csv")


def test_a_listing_that_is_missing_or_too_large_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"l\.csv does not exist"):
        read_listing(tmp_path / "l.csv")
    monkeypatch.setattr("delf_milvus.ingestion.scan.MAX_LISTING_BYTES", 10)
    with pytest.raises(InputError, match="more than the limit of 10"):
        listing(tmp_path, "path\na.jpg\n")


def test_a_parquet_listing_holds_what_jsonl_would(tmp_path: Path) -> None:
    rows = [
        {"path": "a.jpg", "id": "A", "year": 2020, "price": 1.5, "sold": True, "tags": ["red", "big"], "of": {"n": 1}},
        {"path": "b.jpg", "id": None, "year": None, "price": None, "sold": None, "tags": None, "of": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    first, second = read_listing(tmp_path / "l.parquet").rows
    assert (first.path, first.image_id, first.line) == ("a.jpg", "A", 1)
    assert first.metadata == {name: value for name, value in rows[0].items() if name not in ("path", "id")}
    assert (second.path, second.image_id, second.metadata, second.line) == ("b.jpg", None, {}, 2)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"name": ["a.jpg"]}, "line 1: it must name the columns, each once, one of them path"),
        ({"path": ["a.jpg", "a.jpg"]}, "line 2: the path a.jpg is also that of line 1"),
        ({"path": [7]}, "line 1: path must be the path of a photo"),
        (
            {"path": ["a.jpg", "b.jpg"], "at": [None, datetime(2020, 1, 1, tzinfo=timezone.utc)]},
            "line 2: it has a value that is no JSON",
        ),
        ({"path": ["a.jpg"], "x": [float("nan")]}, "line 1: it has a value that is no JSON"),
        ({"path": ["a.jpg"], "x": [b"bytes"]}, "line 1: it has a value that is no JSON"),
    ],
)
def test_parquet_listings_that_do_not_fit_are_input_errors_with_the_row(
    columns: dict[str, list[object]], problem: str, tmp_path: Path
) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "l.parquet")
    with pytest.raises(InputError, match=re.escape(problem)):
        read_listing(tmp_path / "l.parquet")


def test_a_parquet_listing_of_few_bytes_and_much_text_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"path": [f"{n}.jpg" for n in range(2000)], "text": ["x" * 10_000] * 2000})
    parquet.write_table(table, tmp_path / "l.parquet")
    assert (tmp_path / "l.parquet").stat().st_size < 100_000
    monkeypatch.setattr("delf_milvus.ingestion.scan.MAX_LISTING_BYTES", 10_000_000)
    with pytest.raises(InputError, match="more than 10,000,000 bytes unpacked; split it"):
        read_listing(tmp_path / "l.parquet")


def test_what_is_no_parquet_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "l.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(InputError, match=r"l\.parquet, line 1: it is not Parquet"):
        read_listing(tmp_path / "l.parquet")


def test_a_listing_of_another_kind_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end with one of \.csv, \.jsonl"):
        listing(tmp_path, "path\n", "l.xlsx")


@given(
    st.dictionaries(
        st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20),
        st.text(st.characters(blacklist_categories=["Cs"]), max_size=20),
        max_size=8,
    )
)
def test_what_jsonl_states_is_what_the_listing_holds(tmp_path_factory: pytest.TempPathFactory, named: dict) -> None:
    named = {path: image_id for path, image_id in named.items() if path not in (".", "..")}
    effective = [image_id or path for path, image_id in named.items()]
    text = "".join(json.dumps({"path": path, "id": image_id}) + "\n" for path, image_id in named.items())
    folder = tmp_path_factory.mktemp("listing")
    if len(set(effective)) < len(effective):
        with pytest.raises(InputError, match="is also that of line"):
            listing(folder, text, "l.jsonl")
    else:
        rows = listing(folder, text, "l.jsonl").rows
        assert [(row.path, row.image_id or "") for row in rows] == list(named.items())
