"""Ways to damage a file: bytes of any format, texts, and formats whose checksums hide what is behind them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
"""Makes an input of a whole one, given all whole ones."""

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)

TOKENS = (
    *('"', "'", "\\", "\n", "\r\n", "\0", ",", ";", "[", "]", "{", "}", "(", ")", "[" * 3000, "{" * 3000, "(" * 3000),
    *("nan", "NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 30, "9" * 5000, "1" + "0" * 400, "null", "true"),
    *(
        "../../../../tmp/escaped",
        "/etc/passwd",
        "..",
        "~",
        "file:///etc/passwd",
        "http://127.0.0.1:9/",
        "%00",
        "%2e%2e",
    ),
    *(
        "\u2028",
        "\ufeff",
        "\U0001f5fc",
        "\\ud800",
        "\\u0000",
        "a" * 70_000,
        "$",
        "_",
        "__class__",
        "${HOME}",
        "%s",
        "{0}",
    ),
)
"""What readers of text trip over."""


def damaged(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to six changes of the bytes, of any format."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        place = rng.randrange(len(changed)) if changed else 0
        length = min(rng.choice((1, 2, 4, 8, 16, 64, 512, 4096)), len(changed) - place)
        match rng.randrange(10):
            case 0 | 1:
                if changed:
                    changed[place] ^= 1 << rng.randrange(8)
            case 2:
                changed[place : place + length] = rng.randbytes(length)
            case 3:
                del changed[place:]
            case 4:
                del changed[place : place + length]
            case 5:
                changed[place:place] = changed[place : place + length] * rng.choice((1, 2, 50))
            case 6 | 7:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice(_NUMBERS) % (1 << 8 * size)
                changed[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))
            case 8:
                other = rng.choice(others)
                start = rng.randrange(len(other)) if other else 0
                changed[place:] = other[start:]
            case 9:
                changed[place:place] = rng.randbytes(length)
    return bytes(changed)


def reworded(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Changes of a text: tokens that mean something to somebody, lines that move; and sometimes of its bytes."""
    if rng.random() < 0.2:
        return damaged(rng, data, others)
    text = data.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        end = min(end, place + rng.choice((0, 1, 4, 20)))
        match rng.randrange(5):
            case 0 | 1:
                text = text[:place] + rng.choice(TOKENS) + text[end:]
            case 2:
                lines = text.split("\n")
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
                text = "\n".join(lines)
            case 3:
                text = text[:place] + text[end:]
            case 4:
                text = text[:place] + text[place:end] * rng.choice((2, 3, 200)) + text[end:]
    return text.encode("utf-8", "surrogatepass")


