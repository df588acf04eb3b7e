"""The one way to write files and to read them: text, JSON, tables, and tensors with JSON metadata.

*Writing*: what is written goes to a temporary name in the same folder, made by this call alone, and is renamed when it
is on the disk; a reader never sees half a file, and a failed write leaves the old file as it was. A new file's mode is
left to the umask, an old one's is kept, and so is a link to it. The same content gives the same bytes.

*Reading*: regular files only, of a size that is expected; nothing in a file is executed. Whatever is wrong with a file
is a ``ValueError`` that names it. JSON is strict: a key that comes twice, NaN and infinity are refused.

Tensors lie in the safetensors format, with a JSON header in its metadata. They may be given in pieces and read in
parts, so that a file can be larger than memory. The metadata also holds checksums, of each tensor and of all that the
header says: what was changed after it was saved is refused. Files of version 0.1 have none and are read as they are.
"""

from fvlens.files._paths import KINDS, as_path, check_destination, path_hint
from fvlens.files._read import MOST_JSON, parse_json, read_bytes, read_json, read_text
from fvlens.files._tensors import DTYPES, Pieces, TensorFile, read_tensors, write_tensors
from fvlens.files._write import replacing, table_text, write_json, write_table, write_text

__all__ = [
    "DTYPES",
    "KINDS",
    "MOST_JSON",
    "Pieces",
    "TensorFile",
    "as_path",
    "check_destination",
    "parse_json",
    "path_hint",
    "read_bytes",
    "read_json",
    "read_tensors",
    "read_text",
    "replacing",
    "table_text",
    "write_json",
    "write_table",
    "write_tensors",
    "write_text",
]
