"""What prepare_pile.py reads, of files as people have them: what is read, what is left out and
counted, and how much memory the worst of them take."""

import base64
import bz2
import datetime
import gzip
import json
import lzma
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
import zstandard
from piles import contents, json_lines, lines, parquet, record, run, texts, write

import config
import data
from pile.domains import Wanted
from pile.files import LISTED, changes, inventory
from pile.pack import COLUMNS
from pile.pages import largest_page
from prepare_pile import Config
from system.errors import UserError

SCRIPT = Path(config.__file__).parent / "prepare_pile.py"
MB = 1 << 20
SMALL = {"val_fraction": 0, "block_size": 1}  # next to nothing is dropped
PACK = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def numbered(*numbers, domain="a"):
    """Lines of documents that say which they are."""
    return lines([(domain, f"document {i}") for i in numbers])


def printed(capsys):
    """The lines printed since it was last asked."""
    return capsys.readouterr().out.splitlines()


# --- a folder's files -------------------------------------------------------------


def a_folder(tmp_path):
    """Makes a folder of documents 0 to 8, and of files that are not read."""
    write(tmp_path / "s" / "a.jsonl", numbered(0))
    write(tmp_path / "s" / "B.JSONL", numbered(1))
    write(tmp_path / "s" / "c.ndjson", numbered(2))
    write(tmp_path / "s" / "d.Json.Gz", gzip.compress(numbered(3)))
    write(tmp_path / "s" / "e.jsonl.bz2", bz2.compress(numbered(4)))
    write(tmp_path / "s" / "f.ndjson.xz", lzma.compress(numbered(5)))
    write(tmp_path / "s" / "g" / "g.json.zst", zstandard.compress(numbered(6)))
    write(tmp_path / "s" / "a" / "H.TXT", b"document 7")
    parquet(tmp_path / "s" / "I.PARQUET", [("a", "document 8")])
    write(tmp_path / "s" / "notes.md", b"notes")
    write(tmp_path / "s" / "g" / "t.csv", b"text\n")
    write(tmp_path / "s" / ".x.jsonl", numbered(90))
    write(tmp_path / "s" / "._a.parquet", b"\0\5\26\7Mac OS X")
    write(tmp_path / "s" / ".ipynb_checkpoints" / "a-checkpoint.jsonl", numbered(91))
    write(tmp_path / "store" / "k" / "k.jsonl", numbered(10))
    write(tmp_path / "store" / "l.jsonl", numbered(11))
    return tmp_path / "s"


def test_a_folder_is_read_except_links_hidden_files_and_other_kinds(tmp_path, capsys):
    source = a_folder(tmp_path)
    (source / "k").symlink_to("../store/k")
    (source / "l.jsonl").symlink_to("../store/l.jsonl")
    (source / "lost.jsonl").symlink_to("nowhere")
    dataset = run(tmp_path, source, **SMALL)
    assert {text for _, text in contents(dataset)} == {f"document {i}" for i in range(9)}
    expected = {
        "links": ["k", "l.jsonl", "lost.jsonl"],
        "hidden": ["._a.parquet", ".ipynb_checkpoints", ".x.jsonl"],
        "other_kinds": ["t.csv", "notes.md"],
    }
    left_out = dataset.meta["left_out"]
    assert list(left_out) == list(expected)
    for reason, names in expected.items():
        assert left_out[reason]["number"] == len(names)
        assert [Path(name).name for name in left_out[reason]["names"]] == names
    links, hidden, others = [line for line in printed(capsys) if line.startswith("left out: ")]
    assert links.startswith("left out: 3 symbolic links (")
    assert links.endswith("/s/lost.jsonl): --follow_links reads them")
    assert hidden.startswith("left out: 3 hidden files or folders (")
    assert others.startswith("left out: 2 files of another kind (")


