"""Files and batches on disk: an SQLite database for what is known of them, and a folder with the contents.

Several servers may share a folder. All is as durable as SQLite's write-ahead log makes it: a process may be
killed at any time; what a power failure may cost is the last moments, never a file that is half there.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from trunkline.types import RequestError

T = TypeVar("T")
Json = dict[str, Any]

BUSY_TIME = 30.0  # seconds to wait for another process's transaction
STALE = 24 * 3600  # seconds after which an upload that nobody finished is removed
PIECE = 1 << 20
LIVE = ("validating", "in_progress", "finalizing", "cancelling")  # statuses of batches that have not ended

# `used` is what all files and results take, kept by triggers: adding them up for each result would be slow.
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, bytes INTEGER, created_at INTEGER, filename TEXT, purpose TEXT
);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, owner TEXT, status TEXT, data BLOB
);
CREATE TABLE IF NOT EXISTS results (
    batch TEXT, line INTEGER, failed INTEGER, body BLOB, PRIMARY KEY (batch, line)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS used (one INTEGER PRIMARY KEY, bytes INTEGER);
INSERT OR IGNORE INTO used SELECT 1, (SELECT coalesce(sum(bytes), 0) FROM files)
    + (SELECT coalesce(sum(length(body) + 1), 0) FROM results);
CREATE TRIGGER IF NOT EXISTS file_added AFTER INSERT ON files
    BEGIN UPDATE used SET bytes = bytes + new.bytes; END;
CREATE TRIGGER IF NOT EXISTS file_deleted AFTER DELETE ON files
    BEGIN UPDATE used SET bytes = bytes - old.bytes; END;
CREATE TRIGGER IF NOT EXISTS result_added AFTER INSERT ON results
    BEGIN UPDATE used SET bytes = bytes + length(new.body) + 1; END;
CREATE TRIGGER IF NOT EXISTS result_deleted AFTER DELETE ON results
    BEGIN UPDATE used SET bytes = bytes - length(old.body) - 1; END;
COMMIT;
"""