def of_json(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A JSON value with one to three of its values replaced, at any depth; or changed as a text."""
    try:
        value = json.loads(data)
    except ValueError:
        return reworded(rng, data, others)
    if rng.random() < 0.3:
        return reworded(rng, data, others)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _replaced(rng, value)
    return json.dumps(value).encode()


def _replaced(  # noqa: PLR0911 - one way a return
    rng: random.Random, value: object
) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        match rng.randrange(8):
            case 0:
                return {key: one for key, one in value.items() if key != name}
            case 1:
                return {**value, rng.choice(TOKENS): value[name]}
        return {**value, name: _replaced(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value + value
        return [*value[:place], _replaced(rng, value[place]), *value[place + 1 :]]
    deep: object = 1
    for _ in range(rng.choice((3, 900))):
        deep = [deep]
    numbers = [0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")]
    others = [None, True, [], {}, [[]], {"a": 1}, deep, *TOKENS]
    return rng.choice([*numbers, *numbers, *others])


def png_chunks(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A PNG with one chunk changed, dropped, moved or doubled, and its checksums right again."""
    if not data.startswith(b"\x89PNG") or rng.random() < 0.3:
        return damaged(rng, data, others)
    chunks, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    match rng.randrange(6):
        case 0:
            del chunks[number]
        case 1:
            chunks.insert(rng.randrange(len(chunks)), chunks[number])
        case 2 if kind == b"IHDR":
            width, height = (rng.choice((0, 1, 48, 999, 30_000, 1 << 31, (1 << 32) - 1)) for _ in range(2))
            content = struct.pack(">II", width, height) + bytes(rng.choice(range(18)) for _ in range(5))
            chunks[number] = kind, content
        case 3:
            bomb = zlib.compress(bytes(rng.choice((10, 100_000, 20_000_000))))
            text = rng.choice((b"zTXt", b"iCCP", b"IDAT"))
            chunks.insert(1, (text, bomb if text == b"IDAT" else b"name\0\0" + bomb))
        case _:
            chunks[number] = kind, damaged(rng, content, [content])
    packed = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(packed)


def tiff_entries(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A TIFF, or a block of EXIF in a JPEG, with entries of its first directory changed."""
    start = data.find(b"II*\0")
    if start < 0 or rng.random() < 0.3:
        return damaged(rng, data, others)
    changed = bytearray(data)
    try:
        (offset,) = struct.unpack_from("<I", data, start + 4)
        (count,) = struct.unpack_from("<H", data, start + offset)
        for _ in range(rng.choice((1, 2, 4))):
            entry = start + offset + 2 + 12 * rng.randrange(max(1, count))
            part, size = rng.choice(((0, 2), (2, 2), (4, 4), (8, 4)))
            number = rng.choice((*_NUMBERS, *range(254, 350), *range(14))) % (1 << 8 * size)
            changed[entry + part : entry + part + size] = number.to_bytes(size, "little")
    except struct.error:
        return damaged(rng, data, others)
    return bytes(changed)


def jpeg_segments(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A JPEG with one segment before its pixels changed, dropped, doubled, of another length or another kind."""
    if not data.startswith(b"\xff\xd8") or rng.random() < 0.3:
        return tiff_entries(rng, data, others)
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, place + 2)
        segments.append(data[place : place + 2 + length])
        place += 2 + length
    if not segments:
        return damaged(rng, data, others)
    number = rng.randrange(len(segments))
    one = segments[number]
    match rng.randrange(5):
        case 0:
            del segments[number]
        case 1:
            segments.insert(rng.randrange(len(segments)), one * rng.choice((1, 3)))
        case 2:
            segments[number] = one[:2] + struct.pack(">H", rng.choice(_NUMBERS) & 0xFFFF) + one[4:]
        case 3:
            segments[number] = (
                bytes((0xFF, rng.choice((0xC0, 0xC2, 0xC4, 0xDB, 0xDD, 0xE1, 0xE2, 0xEE, 0xFE)))) + one[2:]
            )
        case _:
            segments[number] = one[:4] + damaged(rng, one[4:], [one])
    return data[:2] + b"".join(segments) + data[place:]


def image(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """An image of any format, by what it starts with."""
    if data.startswith(b"\x89PNG"):
        return png_chunks(rng, data, others)
    if data.startswith(b"\xff\xd8"):
        return jpeg_segments(rng, data, others)
    return tiff_entries(rng, data, others)


def zip_members(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A zip archive with a member changed and packed again, so that its checksums are right."""
    if rng.random() < 0.25:
        return damaged(rng, data, others)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(one.filename, archive.read(one)) for one in archive.infolist()]
    number = rng.randrange(len(members))
    name, content = members[number]
    match rng.randrange(6):
        case 0:
            del members[number]
        case 1:
            members[number] = rng.choice((name.removesuffix(".npy"), "../" + name, rng.choice(TOKENS[:40]))), content
        case 2 if content.startswith(b"\x93NUMPY"):
            header = reworded(rng, content[10:128], [content[10:128]])[: (1 << 16) - 1]
            members[number] = name, content[:8] + struct.pack("<H", len(header)) + header + content[128:]
        case 3 if content.startswith(b"\x93NUMPY"):
            kind = rng.choice(("|O", "<f8", "|S0", "<U999", "<c16", "(2,)<f4", "|b1", "<M8[s]", "|V8", "<f4,<i4"))
            shape = rng.choice(("(0, 0)", "(1000000000000, 2)", "(-1, 2)", "()", "(2,)", "(0, 100000000)", "(True, 2)"))
            header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
            members[number] = name, content[:8] + struct.pack("<H", len(header)) + header + content[128:]
        case _:
            members[number] = name, damaged(rng, content, [one for _, one in members])
    packed = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(packed, "w", kind) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return packed.getvalue()


def safetensors(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A safetensors file with its header, or the JSON in its metadata, changed, and the header's length right again."""
    if rng.random() < 0.25:
        return damaged(rng, data, others)
    (length,) = struct.unpack_from("<Q", data)
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.7:
        whole = header["__metadata__"]["delf_milvus"].encode()
        header["__metadata__"]["delf_milvus"] = of_json(rng, whole, [whole]).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        whole = json.dumps(header).encode()
        text = of_json(rng, whole, [whole])
    if rng.random() < 0.2:
        tensors = damaged(rng, tensors, [tensors])
    return struct.pack("<Q", len(text)) + text + tensors


def files(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A folder, as `packed_folder` has it, with one of its files changed; mostly with sizes and SHA-256 right again."""
    folder = unpacked_folder(data)
    name = rng.choice(sorted(folder))
    if name.endswith(".json"):
        folder[name] = of_json(rng, folder[name], [folder[name]])
    else:
        folder[name] = damaged(rng, folder[name], sorted(folder.values()))
        if rng.random() < 0.9:
            text = folder["manifest.json"].decode()
            for part in json.loads(text)["parts"]:
                for one in part.values():
                    if one["file"] == name:
                        text = text.replace(one["sha256"], hashlib.sha256(folder[name]).hexdigest())
                        text = text.replace(f'"bytes": {one["bytes"]}', f'"bytes": {len(folder[name])}')
            folder["manifest.json"] = text.encode()
    return packed_folder(folder)


def packed_folder(files: dict[str, bytes]) -> bytes:
    """Files of one folder as one input."""
    head = json.dumps({name: len(content) for name, content in files.items()}).encode()
    return struct.pack("<I", len(head)) + head + b"".join(files.values())


def unpacked_folder(data: bytes) -> dict[str, bytes]:
    """The inverse of `packed_folder`."""
    (length,) = struct.unpack_from("<I", data)
    place, found = 4 + length, {}
    for name, size in json.loads(data[4 : 4 + length]).items():
        found[name] = data[place : place + size]
        place += size
    return found
