"""The tokenizer of a corpus: a pretrained one, or a byte-level BPE trained on the corpus."""

import json
import logging
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


logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# UTF-8 text never contains this byte, so the padding token can take its id
UNUSED_BYTE = "\u00ff"

# enough text for a stable vocabulary of thousands of tokens; training takes two seconds
SAMPLE_BYTES = 8_000_000

# part of the cache key: change it when the training below changes
RECIPE = "byte-level-bpe-2"


def load_or_train_tokenizer(corpus: Corpus, args: DataArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer `args.tokenizer_name`, or train one on the train split.

    The trained tokenizer is a byte-level BPE, so decoding an encoded text returns the same text. It
    is saved in the cache folder, under a hash of the text that it was trained on. Call this
    function in every process of a launch.

    Returns:
        `transformers.PreTrainedTokenizerBase`: Tokenizer with an `eos_token`. A trained tokenizer
        also has a `bos_token`, which is the same token, and a padding token. With a very
        small corpus it has fewer than `vocab_size` tokens.

    Raises:
        TokenizerError: If a folder has no tokenizer, or if the tokenizer has no `eos_token`.
        EmptyCorpusError: If there is no text to train on.

    Example:
        >>> tokenizer = load_or_train_tokenizer(corpus, DataArguments(vocab_size=1024))
    """
    if args.tokenizer_name is not None:
        with first_process_first():
            tokenizer = _load(args.tokenizer_name)
        check_end_of_text(tokenizer)
        return tokenizer
    sample = _sample(corpus.train, args.tokenizer_seed)
    key = digest([RECIPE, str(args.vocab_size), *sample])
    folder = resolve_cache_dir(args.cache_dir) / "tokenizers" / key

    def build(temporary: Path) -> None:
        _train(sample, args.vocab_size).save_pretrained(temporary)

    return PreTrainedTokenizerFast.from_pretrained(cached_folder(folder, build))


def _load(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        if not Path(name).is_dir() or any(Path(name).glob("*token*")):
            raise
        raise TokenizerError(
            f"`tokenizer_name` must be a folder with a tokenizer, but `{name}` has no tokenizer "
            f"files. Run `tokenizer.save_pretrained({name!r})`, or pass another `tokenizer_name`."
        ) from error


def check_end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return `eos_token_id`, the token id that ends a document. Raise if there is none."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "The tokenizer must have an `eos_token` to end each document, got None for "
            f"{tokenizer.name_or_path or type(tokenizer).__name__!r}. Set one, for example "
            f'`tokenizer.eos_token = "{END_OF_TEXT}"`.'
        )
    return int(tokenizer.eos_token_id)


def make_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Return a function that turns texts into token ids without special tokens."""
    special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    backend = plain_backend(tokenizer) if tokenizer.is_fast else None

    def encode(texts: list[str]) -> list[list[int]]:
        _warn_of_special(texts, special)
        if backend is None:
            return tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
        # a third faster than calling the tokenizer, which also builds masks and offsets
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    return encode


def _warn_of_special(texts: list[str], special: list[str]) -> None:
    """Log a warning at the first text that contains a special token, then empty `special`."""
    found = next((token for token in special for text in texts if token in text), None)
    if found is None:
        return
    special.clear()
    logger.warning(
        "The text contains `%s`, which is a special token of the tokenizer. It is read as plain "
        "text and split into several tokens. To train on chats, pass them to "
        "`multi_exit(SFTTrainer)`, which applies the chat template.",
        found,
    )


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the Rust tokenizer that does not pad, truncate or parse special tokens."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def count_text_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Count the UTF-8 bytes of the text that the token ids encode. Special tokens count 0.

    The count is exact for a byte-level tokenizer, even if the ids start or end inside a character.
    With other tokenizers, a cut character counts as a replacement character of three bytes.

    Example:
        >>> count_text_bytes(tokenizer, tokenizer("été")["input_ids"])  # 5
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
            "The train split must have text to train the tokenizer on, got none."
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
        # all 256 bytes, so that every text can be encoded; sorted, so that the ids never change
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
