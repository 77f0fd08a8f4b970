"""Natural language inference: SNLI, ANLI and DocNLI.

    spot_snli_v110            inputs begin with the data set's name, 'snli'
    taskless_spot_snli_v110   they do not
    spot_anli_r1_v010         ANLI's rounds 1, 2 and 3
    spot_doc_nli_v100

SNLI's rows without a majority label have the target '<unk>'. The reference
compares texts; here labels are numbers, so that we can count predictions that
are not a label.
"""

import functools

from ptune.tasks import metrics, preprocessors, registry

THREE = ('entailment', 'neutral', 'contradiction')
TWO = ('not_entailment', 'entailment')

# A name: TFDS's name, its word, the column of the premise, its labels.
TABLE = {
  'snli_v110': ('snli:1.1.0', 'snli', 'premise', THREE),
  'anli_r1_v010': ('anli/r1:0.1.0', 'anli_r1', 'context', THREE),
  'anli_r2_v010': ('anli/r2:0.1.0', 'anli_r2', 'context', THREE),
  'anli_r3_v010': ('anli/r3:0.1.0', 'anli_r3', 'context', THREE),
  'doc_nli_v100': ('doc_nli:1.0.0', 'doc_nli', 'premise', TWO),
}

for _name, (_tfds, _word, _premise, _labels) in TABLE.items():
  _text = functools.partial(
    preprocessors.classification,
    name=_word,
    fields=('hypothesis', _premise),
    labels=_labels,
    collapse=True,
  )
  registry.register(
    f'spot_{_name}',
    registry.tfds(_tfds),
    [_text],
    metrics=[metrics.accuracy],
    labels=_labels,
    variants=(registry.PLAIN, registry.TASKLESS),
  )
