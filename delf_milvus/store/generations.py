"""Generations of one collection: the pair that it was made with, and pairs that it was rebuilt as for another model.

- The pair of the collection `delf` is `delf_images` and `delf_features`; rebuilt ones are `delf_g2_images` and
  `delf_g2_features`, and so on. Rebuilt ones say in a property whose generation they are, so that a collection of
  somebody's that happens to be called so is left alone.
- Which one is current is said by one alias, `delf_current`, on its images; without it, the plain pair is. Milvus moves
  one alias in one step but not two, and an alias may not be called like a collection: so there is exactly one that
  counts, the name of the features follows from its target, and a collection that was never rebuilt needs none.
- Nothing reads or writes through an alias: it is resolved once, at opening. Who has the old pair open keeps it.
- Once the plain pair is dropped, its two names become aliases of the current pair, for readers with plain Milvus.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from delf_milvus.errors import CollectionError, DatabaseError
from delf_milvus.features import Fingerprint
from delf_milvus.settings import StoreSettings
from delf_milvus.store import schema
from delf_milvus.store.connection import Connection

_PROPERTY = "delf_milvus_generation_of"
_SUFFIXES = (schema.IMAGES_SUFFIX, schema.FEATURES_SUFFIX)


class _Generation(NamedTuple):
    name: str
    fingerprint: Fingerprint | None
    collections: list[str]


def alias_of(collection: str) -> str:
    """The alias on the images of the current generation."""
    return f"{collection}_current"


def properties(collection: str, generation: str) -> dict[str, str]:
    """What the collections of a generation say of it: nothing for the plain pair."""
    return {} if generation == collection else {_PROPERTY: collection}


def current(database: Connection, collection: str) -> str:
    """The name of the current generation, which is the collection's own unless the alias says otherwise."""
    target = _target_of(database, alias_of(collection))
    if target and re.fullmatch(rf"{collection}(_g\d+)?{schema.IMAGES_SUFFIX}", target):
        return target.removesuffix(schema.IMAGES_SUFFIX)
    return collection


def target(
    database: Connection, collection: str, fingerprint: Fingerprint, current_one: str, settings: StoreSettings
) -> str:
    """The generation that a rebuild for a model fills: one that was begun or left for it, or a new number.

    Raises CollectionError where the database has no aliases.
    """
    _check_aliases(database, collection, settings.timeout)
    with database.asking("looking for generations"):
        names = database.client.list_collections(timeout=settings.timeout)
    for generation in _found(database, collection, names, settings.timeout):
        if generation.name != current_one and generation.fingerprint == fingerprint:
            return generation.name
    numbers = [int(match[1]) for name in names if (match := re.match(rf"{collection}_g(\d+)_", name))]
    return f"{collection}_g{max([1, *numbers]) + 1}"


def switch(database: Connection, collection: str, generation: str, timeout: float) -> None:
    """Make a generation the current one, in one step, and let plain names that are free follow."""
    _point(database, alias_of(collection), generation + schema.IMAGES_SUFFIX, timeout)
    _name_plainly(database, collection, generation, timeout)


def drop_others(database: Connection, collection: str, current_one: str, timeout: float) -> list[str]:
    """Drop every generation but the current one, images first; returns their names."""
    # An alias that a crash left on an old generation would hold it.
    _name_plainly(database, collection, current_one, timeout)
    with database.asking("looking for generations"):
        names = database.client.list_collections(timeout=timeout)
    dropped = []
    for generation in _found(database, collection, names, timeout):
        if generation.name == current_one:
            continue
        for name in generation.collections:
            with database.asking(f"dropping {name!r}"):
                database.client.drop_collection(name, timeout=timeout)
        dropped.append(generation.name)
    _name_plainly(database, collection, current_one, timeout)
    return dropped


def _found(database: Connection, collection: str, names: list[str], timeout: float) -> list[_Generation]:
    """The generations among these collections, by number."""
    bases: dict[str, list[str]] = {}
    for suffix in _SUFFIXES:
        for name in names:
            if re.fullmatch(rf"{collection}(_g\d+)?{suffix}", name):
                bases.setdefault(name.removesuffix(suffix), []).append(name)
    found = []
    for base, collections in bases.items():
        with database.asking("looking for generations"):
            described = database.client.describe_collection(collections[0], timeout=timeout).get("properties") or {}
        owner = collection if base == collection else described.get(_PROPERTY)
        if owner != collection or schema.PROPERTY not in described:
            continue
        try:
            fingerprint = schema.CollectionFacts.from_json(described[schema.PROPERTY]).fingerprint
        except ValueError:
            # Of another version of this package: it cannot be filled, but it can be dropped.
            fingerprint = None
        found.append(_Generation(base, fingerprint, collections))
    return sorted(found, key=lambda generation: (len(generation.name), generation.name))


def _target_of(database: Connection, alias: str) -> str:
    """The collection that an alias stands for, or "" where it stands for none."""
    if not database.call("reading an alias", database.client.has_collection, alias):
        return ""
    target = str(database.call("reading an alias", database.client.describe_collection, alias)["collection_name"])
    return "" if target == alias else target


def _point(database: Connection, alias: str, target: str, timeout: float) -> None:
    from pymilvus.exceptions import MilvusException

    # Not by `describe_alias`: Milvus 2.3 looks for that in the default database alone.
    found = _target_of(database, alias)
    if found == target:
        return
    client = database.client
    with database.asking("switching an alias"):
        if found:
            client.alter_alias(target, alias, timeout=timeout)
            return
        try:
            client.create_alias(target, alias, timeout=timeout)
        except MilvusException:
            # An alias of a collection that was dropped under it: it looks absent, and is not.
            client.alter_alias(target, alias, timeout=timeout)


def _name_plainly(database: Connection, collection: str, generation: str, timeout: float) -> None:
    """Let the plain names, where no collection has them, stand for a generation."""
    if generation == collection:
        return
    with database.asking("looking for generations"):
        names = database.client.list_collections(timeout=timeout)
    for suffix in _SUFFIXES:
        if collection + suffix not in names:
            _point(database, collection + suffix, generation + suffix, timeout)


def _check_aliases(database: Connection, collection: str, timeout: float) -> None:
    """Raise CollectionError where the database has no aliases, or ours is taken."""
    alias = alias_of(collection)
    with database.asking("looking for generations"):
        names = database.client.list_collections(timeout=timeout)
    target = _target_of(database, alias)
    if alias in names or (target and current(database, collection) + schema.IMAGES_SUFFIX != target):
        raise CollectionError(
            f"{alias!r} at {database.where} belongs to somebody else, but is the alias that a rebuilt collection "
            f"{collection!r} needs; ingest into a new collection with --collection."
        )
    try:
        with database.asking("looking for aliases"):
            database.client.list_aliases(timeout=timeout)
    except DatabaseError as error:
        if "implemented" not in str(error).lower():
            raise
        raise CollectionError(
            f"The database at {database.where} has no aliases, which a rebuild switches; ingest into a new collection "
            "with --collection."
        ) from None
