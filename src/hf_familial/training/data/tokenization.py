"""The tokenizer: a pretrained one, or a byte-level BPE trained on the corpus and kept."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..._files import digest
from ...errors import EmptyCorpusError, TokenizerError
from ._cache import cached_folder, first_process_first, resolve_cache_dir
from .arguments import DataArguments
from .corpus import Corpus, Documents, iter_texts


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# a byte that no text in UTF-8 holds: its place in the vocabulary is free for the padding token
UNUSED_BYTE = "\u00ff"

# enough for merges of thousands of tokens to settle, and two seconds of training
SAMPLE_BYTES = 8_000_000

# part of the cache's key: raise it when the recipe below changes
RECIPE = "byte-level-bpe-2"


def load_or_train_tokenizer(corpus: Corpus, args: DataArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the arguments name, or train one on the train split.

    The trained one is a byte-level BPE: every text survives encoding and decoding unchanged. It is
    kept under the cache folder by a hash of the documents it was trained on. Call it in every
    process of a launch.

    Returns:
        `transformers.PreTrainedTokenizerBase` with an end-of-text token, which also begins a
        text; a trained one also has a padding token, which no text holds. A tiny corpus gives
        fewer than `vocab_size` tokens.

    Raises:
        DataError: If the tokenizer has no `eos_token` (`TokenizerError`), or there is no text to
            train on (`EmptyCorpusError`).
    """
    if args.tokenizer_name is not None:
        with first_process_first():
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        check_end_of_text(tokenizer)
        return tokenizer
    sample = _sample(corpus.train, args.tokenizer_seed)
    key = digest([RECIPE, str(args.vocab_size), *sample])
    folder = resolve_cache_dir(args.cache_dir) / "tokenizers" / key

    def build(temporary: Path) -> None:
        _train(sample, args.vocab_size).save_pretrained(temporary)

    return PreTrainedTokenizerFast.from_pretrained(cached_folder(folder, build))


def check_end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a document, the tokenizer's `eos_token_id`."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "The tokenizer must have an `eos_token` to end each document, got None for "
            f"{tokenizer.name_or_path or type(tokenizer).__name__!r}; set one, for example "
            f'`tokenizer.eos_token = "{END_OF_TEXT}"`.'
        )
    return int(tokenizer.eos_token_id)


def make_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Return a function from texts to token ids, without special tokens."""
    if tokenizer.is_fast:
        backend = plain_backend(tokenizer)
        # a third faster than the call, which also builds masks and offsets
        return lambda texts: [
            encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        ]
    return lambda texts: tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the Rust tokenizer, without padding, truncation or special tokens in texts."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def count_text_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Count the UTF-8 bytes of the text that token ids stand for; special tokens count zero.

    Exact for a byte-level tokenizer, even when the ids begin or end inside a character. For
    others such an edge counts the three bytes of a replacement character.
    """
    special = set(tokenizer.all_special_ids)
    ids = [i for i in ids if i not in special]
    if not (
        tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    ):
        return len(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).encode())
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    # the byte-level alphabet spells each byte as one character; added tokens are plain text
    pieces = (added[i].encode() if i in added else tokenizer.convert_ids_to_tokens(i) for i in ids)
    return sum(map(len, pieces))


def _sample(documents: Documents, seed: int) -> list[str]:
    shuffled = documents.shuffle(seed=seed) if isinstance(documents, Dataset) else documents
    sample = list(_first_bytes(shuffled, SAMPLE_BYTES))
    if not any(sample):
        raise EmptyCorpusError(
            "A tokenizer must be trained on some text, got an empty train split."
        )
    return sample


def _first_bytes(documents: Documents, limit: int) -> Iterator[str]:
    for texts in iter_texts(documents):
        for text in texts:
            piece = text[:limit].encode()[:limit].decode(errors="ignore")
            limit -= len(piece.encode())
            yield piece
        if limit <= 0:
            return


def _train(sample: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # all 256 bytes, so that no text is unknown; sorted, so that ids do not move
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer)
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    vocab[PADDING] = vocab.pop(UNUSED_BYTE)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
