"""Every setting, one nested model a stage, with its unit and the reason for its default.

Values come from, in falling order: arguments (command-line flags), environment (`DELF_MILVUS_SEARCH__TOP=5`), `.env`,
a TOML file, the defaults here. A secret may lie in a file that the environment names: `DELF_MILVUS_TOKEN_FILE`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from delf_milvus.errors import UsageError

DEFAULT_CONFIG = "delf_milvus.toml"

_PREFIX = "DELF_MILVUS_"
_MOST_SECRET = 65_536

Preset = Literal["fast", "standard", "paper"]

Profile = Literal[
    "auto",
    "FLAT",
    "IVF_PQ",
    "PAPER",
    "IVF_SQ8",
    "HNSW",
    "SCANN",
    "IVF_RABITQ",
    "DISKANN",
    "GPU_IVF_PQ",
    "AUTOINDEX",
]
"""Indexes by name: `store.profiles` says which there are where, and what each is built with."""


Runtime = Literal["torch", "openvino"]

IndexedChoice = Literal["top", "spread"]

Device = Literal["auto", "cpu", "cuda"]

EngineName = Literal["local", "ray"]

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ExtractionPlan:
    """What a preset stands for.

    longest_side: pixels that a larger photo is shrunk to. scales: the pyramid, relative to the shrunk photo.
    stored_features, query_features: most features of a stored image and of a query.
    """

    longest_side: int
    scales: tuple[float, ...]
    stored_features: int
    query_features: int


PRESETS: dict[Preset, ExtractionPlan] = {
    "fast": ExtractionPlan(640, (0.5, 1.0), 300, 500),
    "standard": ExtractionPlan(640, (0.5, 0.7071, 1.0, 1.4142), 500, 500),
    "paper": ExtractionPlan(1024, (0.25, 0.3536, 0.5, 0.7071, 1.0, 1.4142, 2.0), 1000, 1000),
}


MOST_ANSWERS = 1000
"""Answers that a search can be asked for."""


class _Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DecodeSettings(_Stage):
    """Limits on what is decoded: photos come from strangers."""

    max_pixels: int = Field(
        default=100_000_000, ge=1, description="Declared width x height above which a photo is refused."
    )
    max_bytes: int = Field(
        default=200_000_000, ge=1, description="File size, in bytes, above which a photo is refused."
    )


class ExtractSettings(_Stage):
    """How features are extracted. Fields left at None take the preset's value."""

    preset: Preset = Field(default="standard", description="Cost level: fast, standard or paper.")
    longest_side: int | None = Field(
        default=None, ge=32, le=8192, description="Pixels; larger photos are shrunk to it."
    )
    scales: tuple[float, ...] | None = Field(default=None, description="Pyramid scales, relative to the shrunk photo.")
    stored_features: int | None = Field(default=None, ge=1, le=4096, description="Most features stored for an image.")
    query_features: int | None = Field(default=None, ge=1, le=4096, description="Most features of a query photo.")
    runtime: Runtime = Field(
        default="torch",
        description="Library that computes the network; openvino (CPU only) needs the extra of that name.",
    )
    device: Device = Field(default="auto", description="Where it computes; auto is the GPU where torch sees one.")
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of the network; auto is bf16 where the processor computes it faster, or fp32.",
    )
    selection: Literal["model", "attention", "norm"] = Field(
        default="model", description="How cells are scored; model is what the weight file says retrieves better."
    )
    min_attention: float | None = Field(
        default=None,
        ge=0,
        description="Score below which a cell is no feature; its range is the model's. None: no bar.",
    )

    @field_validator("scales")
    @classmethod
    def _sensible_scales(cls, scales: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if scales is not None and (not scales or len(scales) > 16 or not all(0.05 <= s <= 4 for s in scales)):
            raise ValueError("give 1 to 16 scales between 0.05 and 4")
        return scales

    @model_validator(mode="after")
    def _runtime_has_device(self) -> ExtractSettings:
        if self.runtime == "openvino" and self.device == "cuda":
            raise ValueError("runtime openvino computes on the CPU: set device to cpu, or runtime to torch")
        return self

    @property
    def plan(self) -> ExtractionPlan:
        """The preset with the fields that were set on their own."""
        preset = PRESETS[self.preset]
        return ExtractionPlan(
            self.longest_side or preset.longest_side,
            self.scales or preset.scales,
            self.stored_features or preset.stored_features,
            self.query_features or preset.query_features,
        )


class TlsSettings(_Stage):
    """Certificates of a connection to an https:// address, PEM files. Without any, public authorities are trusted."""

    ca: Path | None = Field(
        default=None, description="Certificate of the authority that signed the server's certificate."
    )
    cert: Path | None = Field(
        default=None, description="Client certificate, where the server asks for one; needs key and ca."
    )
    key: Path | None = Field(default=None, description="Private key of the client certificate.")
    server_name: str = Field(
        default="", description="Name in the server's certificate, where it is not that of the address."
    )


class StoreSettings(_Stage):
    """How the database is reached and used."""

    db_name: str = Field(
        default="", description="Database on the server; empty is what the address names, or the default."
    )
    user: str = Field(default="", description="User of the server; instead of a token.")
    password: SecretStr = Field(default=SecretStr(""), description="That user's password.")
    tls: TlsSettings = TlsSettings()
    consistency: Literal["strong", "session", "bounded", "eventually"] = Field(
        default="session",
        description="What searches see: session is what this process wrote, and of others all but the last moments; "
        "strong waits for everything; bounded and eventually wait for nothing. What decides a write is always strong.",
    )
    profile: Profile = Field(default="auto", description="Index of the descriptors; auto picks by backend and size.")
    nlist: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Lists of an IVF index in each segment; chosen from its rows by default.",
    )
    m: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Sub-vectors of an IVF_PQ code, a divisor of the components; half by default.",
    )
    # Servers accept more than 8 bits, and then never finish to build.
    nbits: int | None = Field(
        default=None, ge=1, le=8, description="Bits of a sub-vector of an IVF_PQ code; 8 by default."
    )
    nprobe: int = Field(
        default=32,
        ge=1,
        le=65536,
        description="Lists an IVF or SCANN index visits in each segment for each descriptor.",
    )
    ef: int | None = Field(
        default=None, ge=1, le=32768, description="Candidates HNSW and DISKANN keep; 128 or the neighbours by default."
    )
    refine: float = Field(
        default=2.0, ge=1, le=100, description="Times the neighbours that SCANN compares once more with exact vectors."
    )
    timeout: float = Field(
        default=60.0,
        gt=0,
        description="Seconds before a request to the database fails; one that may be sent twice then is, once.",
    )
    fields: dict[str, str] = Field(
        default_factory=dict,
        description='Fields that searches can be filtered by, for a new collection: {"year": "integer=0"}; the types '
        "are text, integer, number and boolean.",
    )
    tenant_field: str = Field(default="", description="Text field that keeps tenants apart, for a new collection.")
    indexed_features: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Stored features of an image that searches look for, for a new collection; the others are only "
        "compared, and take disk but no memory. None: all.",
    )
    indexed_choice: IndexedChoice = Field(
        default="spread",
        description="Which ones: those of highest score, or spread over the photo and unlike each other.",
    )
    tenant: str = Field(default="", description="Whose images are read, written and searched; none: a search sees all.")
    retry_seconds: float = Field(
        default=15.0,
        ge=0,
        description="Seconds that a call is repeated while the database is away or busy: a restart may pass unseen.",
    )
    batch_bytes: int = Field(
        default=8_000_000,
        ge=100_000,
        le=60_000_000,
        description="Bytes of one write; a message may have at most 64 MB.",
    )
    bulk_storage: str = Field(
        default="",
        description="Folder, or s3://bucket/prefix, that the server reads too: large writes go as files. Empty: off.",
    )
    bulk_path: str = Field(
        default="",
        description="How the server calls bulk_storage. Empty: the same folder, or the prefix in its bucket.",
    )
    bulk_from: int = Field(
        default=500_000,
        ge=1,
        description="Feature rows from which a write goes as files; each such write waits ten seconds.",
    )
    bulk_timeout: float = Field(default=3600.0, gt=0, description="Seconds before an import of files counts as failed.")

    @field_validator("bulk_storage")
    @classmethod
    def _folder_or_bucket(cls, storage: str) -> str:
        if "://" in storage and not re.fullmatch(r"s3://[^/]+(/.*)?", storage):
            raise ValueError("give the path of a folder, or s3://bucket/prefix")
        return storage


