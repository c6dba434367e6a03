"""Recognizes files that are given as tables and are something else, for errors that state what to do."""

import codecs

from shards.sources.files import read_head
from shards.storage import Place

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd -k"),
}
"""First bytes -> the name of a compression, and the command that decompresses."""
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_OLD_EXCEL = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def describe_other(path: Place) -> str | None:
    """The kind of a file that is no table, and the fix, in the form `is …; …`; None if its first bytes do not tell."""
    try:
        head = read_head(path)
    except ValueError:
        return None
    name, extension = path.name, path.suffix.lower()
    for magic, (kind, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed with {kind}; decompress it: {command} {name}"
    if head.startswith(b"PK\x03\x04"):
        if extension in (".xlsx", ".xlsm", ".xlsb", ".ods") or b"[Content_Types].xml" in head:
            return "is a spreadsheet; save it as CSV in UTF-8"
        return "is a zip archive; unpack it and give the table inside"
    if head.startswith(_OLD_EXCEL):
        return "is a spreadsheet of old Excel; save it as CSV in UTF-8"
    if head.startswith(_UTF_16):
        return f"is in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name} > FILE"
    if head.startswith(b"SQLite format 3\0"):
        return "is a database of SQLite; export its table as CSV"
    if head[:1] == b"\x80" and extension in (".pkl", ".pickle"):
        return "is a pickle, which may run code; save it as Parquet"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS; fetch the file itself: git lfs pull"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if extension == ".json" and text.startswith(b"["):
        return f"is a JSON array; write one object on each line: jq -c '.[]' {name} > {name.rpartition('.')[0]}.jsonl"
    if extension == ".json" and text.startswith(b"{"):
        return "is JSON; write one object for each picture on a line of its own, and call the file .jsonl"
    return None
