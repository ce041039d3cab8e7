"""Where a chunk's text comes from: train_docs.parquet, read in both directions (prepare_pile.py says how documents lie in chunks)."""

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np

from pile.tokenizers import whole_characters
from system.errors import UserError
from system.files import atomic, short
from system.terminal import progress


class Documents:
    """The table of train_docs.parquet, some row groups at a time: a chunk's documents, a document's chunks."""

    def __init__(self, run):
        import pyarrow.parquet

        from pile.pack import DOCUMENTS

        self.run, self.path, self.cached = run, run.data.path / "train_docs.parquet", {}
        self.cure = run.data.prepare_again()
        run.data.check_table(self.path.name)
        try:
            raw = open(self.path, "rb")  # not by its name, which may be no UTF-8
            # Arrow's own threads sometimes abort a process as it ends (apache/arrow#34314): none
            options = dict(pre_buffer=False, page_checksum_verification=True)
            self.file = pyarrow.parquet.ParquetFile(raw, **options)
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path} is missing or damaged ({short(e)}): {self.cure}") from e
        if self.file.schema_arrow != DOCUMENTS:
            raise UserError(f"{self.path} is damaged (its columns are others): {self.cure}")
        groups, column = (
            range(self.file.num_row_groups),
            self.file.schema_arrow.names.index("first_chunk"),
        )
        of = [self.file.metadata.row_group(i) for i in groups]
        self.first = np.array(
            [
                group.column(column).statistics.min if group.num_rows else np.iinfo("i8").max
                for group in of
            ]
        )

    def group(self, i):
        """A row group -> {column: array}."""
        if i not in self.cached:
            columns = self.read([i]).columns
            group = {name: c.to_numpy() for name, c in zip(self.file.schema_arrow.names, columns)}
            n, width = self.run.data.train.rows.shape
            inside = (group["first_chunk"] >= 0) & (group["first_chunk"] < n)
            inside &= (group["first_token"] >= 0) & (group["first_token"] < width)
            known = np.isin(group["domain"], self.run.domains)
            if not (inside & known & (group["n_tokens"] >= 0)).all():
                raise UserError(f"{self.path} speaks of chunks that are not there: {self.cure}")
            self.cached = {i: group}
        return self.cached[i]

    def read(self, groups, columns=None):
        """Row groups -> a pyarrow Table. Raises UserError where a page is damaged."""
        try:
            return self.file.read_row_groups(groups, columns, use_threads=False)
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path} is damaged ({short(e)}): {self.cure}") from e

    def stream(self, d):
        """The chunks of a domain, in their order: documents go on from one to the next."""
        return np.flatnonzero(self.run.data.train.domain == d)

    def of_chunk(self, chunk):
        """[{doc, source, record, n_tokens, begins: token of this chunk, negative where it began in an earlier one}], in order."""
        domain = self.run.domains[int(self.run.data.train.domain[chunk])]
        found, i = [], int(np.searchsorted(self.first, chunk, "right")) - 1
        while i >= 0:
            group = self.group(i)
            before = np.flatnonzero((group["first_chunk"] <= chunk) & (group["domain"] == domain))[
                ::-1
            ]
            for row in before:
                begun, n = int(group["first_chunk"][row]), int(group["n_tokens"][row])
                apart = (
                    0
                    if begun == chunk
                    else np.count_nonzero(
                        self.run.data.train.domain[begun:chunk] == self.run.data.train.domain[chunk]
                    )
                )
                begins = int(group["first_token"][row]) - apart * self.run.data.train.rows.shape[1]
                if (
                    begins + n >= 0 and begins <= self.run.width
                ):  # its <eot>, or more, in what was trained on
                    doc, source, record = (group[key][row] for key in ("doc", "source", "record"))
                    found.append(
                        dict(
                            doc=int(doc),
                            source=source,
                            record=int(record),
                            n_tokens=n,
                            begins=int(begins),
                        )
                    )
                if begun < chunk:
                    return found[::-1]
            i -= 1
        return found[::-1]

    def find(self, doc):
        """A document's row of the table, as a dict. Raises UserError for a number that is none there."""
        rows = self.rows_of(doc) if 0 <= doc < 2**63 else []
        if not rows:
            why = "it is in the validation set, fills no chunk, or does not exist"
            raise UserError(
                f"document {doc} is not in {self.path}: {why}. `values.py chunk` says which documents lie in a chunk"
            )
        return rows[0]

    def rows_of(self, doc):
        import pyarrow.parquet

        chosen = dict(filters=[("doc", "==", doc)], page_checksum_verification=True)
        try:
            with open(self.path, "rb") as raw:
                return pyarrow.parquet.read_table(raw, **chosen).to_pylist()
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path} is damaged ({short(e)}): {self.cure}") from e

    def pieces(self):
        """Documents by row group -> (columns {name: (n,)}, document, chunk, begin, end): four int64 (m,), one entry for every chunk a document
        lies in, begin and end in the row's tokens, its <eot> counted; ascending in document (the row of the columns) and place."""
        (_, W), domains, streams = self.run.data.train.rows.shape, np.array(self.run.domains), {}
        for i in range(len(self.first)):
            columns = self.group(i)
            n, start, stream_of = (
                columns["n_tokens"].astype(np.int64) + 1,
                columns["first_token"].astype(np.int64),
                columns["domain"],
            )
            parts = []
            for name in np.unique(stream_of.astype(str)) if len(n) else ():
                if name not in streams:
                    streams[name] = self.stream(int(np.flatnonzero(domains == name)[0]))
                own = np.flatnonzero(stream_of == name)
                first = np.searchsorted(streams[name], columns["first_chunk"][own])
                last = np.minimum(
                    first + (start[own] + n[own] - 1) // W, len(streams[name]) - 1
                )  # the end of the last one may fill no chunk
                count = last - first + 1
                document, nth = (
                    np.repeat(own, count),
                    np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count),
                )
                begin = start[document] - nth * W
                where = streams[name][np.repeat(first, count) + nth]
                parts.append(
                    np.stack([document, where, begin.clip(0), (begin + n[document]).clip(max=W)])
                )
            found = np.concatenate(parts, 1) if parts else np.zeros((4, 0), np.int64)
            yield columns, *found[:, np.argsort(found[0], kind="stable")]

    def by_chunk(self, chunks):
        """int64, ascending -> [(some of them (n,), bounds (n + 1,), docs)]: the i-th chunk's documents are docs[bounds[i] : bounds[i + 1]]."""
        import pyarrow as pa
        import pyarrow.compute as pc

        n, (_, W), of = (
            len(self.run.values),
            self.run.data.train.rows.shape,
            self.run.data.train.domain,
        )
        columns, names, last = (
            ["doc", "domain", "first_chunk", "first_token"],
            pa.array(self.run.domains),
            np.zeros((3, 0), np.int64),
        )
        for i in range(0, len(self.first), 8):
            table = self.read(range(i, min(i + 8, len(self.first))), columns)
            doc, domain, chunk, token = (
                column.to_numpy()
                for column in table.set_column(
                    1, "domain", pc.index_in(table["domain"], names)
                ).columns
            )
            new = np.stack([domain, (domain * np.int64(n) + chunk) * W + token, doc])
            rows = np.concatenate(
                [last, new], 1
            )  # the last document of each domain so far may go on
            domain, place, doc = rows = rows[:, np.argsort(rows[1])]
            last = rows[:, np.append(domain[1:] != domain[:-1], True)]
            end = (
                np.searchsorted(chunks, self.first[i + 8])
                if i + 8 < len(self.first)
                else len(chunks)
            )
            some, chunks = chunks[:end], chunks[end:]
            start = (of[some] * np.int64(n) + some) * W
            begin, end = (
                np.searchsorted(place, start),
                np.searchsorted(place, start + self.run.width, "right"),
            )
            begin -= (
                place.take(begin, mode="clip") != start
            )  # where none begins with the chunk, one goes on into it
            bounds = np.append(0, np.cumsum(end - begin))
            yield (
                some,
                bounds,
                doc[np.arange(bounds[-1]) + np.repeat(begin - bounds[:-1], end - begin)],
            )


