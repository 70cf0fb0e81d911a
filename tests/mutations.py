"""What a disk, a careless copy or a stranger may do to a set: one seeded change at a time.

`mutate` changes a copy of a set in place and says what it did. Kinds that begin with `forged` make
all hashes, checksums and counts of sizes right again, as somebody would who wants to be believed;
the others leave them alone.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile_parquet import first_page_header, rehash
from tests.payload_builders import forged
from tide_cache.canonical import canonical_json
from tide_cache.manifest import SIGNATURE
from tide_cache.shards import METADATA_KEY, table_bytes

HOSTILE_NUMBERS = (-1, 0, 1, 2, 7, 255, 1 << 16, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, 10**18)
HOSTILE_VALUES: tuple[Any, ...] = (
    *HOSTILE_NUMBERS, 10**30, -(10**30), 1e-300, 1e300, 0.5, True, None, "", "x", "../x",
    "/etc/passwd", "\x1b[2J", "data/view-00/00000.parquet", "s3://bucket/x", [], {}, [[]],
    [1e308, 1.0], "9" * 400,
)  # fmt: skip
HOSTILE_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan)


def mutate(folder: Path, kind: str, chance: random.Random) -> str:
    """Change a set in `folder` by the mutation `kind`; returns what was done."""
    return MUTATIONS[kind](folder, chance)


def kinds_of(folder: Path) -> list[str]:
    """The mutations that this set can suffer: signatures and payloads are not everywhere."""
    found = list(MUTATIONS)
    if not (folder / SIGNATURE).exists():
        found = [kind for kind in found if not kind.startswith("signed")]
    if not any((folder / "codec").glob("*")):
        found = [kind for kind in found if "codec" not in kind]
    if json.loads((folder / "manifest.json").read_text())["kind"] != "cache":
        found = [kind for kind in found if "payload" not in kind]
    return found


def shard_byte(folder: Path, chance: random.Random) -> str:
    return _damage(_some_shard(folder, chance), chance)


def codec_byte(folder: Path, chance: random.Random) -> str:
    return _damage(chance.choice(sorted((folder / "codec").glob("*"))), chance)


def manifest_byte(folder: Path, chance: random.Random) -> str:
    return _damage(folder / "manifest.json", chance)


def shard_cut(folder: Path, chance: random.Random) -> str:
    path = _some_shard(folder, chance)
    data = path.read_bytes()
    size = chance.randrange(len(data))
    path.write_bytes(data[:size])
    return f"{path.name} cut to {size} bytes"


def shard_longer(folder: Path, chance: random.Random) -> str:
    path = _some_shard(folder, chance)
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 100)))
    return f"{path.name} made longer"


def shards_swapped(folder: Path, chance: random.Random) -> str:
    one, two = chance.sample(_shards(folder), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"{one} and {two} swapped"


def shard_missing(folder: Path, chance: random.Random) -> str:
    path = _some_shard(folder, chance)
    path.unlink()
    return f"{path.name} removed"


def shard_extra(folder: Path, chance: random.Random) -> str:
    path = _some_shard(folder, chance)
    other = path.with_name(f"{chance.randrange(10, 99999):05d}.parquet")
    other.write_bytes(path.read_bytes())
    return f"{other.name} added"


def shard_link(folder: Path, chance: random.Random) -> str:
    path = _some_shard(folder, chance)
    path.unlink()
    target = chance.choice(["/dev/zero", "/etc/passwd", "..", str(_some_shard(folder, chance))])
    path.symlink_to(target)
    return f"{path.name} linked to {target}"


def manifest_field(folder: Path, chance: random.Random) -> str:
    """Any value of the manifest becomes another one."""
    return _edit_manifest(folder, chance)


def counts_wrong(folder: Path, chance: random.Random) -> str:
    def edit(values: Any) -> str:
        part = values[chance.choice(["counts", "dropped"])]
        name = chance.choice(sorted(part) or ["num_rows"])
        part[name] = chance.choice([part.get(name, 0) + 1, *HOSTILE_NUMBERS])
        return f"{name} = {part[name]}"

    return _edit(folder, edit)


def forged_manifest_field(folder: Path, chance: random.Random) -> str:
    """A header that manifest and shards agree on, with one value that no program wrote."""
    done = _edit_manifest(folder, chance)
    values = json.loads((folder / "manifest.json").read_text())
    header = {k: v for k, v in values.items() if k not in ("counts", "dropped", "files", "shards")}
    for path in _shards(folder):
        _restamp(path, header)
    rehash(folder)
    return done


def forged_shard_byte(folder: Path, chance: random.Random) -> str:
    done = shard_byte(folder, chance)
    rehash(folder)
    return done


def forged_footer(folder: Path, chance: random.Random) -> str:
    """Bytes of the footer, where Parquet says what is where and how large it is."""
    path = _some_shard(folder, chance)
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[-8:-4], "little")
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(len(data) - 8 - size, len(data) - 4)] = _byte(chance)
    path.write_bytes(data)
    rehash(folder)
    return f"footer of {path.name}"


def forged_page_header(folder: Path, chance: random.Random) -> str:
    path = _some_shard(folder, chance)
    data = bytearray(path.read_bytes())
    column = chance.choice(pq.read_schema(path).names)
    start, stop, _ = first_page_header(bytes(data), column)
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(start, stop)] = _byte(chance)
    path.write_bytes(data)
    rehash(folder)
    return f"page header of {column} of {path.name}"


def forged_codec_byte(folder: Path, chance: random.Random) -> str:
    done = codec_byte(folder, chance)
    rehash(folder)
    return done


def forged_swap(folder: Path, chance: random.Random) -> str:
    done = shards_swapped(folder, chance)
    rehash(folder)
    return done


def forged_row_value(folder: Path, chance: random.Random) -> str:
    """One value of one row: an id, a length, a bit of a mask, a place of an alignment, a name."""
    path = _some_shard(folder, chance)
    table = pq.read_table(path)
    names = [
        name for name in table.column_names if not name.startswith(("cand_", "hidden_", "chunk_"))
    ]
    name = chance.choice(names)
    field = table.schema.field(name)
    values = table[name].to_pylist()
    row = chance.randrange(len(values))
    values[row] = _other(values[row], field.type, chance)
    at = table.schema.get_field_index(name)
    _write(path, table.set_column(at, field, pa.array(values, field.type)))
    rehash(folder)
    return f"{name} of row {row} of {path.name}"


def forged_payload(folder: Path, chance: random.Random) -> str:
    """Cells of payload columns changed, and their checksums made right."""
    path = _some_shard(folder, chance)
    table = pq.read_table(path)
    prefixes = ("cand_", "hidden_", "chunk_")
    prefix = chance.choice(
        [p for p in prefixes if any(n.startswith(p) for n in table.column_names)]
    )
    names = [name for name in table.column_names if name.startswith(prefix)]
    part = forged(table.select(names).replace_schema_metadata(None), chance.randrange(1 << 30))
    for name in names:
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), part[name])
    _write(path, table)
    rehash(folder)
    return f"{prefix} of {path.name}"


def forged_columns(folder: Path, chance: random.Random) -> str:
    """A column dropped, doubled, renamed, moved or of another type; rows dropped or doubled."""
    path = _some_shard(folder, chance)
    table = pq.read_table(path)
    name = chance.choice(table.column_names)
    at = table.schema.get_field_index(name)
    what = chance.choice(["drop", "rename", "move", "large", "nulls", "fewer rows", "more rows"])
    if what == "drop":
        table = table.drop_columns([name])
    elif what == "rename":
        table = table.rename_columns([n + "x" if n == name else n for n in table.column_names])
    elif what == "move":
        column, field = table[name], table.schema.field(name)
        table = table.drop_columns([name]).add_column(0, field, column)
    elif what == "large":
        kind = (
            pa.large_binary() if pa.types.is_binary(table.schema.field(name).type) else pa.string()
        )
        table = table.set_column(at, name, pa.array([None] * table.num_rows, kind))
    elif what == "nulls":
        field = table.schema.field(name).with_nullable(True)
        table = table.set_column(at, field, pa.nulls(table.num_rows, field.type))
    elif what == "fewer rows":
        table = table.slice(0, chance.randrange(table.num_rows))
    else:
        table = pa.concat_tables([table, table])
    _write(path, table)
    rehash(folder)
    return f"{what}: {name} of {path.name}"


def signed_extra(folder: Path, chance: random.Random) -> str:
    name = chance.choice(["x", "data/x", "codec/x", ".x", "data/view-00/.x"])
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(chance.randbytes(3))
    return f"{name} added"


def signed_missing(folder: Path, chance: random.Random) -> str:
    path = chance.choice([p for p in _files(folder) if p.name not in (SIGNATURE, "manifest.json")])
    path.unlink()
    return f"{path.name} removed"


def signed_changed(folder: Path, chance: random.Random) -> str:
    path = chance.choice([p for p in _files(folder) if p.name != "manifest.json"])
    return _damage(path, chance)


def signed_forged(folder: Path, chance: random.Random) -> str:
    """Sound in itself and under the older signature: rows dropped, hashes made right."""
    return forged_row_value(folder, chance)


Mutation = Callable[[Path, random.Random], str]
MUTATIONS: dict[str, Mutation] = {
    made.__name__: made
    for made in (
        shard_byte, codec_byte, manifest_byte, shard_cut, shard_longer, shards_swapped,
        shard_missing, shard_extra, shard_link, manifest_field, counts_wrong,
        forged_manifest_field, forged_shard_byte, forged_footer, forged_page_header,
        forged_codec_byte, forged_swap, forged_row_value, forged_payload, forged_columns,
        signed_extra, signed_missing, signed_changed, signed_forged,
    )
}  # fmt: skip


def _shards(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob("*/*.parquet"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _some_shard(folder: Path, chance: random.Random) -> Path:
    return chance.choice(_shards(folder))


def _byte(chance: random.Random) -> int:
    return chance.choice([0, 1, 2, 0x7F, 0x80, 0xFF, chance.randrange(256)])


def _damage(path: Path, chance: random.Random) -> str:
    """Change, remove or add a few bytes; what comes out is never what was there."""
    before = path.read_bytes()
    data = bytearray(before)
    places = []
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(data))
        places.append(at)
        what = chance.randrange(4)
        if what == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            data[at] = _byte(chance)
        elif what == 2 and len(data) > 1:
            del data[at]
        else:
            data.insert(at, _byte(chance))
    if data == before:
        data[places[0]] ^= 1
    path.write_bytes(data)
    return f"{path.name} at {places}"


def _edit(folder: Path, edit: Callable[[Any], str]) -> str:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    done = edit(values)
    path.write_text(json.dumps(values))
    return done


def _edit_manifest(folder: Path, chance: random.Random) -> str:
    def edit(values: Any) -> str:
        way: list[Any] = []
        here = values
        while True:
            key = chance.choice(sorted(here) if isinstance(here, dict) else range(len(here)))
            way.append(key)
            if not isinstance(here[key], dict | list) or not here[key] or chance.random() < 0.1:
                break
            here = here[key]
        what = chance.randrange(6)
        if what == 0:
            del here[key]
        elif what == 1 and isinstance(here, dict):
            here["surprise"] = chance.choice(HOSTILE_VALUES)
        elif what == 2 and isinstance(here, list):
            here.append(here[key])
        elif what == 3 and isinstance(here[key], int | float):
            here[key] += chance.choice([-1, 1])
        else:
            here[key] = chance.choice(HOSTILE_VALUES)
        return f"manifest {'.'.join(map(str, way))}"

    return _edit(folder, edit)


def _restamp(path: Path, header: Any) -> None:
    file = pq.ParquetFile(io.BytesIO(path.read_bytes()))
    stamp = json.loads(file.schema_arrow.metadata[METADATA_KEY])
    stamp["header"] = header
    table = file.read().replace_schema_metadata({METADATA_KEY: canonical_json(stamp)})
    path.write_bytes(table_bytes(table))


def _write(path: Path, table: pa.Table) -> None:
    path.write_bytes(table_bytes(table))


def _other(value: Any, kind: pa.DataType, chance: random.Random) -> Any:
    if pa.types.is_string(kind):
        return chance.choice(["", "x" * 1000, "\x1b[2J", "\x00", value + "x", value])
    if pa.types.is_floating(kind):
        return chance.choice(HOSTILE_FLOATS)
    if pa.types.is_integer(kind):
        top = (1 << (kind.bit_width - 1)) - 1
        return chance.choice(
            [n for n in (value + 1, value - 1, *HOSTILE_NUMBERS) if -top <= n <= top]
        )
    if pa.types.is_binary(kind):
        data = bytearray(value)
        if chance.random() < 0.3 or not data:
            return bytes(data[:-1]) if chance.random() < 0.5 else bytes(data + b"\x01")
        data[chance.randrange(len(data))] = _byte(chance)
        return bytes(data)
    assert pa.types.is_list(kind)
    numbers = list(value)
    what = chance.randrange(3)
    at = chance.randrange(len(numbers)) if numbers else 0
    if what == 0 and numbers:
        del numbers[at]
    elif what == 1:
        numbers.insert(at, chance.choice([0, 1, 5, -1, (1 << 31) - 1]))
    elif numbers:
        small = [numbers[at] - 1, numbers[at] + 1, 0, 1, 39, 40]
        numbers[at] = chance.choice([*small, -1, 1 << 20, (1 << 31) - 1, -(1 << 31)])
    return numbers
