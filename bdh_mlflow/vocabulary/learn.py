"""A vocabulary learned from text: byte-level BPE by `tokenizers`, which gives every text back."""

from collections.abc import Iterable

from bdh_mlflow.text import BYTE_VALUES
from bdh_mlflow.vocabulary.libraries import ENDS

LEAST = BYTE_VALUES + 2  # the bytes, a separator and one merge


def learn_bpe(texts: Iterable[str], size: int) -> bytes:
    """The tokenizer.json of a byte-level BPE with the separator `<|endoftext|>`; equal texts give equal bytes.

    size: tokens, LEAST or more; a text with fewer pairs to merge gives fewer. Words are cut as by GPT-2 (its regular expression).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[ENDS[0]], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()
