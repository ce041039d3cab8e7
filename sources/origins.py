"""Where a chunk's text comes from: train_docs.parquet, read in both directions (prepare_pile.py says how documents lie in chunks)."""

import numpy as np


class Documents:
    """The table of train_docs.parquet, some row groups at a time: a chunk's documents, a document's chunks."""

    def __init__(self, run):
        import pyarrow.parquet

        self.run, self.path, self.cached = run, run.data.path / "train_docs.parquet", {}
        try:
            self.file = pyarrow.parquet.ParquetFile(self.path)
        except (OSError, ValueError) as e:
            raise ValueError(f"{self.path} is missing or damaged ({e}): type: {run.data.meta['command']} --overwrite") from e
        groups, column = range(self.file.num_row_groups), self.file.schema_arrow.names.index("first_chunk")
        of = [self.file.metadata.row_group(i) for i in groups]
        self.first = np.array([group.column(column).statistics.min if group.num_rows else np.iinfo("i8").max for group in of])

    def group(self, i):
        if i not in self.cached:
            self.cached = {i: {name: c.to_numpy() for name, c in zip(self.file.schema_arrow.names, self.file.read_row_group(i).columns)}}
        return self.cached[i]

    def stream(self, d):
        """The chunks of a domain, in their order: documents go on from one to the next."""
        return np.flatnonzero(self.run.data.train.domain == d)

    def of_chunk(self, chunk):
        """[{doc, source, record, n_tokens, begins: token of this chunk, negative where it began in an earlier one}], in order."""
        domain = self.run.domains[int(self.run.data.train.domain[chunk])]
        found, i = [], int(np.searchsorted(self.first, chunk, "right")) - 1
        while i >= 0:
            group = self.group(i)
            before = np.flatnonzero((group["first_chunk"] <= chunk) & (group["domain"] == domain))[::-1]
            for row in before:
                begun, n = int(group["first_chunk"][row]), int(group["n_tokens"][row])
                apart = 0 if begun == chunk else np.count_nonzero(self.run.data.train.domain[begun:chunk] == self.run.data.train.domain[chunk])
                begins = int(group["first_token"][row]) - apart * self.run.data.train.rows.shape[1]
                if begins + n >= 0 and begins <= self.run.width:  # its <eot>, or more, in what was trained on
                    doc, source, record = (group[key][row] for key in ("doc", "source", "record"))
                    found.append(dict(doc=int(doc), source=source, record=int(record), n_tokens=n, begins=int(begins)))
                if begun < chunk:
                    return found[::-1]
            i -= 1
        return found[::-1]

    def find(self, doc):
        """A document's row of the table, as a dict. Raises ValueError for a number that is none there."""
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(self.path, filters=[("doc", "==", doc)]).to_pylist() if 0 <= doc < 2**63 else []
        if not rows:
            why = "it is in the validation set, fills no chunk, or does not exist"
            raise ValueError(f"document {doc} is not in {self.path}: {why}. `values.py chunk` says which documents lie in a chunk")
        return rows[0]

    def by_chunk(self, chunks):
        """int64, ascending -> [(some of them (n,), bounds (n + 1,), docs)]: the i-th chunk's documents are docs[bounds[i] : bounds[i + 1]]."""
        import pyarrow as pa
        import pyarrow.compute as pc

        n, (_, W), of = len(self.run.values), self.run.data.train.rows.shape, self.run.data.train.domain
        columns, names, last = ["doc", "domain", "first_chunk", "first_token"], pa.array(self.run.domains), np.zeros((3, 0), np.int64)
        for i in range(0, len(self.first), 8):
            table = self.file.read_row_groups(range(i, min(i + 8, len(self.first))), columns)
            doc, domain, chunk, token = (column.to_numpy() for column in table.set_column(1, "domain", pc.index_in(table["domain"], names)).columns)
            new = np.stack([domain, (domain * np.int64(n) + chunk) * W + token, doc])
            rows = np.concatenate([last, new], 1)  # the last document of each domain so far may go on
            domain, place, doc = rows = rows[:, np.argsort(rows[1])]
            last = rows[:, np.append(domain[1:] != domain[:-1], True)]
            end = np.searchsorted(chunks, self.first[i + 8]) if i + 8 < len(self.first) else len(chunks)
            some, chunks = chunks[:end], chunks[end:]
            start = (of[some] * np.int64(n) + some) * W
            begin, end = np.searchsorted(place, start), np.searchsorted(place, start + self.run.width, "right")
            begin -= place.take(begin, mode="clip") != start  # where none begins with the chunk, one goes on into it
            bounds = np.append(0, np.cumsum(end - begin))
            yield some, bounds, doc[np.arange(bounds[-1]) + np.repeat(begin - bounds[:-1], end - begin)]
