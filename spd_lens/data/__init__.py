"""Batches of tokens, token windows from texts and data sets, cached residual streams."""

from spd_lens.data.batches import Batch, TokenBatches, as_batch
from spd_lens.data.documents import Document
from spd_lens.data.processes import Processes, join_processes, leave_processes
from spd_lens.data.residual_files import open_residuals, write_residuals
from spd_lens.data.residuals import ResidualBatches, cache_residuals
from spd_lens.data.streams import checked_batch, endless_batches, first_batches
from spd_lens.data.token_stream import TokenStream
from spd_lens.data.tokens import cut_windows, load_tokens, pack_tokens
from spd_lens.data.window_stream import Cutting, Documents

__all__ = [
    "Batch",
    "Cutting",
    "Document",
    "Documents",
    "Processes",
    "ResidualBatches",
    "TokenBatches",
    "TokenStream",
    "as_batch",
    "cache_residuals",
    "checked_batch",
    "cut_windows",
    "endless_batches",
    "first_batches",
    "join_processes",
    "leave_processes",
    "load_tokens",
    "open_residuals",
    "pack_tokens",
    "write_residuals",
]
