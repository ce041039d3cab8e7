"""The folders that prepare_pile.py writes: nothing of anybody else's is removed, one data set
replaces another wherever it is killed, and a source that has changed is another source."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from piles import ARRAYS, TABLES, digest, lines, run, texts, write

import config
from pile import workers
from prepare_pile import Config, prepare
from system.errors import UserError
from system.files import write_json

SCRIPT = Path(config.__file__).parent / "prepare_pile.py"
EVERYTHING = sorted([*ARRAYS, *TABLES, "meta.json"])


def listing(folder):
    """Every file below a folder, with its contents."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(folder, source, answer, **options):
    """Prepares, which must end with this error and change nothing."""
    before = listing(folder)
    with pytest.raises(UserError, match=answer):
        run(folder, source, **options)
    assert listing(folder) == before


CLAIM = """
import sys
from system.files import Claim
claim = Claim(sys.argv[1], "data_dir")
print(flush=True)
input()
"""


@contextlib.contextmanager
def claimed(folder):
    """As a context: meanwhile another process has claimed the folder."""
    command = [sys.executable, "-c", CLAIM, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        process.stdout.readline()
        yield
        process.communicate()


# --- what is not ours -------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_data_dir_with_other_files_is_refused_and_kept(tmp_path, overwrite):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    options = {"overwrite": overwrite}
    write(tmp_path / "out" / "meta.json", b"{}")
    refuse(tmp_path, source, r"did not write \(meta.json\): write another --data_dir", **options)
    write(tmp_path / "out" / "thesis.tex", b"years of work")
    refuse(tmp_path, source, r"did not write \(thesis.tex\): write another", **options)
    shutil.rmtree(tmp_path / "out")
    write_json(tmp_path / "mine.json", {"schema": 1})  # a sealed file of something else
    write(tmp_path / "out" / "meta.json", (tmp_path / "mine.json").read_bytes())
    refuse(tmp_path, source, r"did not write \(meta.json\)", **options)
    shutil.rmtree(tmp_path / "out")
    run(tmp_path, source)
    write(tmp_path / "out" / "thesis.tex", b"years of work")
    refuse(tmp_path, source, r"did not write \(thesis.tex\)", **options)
    (tmp_path / "out" / "thesis.tex").unlink()
    write(tmp_path / "out" / "train.npy.d" / "thesis.tex", b"years of work")
    refuse(tmp_path, source, r"did not write \(train.npy.d\)", **options)
    shutil.rmtree(tmp_path / "out")
    write(tmp_path / "out" / "train.npy" / "thesis.tex", b"years of work")
    refuse(tmp_path, source, r"did not write \(train.npy\)", **options)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "seal": lambda out: flip(out / "meta.json"),
    "no seal": lambda out: (out / "meta.json").write_text(json.dumps({"schema": 2})),
    "cut short": lambda out: (out / "train.npy").write_bytes(b""),
    "missing": lambda out: (out / "train.npy").unlink(),
    "no meta": lambda out: (out / "meta.json").unlink(),
    "lock": lambda out: (out / "lock").touch(),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_overwrite_replaces_a_damaged_data_set(tmp_path, damage):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    before = digest(run(tmp_path, source).path)
    DAMAGES[damage](tmp_path / "out")
    if damage != "lock":
        refuse(tmp_path, source, r"--overwrite")
    run(tmp_path, source, overwrite=True)
    assert digest(tmp_path / "out") == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == EVERYTHING


def test_a_parts_folder_with_other_files_is_refused_and_kept(tmp_path):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    strange = {
        "notes.md": "notes.md",
        "00001-0123456789abcde.arrow": "00001-0123456789abcde.arrow",
        "a.arrow": "a.arrow",
        "1-of-1.partial/thesis.tex": "1-of-1.partial/thesis.tex",
        "replaced/thesis.tex": "replaced/thesis.tex",
        "00001-0123456789abcdef.arrow/thesis.tex": "00001-0123456789abcdef.arrow",
        "sub/a.jsonl": "sub",
    }
    for name, refused in strange.items():
        write(tmp_path / "out.parts" / name, b"years of work")
        answer = rf"out.parts holds files that this program did not write \({refused}\)"
        refuse(tmp_path, source, answer)
        shutil.rmtree(tmp_path / "out.parts")
    (tmp_path / "mine" / "1-of-1.partial").mkdir(parents=True)
    (tmp_path / "out.parts").symlink_to("mine")
    refuse(tmp_path, source, "out.parts is a symbolic link")
    (tmp_path / "out.parts").unlink()
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "1-of-1.partial").symlink_to("../mine")
    refuse(tmp_path, source, r"did not write \(1-of-1.partial\)")
    (tmp_path / "out.parts" / "1-of-1.partial").unlink()
    write(tmp_path / "out.parts" / "00007-0123456789abcdef.arrow", b"of an older run")
    run(tmp_path, source)  # which removes what is its own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "mine", "out"]