def test_follow_links_reads_every_file_and_folder_once(tmp_path):
    source = a_folder(tmp_path)
    (source / "k").symlink_to("../store/k")
    (source / "l.jsonl").symlink_to("../store/l.jsonl")
    (tmp_path / "store" / "k" / "round").symlink_to("../../s")  # leads back
    (source / "g" / "up").symlink_to("..")
    (source / "copy.jsonl").symlink_to("a.jsonl")
    dataset = run(tmp_path, source, follow_links=True, **SMALL)
    expected = [f"document {i}" for i in [*range(9), 10, 11]]
    assert sorted(text for _, text in contents(dataset)) == sorted(expected)
    assert dataset.meta["left_out"]["repeated"]["number"] == 3
    assert "links" not in dataset.meta["left_out"]
    (source / "lost.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"s/lost.jsonl is a symbolic link that leads nowhere"):
        run(tmp_path, source, follow_links=True, overwrite=True, **SMALL)


def test_a_source_without_files_names_those_that_were_left_out(tmp_path):
    write(tmp_path / "store" / "a.jsonl", numbered(0))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.jsonl").symlink_to("../store/a.jsonl")
    write(tmp_path / "s" / "a.csv", b"text\n")
    with pytest.raises(UserError, match="nothing to read there; left out: 1 symbolic link") as e:
        run(tmp_path, tmp_path / "s")
    assert "s/a.jsonl): --follow_links reads them; left out: 1 file of another kind" in str(e.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "store"]


def test_a_glob_leaves_out_links_and_folders_and_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_folder(tmp_path)
    write(tmp_path / "t" / "sub" / "x.jsonl", numbered(20))
    write(tmp_path / "t" / "y.jsonl", numbered(21))
    (tmp_path / "t" / "z.jsonl").symlink_to("../store/l.jsonl")
    (tmp_path / "t" / "k").symlink_to("../store/k")
    dataset = run(tmp_path, "t/*", **SMALL)
    assert [text for _, text in contents(dataset)] == ["document 21"]
    left_out = dataset.meta["left_out"]
    assert left_out["folders"] == {"number": 1, "names": ["t/sub"]}
    assert left_out["links"] == {"number": 2, "names": ["t/k", "t/z.jsonl"]}
    dataset = run(tmp_path, "t/**/*.jsonl", follow_links=True, overwrite=True, **SMALL)
    expected = {f"document {i}" for i in (10, 11, 20, 21)}
    assert {text for _, text in contents(dataset)} == expected
    monkeypatch.chdir(tmp_path / "t")  # a link that the user named is none of a folder's
    assert run(tmp_path, "z.jsonl", overwrite=True, **SMALL).meta["documents"] == 1


def test_a_data_dir_is_never_read_as_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", numbered(*range(40)))
    run(tmp_path, ".", data_dir="out", val_fraction=0)
    again = run(tmp_path, ".", data_dir="out", val_fraction=0, overwrite=True)
    assert again.meta["documents"] == 40
    assert not again.meta["left_out"]
    run(tmp_path, ".", data_dir="out", val_fraction=0)  # and its own files change no source
    for source in ("out", "out/meta.json", "out/*.parquet"):
        with pytest.raises(UserError, match=r"lies in .*out, which this program writes"):
            run(tmp_path, source, data_dir="out", overwrite=True)


def test_files_with_names_that_are_not_utf8_are_read(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    name = os.fsdecode(b"na\xefve.jsonl")
    write(Path(folder, name), b'{"text": "document 0"}\n')
    write(Path(folder, "b.txt"), b"document 1")
    pq.write_table(pa.table({"text": ["document 2"]}), Path(folder, "c.parquet").open("wb"))
    dataset = run(tmp_path, folder, data_dir=f"{folder}/out", **SMALL)
    assert {domain for domain, _ in contents(dataset)} == {"na\\xefve", "caf\\xe9", "c"}
    assert dataset.meta["documents"] == 3
    with pytest.raises(UserError, match="no column"):
        run(tmp_path, Path(folder, "c.parquet"), text_key="body")


# --- packed files -------------------------------------------------------------------


def long_window(raw, log):
    """Bytes packed with a window of 2^log bytes, as by zstd --long=<log>."""
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(raw) + packer.flush()


SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"12345"  # a frame that pzstd writes


@pytest.mark.parametrize(
    "name, packed",
    [
        ("a.jsonl.zst", lambda raw: long_window(raw, 28)),
        ("a.jsonl.zst", lambda raw: long_window(raw, 31)),
        ("a.jsonl.zst", lambda raw: SKIPPABLE + zstandard.compress(raw) + SKIPPABLE),
        ("a.jsonl.gz", lambda raw: gzip.compress(raw) + bytes(100_000)),
        ("a.jsonl.gz", lambda raw: gzip.compress(raw) + bytes(100) + gzip.compress(b"")),
        ("a.jsonl.bz2", lambda raw: bz2.compress(raw[:100]) + bz2.compress(raw[100:])),
        ("a.jsonl.xz", lambda raw: lzma.compress(raw[:100]) + bytes(8) + lzma.compress(raw[100:])),
    ],
)
def test_a_packed_file_is_read_in_every_valid_form(tmp_path, name, packed):
    raw = numbered(*range(40))
    dataset = run(tmp_path, write(tmp_path / name, packed(raw)))
    assert dataset.meta["documents"] == 40
    assert not any(dataset.meta["skipped"].values())


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_packed_file_is_refused_with_the_reason(tmp_path, suffix):
    raw = numbered(*range(400))
    packed = PACK[suffix](raw)
    cut_short = [
        b"",
        packed[: len(packed) // 2],
        packed[:-1],
        packed + packed[:1],
        packed + packed[:-1],
    ]
    for content in cut_short:
        with pytest.raises(UserError, match=r"is damaged or cut short \(.*fetch it again"):
            run(tmp_path, write(tmp_path / f"a.jsonl{suffix}", content))
    if suffix != ".gz":
        flipped = bytearray(packed)
        flipped[len(packed) // 2] ^= 4
        with pytest.raises(UserError, match=r"is damaged or cut short|something else"):
            run(tmp_path, write(tmp_path / f"a.jsonl{suffix}", bytes(flipped)))
    with pytest.raises(UserError, match=r"or no \w+ file \(it begins with b'{\"text'\)"):
        run(tmp_path, write(tmp_path / f"a.jsonl{suffix}", raw))
    with pytest.raises(UserError, match=r"data with something else \(b'garbag'\)") as error:
        run(tmp_path, write(tmp_path / f"a.jsonl{suffix}", packed + b"garbage"))
    assert f"head -c {len(packed)} " in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.jsonl{suffix}"]


def test_a_file_packed_with_a_zstd_dictionary_is_not_called_damaged(tmp_path):
    words = [b"hello world %d foo bar" % i * 20 for i in range(1000)]
    dictionary = zstandard.train_dictionary(1000, words)
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(numbered(0))
    with pytest.raises(UserError, match="was packed with a zstd dictionary of its own"):
        run(tmp_path, write(tmp_path / "a.jsonl.zst", packed))


# --- parquet --------------------------------------------------------------------------


class Keys(encryption.KmsClient):
    """Keeps keys badly."""

    def wrap_key(self, key, master):
        return base64.b64encode(key)

    def unwrap_key(self, key, master):
        return base64.b64decode(key)


def encrypt(path, plaintext_footer):
    keys = {"column_keys": {"key": ["text"]}, "plaintext_footer": plaintext_footer}
    settings = encryption.EncryptionConfiguration(footer_key="footer", **keys)
    factory = encryption.CryptoFactory(lambda connection: Keys())
    connection = encryption.KmsConnectionConfig()
    properties = factory.file_encryption_properties(connection, settings)
    content = pa.table({"text": ["document"] * 40})
    with pq.ParquetWriter(path, content.schema, encryption_properties=properties) as file:
        file.write_table(content)


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_an_encrypted_parquet_file_is_refused(tmp_path, plaintext_footer):
    """With a readable footer pyarrow would end the process when it reads the text."""
    encrypt(tmp_path / "a.parquet", plaintext_footer)
    with pytest.raises(UserError, match=r"a.parquet is encrypted: decrypt it first"):
        run(tmp_path, tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_refused_with_the_reason(tmp_path):
    path = write(tmp_path / "a.parquet", b"text\nhello\n")
    with pytest.raises(UserError, match=r"is no parquet file \(it begins with b'text'\)"):
        run(tmp_path, path)
    parquet(path, texts(2000))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 4
    for damaged in (whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        with pytest.raises(UserError, match=r"a.parquet is damaged or cut short \("):
            run(tmp_path, write(path, damaged))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_two_parquet_columns_of_one_name_are_refused_only_if_they_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    names = ["n", "text", "n", "text"]
    columns = [pa.array([i]) for i in range(4)]
    pq.write_table(pa.Table.from_arrays(columns, names=names), path)
    with pytest.raises(UserError, match="has 2 columns 'text': rename all but one"):
        run(tmp_path, path)
    documents = [f"document {i}" for i in range(40)]
    columns = [pa.array(range(40)), pa.array(documents), pa.array(range(40))]
    pq.write_table(pa.Table.from_arrays(columns, names=["n", "text", "n"]), path)
    assert run(tmp_path, path).meta["documents"] == 40


def test_parquet_files_of_any_encoding_give_the_same_chunks(tmp_path):
    column = ["x", "xy", "xyz"] * 20
    ways = [
        {"compression": "brotli"},
        {"compression": "lz4"},
        {"compression": "none", "data_page_version": "2.0"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"row_group_size": 7, "write_page_index": True, "write_page_checksum": True},
    ]
    hashes = set()
    for way in ways:
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", **way)
        hashes.add(run(tmp_path, tmp_path / "a.parquet", overwrite=True, **SMALL).hash)
    assert len(hashes) == 1


def test_a_parquet_file_without_rows_has_no_document(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "s.parquet")
    with pytest.raises(UserError, match=r"no document in .*s.parquet"):
        run(tmp_path, tmp_path / "s.parquet")


def test_a_parquet_row_that_is_not_utf8_is_skipped_alone(tmp_path):
    good = [f"document {i}".encode() for i in range(40)]
    kinds = [pa.binary(), pa.large_binary(), pa.binary_view()]
    columns = {str(kind): pa.array([*good, b"caf\xe9", None], kind) for kind in kinds}
    columns["dictionary"] = columns["binary"].dictionary_encode()
    for column in columns.values():
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        dataset = run(tmp_path, tmp_path / "a.parquet", overwrite=True)
        skipped = {why: n for why, n in dataset.meta["skipped"].items() if n}
        assert dataset.meta["documents"] == 40
        assert skipped == {"not_utf8": 1, "no_text": 1}


def test_the_largest_page_is_as_large_as_pyarrow_wrote_it(tmp_path):
    column = [f"{i:05}" * 200 for i in range(3000)]
    for options in ({}, {"data_page_version": "2.0"}, {"use_dictionary": False}):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": column}), path, compression="zstd", **options)
        with open(path, "rb") as file:
            column_chunk = pq.ParquetFile(file).metadata.row_group(0).column(0)
            largest = largest_page(file, column_chunk)
        # rows are written 1024 at a time, and a page with more than a megabyte is full
        assert 1004 * 1024 < largest < 1004 * 2100
        assert largest < column_chunk.total_uncompressed_size


# --- the same records in every format ---------------------------------------------------


def outcome(dataset):
    """The documents, and the counts of what was skipped or had no domain."""
    return contents(dataset), dataset.meta["skipped"], dataset.meta["no_domain"]


ODD = [  # under text_key: what is no text
    pa.array(range(40)),
    pa.array([i / 3 for i in range(40)]),
    pa.array([i % 2 == 0 for i in range(40)]),
    pa.array([datetime.date(2020, 1, 1)] * 40),
    pa.array([datetime.datetime(2020, 1, 1)] * 40, pa.timestamp("ns", "Europe/Berlin")),
    pa.array([["a"]] * 40),
    pa.array([{"a": "b"}] * 40),
    pa.array([1, 2] * 20).dictionary_encode(),
    pa.nulls(40),
]


@pytest.mark.parametrize("column", ODD, ids=lambda column: str(column.type))
def test_a_parquet_cell_that_is_not_text_is_counted_as_no_text(tmp_path, column):
    write(tmp_path / "s" / "a.jsonl", numbered(*range(40)))
    pq.write_table(pa.table({"text": column}), tmp_path / "s" / "b.parquet")
    dataset = run(tmp_path, tmp_path / "s", **SMALL)
    assert dataset.meta["documents"] == 40
    assert dataset.meta["skipped"]["no_text"] == 40


def test_a_json_value_that_is_not_text_is_counted_as_no_text(tmp_path):
    rows = [{"text": value} for value in [3, 0.5, True, None, ["a"], {"a": "b"}]]
    source = write(tmp_path / "a.jsonl", numbered(*range(40)) + json_lines(rows))
    dataset = run(tmp_path, source, **SMALL)
    assert dataset.meta["documents"] == 40
    assert dataset.meta["skipped"]["no_text"] == 6


DOMAINS = {  # of the fifth row on: none
    "text": pa.array([f"name {i}" if i < 5 else None for i in range(8)]),
    "integers": pa.array([i if i < 5 else None for i in range(8)]),
    "floats": pa.array([i / 2 if i < 5 else None for i in range(8)]),
    "truth": pa.array([i > 2 if i < 5 else None for i in range(8)]),
    "empty": pa.array([f"name {i}" if i < 5 else "" for i in range(8)]),
    "categories": pa.array(["x", "y", "x", "x", "y", None, None, None]).dictionary_encode(),
    "lists": pa.array([["cs.CL"]] * 8),
}


@pytest.mark.parametrize("kind", list(DOMAINS))
def test_domains_are_the_same_in_json_and_in_parquet(tmp_path, kind, capsys):
    column = DOMAINS[kind]
    documents = [f"document {i}" for i in range(8)]
    meta = pa.StructArray.from_arrays([column], names=["pile_set_name"])
    pq.write_table(pa.table({"text": documents, "meta": meta}), tmp_path / "a.parquet")
    rows = []
    for text, value in zip(documents, column.to_pylist(), strict=True):
        rows.append(record(value, text))
    write(tmp_path / "a.jsonl", json_lines(rows))
    one = run(tmp_path, tmp_path / "a.jsonl", **SMALL)
    line = f"{one.meta['no_domain']} documents without meta.pile_set_name"
    assert line in capsys.readouterr().out
    other = run(tmp_path, tmp_path / "a.parquet", overwrite=True, **SMALL)
    assert outcome(one) == outcome(other)
    assert one.meta["no_domain"] == (8 if kind == "lists" else 3)
    assert one.hash == other.hash


def test_a_domain_is_found_in_structs_maps_flat_keys_and_json_texts(tmp_path, capsys):
    name = {"pile_set_name": "ArXiv"}
    kinds = {
        "nested": {"meta": name},
        "json": {"meta": json.dumps(name)},
        "flat": {"meta.pile_set_name": "ArXiv"},
        "none": {"other": 1},
        "no json": {"meta": "{not json"},
    }
    for kind, entries in kinds.items():
        rows = [{"text": f"{kind} {i}", **entries} for i in range(3)]
        write(tmp_path / "s" / f"{kind}.jsonl", json_lines(rows))
    pairs = pa.array([[("url", "x"), ("pile_set_name", "ArXiv")], None, []] * 3, MAP)
    columns = {
        "map": pairs,
        "json column": pa.array([json.dumps(name)] * 3),
        "struct": pa.array([name] * 3),
        "json type": pa.array([json.dumps(name)] * 3, pa.json_()),
    }
    for kind, column in columns.items():
        documents = [f"{kind} {i}" for i in range(len(column))]
        path = tmp_path / "s" / f"{kind}.parquet"
        pq.write_table(pa.table({"text": documents, "meta": column}), path)
    flat = pa.table({"text": ["flat column"], "meta.pile_set_name": ["ArXiv"]})
    pq.write_table(flat, tmp_path / "s" / "flat column.parquet")
    dataset = run(tmp_path, tmp_path / "s", **SMALL)
    by_domain = dataset.meta["by_domain"]
    counts = {domain: by_domain[domain]["train"]["documents"] for domain in by_domain}
    assert counts == {"ArXiv": 3 * 3 + 3 + 9 + 1, "none": 3, "no json": 3, "map": 6}
    assert dataset.meta["no_domain"] == 12
    assert "12 documents without meta.pile_set_name, under their file's name" in printed(capsys)


MAP = pa.map_(pa.string(), pa.string())


def test_documents_without_a_domain_are_counted_up_to_the_limit(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(100)]
    source = write(tmp_path / "a.jsonl", json_lines(rows))
    dataset = run(tmp_path, source, limit_tokens=30, **SMALL)
    assert dataset.meta["documents"] == 3
    assert dataset.meta["no_domain"] == 3


def test_a_txt_is_not_counted_as_without_a_domain(tmp_path, capsys):
    write(tmp_path / "t" / "a.txt", b"a text has a folder " * 9)
    dataset = run(tmp_path, tmp_path / "t", val_fraction=0)
    assert dataset.domains == ["t"]
    assert dataset.meta["no_domain"] == 0
    assert "without" not in capsys.readouterr().out


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("suffix", list(PACK))
def test_a_byte_order_mark_is_left_out_of_texts(tmp_path, suffix):
    raw = numbered(0, 1, 2)
    pack = PACK[suffix]
    for kind in (".jsonl", ".json"):
        # the second mark is that of a file which was joined to the first one
        source = write(tmp_path / f"a{kind}{suffix}", pack(BOM + raw + BOM + numbered(3)))
        dataset = run(tmp_path, source, overwrite=True, **SMALL)
        assert [text for _, text in contents(dataset)] == [f"document {i}" for i in range(4)]
        assert not any(dataset.meta["skipped"].values())
    source = write(tmp_path / f"a.txt{suffix}", pack(BOM + b"hello\r\nworld"))
    dataset = run(tmp_path, source, overwrite=True, **SMALL)
    assert contents(dataset) == [(tmp_path.name, "hello\r\nworld")]  # line ends stay
    source = write(tmp_path / f"b.json{suffix}", pack(BOM + b'[{"text": "an array"}]\n'))
    with pytest.raises(UserError, match="is one JSON array"):
        run(tmp_path, source, overwrite=True)
    source = write(tmp_path / f"c.txt{suffix}", pack(BOM))
    with pytest.raises(UserError, match=r"no document in .*c.txt"):
        run(tmp_path, source, overwrite=True)


def test_a_record_with_a_number_too_long_for_python_keeps_its_text(tmp_path):
    long = b"1" * 5000
    rows = [
        b'{"text": "long", "n": ' + long + b', "meta": {"pile_set_name": "a"}}',
        b'{"text": "not a number", "n": NaN, "m": -Infinity, "meta": {"pile_set_name": "a"}}',
        b'{"text": ' + long + b"}",
        b'{"text": "a domain", "meta": {"pile_set_name": ' + long + b"}}",
    ]
    dataset = run(tmp_path, write(tmp_path / "f.jsonl", b"\n".join(rows)), **SMALL)
    assert contents(dataset) == [("a", "long"), ("a", "not a number"), ("f", "a domain")]
    assert dataset.meta["skipped"]["no_text"] == 1
    assert dataset.meta["long_domain"] == 1


# --- what is too long -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "b/a.txt"])
def test_a_record_that_is_too_long_is_counted(tmp_path, name, capsys):
    middle = "x" * (MB + 1)
    documents = [("a", "document 0"), ("a", middle), ("a", "y" * 1_000_000), ("a", "document 3")]
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, documents)
    elif name == "b/a.txt":
        write(path, "\n".join(text for _, text in documents).encode())
    else:
        write(path, PACK[path.suffix.removesuffix("l").removesuffix(".json")](lines(documents)))
    dataset = run(tmp_path, path, max_document_mb=1, **SMALL)
    assert dataset.meta["skipped"]["too_long"] == 1
    text = "".join(text for _, text in contents(dataset))
    assert text.replace("\n", "") == "document 0" + "y" * 1_000_000 + "document 3"
    output = "\n".join(printed(capsys))
    assert "\n1 record longer than --max_document_mb=1" in output
    again = run(tmp_path, path, max_document_mb=2, overwrite=True, **SMALL)
    assert again.meta["skipped"]["too_long"] == 0
    write(tmp_path / "long.jsonl", lines([("a", middle)])[:-1])  # the last line has no end
    with pytest.raises(UserError, match=r"1 too_long.*raise --max_document_mb=1"):
        run(tmp_path, tmp_path / "long.jsonl", max_document_mb=1, overwrite=True)


def test_a_large_json_array_is_refused_as_an_array(tmp_path):
    array = json.dumps([record("a", "x" * 1000)] * 2000).encode()
    for raw in (array, array + b"\n", b" \n" + array):
        source = write(tmp_path / "a.json.gz", gzip.compress(raw))
        with pytest.raises(UserError, match="is one JSON array: write a record a line, as `jq"):
            run(tmp_path, source, max_document_mb=1)


def test_a_document_with_a_long_domain_takes_the_name_of_its_file(tmp_path, capsys):
    documents = [("x" * 200, "document 0"), ("y" * 201, "document 1"), ("z" * MB, "document 2")]
    write(tmp_path / "s" / "a.jsonl", lines(documents))
    parquet(tmp_path / "s" / "b.parquet", documents)
    dataset = run(tmp_path, tmp_path / "s", **SMALL)
    assert dataset.domains == ["x" * 200, "a", "b"]
    assert dataset.meta["long_domain"] == 4
    out = capsys.readouterr().out
    assert "4 documents with a domain of over 200 characters, under their file's name" in out
    assert len(out) < 2000


def test_a_row_group_with_a_page_too_large_is_skipped(tmp_path):
    """The second row group's one page is of 80 MB, which takes more than --max_document_mb=1."""
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="zstd") as file:
        file.write_table(pa.table({"text": [f"document {i}" for i in range(40)]}))
        file.write_table(pa.table({"text": ["in the group of", "x" * (80 * MB)]}))
        file.write_table(pa.table({"text": [f"document {i}" for i in range(40, 60)]}))
    dataset = run(tmp_path, path, max_document_mb=1, **SMALL)
    assert dataset.meta["documents"] == 60
    assert dataset.meta["skipped"]["too_long"] == 2
    dataset = run(tmp_path, path, max_document_mb=16, overwrite=True, **SMALL)
    assert dataset.meta["documents"] == 61
    assert dataset.meta["skipped"]["too_long"] == 1


def children(pid):
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    return pids


def peak_memory(arguments):
    """Runs a command. Returns its output, and the MB that it and its children needed together."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    peaks = {}
    while process.poll() is None:
        try:
            for pid in [process.pid, *children(process.pid)]:
                status = Path(f"/proc/{pid}/status").read_text()
                peak = int(status.partition("VmHWM:")[2].split()[0])
                peaks[pid] = max(peak, peaks.get(pid, 0))
        except (OSError, IndexError):  # a process ended meanwhile
            continue
        time.sleep(0.002)
    output, _ = process.communicate()
    assert process.returncode == 0
    return output, sum(peaks.values()) / 1024


def zstd_bomb(path):
    """A line of 700 MB in 22 KB."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = packer.compress(numbered(*range(40)) + b'{"text": "')
    for _ in range(700):
        packed += packer.compress(b"a" * MB)
    packed += packer.compress(b'"}\n' + numbered(*range(40, 80)))
    write(path, packed + packer.flush())


def parquet_bomb(path):
    """A text of 8 MB, 200 times, in a kilobyte."""
    good = [f"document {i}" for i in range(80)]
    indices = [*range(80), *[80] * 200]
    column = pa.DictionaryArray.from_arrays(pa.array(indices), pa.array([*good, "a" * (8 * MB)]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False)


@pytest.mark.parametrize(
    "name, make, too_long",
    [("a.jsonl.zst", zstd_bomb, 1), ("a.parquet", parquet_bomb, 200)],
)
def test_a_decompression_bomb_stays_within_the_memory_that_the_help_promises(
    tmp_path, name, make, too_long
):
    make(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 50_000
    options = ["--max_document_mb=4", "--workers=1", "--tokenizer=byte", "--block_size=8"]
    options.append("--val_fraction=0")
    places = [f"--source={tmp_path / name}", f"--data_dir={tmp_path / 'out'}"]
    output, megabytes = peak_memory([sys.executable, SCRIPT, *options, *places])
    assert f"80 documents; skipped: {too_long} too_long" in output
    assert megabytes < 500  # the help promises 1000 + 1 * (200 + 80 * 4)


def test_the_worst_text_stays_within_the_memory_that_the_help_promises(tmp_path):
    """One word of 3 MB, for which the tokenizer takes 50 bytes a byte; records of empty lists, of
    which Python makes 20 bytes a byte."""
    word = b'{"text": "' + b"a" * (3 * MB) + b'"}\n'
    nested = b'{"text": "short", "x": [' + b"{}," * MB + b"1]}\n"
    write(tmp_path / "a.jsonl", numbered(*range(40)) + word + nested)
    options = ["--max_document_mb=4", "--workers=1", "--block_size=8", "--val_fraction=0"]
    places = [f"--source={tmp_path / 'a.jsonl'}", f"--data_dir={tmp_path / 'out'}"]
    output, megabytes = peak_memory([sys.executable, SCRIPT, *options, *places])
    assert "42 documents; skipped: nothing" in output
    assert megabytes < 1000 + 1 * (200 + 80 * 4)  # as the help promises


def test_the_help_says_how_much_memory_is_needed():
    command = [sys.executable, SCRIPT, "--help"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    assert "1 GB + workers * (0.2 GB + 80 * max_document_mb MB)" in output
    assert "--max_document_mb=64 " in output


def test_a_part_stores_tokens_with_64_bit_offsets():
    """Of bytes as of pyarrow's binary columns; a document of 2 GB is too much for a test."""
    assert COLUMNS.field("tokens").type == pa.large_binary()


# --- domains asked for --------------------------------------------------------------------


def test_a_domain_with_a_comma_in_its_name_can_be_asked_for(tmp_path):
    names = ["cs.CL, cs.LG", "cs.CL", "a,b"]
    documents = [(names[i % 3], f"document {i}") for i in range(60)]
    source = write(tmp_path / "a.jsonl", lines(documents))
    asked = {
        "cs.CL, cs.LG": {"cs.CL, cs.LG", "cs.CL"},
        "cs.CL\\, cs.LG": {"cs.CL, cs.LG"},
        "a\\,b,cs.CL": {"a,b", "cs.CL"},
        "a,b": {"a,b"},
        " a,b , cs.CL": {"a,b", "cs.CL"},
    }
    for spec, expected in asked.items():
        dataset = run(tmp_path, source, domains=spec, overwrite=True, **SMALL)
        assert {*dataset.domains} == expected
    for spec, missing in {"a,b,c": "'c'", "a": "'a'", "cs.CL, cs.X": "'cs.X'"}.items():
        with pytest.raises(UserError, match=f"no document of {missing}; there is") as error:
            run(tmp_path, source, domains=spec, overwrite=True, **SMALL)
        assert "within a name a comma is written \\," in str(error.value)


def test_domains_takes_thousands_of_names():
    wanted = Wanted(",".join(f"name {i}" for i in range(4000)))
    assert wanted.has("name 7,name 8")
    assert not wanted.has("name 7, name 8")
    assert len(wanted.missing(["name 7"])) == 3999


def test_a_message_about_many_domains_names_a_few(tmp_path, capsys):
    documents = [(f"domain {i}", f"document {i}") for i in range(3000)]
    source = write(tmp_path / "a.jsonl", lines(documents))
    dataset = run(tmp_path, source, **SMALL)
    out = capsys.readouterr().out
    assert len(dataset.domains) == 3000
    assert out.count("\n") < 50
    assert "and 2,960 smaller domains: " in out
    with pytest.raises(UserError, match=r"no document of 'x'.*3000 in all") as error:
        run(tmp_path, source, domains="x", overwrite=True, **SMALL)
    assert len(str(error.value)) < 1000


# --- whether a source has changed -----------------------------------------------------------


def test_changes_names_the_files_that_changed():
    was = inventory("s", [("a", 1, 1), ("b", 1, 1), ("c", 1, 1)])
    now = inventory("s", [("a", 1, 1), ("b", 1, 2), ("d", 1, 1)])
    assert changes(was, was) == ""
    assert changes(was, now) == "b has changed, c is gone, d is new"
    many = [(f"{i}", 1, 1) for i in range(LISTED + 1)]
    was = inventory("s", many)
    now = inventory("s", [*many[1:], ("0", 1, 2)])
    assert "names" not in was
    assert changes(was, now) == "some of its 1,001 files have changed"


def test_the_reader_knows_every_option_that_changes_the_content():
    assert Config().makes() == data.PREPARED_BY


def test_records_of_a_hub_dataset_are_read_like_those_of_files(tmp_path):
    rows = [{**record("a", "document 0"), "n": 1}, {"text": "document 1"}, {"text": 7}]
    write(tmp_path / "set" / "a.jsonl", BOM + json_lines(rows))
    dataset = run(tmp_path, "", dataset=str(tmp_path / "set"), **SMALL)
    assert contents(dataset) == [("a", "document 0"), ("set", "document 1")]
    assert dataset.meta["skipped"]["no_text"] == 1
    assert dataset.meta["no_domain"] == 1
