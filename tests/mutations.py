"""Mutated copies of files: what disks, networks and other programs make of them.

A mutation takes a generator of random numbers and the content, and gives another content. Those of
any file know nothing of what stands in it; the others know a format, and keep lengths and checksums
right, so that what they change is met by a reader and not by its checksums.
"""

import gzip
import io
import json
import re
import struct
import tarfile
import zipfile
import zlib

import h5py
import numpy as np

SIZES = [
    0,
    1,
    2,
    7,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
"""What length fields are set to."""
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 10**9, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-300, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "a" * 10_000,
        "\0",
        "\n",
        "é\u2028",
        "1",
        "1e9",
        "nan",
    ),
    *("../x", "/", "mixture", [], [[]], [1, 2], ["a"], {}, {"name": "x"}, [[1.0] * 3] * 3, [None]),
]
"""What stands in the place of a value of JSON or YAML."""


# --- of any file -----------------------------------------------------------------------------


def span(rng, data, most=64):
    """Where some neighbouring bytes are."""
    start = int(rng.integers(len(data) + 1))
    return start, start + int(rng.integers(1, most + 1))


def flip_bits(rng, data):
    data = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 9)) if data else ():
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def truncate(rng, data):
    return data[: int(rng.integers(len(data) + 1))]


def remove(rng, data):
    start, end = span(rng, data)
    return data[:start] + data[end:]


def double(rng, data):
    start, end = span(rng, data, 512)
    return data[:end] + data[start:]


