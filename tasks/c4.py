"""C4 (Raffel et al., 2020): the data for training and adapting T5.

    c4_v220_prefix_lm                       adapts T5 to language modelling
    c4_v220_span_corruption                 T5's own objective
    c4_v220_span_corruption_no_sentinel     targets begin with a lost token
    byt5_c4_v220_span_corruption            the same in bytes

Prompt tuning works best on a model adapted by prefix LM. A model trained by
span corruption alone has seen only targets that begin with a sentinel (Lester
et al., 2021, section 2.2). Train on these tasks with runs/pretrain.gin.

The reference's names for span corruption end with `unsupervised`. TFDS now
calls the parts en.realnewslike and en.webtextlike realnewslike and webtextlike.
You need a cluster to prepare C4: see TFDS.
"""

import functools

import seqio

from ptune.tasks import pretraining, registry

SPAN_CORRUPTION = {
  'c4_v220_span_corruption': 'c4/en:2.2.0',
  'c4_v020_unsupervised': 'c4/en:2.2.0',
  'c4_noclean_v020_unsupervised': 'c4/en.noclean:2.2.0',
  'c4_realnewslike_v020_unsupervised': 'c4/realnewslike:2.2.0',
  'c4_webtextlike_v020_unsupervised': 'c4/webtextlike:2.2.0',
}
NO_SENTINEL = {'c4_v220_span_corruption_no_sentinel': 'c4/en:2.2.0'}
PREFIX_LM = {'c4_v220_prefix_lm': 'c4/en:2.2.0'}

# mT5's vocabulary does not mark its sentinels for SeqIO.
WITH_SENTINELS = ('', 'byt5_')

for _table, _add, _vocabularies in (
  (SPAN_CORRUPTION, pretraining.add_span_corruption, WITH_SENTINELS),
  (
    NO_SENTINEL,
    functools.partial(pretraining.add_span_corruption, sentinel_first=False),
    WITH_SENTINELS,
  ),
  (PREFIX_LM, pretraining.add_prefix_lm, registry.VOCABULARIES),
):
  for _name, _tfds in _table.items():
    for _vocab in _vocabularies:
      if _vocab + _name not in seqio.TaskRegistry.names():
        _source = registry.tfds(_tfds)
        _add(_vocab + _name, _source, registry.vocabulary(_vocab))
