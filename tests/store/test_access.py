"""Who may connect, how and to which database: a real Milvus server with authorization and TLS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from milvus_server import WheelServer
from pymilvus import MilvusClient
from store_samples import MODEL, random_items

from delf_milvus.errors import DatabaseError, UsageError
from delf_milvus.settings import StoreSettings
from delf_milvus.store.feature_store import FeatureStore

SECRET = "hunter2secret"


@dataclass(frozen=True)
class Guarded:
    """A server that wants TLS with a client certificate, and a password; its certificates lie in `folder`."""

    uri: str
    folder: Path

    @property
    def tls(self) -> dict[str, Any]:
        names = {"ca": "ca.pem", "cert": "client.pem", "key": "client.key"}
        return {**{name: self.folder / file for name, file in names.items()}, "server_name": "server.test"}

    def settings(self, **changes: Any) -> StoreSettings:
        return StoreSettings(**{"timeout": 10, "tls": self.tls, "user": "root", "password": "Milvus", **changes})

    def client(self, **options: Any) -> MilvusClient:
        files = {"ca_pem_path": "ca.pem", "client_pem_path": "client.pem", "client_key_path": "client.key"}
        paths = {name: str(self.folder / file) for name, file in files.items()}
        arguments = {"token": "root:Milvus", "server_name": "server.test", **paths, **options}
        return MilvusClient(self.uri, dedicated=True, **arguments)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    if sys.platform != "linux":
        pytest.skip("the server comes as a wheel for Linux only")
    folder = tmp_path_factory.mktemp("guarded")
    make_certificates(folder)
    config = {
        "authorization_enabled": True,
        "tls_mode": 2,
        "server_pem_path": str(folder / "server.pem"),
        "server_key_path": str(folder / "server.key"),
        "ca_pem_path": str(folder / "ca.pem"),
    }
    (folder / "server").mkdir()
    server = WheelServer(folder / "server", config)
    found = Guarded(server.uri.replace("http:", "https:"), folder)
    client = found.client()
    client.create_database("photos")
    client.create_user("reader", SECRET)
    client.close()
    yield found
    server.kill()


def make_certificates(folder: Path) -> None:
    """An authority, and a certificate of it for a server and for a client, as PEM files."""

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=folder)

    key = ["-newkey", "rsa:2048", "-nodes"]
    openssl("req", "-x509", *key, "-days", 2, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test authority")
    for who in ("server", "client"):
        openssl("req", *key, "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}.test")
        (folder / "names").write_text(f"subjectAltName=DNS:{who}.test\n")
        authority = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        openssl("x509", "-req", "-in", f"{who}.csr", *authority, "-days", 2, "-out", f"{who}.pem", "-extfile", "names")


def opened(uri: str, settings: StoreSettings, token: str = "", create: bool = True) -> FeatureStore:
    return FeatureStore.open(uri, "delf", MODEL, settings, token=token, max_features=20, create=create)


@pytest.mark.server
def test_user_password_certificates_and_database_reach_a_guarded_server(guarded: Guarded) -> None:
    with opened(guarded.uri, guarded.settings(db_name="photos")) as store:
        store.write(random_items(1, 3, 10))
        assert store.status().uri == f"{guarded.uri}/photos"
    token_only = guarded.settings(db_name="photos", user="", password="")
    with opened(guarded.uri, token_only, token="root:Milvus", create=False) as store:
        assert store.count_images() == 3
    with pytest.raises(Exception, match="There is no collection"):
        opened(guarded.uri, guarded.settings(), create=False)
    client = guarded.client()
    assert client.list_collections() == []
    client.close()


@pytest.mark.server
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"password": SECRET}, "does not accept this token, or user and password"),
        ({"db_name": "nowhere"}, "/nowhere cannot be used .* no such database"),
        ({"user": "reader", "password": SECRET, "db_name": "photos"}, "needs the privilege Load"),
        ({"tls": {}}, "No secure connection"),
        ({"tls": {"server_name": "server.test"}}, "No secure connection"),
    ],
)
def test_what_the_server_refuses_is_one_sentence_without_a_secret(
    guarded: Guarded, changes: dict[str, Any], words: str
) -> None:
    if "db_name" in changes and changes["db_name"] == "photos":
        opened(guarded.uri, guarded.settings(db_name="photos")).create()
    with pytest.raises(DatabaseError, match=words) as caught:
        opened(guarded.uri, guarded.settings(**changes), create=False).count_images()
    message = str(caught.value)
    assert message.count("\n") == 0
    assert SECRET not in message
    assert caught.value.exit_code == 3


# Beside what every user has by the role `public`; examples/guides/security.md lists them.
SEARCHES = ("Load", "Query", "Search")
INGESTS = (*SEARCHES, "Insert", "Upsert", "Delete", "Flush", "GetFlushState")
OPERATES = (*INGESTS, "CreateIndex", "DropIndex", "Release", "Compaction", "GetStatistics")


def as_role(guarded: Guarded, name: str, privileges: tuple[str, ...]) -> FeatureStore:
    """The store, opened by a user whose role has these privileges on our two collections, and no other."""
    root = guarded.client(db_name="photos")
    root.create_role(name)
    root.create_user(f"{name}_user", SECRET)
    root.grant_role(f"{name}_user", name)
    for privilege in privileges:
        # A compaction is asked for by a number, which no grant names.
        for collection in ("*",) if privilege == "Compaction" else ("delf_features", "delf_images"):
            root.grant_privilege(name, "Collection", privilege, collection, db_name="photos")
    root.close()
    settings = guarded.settings(db_name="photos", user=f"{name}_user", password=SECRET)
    return opened(guarded.uri, settings, create=False)


def looked_at(store: FeatureStore) -> None:
    """What a search and a listing ask for."""
    record, features = random_items(1, 1, 10)[0]
    assert store.count_images() >= 3
    assert record.image_id in [one.image_id for one in store.list()]
    assert record.key in store.neighbours(features.descriptors, 5)[0] >> 12
    assert record.key in store.similar(features.global_descriptor, 3)[0]
    assert store.stored([record.key])
    store.status()


@pytest.mark.server
def test_the_documented_rights_are_enough_and_whoever_searches_cannot_write(guarded: Guarded) -> None:
    items = random_items(1, 3, 10)
    with opened(guarded.uri, guarded.settings(db_name="photos")) as store:
        store.write(items)
        store.ensure_index()
    with as_role(guarded, "searches", SEARCHES) as store:
        looked_at(store)
        for forbidden in (lambda: store.write(items), lambda: store.delete([items[0][0].image_id]), store.compact):
            with pytest.raises(DatabaseError, match=r"needs the privilege \w+; ask who runs it\.$") as caught:
                forbidden()
            assert SECRET not in str(caught.value)
        looked_at(store)
    with as_role(guarded, "ingests", INGESTS) as store:
        store.write(random_items(2, 2, 10, "more"))
        store.ensure_index()
        store.delete([record.image_id for record, _ in random_items(2, 2, 10, "more")])
        looked_at(store)
    with as_role(guarded, "operates", OPERATES) as store:
        assert not store.fsck().findings
        store.compact()
        store.build_index("IVF_SQ8")
        looked_at(store)


@pytest.mark.server
def test_plain_http_to_a_server_with_tls_says_what_may_be_wrong(guarded: Guarded) -> None:
    with pytest.raises(DatabaseError, match="not waiting for https://"):
        opened(guarded.uri.replace("https:", "http:"), StoreSettings(timeout=5))


@pytest.mark.server
def test_the_command_line_says_a_refusal_in_one_line(guarded: Guarded, tmp_path: Path) -> None:
    tls = {f"DELF_MILVUS_STORE__TLS__{name.upper()}": str(value) for name, value in guarded.tls.items()}

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from delf_milvus.cli.main import run; run()", "--uri", guarded.uri]
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    for arguments, environment in (
        (["--token", f"root:{SECRET}", "status"], tls),
        (["--db", "nowhere", "--token", "root:Milvus", "status"], tls),
        (["--token", "root:Milvus", "status"], {}),
    ):
        refused = call(*arguments, **environment)
        assert refused.returncode == 3, refused.stderr
        assert refused.stderr.startswith("Error: ")
        assert refused.stderr.count("\n") == 1, refused.stderr
        assert SECRET not in refused.stderr
    absent = call("--db", "photos", "--collection", "other", "--token", "root:Milvus", "status", **tls)
    assert absent.returncode == 4
    assert "/photos" in absent.stderr


@pytest.mark.parametrize(
    ("uri", "changes", "words"),
    [
        ("http://127.0.0.1:9", {"tls": {"ca": "ca.pem"}}, "https://"),
        ("photos.db", {"tls": {"server_name": "x"}}, "https://"),
        ("https://127.0.0.1:9", {"tls": {"ca": "missing.pem"}}, "cannot be read"),
        ("https://127.0.0.1:9", {"tls": {"ca": __file__}}, "no PEM file"),
        ("https://127.0.0.1:9", {"tls": {"cert": "a.pem", "key": "a.key"}}, "all of"),
        ("https://127.0.0.1:9", {"tls": {"ca": "ca.pem", "cert": "a.pem"}}, "all of"),
        ("http://127.0.0.1:9", {"user": "root"}, "belong together"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_connecting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        opened(uri, StoreSettings(timeout=5, **changes))


def test_a_token_beside_a_user_is_refused() -> None:
    with pytest.raises(UsageError, match="not both"):
        opened("http://127.0.0.1:9", StoreSettings(timeout=5, user="root", password="Milvus"), token="t")


def test_an_embedded_database_has_databases_too(tmp_path: Path) -> None:
    client = MilvusClient(str(tmp_path / "many.db"))
    client.create_database("mine")
    path = str(tmp_path / "many.db")
    with opened(path, StoreSettings(db_name="mine")) as store:
        store.write(random_items(1, 2, 10))
    with pytest.raises(DatabaseError, match="no such database"):
        opened(path, StoreSettings(db_name="nowhere"))
    assert client.list_collections() == []
    client.close()
