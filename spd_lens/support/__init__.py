"""Small tools that know nothing of decompositions: files, tables, pages, names, versions."""

from spd_lens.support.checked_json import CheckedContent, checked_text, read_checked, write_checked
from spd_lens.support.compiling import Backend
from spd_lens.support.files import (
    CannotWrite,
    file_hash,
    given_directory,
    given_path,
    made_directory,
    new_directory,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from spd_lens.support.given import (
    given_flag,
    given_function,
    given_instance,
    given_list,
    given_number,
    given_one_of,
    given_seed,
    given_whole,
    given_wholes,
    shown,
)
from spd_lens.support.interrupts import hold_interrupts
from spd_lens.support.names import near_names
from spd_lens.support.owners import clear_dead_temporaries, held, own_mark, temporary_beside
from spd_lens.support.pages import filled_page, page_without_script, script_json, shortened, table_html, visible
from spd_lens.support.progress import tqdm
from spd_lens.support.saved_pair import SavedPair
from spd_lens.support.tables import format_table
from spd_lens.support.versions import library_versions
from spd_lens.support.workspace import block_entries

__all__ = [
    "Backend",
    "CannotWrite",
    "CheckedContent",
    "SavedPair",
    "block_entries",
    "checked_text",
    "clear_dead_temporaries",
    "file_hash",
    "filled_page",
    "format_table",
    "given_directory",
    "given_flag",
    "given_function",
    "given_instance",
    "given_list",
    "given_number",
    "given_one_of",
    "given_path",
    "given_seed",
    "given_whole",
    "given_wholes",
    "held",
    "hold_interrupts",
    "library_versions",
    "made_directory",
    "near_names",
    "new_directory",
    "own_mark",
    "page_without_script",
    "read_checked",
    "read_tensors",
    "script_json",
    "shortened",
    "shown",
    "table_html",
    "temporary_beside",
    "tqdm",
    "visible",
    "write_checked",
    "write_json",
    "write_tensors",
    "write_text",
]
