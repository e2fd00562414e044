"""Every setting, one nested model a stage, with its unit and the reason for its default.

Values come from, in falling order: arguments (command-line flags), environment (`DELF_MILVUS_SEARCH__TOP=5`), `.env`,
a TOML file, the defaults here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from delf_milvus.errors import UsageError

Preset = Literal["fast", "standard", "paper"]


class _Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DecodeSettings(_Stage):
    """Limits on what is decoded: photos come from strangers."""

    max_pixels: int = Field(100_000_000, ge=1, description="Declared width x height above which a photo is refused.")
    max_bytes: int = Field(200_000_000, ge=1, description="File size, in bytes, above which a photo is refused.")


class ExtractSettings(_Stage):
    """How features are extracted. Fields left at None take the preset's value."""

    preset: Preset = Field("standard", description="Cost level: fast, standard or paper.")
    longest_side: int | None = Field(None, ge=32, le=8192, description="Pixels; larger photos are shrunk to it.")
    scales: tuple[float, ...] | None = Field(None, description="Pyramid scales, relative to the shrunk photo.")
    stored_features: int | None = Field(None, ge=1, le=4096, description="Most features stored for an image.")
    query_features: int | None = Field(None, ge=1, le=4096, description="Most features of a query photo.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Arithmetic of the network; auto is bf16 where the processor computes it natively."
    )
    threads: int = Field(0, ge=0, description="Threads of the network; 0 leaves torch's own choice.")


class StoreSettings(_Stage):
    """How the database is used."""

    profile: Literal["auto", "FLAT", "IVF_SQ8", "IVF_PQ", "HNSW"] = Field(
        "auto", description="Index of the descriptors; auto picks by backend and size."
    )
    nprobe: int = Field(32, ge=1, le=65536, description="Lists an IVF index visits for each descriptor.")
    timeout: float = Field(60.0, gt=0, description="Seconds before a call to the database fails.")
    batch_bytes: int = Field(
        8_000_000, ge=100_000, le=60_000_000, description="Bytes of one write; a message may have at most 64 MB."
    )


class IngestSettings(_Stage):
    """How a folder becomes rows."""

    on_error: Literal["skip", "stop"] = Field("skip", description="What a photo that fails does to the run.")
    decode_threads: int = Field(2, ge=1, le=64, description="Threads that read and decode ahead of the network.")
    queue: int = Field(8, ge=1, le=1024, description="Decoded photos that wait, at most: bounds memory.")
    follow_links: bool = Field(True, description="Descend into linked folders (each real folder once).")


class SearchSettings(_Stage):
    """How candidates are found and answers ranked."""

    top: int = Field(10, ge=1, le=1000, description="Answers at most.")
    candidates: int = Field(100, ge=1, le=1000, description="Images that are verified, best votes first.")
    neighbours: int = Field(120, ge=1, le=1000, description="Nearest descriptors fetched for each query descriptor.")
    mode: Literal["full", "hits"] = Field(
        "full", description="full matches against all stored descriptors of a candidate, hits only the neighbours."
    )
    inlier_weight: float = Field(
        0.75, ge=0, description="Weight of the inliers beside the votes, each divided by its mean over the best five."
    )


class VerifySettings(_Stage):
    """When a match counts as geometric evidence."""

    similarity: float = Field(0.6, ge=-1, le=1, description="Least cosine similarity of a putative match.")
    residual: float = Field(
        25.0, gt=0, description="Most distance of an inlier, pixels of a photo with a longest side of 640."
    )
    min_inliers: int = Field(5, ge=3, description="Inliers below which an affine transform proves nothing.")
    max_false_alarm: float = Field(
        0.01, gt=0, lt=1, description="Share of queries without a match that may be answered with one."
    )


class Settings(BaseSettings):
    """All settings. `Settings.load` reads every source; the constructor alone reads arguments and defaults only."""

    model_config = SettingsConfigDict(
        env_prefix="DELF_MILVUS_",
        env_nested_delimiter="__",
        env_file=".env",
        extra="ignore",
        frozen=True,
    )

    uri: str = Field("delf_milvus.db", description="Path of an embedded database, or http(s)://host:port.")
    token: SecretStr = Field(SecretStr(""), description="Token, or user:password, of a server.")
    collection: str = Field("delf", description="Name that the two collections start with.")
    model: str = Field("bundled", description='Weight file (.safetensors), or "bundled".')
    decode: DecodeSettings = DecodeSettings()
    extract: ExtractSettings = ExtractSettings()
    store: StoreSettings = StoreSettings()
    ingest: IngestSettings = IngestSettings()
    search: SearchSettings = SearchSettings()
    verify: VerifySettings = VerifySettings()
