"""From a corpus to packed token blocks: documents, tokenizer, packing, one door `prepare_data`."""

from ...errors import (
    DataError,
    EmptyCorpusError,
    TextColumnError,
    TokenizerError,
    UnknownFileTypeError,
)
from .arguments import DataArguments
from .corpus import Corpus, load_corpus
from .packing import PackedDocuments, pack_documents
from .prepare import PackedData, prepare_data
from .tokenization import count_text_bytes, load_or_train_tokenizer


__all__ = [
    "Corpus",
    "DataArguments",
    "DataError",
    "EmptyCorpusError",
    "PackedData",
    "PackedDocuments",
    "TextColumnError",
    "TokenizerError",
    "UnknownFileTypeError",
    "count_text_bytes",
    "load_corpus",
    "load_or_train_tokenizer",
    "pack_documents",
    "prepare_data",
]
