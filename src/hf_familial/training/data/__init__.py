"""Preparation of training data. `prepare_data` turns a corpus into packed blocks of tokens."""

from .arguments import DataArguments
from .corpus import Corpus, load_corpus
from .packing import PackedDocuments, pack_documents
from .prepare import PackedData, prepare_data
from .tokenization import count_text_bytes, load_or_train_tokenizer


__all__ = [
    "Corpus",
    "DataArguments",
    "PackedData",
    "PackedDocuments",
    "count_text_bytes",
    "load_corpus",
    "load_or_train_tokenizer",
    "pack_documents",
    "prepare_data",
]
