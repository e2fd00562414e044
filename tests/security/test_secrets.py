"""No secret leaves the settings: not by what is shown, nor by what is said when something is wrong."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from delf_milvus.cli.main import app
from delf_milvus.errors import DelfMilvusError
from delf_milvus.settings import load
from delf_milvus.store.connection import server_name

SECRETS = [("token",), ("store", "password"), ("service", "read_keys"), ("service", "write_keys")]

# Long enough that it is nowhere by chance, and what addresses and files make trouble with.
secrets = st.text(st.sampled_from("abcXYZ019:/@?#%&=+ \"'\\{}$é塔"), min_size=6, max_size=30).map(lambda s: f"s3cr{s}t")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def nested(names: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(names):
        value = {name: value}
    return value


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SECRETS), secrets)
def test_settings_tell_no_secret(names: tuple[str, ...], secret: str) -> None:
    loaded = load(nested(names, secret))
    value: Any = loaded.settings
    for name in names:
        value = getattr(value, name)
    assert value.get_secret_value() == secret
    for text in (repr(loaded), str(loaded.settings), str(loaded.rows()), loaded.settings.model_dump_json()):
        assert secret not in text
        assert json.dumps(secret)[1:-1] not in text


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(secrets)
def test_an_address_is_shown_without_its_password(secret: str) -> None:
    uri = f"http://root:{secret}@host:19530/db"
    loaded = load({"uri": uri})
    shown = next(value for name, value, _ in loaded.rows() if name == "uri")
    for text in (shown, server_name(uri, loaded.settings.store)):
        assert secret not in text
        assert secret[:8] not in text
        assert secret[-8:] not in text


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SECRETS), secrets, st.sampled_from(["list", "object", "misplaced", "file", "toml"]))
def test_an_error_about_a_secret_does_not_tell_it(names: tuple[str, ...], secret: str, wrong: str) -> None:
    config = Path("wrong.toml")
    flags: dict[str, Any] = {}
    match wrong:
        case "list":
            flags = nested(names, [secret])
        case "object":
            flags = nested(names, {secret: secret})
        case "misplaced":
            flags = nested((*names[:-1], f"{names[-1]}s"), secret)
        case "file":
            config.write_text(f"[search]\ntop = {json.dumps(secret)}\n", encoding="utf-8")
        case "toml":
            config.write_text(f"{names[-1]} = {secret}\n", encoding="utf-8")
    try:
        with pytest.raises(DelfMilvusError) as caught:
            load(flags, config if config.exists() else None)
    finally:
        config.unlink(missing_ok=True)
    # An object's names are names of settings, and are told.
    assert wrong == "object" or secret not in str(caught.value)


def test_the_command_line_tells_no_secret(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    secret = "s3cr-of-the-command-line-t"
    for names in SECRETS:
        monkeypatch.setenv("DELF_MILVUS_" + "__".join(names).upper(), secret + names[-1])
    monkeypatch.setenv("DELF_MILVUS_URI", f"http://root:{secret}@127.0.0.1:9")
    monkeypatch.setenv("DELF_MILVUS_STORE__RETRY_SECONDS", "0")
    caplog.set_level(logging.DEBUG)
    for arguments in (["config", "show"], ["--json", "config", "show"], ["-v", "status"], ["doctor"], ["list"]):
        result = CliRunner().invoke(app, arguments)
        told = result.output + (result.stderr if result.stderr_bytes is not None else "") + caplog.text
        if result.exception is not None:
            told += "".join(traceback.format_exception(result.exception))
        assert secret not in told, arguments


def test_settings_that_are_pickled_for_another_process_still_show_none() -> None:
    copied = pickle.loads(pickle.dumps(load({"token": "s3cr-and-long-t"}).settings))
    assert copied.token.get_secret_value() == "s3cr-and-long-t"
    assert "s3cr" not in repr(copied)
