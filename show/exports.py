"""Values in full: a table of every chunk for other programs, and two runs side by side."""

from pathlib import Path

import numpy as np

from show.documents import Documents
from system.errors import UserError
from system.files import atomic


def export(run, path):
    """A row for every chunk used -> a .parquet file: its domain, documents, visits, mean loss, and a column `value:<name>` for each target."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, n = Path(path), len(run.values)
    if path.suffix != ".parquet" or path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: write the name of a .parquet file, in a folder that exists")
    visits, loss, first = (
        np.zeros(n, np.int32),
        np.zeros(n),
        np.full(n, np.iinfo("i4").max, np.int32),
    )
    for part in run.parts():
        np.add.at(visits, part["chunk"], 1)
        np.add.at(loss, part["chunk"], part["loss"].astype(float))
        np.minimum.at(first, part["chunk"], part["step"])
    of = dict(
        chunk=pa.int64(),
        domain=pa.string(),
        docs=pa.list_(pa.int64()),
        visits=pa.int32(),
        first_step=pa.int32(),
        loss=pa.float64(),
    )
    about = {
        key: str(run.info[key]) for key in ("sign", "unit", "rule", "committed_step", "data_hash")
    }
    schema = pa.schema(of | {f"value:{name}": pa.float32() for name in run.names}, about)
    with (
        atomic(path) as f,
        pq.ParquetWriter(str(f.name), schema) as file,
    ):  # by its name: arrow would swallow a signal's exception
        for ids, ends, docs in Documents(run).by_chunk(run.used):
            domain = pa.array(run.domains).take(pa.array(run.data.train.domain[ids]))
            columns = [
                ids,
                domain,
                pa.ListArray.from_arrays(pa.array(ends, pa.int32()), docs),
                visits[ids],
                first[ids],
                loss[ids] / visits[ids],
            ]
            file.write_table(pa.table([*columns, *run.values[ids].T], schema=schema))
    return dict(path=str(path), rows=len(run.used), columns=schema.names)


def compare(run, other, n=10, chars=200):
    """The same data valued twice, on the chunks that both used: rank correlation, equal signs, means by domain, the chunks that moved most."""
    from scipy import stats

    ids, names = (
        np.intersect1d(run.used, other.used, assume_unique=True),
        [name for name in run.names if name in other.names],
    )
    if run.data.hash != other.data.hash:
        raise UserError(
            f"{run.path} and {other.path} were trained on different data ({run.data.path}, {other.data.path}): their chunks differ"
        )
    if not names or not len(ids):
        raise UserError(
            f"{run.path} and {other.path} have no {'chunk' if names else 'target'} in common that both valued: nothing to compare"
        )
    found = dict(
        runs=[str(run.path), str(other.path)],
        unit=run.info["unit"],
        chunks=len(ids),
        targets=[],
        domains=[],
        moved=[],
    )
    domain = run.data.train.domain[ids]
    for name in names:
        a, b = (of.values[ids, of.target(name)].astype(float) for of in (run, other))
        rank_a, rank_b = stats.rankdata(-a), stats.rankdata(-b)
        pearson, spearman = (
            float(np.corrcoef(x, y)[0, 1]) if x.std() * y.std() else np.nan
            for x, y in ((a, b), (rank_a, rank_b))
        )
        figures = dict(
            pearson=pearson, spearman=spearman, equal_signs=float((np.sign(a) == np.sign(b)).mean())
        )
        found["targets"].append(dict(target=name, **figures))
        for d in np.unique(domain):
            means = dict(mean_a=float(a[domain == d].mean()), mean_b=float(b[domain == d].mean()))
            found["domains"].append(
                dict(target=name, domain=run.domains[d], chunks=int((domain == d).sum()), **means)
            )
        for i in np.argsort(-abs(rank_a - rank_b), kind="stable")[:n]:
            figures = dict(
                rank_a=float(rank_a[i]),
                rank_b=float(rank_b[i]),
                value_a=float(a[i]),
                value_b=float(b[i]),
            )
            found["moved"].append(
                dict(
                    target=name,
                    chunk=int(ids[i]),
                    domain=run.domains[domain[i]],
                    **figures,
                    text=run.text(ids[i], chars),
                )
            )
    return found