def swap(rng, data):
    a, b, c = sorted(rng.integers(len(data) + 1, size=3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def fill(rng, data):
    start, end = span(rng, data, 512)
    end = min(end, len(data))
    filled = [bytes(end - start), b"\xff" * (end - start), rng.bytes(end - start)]
    return data[:start] + filled[rng.integers(3)] + data[end:]


def insert(rng, data):
    start, end = span(rng, data)
    return data[:start] + rng.bytes(end - start) + data[start:]


def append(rng, data):
    return data + (data if rng.random() < 0.5 else rng.bytes(100))


def set_length(rng, data):
    """A word of any width and order becomes another number."""
    form = "<>"[rng.integers(2)] + "BHLQ"[rng.integers(4)]
    width = struct.calcsize(form)
    word = struct.pack(form, SIZES[rng.integers(len(SIZES))] % 256**width)
    start = int(rng.integers(max(1, len(data) - width)))
    return data[:start] + word + data[start + width :]


def set_digits(rng, data):
    """A number in the text becomes another one."""
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return set_length(rng, data)
    match = found[rng.integers(len(found))]
    number = rng.choice([b"0", b"-1", b"1e999", b"NaN", b"9" * 30, b"4294967296", b""])
    return data[: match.start()] + bytes(number) + data[match.end() :]


ANY = [flip_bits, truncate, remove, double, swap, fill, insert, append, set_length, set_digits]


def mutated(rng, data, known=()):
    """One to three mutations, of which half know the format, if any do; these come first."""
    count = int(rng.choice([1, 1, 1, 2, 3]))
    first = int(rng.binomial(count, 0.5)) if known else 0
    for chosen in [known] * first + [ANY] * (count - first):
        try:
            data = chosen[rng.integers(len(chosen))](rng, data)
        except Exception:  # after another mutation it may lack what was to be changed
            continue  # h5py must not be given what is damaged already
    return data


# --- trees, as JSON and YAML have them -------------------------------------------------------


def change_tree(rng, tree):
    """The same with a value replaced, doubled, wrapped or left out, or a key renamed."""
    places = list(_places(tree))
    if not places:
        return VALUES[rng.integers(len(VALUES))]
    path = places[rng.integers(len(places))]
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in path[:-1]:
        node = node[key]
    key, kind = path[-1], rng.integers(8)
    if kind < 4:
        node[key] = VALUES[rng.integers(len(VALUES))]
    elif kind == 4:
        del node[key]
    elif kind == 5:
        node[key] = [node[key]] if rng.random() < 0.5 else {"name": node[key]}
    elif kind == 6 and isinstance(node, dict):
        node[str(rng.choice(["x", key + "s", "", "name", "\n"]))] = node.pop(key)
    else:
        value = node[key]
        other = rng.integers(-3, 300).item() if rng.random() < 0.5 else [value] * 3
        node[key] = value * 3 if isinstance(value, str | list) else other
    return tree


def _places(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))


def json_text(rng, data):
    return json.dumps(change_tree(rng, json.loads(data)), ensure_ascii=False).encode()


# --- images ----------------------------------------------------------------------------------


def png_chunk(rng, data):
    """What stands in a chunk of a PNG, its length and checksum being right."""
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack_from(">L", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    at = int(rng.integers(len(chunks)))
    kind, body = chunks[at]
    if kind == b"IDAT" and rng.random() < 0.7:
        body = zlib.compress(mutated(rng, zlib.decompress(body)))
    else:
        body = mutated(rng, body)
    chunks[at] = kind, body
    if rng.random() < 0.2:
        chunks.insert(at, chunks[rng.integers(len(chunks))])
    whole = (
        struct.pack(">L", len(b)) + k + b + struct.pack(">L", zlib.crc32(k + b)) for k, b in chunks
    )
    return data[:8] + b"".join(whole)


def jpeg_segment(rng, data):
    """What stands in a segment of a JPEG in front of its pixels, its length being right or not."""
    segments, place = [], 2
    while data[place + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, place + 2)
        segments.append((data[place : place + 2], data[place + 4 : place + 2 + length]))
        place += 2 + length
    at = int(rng.integers(len(segments)))
    marker, body = segments[at]
    segments[at] = marker, mutated(rng, body)[:65_000]
    if rng.random() < 0.2:
        segments.insert(at, segments[rng.integers(len(segments))])
    whole = b"".join(m + struct.pack(">H", len(b) + 2) + b for m, b in segments)
    return data[:2] + whole + data[place:]


def tiff_entry(rng, data):
    """Tag, type, count or value of an entry of a TIFF's directory."""
    (start,) = struct.unpack_from("<L", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    place = start + 2 + 12 * int(rng.integers(count))
    offset, form = [(0, "<H"), (2, "<H"), (4, "<L"), (8, "<L")][rng.integers(4)]
    most = 256 ** struct.calcsize(form)
    number = rng.choice([0, 1, 2, 5, 32773, 34712, 50000, most - 1, rng.integers(300), len(data)])
    changed = bytearray(data)
    struct.pack_into(form, changed, place + offset, int(number) % most)
    return bytes(changed)


# --- archives --------------------------------------------------------------------------------


def zip_member(rng, data):
    """Content, name or fields of a member of a zip archive that is whole."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        members = old.infolist()
        at = int(rng.integers(len(members)))
        for place, member in enumerate(members):
            content, kind = old.read(member), int(rng.integers(6)) if place == at else 6
            if kind < 2:
                content = mutated(rng, content)
            elif kind == 2:
                member.filename = strange_name(rng, member.filename)
            elif kind == 3:
                member.external_attr = int(rng.integers(2**32))
            elif kind == 4:
                member.compress_type = [0, 8, 12, 14][rng.integers(4)]
            elif kind == 5:
                continue
            new.writestr(member, content)
    return changed.getvalue()


def strange_name(rng, name):
    known = ["", "/", "../" + name, name + "/x", name.upper(), "train", name[:-4], "a" * 300]
    known += [name.replace("/", "\\"), "\u202e" + name, name.replace("0", "é\n"), "test/" + name]
    return known[rng.integers(len(known))]


def tar_header(rng, data):
    """A field of a header of a tar archive, whose checksum is right."""
    fields = [(0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265)]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        starts = [member.offset for member in archive]
    start = starts[rng.integers(len(starts))]
    begin, end = fields[rng.integers(len(fields))]
    header = bytearray(data[start : start + 512])
    kinds = [mutated(rng, bytes(header[begin:end])), rng.bytes(end - begin), b"7" * (end - begin)]
    kinds.append(b"0123456789xgLKSDV"[rng.integers(17) :])
    header[begin:end] = kinds[rng.integers(4)][: end - begin].ljust(end - begin, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def gzipped(rng, data):
    """A tar archive within its compression."""
    inner = gzip.decompress(data)
    return gzip.compress(
        tar_header(rng, inner) if rng.random() < 0.7 else mutated(rng, inner), 1, mtime=0
    )


# --- HDF5 ------------------------------------------------------------------------------------


def hdf5_part(rng, data):
    """An attribute or an array of an HDF5 file, which is then as sound as h5py makes it."""
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        arrays = []
        file.visititems(lambda name, it: arrays.append(name) if isinstance(it, h5py.Dataset) else 0)
        holders = [file, *(file[name] for name in arrays if len(file[name].attrs))]
        if rng.random() < 0.5 and len(holder := holders[rng.integers(len(holders))].attrs):
            _change_attribute(rng, holder, sorted(holder)[rng.integers(len(holder))])
        else:
            _change_array(rng, file, arrays[rng.integers(len(arrays))])
    return buffer.getvalue()


def _change_attribute(rng, attributes, name):
    value = attributes[name]
    if isinstance(value, str) and value[:1] in ("[", "{") and rng.random() < 0.6:
        attributes[name] = json.dumps(change_tree(rng, json.loads(value)))
        return
    others = ["", "x", b"\xff\xfe", "null", "{}", "[" * 3000, 0, -1, 10**12, 0.5, np.nan]
    others += [np.zeros((0,)), np.arange(3), h5py.Empty("f"), "[1]", '"a"', "1" * 5000]
    if rng.random() < 0.2:
        del attributes[name]
    else:
        attributes[name] = others[rng.integers(len(others))]


def _change_array(rng, file, name):
    array = file[name][()]
    others = [
        lambda: array[..., None],
        lambda: array[:0],
        lambda: array.ravel()[: len(array)],
        lambda: array[:-1],
        lambda: array.astype(rng.choice(["f8", "i1", "u8", "S3", "c8", "?", "f2"])),
        lambda: array * 0 - 1.0,
        lambda: np.full(array.shape, rng.choice([np.nan, np.inf, -1e300, 1e300])),
        lambda: np.full(array.shape, 2**62),
        lambda: array[::-1],
        lambda: np.array(["x", "y"], dtype="S"),
        lambda: np.zeros(array.shape, [("a", "f4"), ("b", "i2")]),
        lambda: 3,
        lambda: h5py.Empty("f4"),
        lambda: rng.permutation(array.ravel()).reshape(array.shape),
    ]
    kept = dict(file[name].attrs)
    del file[name]
    kind = rng.integers(len(others) + 2)
    if kind == len(others):
        file.create_group(name)
    elif kind < len(others):
        file[name] = others[kind]()
        file[name].attrs.update(kept)


# --- safetensors, and what PyTorch stores ----------------------------------------------------


def safetensors_header(rng, data):
    """The JSON in front of the tensors, or that within it, the length being right."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = header.get("__metadata__", {})
    if inner and rng.random() < 0.7:
        key = sorted(inner)[rng.integers(len(inner))]
        inner[key] = json.dumps(change_tree(rng, json.loads(inner[key])))
    else:
        header = change_tree(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
