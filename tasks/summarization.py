"""Summarisation: XSum, CNN/DailyMail and others, scored by ROUGE.

    xsum_v110_examples         'summarize: ' and a document
    cnn_dailymail_v002
    spot_gigaword_v120         the data set's name, 'summarize: ', a document
    taskless_spot_samsum_v100  without the name

TFDS 4.9.10 serves newer versions of CNN/DailyMail and Multi-News, 3.4.0 and
2.1.0, than the reference used; names with the old versions are aliases. You
must download Newsroom by hand.
"""

import functools

from ptune.tasks import metrics, preprocessors, registry

# Names: TFDS's name, and the columns of texts and summaries.
TABLE = {
  ('xsum_v110',): ('xsum:1.1.0', 'document', 'summary'),
  ('cnn_dailymail_v002', 'cnn_dailymail_v310', 'cnn_dailymail_v340'): (
    'cnn_dailymail:3.4.0',
    'article',
    'highlights',
  ),
}
SPOT_TABLE = {
  ('aeslc_v100',): ('aeslc:1.0.0', 'email_body', 'subject_line'),
  ('billsum_v300',): ('billsum:3.0.0', 'text', 'summary'),
  ('cnn_dailymail_v320', 'cnn_dailymail_v340'): (
    'cnn_dailymail:3.4.0',
    'article',
    'highlights',
  ),
  ('gigaword_v120',): ('gigaword:1.2.0', 'document', 'summary'),
  ('multi_news_v100', 'multi_news_v210'): (
    'multi_news:2.1.0',
    'document',
    'summary',
  ),
  ('newsroom_v100',): ('newsroom:1.0.0', 'text', 'summary'),
  ('samsum_v100',): ('samsum:1.0.0', 'dialogue', 'summary'),
}


def _register(names, tfds_name, source, target, prefix, variants):
  text = functools.partial(
    preprocessors.generation, prefix=prefix, source=source, target=target
  )
  registry.register(
    names,
    registry.tfds(tfds_name),
    [text],
    metrics=[metrics.rouge],
    variants=variants,
  )


for _names, _row in TABLE.items():
  _register(_names, *_row, 'summarize:', (registry.PLAIN,))
for _names, _row in SPOT_TABLE.items():
  _word = _row[0].split(':')[0]
  _register(
    [f'spot_{name}' for name in _names],
    *_row,
    f'{_word} summarize:',
    (registry.PLAIN, registry.TASKLESS),
  )