class Storage:
    """All work happens in one thread of its own, through `run`; other methods are called there."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._thread = ThreadPoolExecutor(1, "trunkline-files")
        self._opened: sqlite3.Connection | None = None

    @property
    def exists(self) -> bool:
        """Whether there is a database: it is made on first use."""
        return (self.folder / "index.sqlite3").exists()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(*args)`, most often a method of this storage, in its thread. Raises RequestError
        (507) when the disk refuses."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, function, *args)
        except (sqlite3.OperationalError, OSError) as error:
            raise RequestError(
                f"the file storage can't be used: {error}", code="storage_failed", status=507
            ) from error

    def close(self) -> None:
        """Wait for what runs, and close the database."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._opened is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            db = sqlite3.connect(self.folder / "index.sqlite3", timeout=BUSY_TIME, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(_SCHEMA)
            self._opened = db
            self._sweep()
        return self._opened

    def _sweep(self) -> None:
        """Remove contents that no file has: of uploads and results that a crash cut off."""
        known = {name for (name,) in self._db.execute("SELECT id FROM files")}
        for path in self.folder.glob("file-*"):
            if path.name not in known and time.time() - path.stat().st_mtime > STALE:
                path.unlink(missing_ok=True)

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            result = work(db)
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
        return result

    # ------------------------------------------------------------------ files
    def path(self, file_id: str) -> Path:
        return self.folder / file_id

    def add_file(self, source: IO[bytes], filename: str, purpose: str) -> Json:
        """Keep a copy of `source`. Raises RequestError (413) when the storage is full."""
        self._db  # noqa: B018  makes the folder
        file_id = _new_id("file")
        path = self.path(file_id)
        try:
            with path.open("xb") as target:
                while piece := source.read(PIECE):
                    target.write(piece)
                target.flush()
                os.fsync(target.fileno())
            size = path.stat().st_size

            def work(db: sqlite3.Connection) -> Json:
                self._check_room(db, "file", size)
                return self._register(db, file_id, filename, purpose)

            return self._transaction(work)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _check_room(self, db: sqlite3.Connection, what: str, size: int) -> None:
        (used,) = db.execute("SELECT bytes FROM used").fetchone()
        if used + size > self.most_bytes:
            raise RequestError(
                f"the {what} has {size} bytes, and {used} of {self.most_bytes} are taken: delete files, or "
                "raise --file-storage-size",
                code="storage_full",
                param=what,
                status=413,
            )

    def _register(self, db: sqlite3.Connection, file_id: str, filename: str, purpose: str) -> Json:
        size = self.path(file_id).stat().st_size
        row = (file_id, size, int(time.time()), filename, purpose)
        db.execute("INSERT INTO files (id, bytes, created_at, filename, purpose) VALUES (?, ?, ?, ?, ?)", row)
        return _file_object(row)

    def file(self, file_id: str) -> Json | None:
        row = self._db.execute(f"SELECT {_FILE} FROM files WHERE id = ?", (file_id,)).fetchone()
        return None if row is None else _file_object(row)

    def files(self, purpose: str | None, after: str | None, limit: int, newest_first: bool) -> list[Json]:
        """At most `limit` files behind the one named `after`."""
        where, values = _behind("files", after, newest_first)
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT {_FILE} FROM files WHERE {where} ORDER BY number {order} LIMIT ?"
        return [_file_object(row) for row in self._db.execute(query, (*values, limit))]

    def delete_file(self, file_id: str) -> bool:
        """Raises RequestError (409) for the input of a batch that has not ended."""

        def work(db: sqlite3.Connection) -> bool:
            for _, batch in self._live(db):
                if batch["input_file_id"] == file_id:
                    raise RequestError(
                        f"the batch {batch['id']} still reads this file: cancel it first",
                        code="file_in_use",
                        param="file_id",
                        status=409,
                    )
            return db.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount > 0

        found = self._transaction(work)
        if found:
            self.path(file_id).unlink(missing_ok=True)
        return found

    # ------------------------------------------------------------------ batches
    def add_batch(self, batch: Json, owner: str, most_live: int) -> None:
        """Raises RequestError (429) when too many have not ended."""

        def work(db: sqlite3.Connection) -> None:
            live = len(self._live(db))
            if live >= most_live:
                raise RequestError(
                    f"{live} batches have not ended, the limit is {most_live}: retry later",
                    code="too_many_batches",
                    status=429,
                )
            db.execute(
                "INSERT INTO batches (id, owner, status, data) VALUES (?, ?, ?, ?)",
                (batch["id"], owner, batch["status"], msgspec.json.encode(batch)),
            )

        self._transaction(work)

    def _live(self, db: sqlite3.Connection) -> list[tuple[str, Json]]:
        marks = ", ".join("?" * len(LIVE))
        rows = db.execute(f"SELECT owner, data FROM batches WHERE status IN ({marks}) ORDER BY number", LIVE)
        return [(owner, msgspec.json.decode(data)) for owner, data in rows]

    def live_batches(self, owner: str) -> list[Json]:
        """Those of a model that have not ended, oldest first."""
        return [batch for whose, batch in self._live(self._db) if whose == owner]

    def batch(self, batch_id: str) -> Json | None:
        """With its counts as they are now."""
        row = self._db.execute("SELECT data FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return None if row is None else self._counted(msgspec.json.decode(row[0]))

    def batches(self, after: str | None, limit: int) -> list[Json]:
        where, values = _behind("batches", after, newest_first=True)
        query = f"SELECT data FROM batches WHERE {where} ORDER BY number DESC LIMIT ?"
        rows = self._db.execute(query, (*values, limit)).fetchall()
        return [self._counted(msgspec.json.decode(data)) for (data,) in rows]

    def _counted(self, batch: Json) -> Json:
        if batch["status"] in LIVE:
            failed, total = self._db.execute(
                "SELECT coalesce(sum(failed), 0), count(*) FROM results WHERE batch = ?", (batch["id"],)
            ).fetchone()
            batch["request_counts"] |= {"completed": total - failed, "failed": failed}
        return batch

    def change_batch(self, batch_id: str, only_from: Sequence[str], **fields: Any) -> Json | None:
        """Set fields of a batch if its status is one of `only_from`; the batch as it is then. None: there is
        no such batch."""

        def work(db: sqlite3.Connection) -> Json | None:
            return self._set(db, batch_id, only_from, fields)

        changed = self._transaction(work)
        return None if changed is None else self._counted(changed)

    def cancel_batch(self, batch_id: str) -> Json | None:
        """Have a batch end early, if it still runs lines."""
        changes = {"status": "cancelling", "cancelling_at": int(time.time())}
        return self.change_batch(batch_id, ("validating", "in_progress"), **changes)

    @staticmethod
    def _set(db: sqlite3.Connection, batch_id: str, only_from: Sequence[str], fields: Json) -> Json | None:
        row = db.execute("SELECT data FROM batches WHERE id = ?", (batch_id,)).fetchone()
        if row is None:
            return None
        batch: Json = msgspec.json.decode(row[0])
        if batch["status"] in only_from:
            batch |= fields
            db.execute(
                "UPDATE batches SET status = ?, data = ? WHERE id = ?",
                (batch["status"], msgspec.json.encode(batch), batch_id),
            )
        return batch

    # ------------------------------------------------------------------ results of lines
    def add_result(
        self, batch_id: str, line: int, failed: bool, body: bytes, *, bounded: bool = True
    ) -> None:
        """The result of a line, once: a second one is dropped. Raises RequestError (413) when the storage is
        full, if it is `bounded`."""

        def work(db: sqlite3.Connection) -> None:
            if bounded:
                self._check_room(db, "result", len(body) + 1)
            db.execute(
                "INSERT OR IGNORE INTO results (batch, line, failed, body) VALUES (?, ?, ?, ?)",
                (batch_id, line, failed, body),
            )

        self._transaction(work)

    def done_lines(self, batch_id: str) -> set[int]:
        return {line for (line,) in self._db.execute("SELECT line FROM results WHERE batch = ?", (batch_id,))}

    def finish_batch(self, batch_id: str, only_from: Sequence[str], **fields: Any) -> Json | None:
        """Write the results into files, and in one transaction with that end the batch."""
        files = [(failed, self._write_results(batch_id, failed)) for failed in (False, True)]

        def work(db: sqlite3.Connection) -> Json | None:
            batch = self._set(db, batch_id, only_from, {})
            if batch is None or batch["status"] not in only_from:
                return batch
            counts = dict(batch["request_counts"])
            changes = dict(fields)
            for failed, (file_id, lines) in files:
                counts["failed" if failed else "completed"] = lines
                if lines:
                    name = f"{batch_id}_{'error' if failed else 'output'}.jsonl"
                    self._register(db, file_id, name, "batch_output")
                    changes["error_file_id" if failed else "output_file_id"] = file_id
            db.execute("DELETE FROM results WHERE batch = ?", (batch_id,))
            return self._set(db, batch_id, only_from, {**changes, "request_counts": counts})

        return self._transaction(work)

    def _write_results(self, batch_id: str, failed: bool) -> tuple[str, int]:
        file_id = _new_id("file")
        rows = self._db.execute(
            "SELECT body FROM results WHERE batch = ? AND failed = ? ORDER BY line", (batch_id, failed)
        )
        lines = 0
        with self.path(file_id).open("xb") as target:
            for (body,) in rows:
                target.write(body + b"\n")
                lines += 1
            target.flush()
            os.fsync(target.fileno())
        if not lines:
            self.path(file_id).unlink()
        return file_id, lines


_FILE = "id, bytes, created_at, filename, purpose"


def _file_object(row: Sequence[Any]) -> Json:
    names = ("id", "bytes", "created_at", "filename", "purpose")
    shown = dict(zip(names, row, strict=True))
    return {"object": "file", **shown, "expires_at": None, "status": "processed", "status_details": None}


def _behind(table: str, after: str | None, newest_first: bool) -> tuple[str, list[Any]]:
    """A condition for the rows that come behind one."""
    if after is None:
        return "1", []
    return f"number {'<' if newest_first else '>'} (SELECT number FROM {table} WHERE id = ?)", [after]


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(16)}"


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(16)}"


def file_gone(file_id: str, param: str) -> RequestError:
    """For a file that is known, but whose content is not there."""
    return RequestError(
        f"the content of {file_id} is not in the server's storage any more",
        code="file_gone",
        param=param,
        status=410,
    )


def lines_of(path: Path, longest: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1. One that is longer than `longest`
    bytes comes as its beginning, which is longer too."""
    with path.open("rb") as source:
        number = 0
        while line := source.readline(longest + 1):
            number += 1
            yielded = line
            while not line.endswith(b"\n") and (line := source.readline(PIECE)):
                pass
            if yielded.strip():
                yield number, yielded
