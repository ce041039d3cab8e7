"""Where a chunk's text comes from. train_docs.parquet is read in both directions: from a chunk to
its documents, and from a document to its chunks. prepare_pile.py says how documents lie in chunks.
"""

import contextlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import bounds
from pile.tokenizers import whole_characters
from system.errors import UserError
from system.files import atomic, short
from system.terminal import progress

AT_ONCE = 8  # row groups that are read together

# where a document begins, in the order of the domains' streams of tokens
BEGINNING = np.dtype([("place", "i8"), ("domain", "i8"), ("doc", "i8")])


@dataclass
class Pieces:
    """Where documents lie: an entry for every chunk that a document lies in. int64 arrays (m,),
    ascending by document and place."""

    document: np.ndarray  # the document's row, in a table that stands beside
    chunk: np.ndarray
    begin: np.ndarray  # the chunk's tokens begin to end are the document's, its <eot> among them
    end: np.ndarray

    @property
    def tokens(self):
        """How many tokens of the chunk are the document's."""
        return self.end - self.begin


class Documents:
    """The table of train_docs.parquet, of which some row groups are in memory at a time."""

    def __init__(self, run):
        """Raises UserError where the file is missing or damaged."""
        import pyarrow.parquet

        from pile.pack import DOCUMENTS

        self.run = run
        self.path = run.data.path / "train_docs.parquet"
        self.cached = {}
        self.cure = run.data.prepare_again()
        run.data.check_table(self.path.name)
        try:
            raw = open(self.path, "rb")  # not by its name, which may be no UTF-8
            # Arrow's own threads sometimes abort a process as it ends (apache/arrow#34314): none
            options = {"pre_buffer": False, "page_checksum_verification": True}
            self.file = pyarrow.parquet.ParquetFile(raw, **options)
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path} is missing or damaged ({short(e)}): {self.cure}") from e
        if self.file.schema_arrow != DOCUMENTS:
            raise UserError(f"{self.path} is damaged (its columns are others): {self.cure}")
        self.first = self.first_chunks()

    def first_chunks(self):
        """The smallest first_chunk of each row group; of an empty one, more than any."""
        column = self.file.schema_arrow.names.index("first_chunk")
        firsts = []
        for i in range(self.file.num_row_groups):
            group = self.file.metadata.row_group(i)
            nothing = np.iinfo("i8").max
            firsts.append(group.column(column).statistics.min if group.num_rows else nothing)
        return np.array(firsts)

    def group(self, i):
        """A row group as {column: array}. Raises UserError where it does not fit the data."""
        if i not in self.cached:
            table = self.read([i])
            group = {name: table[name].to_numpy() for name in self.file.schema_arrow.names}
            n, width = self.run.data.train.rows.shape
            in_chunks = (group["first_chunk"] >= 0) & (group["first_chunk"] < n)
            in_row = (group["first_token"] >= 0) & (group["first_token"] < width)
            known = np.isin(group["domain"], self.run.domains)
            if not (in_chunks & in_row & known & (group["n_tokens"] >= 0)).all():
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
        """The chunks of a domain in their order; documents go on from one to the next."""
        return np.flatnonzero(self.run.data.train.domain == d)

    # --- from a chunk to its documents ------------------------------------------------

    def of_chunk(self, chunk):
        """The documents that lie in a chunk, in order: [{doc, source, record, n_tokens, begins}].

        begins: the token of the chunk at which the document begins, negative where it began in an
        earlier chunk.
        """
        train = self.run.data.train
        domain = self.run.domains[int(train.domain[chunk])]
        documents = []  # the last one first
        i = int(np.searchsorted(self.first, chunk, "right")) - 1
        while i >= 0:
            group = self.group(i)
            candidates = (group["first_chunk"] <= chunk) & (group["domain"] == domain)
            for row in np.flatnonzero(candidates)[::-1]:
                first_chunk = int(group["first_chunk"][row])
                n_tokens = int(group["n_tokens"][row])
                between = train.domain[first_chunk:chunk] == train.domain[chunk]
                tokens_before = np.count_nonzero(between) * train.rows.shape[1]
                begins = int(group["first_token"][row]) - tokens_before
                # its <eot>, or more, is in what was trained on
                if begins + n_tokens >= 0 and begins <= self.run.width:
                    documents.append(
                        {
                            "doc": int(group["doc"][row]),
                            "source": group["source"][row],
                            "record": int(group["record"][row]),
                            "n_tokens": n_tokens,
                            "begins": int(begins),
                        }
                    )
                if first_chunk < chunk:
                    return documents[::-1]
            i -= 1
        return documents[::-1]

    def by_chunk(self, chunks):
        """The documents of many chunks, int64, ascending.

        Yields (some of the chunks (n,), bounds (n + 1,), docs). The documents of the i-th chunk are
        docs[bounds[i] : bounds[i + 1]].
        """
        domain_of = self.run.data.train.domain
        going_on = np.zeros(0, BEGINNING)  # the last document of each domain so far
        for i in range(0, len(self.first), AT_ONCE):
            following = i + AT_ONCE
            groups = range(i, min(following, len(self.first)))
            documents = np.concatenate([going_on, self.beginnings(groups)])
            documents = documents[np.argsort(documents["place"])]
            is_last = np.append(np.diff(documents["domain"]) != 0, True)
            going_on = documents[is_last]
            complete = len(chunks)
            if following < len(self.first):
                complete = np.searchsorted(chunks, self.first[following])
            some = chunks[:complete]
            chunks = chunks[complete:]
            start = self.place(domain_of[some], some, 0)
            first = np.searchsorted(documents["place"], start)
            end = np.searchsorted(documents["place"], start + self.run.width, "right")
            # where none begins with the chunk, one goes on into it
            first -= documents["place"].take(first, mode="clip") != start
            bounds = np.append(0, np.cumsum(end - first))
            rows = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], end - first)
            yield some, bounds, documents["doc"][rows]

    def beginnings(self, groups):
        """Row groups -> where their documents begin, BEGINNING (n,)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.read(groups, ["doc", "domain", "first_chunk", "first_token"])
        domain = pc.index_in(table["domain"], pa.array(self.run.domains)).to_numpy()
        beginnings = np.zeros(len(table), BEGINNING)
        first_chunk = table["first_chunk"].to_numpy()
        first_token = table["first_token"].to_numpy()
        beginnings["place"] = self.place(domain, first_chunk, first_token)
        beginnings["domain"] = domain
        beginnings["doc"] = table["doc"].to_numpy()
        return beginnings

    def place(self, domain, chunk, token):
        """A token's place in an order of all: by domain, then chunk, then token. int64."""
        n_chunks, width = self.run.data.train.rows.shape
        return (domain * np.int64(n_chunks) + chunk) * width + token

    # --- from a document to its chunks ------------------------------------------------

    def find(self, doc):
        """A document's row of the table, as a dict. Raises UserError for a number that no document
        in it has."""
        rows = self.find_all([doc]) if 0 <= doc < 2**63 else {}
        if doc not in rows:
            why = "it is in the validation set, fills no chunk, or does not exist"
            cure = f"`values.py docs {self.run.path}` lists documents by value"
            raise UserError(f"document {doc} is not in {self.path}: {why}. {cure}")
        return rows[doc]

    def find_all(self, docs):
        """The rows of some documents, given by their numbers: {number: a row of the table, as a
        dict}, of those that are in it."""
        found = {}
        for i in range(len(self.first)):
            numbers = self.read([i], ["doc"])["doc"].to_numpy()
            rows = np.flatnonzero(np.isin(numbers, docs)).tolist()
            columns = self.group(i) if rows else {}
            for row in rows:
                record = {name: column[[row]].tolist()[0] for name, column in columns.items()}
                found[record["doc"]] = record
        return found

    def pieces(self):
        """Yields for each row group its columns {name: (n,)}, and Pieces, whose documents are rows
        of those columns."""
        number_of = {name: d for d, name in enumerate(self.run.domains)}
        streams = {}  # domain's name -> its chunks
        for i in range(len(self.first)):
            columns = self.group(i)
            tables = [np.zeros((4, 0), np.int64)]
            for name in dict.fromkeys(columns["domain"]):
                if name not in streams:
                    streams[name] = self.stream(number_of[name])
                rows = np.flatnonzero(columns["domain"] == name)
                tables.append(self.lay_out(columns, rows, streams[name]))
            table = np.concatenate(tables, axis=1)
            order = np.argsort(table[0], kind="stable")
            yield columns, Pieces(*table[:, order])

    def pieces_of(self, row):
        """Pieces of one document, given by its row of the table, a dict."""
        columns = {}
        for name in ("first_chunk", "first_token", "n_tokens"):
            columns[name] = np.array([row[name]])
        stream = self.stream(self.run.domain(row["domain"]))
        return Pieces(*self.lay_out(columns, np.array([0]), stream))

    def lay_out(self, columns, rows, stream):
        """Where documents of one domain lie: their document, chunk, begin, end, int64 (4, m).

        rows: those of the columns that are the domain's. stream: the domain's chunks.
        """
        width = self.run.data.train.rows.shape[1]
        start = columns["first_token"][rows].astype(np.int64)
        length = columns["n_tokens"][rows].astype(np.int64) + 1  # with its <eot>
        first = np.searchsorted(stream, columns["first_chunk"][rows])
        last = first + (start + length - 1) // width
        last = np.minimum(last, len(stream) - 1)  # the end of the last one may fill no chunk
        count = last - first + 1
        index = np.repeat(np.arange(len(rows)), count)
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        begin = start[index] - nth * width
        end = begin + length[index]
        chunk = stream[first[index] + nth]
        return np.stack([rows[index], chunk, begin.clip(0), end.clip(max=width)])


