"""Vocabularies: text to token ids and back, by bytes or by the tokenizer of a library."""

from bdh_mlflow.vocabulary.tokenizer import BYTES, Encoded, Ids, Tokenizer, of_content

__all__ = ["BYTES", "Encoded", "Ids", "Tokenizer", "of_content"]
