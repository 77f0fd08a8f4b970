"""Question answering: SQuAD (Rajpurkar et al., 2016) and MRQA's domains.

    squad_v010_allanswers              trained on the first of several answers
    mrqa_hotpot_qa_v100                in MRQA's training domains
    mrqa_bio_asq_v100                  outside them: a test split, as validation
    squad_to_bio_asq_examples          a mixture: trained on SQuAD, tested there
    squad_to_mrqa_examples             tested in all domains outside training

The mixtures are the domain shifts of Lester et al., 2021, section 5.1. Inputs
do not name the data set, so only `spot_mrqa_...` has taskless variants.

The reference's `squad_v010` compares with the letters of its one answer; here
it compares with the answer itself.
"""

import functools

from ptune.tasks import metrics, postprocessors, preprocessors, registry

SCORED = {'postprocess': postprocessors.answers, 'metrics': [metrics.squad]}

IN_DOMAIN = (
  'hotpot_qa',
  'natural_questions',
  'news_qa',
  'search_qa',
  'trivia_qa',
)
OUT_OF_DOMAIN = (
  'bio_asq',
  'drop',
  'duo_rc',
  'race',
  'relation_extraction',
  'textbook_qa',
)


def _register_squad() -> None:
  source = registry.tfds('squad/v1.1:3.0.0')
  context_free = functools.partial(preprocessors.squad, with_context=False)
  for name, text, postprocess in (
    ('squad_v010', preprocessors.squad, postprocessors.first_answer),
    ('squad_v010_allanswers', preprocessors.squad, postprocessors.answers),
    ('squad_v010_context_free', context_free, postprocessors.answers),
  ):
    registry.register(
      name, source, [text], postprocess=postprocess, metrics=[metrics.squad]
    )


def _register_mrqa() -> None:
  for domain in (*IN_DOMAIN, *OUT_OF_DOMAIN):
    splits = {'validation': 'test'} if domain in OUT_OF_DOMAIN else None
    registry.register(
      f'mrqa_{domain}_v100',
      registry.tfds(f'mrqa/{domain}:1.0.0', splits),
      [preprocessors.mrqa],
      **SCORED,
    )
  for domain in (*IN_DOMAIN, 'squad'):
    registry.register(
      f'spot_mrqa_{domain}_v100',
      registry.tfds(f'mrqa/{domain}:1.0.0'),
      [functools.partial(preprocessors.mrqa, name=domain)],
      variants=(registry.PLAIN, registry.TASKLESS),
      **SCORED,
    )


def _register_mixtures() -> None:
  everywhere = {domain: (domain,) for domain in OUT_OF_DOMAIN}
  for name, domains in {**everywhere, 'mrqa': OUT_OF_DOMAIN}.items():
    rates = {f'mrqa_{domain}_v100_examples': 1.0 for domain in domains}
    registry.register_mixture(
      f'squad_to_{name}_examples',
      {'squad_v010_allanswers_examples': 1.0, **rates},
    )


_register_squad()
_register_mrqa()
_register_mixtures()