def trained_tokens(run, pieces):
    """How many tokens of each of some Pieces were trained on, and their shares of those of the
    chunk, (m,) each. A pair's share is that of its labels, whatever fills up the row."""
    trained = run.width + 1  # tokens of a chunk that were read or predicted
    tokens = np.minimum(pieces.end, trained) - np.minimum(pieces.begin, trained)
    if not run.data.is_pairs:
        return tokens, tokens / trained
    first, end = bounds(run.data.train.answer[pieces.chunk])
    n_labels = (np.minimum(end, trained) - first).clip(min=0)
    is_own = end == pieces.end[:, None]
    return tokens, (n_labels * is_own).sum(1) / np.maximum(n_labels.sum(1), 1)


# --- texts for other trainers ---------------------------------------------------


def stretches(documents, stays, kept):
    """Yields records as in the Pile, {text, meta: {pile_set_name, doc, source, record, part}}.

    documents: Documents. stays: bool (D,), the documents that are written, whole; or None. kept:
    bool (n_chunks,); where stays is None, each stretch of a document whose chunks are kept is
    written. part: the stretch's number in its document.
    """
    run = documents.run
    rows_before = 0
    for columns, pieces in documents.pieces():
        if stays is None:
            chosen = kept[pieces.chunk]
        else:
            chosen = stays[rows_before + pieces.document]
        rows_before += len(columns["doc"])
        last_row = -1
        part = 0
        for start, stop in connected(pieces.document, chosen):
            row = int(pieces.document[start])
            part = part + 1 if row == last_row else 0
            last_row = row
            meta = {
                "pile_set_name": str(columns["domain"][row]),
                "doc": int(columns["doc"][row]),
                "source": str(columns["source"][row]),
                "record": int(columns["record"][row]),
                "part": part,
            }
            yield {"text": text_of(run, pieces, range(start, stop)), "meta": meta}