class IngestSettings(_Stage):
    """How a folder becomes rows."""

    on_error: Literal["skip", "stop"] = Field(default="skip", description="What a photo that fails does to the run.")
    engine: EngineName = Field(
        default="local",
        description="What reads and extracts photos: local is this process, ray the workers of a Ray cluster, which "
        "needs the extra of that name.",
    )
    decode_threads: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Threads that read and decode ahead of the network. None: 2, or 16 at most for one on a GPU.",
    )
    queue: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Decoded photos that wait, at most (for a GPU 64 more): bounds memory.",
    )
    follow_links: bool = Field(default=True, description="Descend into linked folders (each real folder once).")


class RaySettings(_Stage):
    """The cluster of `ingest --engine ray`, and what each of its workers takes of it."""

    address: str = Field(
        default="",
        description="host:port, or ray://host:port, of the cluster. Empty: what RAY_ADDRESS says, or one of this "
        "machine's own for the run.",
    )
    actors: int | None = Field(
        default=None,
        ge=1,
        description="Workers, each with a model of its own. None: as many as the cluster has room for.",
    )
    cpus: float = Field(default=1.0, gt=0, description="Processors of a worker, and threads of its network.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs of a worker, or its share of one: 0.5.")


class SearchSettings(_Stage):
    """How candidates are found and answers ranked."""

    top: int = Field(default=10, ge=1, le=MOST_ANSWERS, description="Answers at most.")
    per_region: int = Field(
        default=0, ge=0, description="Verified answers at most for each thing that the query shows; 0: no limit."
    )
    candidates: int = Field(default=100, ge=1, le=1000, description="Images that are verified, best first.")
    neighbours: int = Field(
        default=120, ge=1, le=1000, description="Nearest descriptors fetched for each query descriptor."
    )
    mode: Literal["full", "hits"] = Field(
        default="full",
        description="full matches against all stored descriptors of a candidate, hits only the neighbours.",
    )
    parts: bool = Field(
        default=False,
        description="Search for five overlapping parts of the photo too: finds small things, in six searches.",
    )
    turned: bool = Field(
        default=False, description="Search for the photo turned by 90, 180 and 270 degrees too, in four searches."
    )
    expand: int = Field(
        default=0,
        ge=0,
        le=10,
        description="Surest answers whose features join the query for a second look: finds more, in twice the time.",
    )
    agreement: int = Field(
        default=0,
        ge=0,
        le=10,
        description="Surest answers that are compared with all candidates too, and have a say.",
    )
    inlier_weight: float = Field(
        default=0.75,
        ge=0,
        description="Weight of the inliers beside the votes, each divided by its mean over the best five.",
    )
    global_weight: float = Field(
        default=0.25,
        ge=0,
        description="Weight of the global descriptor beside the votes, divided likewise; 0: not asked for.",
    )
    similar_images: int = Field(
        default=1000,
        ge=2,
        le=16384,
        description="Images that are fetched by their global descriptor, the most similar ones.",
    )


