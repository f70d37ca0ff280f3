"""Small tools that know nothing of decompositions: files, tables, pages, names, versions."""

from spd_lens.support.files import file_hash, read_tensors, write_json, write_tensors, write_text
from spd_lens.support.names import near_names
from spd_lens.support.pages import filled_page, script_json, shortened, table_html, visible
from spd_lens.support.progress import tqdm
from spd_lens.support.tables import format_table
from spd_lens.support.versions import library_versions
from spd_lens.support.workspace import block_entries

__all__ = [
    "block_entries",
    "file_hash",
    "filled_page",
    "format_table",
    "library_versions",
    "near_names",
    "read_tensors",
    "script_json",
    "shortened",
    "table_html",
    "tqdm",
    "visible",
    "write_json",
    "write_tensors",
    "write_text",
]
