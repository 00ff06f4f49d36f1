"""Named arrays and attributes in HDF5: written atomically, read with suspicion. The door to h5py.

A file is a root with the attributes `format`, `version`, `provenance` and those of its kind, and
datasets named with `/` where Python has dots. Each dataset is contiguous and little-endian and
carries the SHA-256 of its C-order bytes. Attributes are scalars or fixed-length UTF-8 strings; the
root's `sha256` is that of everything declared (`declared`): names, shapes, dtypes, attributes.

A file is input like any other: everything that it declares is checked before anything is believed.

    layout    what a file holds: records, names, checksums
    writing   arrays and attributes → a file, whole or not at all
    sink      the file object that HDF5 writes to
    opening   a file → its header, checked
    reading   a header → its arrays and attributes
    foreign   the arrays of HDF5 that refcurv did not write
"""

from refcurv.files.disk import file_sha256
from refcurv.files.provenance import machine, provenance
from refcurv.files.store.foreign import Outline, foreign_format, open_foreign, read_foreign
from refcurv.files.store.layout import (
    BFLOAT16,
    FORMATS,
    VERSION,
    Entry,
    Header,
    Info,
    Scalar,
    declared,
    sha256,
    to_name,
    to_path,
)
from refcurv.files.store.opening import open_file
from refcurv.files.store.reading import (
    Fact,
    Source,
    changed,
    fact,
    holds,
    inputs,
    read,
    require_entry,
    verify,
)
from refcurv.files.store.writing import write

__all__ = [
    "BFLOAT16",
    "FORMATS",
    "VERSION",
    "Entry",
    "Fact",
    "Header",
    "Info",
    "Outline",
    "Scalar",
    "Source",
    "changed",
    "declared",
    "fact",
    "file_sha256",
    "foreign_format",
    "holds",
    "inputs",
    "machine",
    "open_file",
    "open_foreign",
    "provenance",
    "read",
    "read_foreign",
    "require_entry",
    "sha256",
    "to_name",
    "to_path",
    "verify",
    "write",
]