def test_a_source_in_the_parts_folder_is_refused(tmp_path):
    write(tmp_path / "out.parts" / "a.jsonl", lines(texts()))
    for source in ("out.parts", "out.parts/a.jsonl", "out.parts/*.jsonl"):
        refuse(tmp_path, tmp_path / source, "did not write|which this program writes")


def test_a_run_keeps_the_part_that_another_process_is_writing(tmp_path):
    """Another shard, of other options, while a run of all is done."""
    source = write(tmp_path / "d.jsonl", lines(texts()))
    other = tmp_path / "out.parts" / "2-of-3.partial"
    with claimed(other):
        write(other / "00001-0123456789abcdef.arrow", b"half a part")
        run(tmp_path, source)
        assert (other / "00001-0123456789abcdef.arrow").read_bytes() == b"half a part"
    run(tmp_path, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]


# --- replacing --------------------------------------------------------------------


def prepare_and_die(options, number):
    """Prepares, and is killed in place of the n-th change of a name in a folder."""
    count = 0

    def dying(function):
        def change(*arguments, **named):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return change

    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    prepare(Config(**options))
    os._exit(0)


def test_a_data_set_is_old_or_new_when_overwrite_is_killed_at_any_change(tmp_path, capsys):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    options = {
        "source": str(source),
        "data_dir": str(tmp_path / "out"),
        "tokenizer": "byte",
        "val_fraction": 0.3,
        "workers": 1,
    }
    old = digest(run(tmp_path, source, block_size=32).path)
    new = digest(run(tmp_path, source, block_size=64, data_dir=str(tmp_path / "new")).path)
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    number = 0
    died = True
    digests = []  # after each kill
    while died:
        number += 1
        arguments = ({**options, "block_size": 64, "overwrite": True}, number)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=prepare_and_die, args=arguments)
        process.start()
        process.join()
        died = process.exitcode == -signal.SIGKILL
        assert died or process.exitcode == 0
        if number % 2:  # any command mends it: --verify, or the one that wrote the data set
            prepare(Config(**options, verify=True))
            digests.append(digest(tmp_path / "out"))
            assert digests[-1] in (old, new)
        else:
            block_size = 64 if digests[-1] == new else 32
            capsys.readouterr()
            prepare(Config(**options, block_size=block_size))
            assert "already prepared" in capsys.readouterr().out
            assert not (tmp_path / "out.parts").exists()
            assert not (tmp_path / "out" / "lock").exists()
            assert digest(tmp_path / "out") in (old, new)
        prepare(Config(**options, block_size=64, overwrite=True))
        assert digest(tmp_path / "out") == new
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == EVERYTHING
        assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "new", "old", "out"]
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
    assert number > 10
    assert old in digests
    assert new in digests


def test_a_failed_replacement_leaves_the_old_data_set(tmp_path, monkeypatch):
    source = write(tmp_path / "d.jsonl", lines(texts()))
    before = digest(run(tmp_path, source, block_size=32).path)
    rename = os.rename

    def failing(old, new):
        if str(old).endswith(".partial"):
            raise OSError(5, "Input/output error", str(old))
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        run(tmp_path, source, overwrite=True)
    assert digest(tmp_path / "out") == before
    assert [path.suffix for path in (tmp_path / "out.parts").iterdir()] == [".arrow"]