class VerifySettings(_Stage):
    """When a match counts as geometric evidence."""

    similarity: float = Field(default=0.6, ge=-1, le=1, description="Least cosine similarity of a putative match.")
    residual: float = Field(
        default=25.0, gt=0, description="Most distance of an inlier, pixels of a photo with a longest side of 640."
    )
    min_inliers: int = Field(default=5, ge=3, description="Inliers below which an affine transform proves nothing.")
    homography: bool = Field(default=False, description="Refine the transform of verified answers to a homography.")
    max_false_alarm: float = Field(
        default=0.01, gt=0, lt=1, description="Share of queries without a match that may be answered with one."
    )
    calibration: str = Field(default="", description="File that `calibrate` wrote; empty: the model's own calibration.")


class ServiceSettings(_Stage):
    """`delf-milvus serve`: where it listens, who may ask, and how much."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; beyond this machine only with keys.")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0: any that is free.")
    read_keys: SecretStr = Field(
        default=SecretStr(""), description="Keys that may search and read, separated by commas."
    )
    write_keys: SecretStr = Field(default=SecretStr(""), description="Keys that may also add and delete, likewise.")
    insecure: bool = Field(
        default=False, description="Listen beyond this machine without keys: whoever reaches it may write."
    )
    trusted_proxies: str = Field(
        default="", description="Addresses of proxies, separated by commas, whose X-Forwarded-For names the client."
    )
    photos: tuple[Path, ...] = Field(
        default=(), description="Folders of stored photos that may be shown; none: no photos."
    )
    uploads: Path | None = Field(
        default=None,
        description="Folder that added photos are kept in, and shown from; none: only their features are kept.",
    )
    show_uris: bool = Field(default=False, description="Answers say where on this machine a photo lies.")
    threads: int = Field(
        default=1, ge=1, le=256, description="Photos that are computed at once; each takes all threads of torch."
    )
    queue: int = Field(
        default=64, ge=0, le=100_000, description="Photos that wait for a thread, at most; more are refused."
    )
    queue_each: int = Field(default=32, ge=0, le=100_000, description="Of these, those of one key or address at most.")
    requests_per_minute: int = Field(
        default=1200, ge=0, description="Of each key, or address without one; 0: no limit."
    )
    connections: int = Field(default=512, ge=1, description="Requests at once, of any kind; more are refused.")
    max_photo_bytes: int = Field(default=20_000_000, ge=1, description="Bytes of an uploaded photo.")
    max_body_bytes: int = Field(default=100_000_000, ge=1, description="Bytes of a request with several photos.")
    max_photos: int = Field(default=32, ge=1, le=1000, description="Photos of one request.")
    max_pixels: int = Field(
        default=50_000_000, ge=1, description="Pixels of an uploaded photo; at most decode.max_pixels."
    )
    buffer_bytes: int = Field(
        default=500_000_000, ge=1, description="Bytes of all uploads in memory; more are refused."
    )
    head_seconds: float = Field(default=10.0, gt=0, description="Seconds in which the head of a request must arrive.")
    body_seconds: float = Field(default=60.0, gt=0, description="Seconds in which its body must arrive.")
    request_seconds: float = Field(
        default=60.0, gt=0, description="Seconds before an answer counts as too late, with its wait."
    )
    breaker_failures: int = Field(
        default=3,
        ge=0,
        description="Questions in a row that find the database away or late before it is left alone; 0: it never is.",
    )
    breaker_seconds: float = Field(
        default=10.0, gt=0, description="Seconds that requests are then refused at once, before one is tried."
    )
    drain_seconds: float = Field(
        default=30.0, gt=0, description="Seconds that requests have to end when the service stops."
    )


class Settings(BaseSettings):
    """All settings. The constructor reads arguments and defaults alone; `load` reads every source."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", env_file=".env", extra="forbid", frozen=True
    )

    uri: str = Field(
        default="delf_milvus.db", description="Path, ending in .db, of an embedded database; or http(s)://host:port."
    )
    token: SecretStr = Field(default=SecretStr(""), description="Token, or user:password, of a server.")
    collection: str = Field(default="delf", description="Name that both collections start with.")
    model: str = Field(
        default="bundled", description='Weight file (.safetensors), "bundled", or "small", which is quicker.'
    )
    decode: DecodeSettings = DecodeSettings()
    extract: ExtractSettings = ExtractSettings()
    store: StoreSettings = StoreSettings()
    ingest: IngestSettings = IngestSettings()
    ray: RaySettings = RaySettings()
    search: SearchSettings = SearchSettings()
    verify: VerifySettings = VerifySettings()
    service: ServiceSettings = ServiceSettings()

    def with_database(self, uri: str | None, token: str | None) -> Settings:
        """A copy with another database and token, where they are given."""
        changes: dict[str, Any] = {}
        if uri is not None:
            changes["uri"] = uri
        if token is not None:
            changes["token"] = SecretStr(token)
        return self.model_copy(update=changes)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: a program that embeds the package says what it means."""
        return (init_settings,)


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and where each value came from, by dotted name."""

    settings: Settings
    sources: dict[str, str]

    def rows(self) -> list[tuple[str, Any, str]]:
        """(name, value, source) of every setting; secrets masked."""
        values = _leaves(self.settings.model_dump(mode="json"))
        # To the last @: a password may have others, and slashes.
        values["uri"] = re.sub(r"//.*@", "//**********@", values["uri"], flags=re.DOTALL)
        return [(name, value, self.sources.get(name, "default")) for name, value in values.items()]