def connected(document, chosen):
    """[(start, stop)] of the chosen entries that follow each other in one document. document, and
    chosen, bool: (m,)."""
    entries = np.flatnonzero(chosen)
    if not len(entries):
        return []
    apart = (np.diff(entries) > 1) | (np.diff(document[entries]) != 0)
    starts = entries[np.append(True, apart)]
    stops = entries[np.append(apart, True)] + 1
    return list(zip(starts.tolist(), stops.tolist()))


def text_of(run, pieces, entries):
    """The text of some entries of Pieces, without the characters that are cut at its ends."""
    rows = run.data.train.rows
    tokens = [rows[pieces.chunk[i], pieces.begin[i] : pieces.end[i]] for i in entries]
    tokens = np.concatenate(tokens)
    utf8 = run.tokenizer.decode_bytes(tokens[tokens != run.data.meta["eot"]])
    return whole_characters(utf8)


def check_export(path, run=None):
    """Raises UserError where write_texts cannot write, or a run's data is none that it could."""
    if run and run.data.is_pairs:
        what = f"--export={path}: {run.data.path} is of pairs, which are not written as texts"
        raise UserError(f"{what}: train with --keep=, or take the records that --list names")
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.zst", ".parquet")) or not path.parent.is_dir():
        cure = "write the name of a .jsonl.zst, .jsonl or .parquet file, in a folder that exists"
        raise UserError(f"--export={path}: {cure}")


def write_texts(path, documents, stays, kept):
    """Writes stretches() to a .jsonl, .jsonl.zst or .parquet file with the columns text and meta,
    for other trainers and prepare_pile.py."""
    import zstandard

    records = progress(stretches(documents, stays, kept), "export", unit="text", delay=1)
    records = (record for record in records if record["text"])
    with atomic(path) as file:
        if str(path).endswith(".parquet"):
            write_parquet(file, records)
            return
        if str(path).endswith(".zst"):
            out = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
        else:
            out = contextlib.nullcontext(file)
        with out as stream:
            for record in records:
                stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def write_parquet(file, records):
    import pyarrow as pa
    import pyarrow.parquet as pq

    meta = {
        "pile_set_name": pa.string(),
        "doc": pa.int64(),
        "source": pa.string(),
        "record": pa.int64(),
        "part": pa.int32(),
    }
    schema = pa.schema({"text": pa.large_string(), "meta": pa.struct(meta)})
    # by its name: arrow would swallow a signal's exception in a Python file's write
    with pq.ParquetWriter(str(file.name), schema) as writer:
        for batch in batches(records, 1024):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def batches(records, size):
    """An iterator's records as lists of so many."""
    batch = list(itertools.islice(records, size))
    while batch:
        yield batch
        batch = list(itertools.islice(records, size))
