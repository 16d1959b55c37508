"""An object store for tests: what fsspec, and through it `etils.epath`, opens as gs:// and s3://.

    with fake_buckets(folder): ...
    python tests/fake_bucket.py FOLDER MODULE ARGS...  # the same in a process of its own

It keeps to what object stores promise and no more.  An object has a name and bytes; folders are parts of
names: they are not made, and are gone with their last object.  An object appears when it is closed, whole;
nothing is added to one, and to rename is to copy and delete.  Each lies in a file of a folder of this
machine, under its quoted name, so that a killed process leaves what a bucket would have.
"""

import contextlib
import io
import os
import pathlib
import runpy
import sys
import urllib.parse
import uuid
from collections.abc import Iterator

import fsspec
from etils.epath import backend
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

from sol_jax import files


class FakeBuckets(AbstractFileSystem):
    """Every bucket whose name does not begin with `no-`; those cannot be reached."""

    protocol = ("gs", "gcs", "s3")
    root: pathlib.Path
    cachable = False
    writes = 0  # of objects, in this process

    def _file(self, path: str) -> pathlib.Path:
        name = self._strip_protocol(path)
        if name.startswith("no-"):
            raise RuntimeError(
                "Anonymous caller does not have storage.objects.get access"
            )  # no OSError, as theirs
        return self.root / urllib.parse.quote(name, safe="")

    def _objects(self) -> dict[str, pathlib.Path]:
        return {
            urllib.parse.unquote(file.name): file
            for file in self.root.iterdir()
            if not file.name.startswith(".")
        }

    def info(self, path, **kwargs):
        name, file = self._strip_protocol(path).rstrip("/"), self._file(path)
        if file.is_file():
            stat = file.stat()
            return {"name": name, "size": stat.st_size, "type": "file", "mtime": stat.st_mtime}
        if any(other.startswith(f"{name}/") for other in self._objects()):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        name = self._strip_protocol(path).rstrip("/")
        if self.info(path)["type"] == "file":
            names = [name]
        else:
            below = (other for other in self._objects() if other.startswith(f"{name}/"))
            names = sorted({f"{name}/{other[len(name) + 1 :].split('/')[0]}" for other in below})
        return [self.info(one) for one in names] if detail else names

    def _open(self, path, mode="rb", **kwargs):
        file = self._file(path)
        if mode == "rb":
            try:
                return io.BytesIO(file.read_bytes())
            except FileNotFoundError:
                raise FileNotFoundError(path) from None
        if mode != "wb":
            raise NotImplementedError(f"objects have no mode {mode}")
        return _Upload(file)

    def cp_file(self, path1, path2, **kwargs):
        with self._open(path1) as old, self._open(path2, "wb") as new:
            new.write(old.read())

    def _rm(self, path):
        self._file(path).unlink()  # FileNotFoundError, as theirs

    def mkdir(self, path, create_parents=True, **kwargs):
        raise AssertionError(f"{path}: a bucket would be made")

    makedirs = mkdir


class _Upload(io.BytesIO):
    """Bytes that become an object when they are closed."""

    def __init__(self, file: pathlib.Path):
        super().__init__()
        self._object = file

    def close(self) -> None:
        if not self.closed:
            part = self._object.with_name(f".{uuid.uuid4().hex}")
            part.write_bytes(self.getvalue())
            os.replace(part, self._object)
            FakeBuckets.writes += 1
        super().close()


@contextlib.contextmanager
def fake_buckets(folder: pathlib.Path) -> Iterator[None]:
    """Buckets in `folder`, in place of real ones."""
    folder.mkdir(exist_ok=True)
    own = type("OwnBuckets", (FakeBuckets,), {"root": folder})
    before = dict(_registry)
    _forget()
    for protocol in FakeBuckets.protocol:
        fsspec.register_implementation(protocol, own, clobber=True)
    try:
        yield
    finally:
        _registry.clear()
        _registry.update(before)
        _forget()


def _forget() -> None:
    """Nothing is left of the buckets that were open before."""
    backend.fsspec_backend._get_filesystem.cache_clear()
    files._reached.clear()


if __name__ == "__main__":
    where, module, *args = sys.argv[1:]
    sys.argv = [module, *args]
    with fake_buckets(pathlib.Path(where)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