def load(flags: dict[str, Any] | None = None, config: Path | None = None) -> LoadedSettings:
    """Read every source: flags over environment over `.env` over the TOML file over defaults.

    flags: nested values, `{"search": {"top": 5}}`; None values do not count.
    config: TOML file; without one, `delf_milvus.toml` of the current folder is read where it exists.

    Raises UsageError for an unknown setting, a value that does not fit, or a file that cannot be read.
    """
    if config is not None and not config.is_file():
        raise UsageError(f"There is no settings file {config}; give --config the path of a TOML file.")
    toml = config or Path(DEFAULT_CONFIG)
    layers: list[tuple[str, dict[str, Any]]] = []
    try:
        if toml.is_file():
            layers.append((str(toml), TomlConfigSettingsSource(Settings, toml)()))
        # A project's .env holds other programs' variables too: only ours count.
        dotenv = DotEnvSettingsSource(Settings)()
        layers.append((".env", {name: value for name, value in dotenv.items() if name in Settings.model_fields}))
        environment = EnvSettingsSource(Settings)
        files = {name: f"{_PREFIX}{name.replace('.', '__')}_FILE".lower() for name in _secrets(Settings)}
        named = {name: path for name, file in files.items() if (path := environment.env_vars.get(file))}
        # No setting is called so; as values of a stage they would be unknown ones.
        environment.env_vars = {name: v for name, v in environment.env_vars.items() if name not in files.values()}
        layers.append(("file named in the environment", _read_secrets(named)))
        layers.append(("environment", environment()))
        layers.append(("flag", flags or {}))
        flat = [(source, _leaves(values)) for source, values in layers]
    except RecursionError:
        raise UsageError("The settings cannot be read: one of them is nested too deeply.") from None
    except (SettingsError, ValueError, OSError) as error:
        raise UsageError(f"The settings cannot be read: {error}.") from error
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in flat:
        for name, value in values.items():
            if value is not None:
                _put(merged, name, value)
                sources[name] = source
    try:
        return LoadedSettings(Settings(**merged), sources)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        related = (s for n, s in sources.items() if n == name or n.startswith(name + ".") or name.startswith(n + "."))
        source = next(related, "default")
        problem = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        raise UsageError(f"Setting {name} (from {source}): {problem}.") from error


def _secrets(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of the settings that are secret."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        if field.annotation is SecretStr:
            found.append(prefix + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _secrets(field.annotation, f"{prefix}{name}.")
    return found


def _read_secrets(paths: dict[str, str]) -> dict[str, Any]:
    """Secrets out of files, nested, without the line break at their end. Raises UsageError."""
    values: dict[str, Any] = {}
    for name, path in paths.items():
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_MOST_SECRET + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise UsageError(f"The secret {name} cannot be read from {path}: {reason}.") from None
        if len(text) > _MOST_SECRET:
            raise UsageError(f"The secret {name} cannot be read from {path}: it has more than {_MOST_SECRET:,} bytes.")
        _put(values, name, text.removesuffix("\n").removesuffix("\r"))
    return values


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def _put(target: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = target[parent] = {}
        target = inner
    target[leaf] = value