# --- texts for other trainers ---------------------------------------------------


def stretches(documents, stays, kept):
    """A record for every stretch of a document whose chunks are kept, bool (n_chunks,); or, where stays is given, bool (D,), for every document
    that stays, whole. As in the Pile: {text, meta: {pile_set_name, ...}}; part counts a document's stretches, token is where it begins."""
    run, seen = documents.run, 0
    eot, decode_bytes = run.data.meta["eot"], run.tokenizer.decode_bytes
    for columns, document, chunk, begin, end in documents.pieces():
        fine = kept[chunk] if stays is None else stays[seen + document]
        first = (
            np.append(True, (document[1:] != document[:-1]) | ~fine[:-1])[: len(fine)] & fine
        )  # of a stretch
        starts = np.flatnonzero(first)
        ends = [
            start + int(np.argmin(np.append(same, False)))
            for start, same in ((s, fine[s:t]) for s, t in zip(starts, [*starts[1:], len(fine)]))
        ]
        last, part = -1, 0
        for start, stop in zip(starts.tolist(), ends):
            row = int(document[start])
            part, last = (part + 1 if row == last else 0), row
            tokens = np.concatenate(
                [run.data.train.rows[chunk[i], begin[i] : end[i]] for i in range(start, stop)]
            )
            about = dict(
                pile_set_name=str(columns["domain"][row]),
                doc=int(columns["doc"][row]),
                source=str(columns["source"][row]),
            )
            yield dict(
                text=whole_characters(decode_bytes(tokens[tokens != eot])),
                meta=about | dict(record=int(columns["record"][row]), part=part),
            )
        seen += len(columns["doc"])


def check_export(path):
    """Raises ValueError where write_texts cannot write."""
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.zst", ".parquet")) or not path.parent.is_dir():
        raise UserError(
            f"--export={path}: write the name of a .jsonl.zst, .jsonl or .parquet file, in a folder that exists"
        )


def write_texts(path, documents, stays, kept):
    """stretches() -> a .jsonl, .jsonl.zst or .parquet file, columns text and meta, for other trainers and prepare_pile.py."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    records = (
        r
        for r in progress(stretches(documents, stays, kept), "export", unit="text", delay=1)
        if r["text"]
    )
    meta = pa.struct(
        dict(
            pile_set_name=pa.string(),
            doc=pa.int64(),
            source=pa.string(),
            record=pa.int64(),
            part=pa.int32(),
        )
    )
    with atomic(path) as f:
        if str(path).endswith(".parquet"):
            schema = pa.schema(dict(text=pa.large_string(), meta=meta))
            with pq.ParquetWriter(str(f.name), schema) as file:
                while batch := list(itertools.islice(records, 1024)):
                    file.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            return
        zipped = zstandard.ZstdCompressor().stream_writer(f, closefd=False)
        with zipped if str(path).endswith(".zst") else contextlib.nullcontext(f) as out:
            for record in records:
                out.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