def test_a_replacement_by_another_process_is_not_disturbed(tmp_path):
    """A data_dir that another process is just replacing: both its names are taken."""
    source = write(tmp_path / "d.jsonl", lines(texts()))
    run(tmp_path, source)
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out").rename(tmp_path / "out.parts" / "replaced")
    partial = tmp_path / "out.parts" / "1-of-1.partial"
    with claimed(partial):
        for options in ({"verify": True}, {"overwrite": True}, {}):
            refuse(tmp_path, source, "another process is writing", **options)
    run(tmp_path, source, verify=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == EVERYTHING


# --- a source that has changed ------------------------------------------------------


def test_a_part_is_made_again_when_its_source_file_has_changed(tmp_path, capsys):
    source = write(tmp_path / "s" / "a.jsonl", lines(texts()))
    places = {"source": str(tmp_path / "s"), "data_dir": str(tmp_path / "out")}
    cfg = Config(**places, tokenizer="byte", workers=1, shard="1/1")
    prepare(cfg)
    corrected = source.read_bytes().replace(b"a", b"A", 1)
    write(source, corrected)
    os.utime(source, ns=(1, source.stat().st_mtime_ns + 1))
    prepare(cfg)
    assert "parts are there already" not in capsys.readouterr().out
    prepare(cfg)
    assert "1 of 1 parts are there already" in capsys.readouterr().out


def test_a_changed_source_is_refused_with_the_changed_files_named(tmp_path, capsys):
    source = write(tmp_path / "s" / "a.jsonl", lines(texts(60)))
    write(tmp_path / "s" / "b.jsonl", lines(texts(60, seed=1)))
    run(tmp_path, tmp_path / "s")
    capsys.readouterr()
    run(tmp_path, tmp_path / "s")
    assert "already prepared" in capsys.readouterr().out
    os.utime(source, ns=(1, source.stat().st_mtime_ns + 1))
    answer = r"from other contents of .*s \(a.jsonl has changed\): add --overwrite"
    refuse(tmp_path, tmp_path / "s", answer)
    run(tmp_path, tmp_path / "s", overwrite=True)
    write(tmp_path / "s" / "c.jsonl", lines(texts(60, seed=2)))
    refuse(tmp_path, tmp_path / "s", r"\(c.jsonl is new\)")
    (tmp_path / "s" / "c.jsonl").unlink()
    (tmp_path / "s" / "b.jsonl").unlink()
    refuse(tmp_path, tmp_path / "s", r"\(b.jsonl is gone\)")
    shutil.rmtree(tmp_path / "s")  # a source that is gone is not compared
    capsys.readouterr()
    run(tmp_path, tmp_path / "s")
    assert "already prepared" in capsys.readouterr().out


# --- wrong arguments ------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["d.jsonl"], "d.jsonl is no config file (.py or .json), that is data: write --source=d"),
        (["notes.txt"], "(.py or .json), that is data: write --source=notes.txt"),
        (["--workers=1000000000"], "it must be at most"),
        (["--workers=-1"], "--workers=-1: it must be at least 0"),
        (["--max_document_mb=0"], "--max_document_mb=0: it must be at least 1"),
        (["--max_document_mb=1e9"], "it must be below 1048576"),
        (["--block_size=1e18"], "it must be below 2147483648"),
        (["--val_fraction=-1"], "--val_fraction=-1.0: it must be at least 0"),
        (["--val_fraction=inf"], "--val_fraction=inf: it must be below 1"),
        (["--text_key="], "--text_key=: write --text_key=<a name>"),
        (["--shard=1/9999999999999999999999"], "write --shard=<i>/<n, i from 1 to n>"),
        (["--data_dir=/"], "--data_dir=/ is no folder of its own"),
    ],
)
def test_a_wrong_argument_ends_with_one_line(tmp_path, monkeypatch, capsys, arguments, answer):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", lines(texts()))
    write(tmp_path / "notes.txt", b"a text")
    if arguments[0].startswith("-"):
        arguments = ["--source=d.jsonl", *arguments]
    with pytest.raises(SystemExit) as stop:
        config.main(lambda: prepare(config.load(Config, arguments)))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert answer in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "notes.txt"]


def test_more_than_four_workers_a_core_are_refused():
    cores = os.cpu_count()
    assert Config(workers=4 * cores).workers == 4 * cores
    with pytest.raises(UserError, match=f"at most {4 * cores}, 4 for each core"):
        Config(workers=4 * cores + 1)


def test_started_workers_are_killed_when_others_cannot_be_started(monkeypatch):
    started = []
    start = multiprocessing.Process.start

    def start_two(process):
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.Process, "start", start_two)
    with pytest.raises(BlockingIOError):
        workers.start(5, lambda: None)
    assert len(started) == 2
    for process in started:
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
