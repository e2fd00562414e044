"""Where settings come from, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from delf_milvus.errors import UsageError
from delf_milvus.settings import PRESETS, ExtractSettings, Settings, load


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source_of(name: str, **arguments: object) -> tuple[object, str]:
    rows = {row[0]: row[1:] for row in load(**arguments).rows()}  # type: ignore[arg-type]
    return rows[name]


def test_flag_over_environment_over_dotenv_over_file_over_default(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source_of("search.top") == (10, "default")
    (empty_folder / "delf_milvus.toml").write_text("[search]\ntop = 1\n")
    assert source_of("search.top") == (1, "delf_milvus.toml")
    (empty_folder / ".env").write_text("DELF_MILVUS_SEARCH__TOP=2\nOTHER_PROGRAM=3\n")
    assert source_of("search.top") == (2, ".env")
    monkeypatch.setenv("DELF_MILVUS_SEARCH__TOP", "3")
    assert source_of("search.top") == (3, "environment")
    assert source_of("search.top", flags={"search": {"top": 4}}) == (4, "flag")


def test_sources_are_merged_value_by_value(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "own.toml").write_text('uri = "http://there:1"\n[search]\ntop = 1\ncandidates = 50\n')
    monkeypatch.setenv("DELF_MILVUS_SEARCH__TOP", "3")
    settings = load({"search": {"mode": "hits"}}, empty_folder / "own.toml").settings
    assert (settings.uri, settings.search.top, settings.search.candidates, settings.search.mode) == (
        "http://there:1",
        3,
        50,
        "hits",
    )


def test_a_flag_that_was_not_given_does_not_count() -> None:
    assert load({"search": {"top": None}}).settings.search.top == 10


def test_the_constructor_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELF_MILVUS_URI", "elsewhere.db")
    assert Settings().uri == "delf_milvus.db"
    assert load().settings.uri == "elsewhere.db"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[search]\ntop = 0\n", ["search.top", "greater"]),
        ("[serach]\ntop = 1\n", ["serach", "no such setting"]),
        ("[search]\nbottom = 1\n", ["search.bottom", "no such setting"]),
        ('[extract]\npreset = "huge"\n', ["extract.preset", "standard"]),
        ("[extract]\nscales = []\n", ["extract.scales", "1 to 16"]),
        ('[extract]\nruntime = "onnx"\n', ["extract.runtime", "openvino"]),
        ('[extract]\nprecision = "int8"\n', ["extract.precision", "fp16"]),
        ('[extract]\nruntime = "openvino"\ndevice = "cuda"\n', ["extract", "computes on the CPU"]),
        ("search = 5\n", ["search"]),
        ("not toml at all", ["cannot be read"]),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_the_setting(empty_folder: Path, text: str, words: list[str]) -> None:
    (empty_folder / "bad.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load(config=empty_folder / "bad.toml")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_file_is_an_error_only_when_it_was_asked_for() -> None:
    load()
    with pytest.raises(UsageError, match=r"no\.toml"):
        load(config=Path("no.toml"))


def test_a_bad_environment_value_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELF_MILVUS_VERIFY__RESIDUAL", "wide")
    with pytest.raises(UsageError, match=r"verify\.residual \(from environment\)"):
        load()


def test_secrets_are_masked() -> None:
    rows = load({"token": "root:hunter2"}).rows()
    assert "hunter2" not in str(rows)
    assert "hunter3" not in str(load({"uri": "http://root:hunter3@host:1"}).rows())
    assert load({"token": "root:hunter2"}).settings.token.get_secret_value() == "root:hunter2"


def test_single_extract_fields_override_their_preset() -> None:
    plan = ExtractSettings(preset="paper", stored_features=300).plan
    assert plan.stored_features == 300
    assert plan.scales == PRESETS["paper"].scales


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "[" + ".".join(["a"] * 3000) + "]"])
def test_a_file_that_is_nested_too_deeply_is_one_sentence(empty_folder: Path, text: str) -> None:
    (empty_folder / "bad.toml").write_text(text)
    with pytest.raises(UsageError, match="nested too deeply"):
        load(config=empty_folder / "bad.toml")


def test_an_environment_that_is_nested_too_deeply_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELF_MILVUS_STORE", "[" * 100_000)
    with pytest.raises(UsageError, match="nested too deeply"):
        load()


def test_secrets_come_from_files_that_the_environment_names(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / "token").write_text("from a file\n")
    (empty_folder / "keys").write_text("one, two \n\n")
    monkeypatch.setenv("DELF_MILVUS_TOKEN_FILE", "token")
    monkeypatch.setenv("DELF_MILVUS_SERVICE__READ_KEYS_FILE", str(empty_folder / "keys"))
    monkeypatch.setenv("DELF_MILVUS_STORE__PASSWORD_FILE", "")
    loaded = load()
    assert loaded.settings.token.get_secret_value() == "from a file"
    assert loaded.settings.service.read_keys.get_secret_value() == "one, two \n"
    assert loaded.settings.store.password.get_secret_value() == ""
    assert loaded.sources["token"] == "file named in the environment"
    monkeypatch.setenv("DELF_MILVUS_TOKEN", "from the environment")
    assert load().settings.token.get_secret_value() == "from the environment"


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * 70_000])
def test_a_file_of_a_secret_that_cannot_be_read_is_one_sentence_without_it(
    content: bytes | None, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (empty_folder / "token").write_bytes(content)
    monkeypatch.setenv("DELF_MILVUS_TOKEN_FILE", "token")
    with pytest.raises(UsageError, match="The secret token cannot be read from token: ") as caught:
        load()
    assert "xxx" not in str(caught.value)


def test_only_secrets_come_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELF_MILVUS_SEARCH__TOP_FILE", "x")
    with pytest.raises(UsageError, match="no such setting"):
        load()
