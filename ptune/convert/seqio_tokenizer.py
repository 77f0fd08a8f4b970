"""A vocabulary of `tokenizers` for the features of a SeqIO task."""

from collections.abc import Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from ptune.convert.tokenizer_json import Tokenizer


class TokenizerVocabulary(seqio.Vocabulary):
  """A `tokenizer_json.Tokenizer` as a SeqIO vocabulary.

  Its TensorFlow functions call Python, so a task must run in the process that
  made it.
  """

  def __init__(self, directory: epath.PathLike):
    super().__init__()
    self.tokenizer = Tokenizer(directory)

  @property
  def bos_id(self) -> int | None:
    return None

  @property
  def eos_id(self) -> int:
    return self.tokenizer.eos_id

  @property
  def pad_id(self) -> int:
    return self.tokenizer.pad_id

  @property
  def unk_id(self) -> int | None:
    return self.tokenizer.unk_id

  @property
  def _base_vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def _encode(self, s: str) -> Sequence[int]:
    return self.tokenizer.encode(s)

  def _decode(self, ids: Iterable[int]) -> str:
    return self.tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    if s.shape.rank:  # A batch of texts: [texts] -> [texts, (ids)].
      spec = tf.RaggedTensorSpec([None], tf.int32, ragged_rank=0)
      return tf.map_fn(self._encode_tf, s, fn_output_signature=spec)

    def encode(text: np.ndarray) -> np.ndarray:
      ids = self._encode(np.asarray(text).item().decode(errors='ignore'))
      return np.array(ids, np.int32)

    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    if ids.shape.rank and ids.shape.rank > 1:
      return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)

    def decode(ids: np.ndarray) -> bytes:
      return self._decode(ids.tolist()).encode()

    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    text.set_shape([])
    return text

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, TokenizerVocabulary)
      and self.tokenizer == other.tokenizer
    )

  def __str__(self) -> str:
    return f'TokenizerVocabulary({self.tokenizer})'
