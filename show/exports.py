"""Values in full: a table of every chunk for other programs, and two runs side by side."""

from pathlib import Path

import numpy as np

from show.documents import Documents
from system import store
from system.errors import UserError
from system.files import atomic


def export(run, path):
    """A row for every chunk used -> a .parquet file: its domain, documents, visits, mean loss, and
    a column `value:<name>` for each target; of a run that has them also `smoothed:<name>`, sums
    over the visits as values are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if path.suffix != ".parquet" or path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: write the name of a .parquet file, in a folder that exists")
    visits, first_step, loss = count_visits(run)
    columns = {
        "chunk": pa.int64(),
        "domain": pa.string(),
        "docs": pa.list_(pa.int64()),
        "visits": pa.int32(),
        "first_step": pa.int32(),
        "loss": pa.float64(),
    }
    for name in run.names:
        columns[f"value:{name}"] = pa.float32()
    figures = [run.values]
    if run.is_smoothed:
        figures.append(run.sums("smoothed").astype(np.float32))
        for name in run.names:
            columns[f"smoothed:{name}"] = pa.float32()
    figures = np.concatenate(figures, 1)
    keys = ("sign", "unit", "rule", "committed_step", "data_hash")
    schema = pa.schema(columns, {key: str(run.info[key]) for key in keys})
    # by its name: arrow would swallow a signal's exception in a Python file's write
    with atomic(path) as file, pq.ParquetWriter(str(file.name), schema) as writer:
        for chunks, bounds, docs in Documents(run).by_chunk(run.used):
            rows = [
                chunks,
                pa.array(run.domains).take(pa.array(run.data.train.domain[chunks])),
                pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), docs),
                visits[chunks],
                first_step[chunks],
                loss[chunks] / visits[chunks],
                *figures[chunks].T,
            ]
            writer.write_table(pa.table(rows, schema=schema))
    return {"path": str(path), "rows": len(run.used), "columns": schema.names}


def count_visits(run):
    """For each chunk: its visits, the step of the first, the sum of their losses, (n_chunks,)."""
    n = len(run.values)
    count = np.zeros(n, np.int32)
    first_step = np.full(n, np.iinfo("i4").max, np.int32)
    loss = np.zeros(n)
    for visits in map(store.filled, run.blocks()):
        np.add.at(count, visits["chunk"], 1)
        np.minimum.at(first_step, visits["chunk"], visits["step"])
        np.add.at(loss, visits["chunk"], visits["loss"].astype(float))
    return count, first_step, loss


def compare(run, other, n=10, chars=200):
    """The same data valued twice, on the chunks that both used: rank correlation, equal signs,
    medians and means by domain, the chunks that moved most."""
    chunks = np.intersect1d(run.used, other.used, assume_unique=True)
    targets = [name for name in run.names if name in other.names]
    if run.data.hash != other.data.hash:
        what = f"{run.path} and {other.path} were trained on different data"
        raise UserError(f"{what} ({run.data.path}, {other.data.path}): their chunks differ")
    if not targets or not len(chunks):
        missing = "chunk" if targets else "target"
        what = f"{run.path} and {other.path} have no {missing} in common that both valued"
        raise UserError(f"{what}: nothing to compare")
    figures, domains, moved = [], [], []
    for name in targets:
        a = run.values[chunks, run.target(name)].astype(float)
        b = other.values[chunks, other.target(name)].astype(float)
        figures.append({"target": name, **agreement(a, b)})
        domains += by_domain(run, chunks, name, a, b)
        moved += most_moved(run, chunks, name, a, b, n, chars)
    return {
        "runs": [str(run.path), str(other.path)],
        "horizons": [run.horizon, other.horizon],
        "unit": run.info["unit"],
        "chunks": len(chunks),
        "targets": figures,
        "domains": domains,
        "moved": moved,
    }


def agreement(a, b):
    """Two runs' values of a target, (n,) each."""
    return {
        "pearson": correlation(a, b),
        "spearman": correlation(ranks(a), ranks(b)),
        "equal_signs": float((np.sign(a) == np.sign(b)).mean()),
    }


def correlation(x, y):
    """Pearson's; NaN where one of them is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() * y.std() else np.nan


def ranks(values):
    """The largest has rank 1."""
    from scipy import stats

    return stats.rankdata(-values)


def by_domain(run, chunks, target, a, b):
    domain = run.data.train.domain[chunks]
    rows = []
    for d in np.unique(domain):
        inside = domain == d
        rows.append(
            {
                "target": target,
                "domain": run.domains[d],
                "chunks": int(inside.sum()),
                "median_a": float(np.median(a[inside])),
                "median_b": float(np.median(b[inside])),
                "mean_a": float(a[inside].mean()),
                "mean_b": float(b[inside].mean()),
            }
        )
    return rows


def most_moved(run, chunks, target, a, b, n, chars):
    """The n chunks whose ranks differ most."""
    rank_a = ranks(a)
    rank_b = ranks(b)
    rows = []
    for i in np.argsort(-abs(rank_a - rank_b), kind="stable")[:n]:
        chunk = int(chunks[i])
        rows.append(
            {
                "target": target,
                "chunk": chunk,
                "domain": run.domain_of(chunk),
                "rank_a": float(rank_a[i]),
                "rank_b": float(rank_b[i]),
                "value_a": float(a[i]),
                "value_b": float(b[i]),
                "text": run.text(chunk, chars),
            }
        )
    return rows
