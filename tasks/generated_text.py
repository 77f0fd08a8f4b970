"""English sentences from a small grammar, so that a model can train anywhere.

A *sentence* says who did what, where and when, and how good it was; those facts
are its latents. Pre-training reads sentences, a few docstrings, and rows of
many small tasks about the latents. Prompts are tuned on *reviews* and on
*reports*, whose topic is asked. These use other templates over the same words,
and labels that pre-training never reads.

    sentence  anna cooked three green noodles at the market in the morning and
              that was not really stale .
    review    i gave this noodle to my sister and we both find it stale
              -> negative

Everything is a pure function of a seed (docstrings also depend on the Python
release). This module imports neither SeqIO nor TensorFlow, because `ptune demo`
must start fast.
"""

import ast
import dataclasses
import functools
import pathlib
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ptune.tasks import prefixes


class Domain(NamedTuple):
  """The words of sentences about one topic."""

  nouns: tuple[str, ...]
  places: tuple[str, ...]
  good: tuple[str, ...]
  bad: tuple[str, ...]
  verbs: tuple[str, ...]


def _domain(nouns: str, places: str, good: str, bad: str, verbs: str) -> Domain:
  return Domain(*(tuple(x.split()) for x in (nouns, places, good, bad, verbs)))


DOMAINS = {
  'food': _domain(
    'soup noodle pizza steak salad curry burger pancake sausage cheese cake'
    ' sandwich pie omelette dumpling stew',
    'kitchen market bakery diner',
    'tasty fresh juicy savoury tender delicious',
    'stale bland greasy burnt soggy rancid',
    'cook order taste serve',
  ),
  'film': _domain(
    'movie drama comedy thriller western cartoon sequel trailer scene plot'
    ' actor script villain romance documentary musical',
    'cinema theatre festival studio',
    'gripping moving witty thrilling touching hilarious',
    'boring predictable clumsy wooden corny pointless',
    'watch film direct review',
  ),
  'book': _domain(
    'novel poem chapter diary essay story paperback memoir fable manual'
    ' biography legend magazine notebook textbook atlas',
    'library bookshop archive attic',
    'insightful poetic readable profound lively captivating',
    'tedious shallow confusing preachy muddled longwinded',
    'borrow translate publish quote',
  ),
  'hotel': _domain(
    'room suite lobby bed pillow blanket balcony shower towel breakfast pool'
    ' sauna elevator receptionist hallway curtain',
    'resort beach harbour village',
    'cosy spotless restful welcoming spacious luxurious',
    'filthy noisy cramped mouldy stuffy shabby',
    'book visit reserve clean',
  ),
  'phone': _domain(
    'camera screen battery charger keyboard speaker tablet laptop headset'
    ' printer router monitor sensor button cable app',
    'shop office lab desk',
    'fast responsive sleek handy efficient accurate',
    'laggy buggy glitchy flimsy sluggish overheated',
    'charge repair install unlock',
  ),
  'car': _domain(
    'engine truck van wheel brake gearbox seat tyre jeep bumper windscreen'
    ' mirror scooter motorbike pedal taxi',
    'garage highway bridge workshop',
    'smooth sturdy powerful economical safe agile',
    'rusty wobbly leaky dented unsafe thirsty',
    'park rent wash polish',
  ),
  'garden': _domain(
    'rose tulip hedge lawn tree shrub fern pond fountain orchid daisy cactus'
    ' vine lily herb bush',
    'park greenhouse meadow yard',
    'blooming fragrant lush healthy fertile vibrant',
    'withered weedy barren rotten thorny diseased',
    'plant water trim paint',
  ),
  'music': _domain(
    'song guitar piano violin drum flute trumpet concert melody album ballad'
    ' choir symphony singer chorus orchestra',
    'stage club church arena',
    'melodic catchy soulful harmonious uplifting rhythmic',
    'shrill tuneless screechy monotonous hoarse discordant',
    'play record perform practise',
  ),
  'clothes': _domain(
    'shirt jacket scarf coat sweater dress skirt hat glove boot sock belt'
    ' blouse suit sandal raincoat',
    'boutique wardrobe mall laundry',
    'stylish comfy elegant soft warm flattering',
    'itchy baggy faded torn scratchy frumpy',
    'wear sew iron fold',
  ),
  'school': _domain(
    'lesson teacher exam course lecture seminar homework workshop tutor quiz'
    ' project classroom student debate experiment diploma',
    'college campus academy gymnasium',
    'inspiring clear helpful useful patient motivating',
    'unfair chaotic strict useless vague disorganised',
    'explain study attend prepare',
  ),
  'sport': _domain(
    'match race goal team coach player tournament jersey racket ball league'
    ' marathon trophy referee rider sprint',
    'stadium court track pitch',
    'exciting skilful fair energetic brave heroic',
    'lazy sloppy violent reckless cowardly uneventful',
    'train kick score join',
  ),
  'furniture': _domain(
    'chair table sofa lamp shelf cupboard drawer carpet mattress stool bench'
    ' bookcase armchair dresser candle clock',
    'parlour warehouse cellar balcony',
    'solid comfortable polished durable tidy graceful',
    'creaky scratched unstable broken lumpy cracked',
    'assemble move dust design',
  ),
  'travel': _domain(
    'train flight ferry bus ticket journey tunnel tram cruise luggage platform'
    ' cabin suitcase passport map tour',
    'station airport island border',
    'punctual scenic relaxing affordable adventurous carefree',
    'delayed crowded exhausting overpriced bumpy cancelled',
    'board miss plan enjoy',
  ),
  'animal': _domain(
    'dog cat horse parrot rabbit hamster goat turtle pony kitten puppy lamb'
    ' duck goose donkey lizard',
    'farm zoo stable forest',
    'friendly playful gentle loyal cuddly clever',
    'aggressive smelly vicious stubborn sickly fierce',
    'feed brush walk adopt',
  ),
}
GOOD = (
  'great good wonderful excellent lovely superb pleasant splendid charming'
  ' brilliant delightful fantastic amazing perfect marvellous nice'
).split()
BAD = (
  'bad awful terrible poor dreadful horrible nasty dismal lousy miserable'
  ' ugly disappointing annoying worthless mediocre ghastly'
).split()
NAMES = (
  'anna ben clara david emma felix grace henry iris jacob karen leo maria'
  ' nina oscar paula quentin rosa simon tara victor wendy'
).split()
COLOURS = 'red blue green yellow black white brown pink purple grey'.split()
NUMBERS = 'two three four five six seven eight nine ten twelve'.split()
TIMES = 'morning afternoon evening night weekend summer winter spring'.split()
TENSES = ('past', 'present', 'future')
PLACES = sorted({place for d in DOMAINS.values() for place in d.places})
POLARITIES = ('good', 'bad')
DEGREES = ('', '', 'very ', 'really ', 'quite ', 'so ')
NEGATED = 0.2  # Probability of `not` before an adjective of the other polarity.

VALUES = {
  'polarity': POLARITIES,
  'domain': tuple(DOMAINS),
  'tense': TENSES,
  'name': tuple(NAMES),
  'place': tuple(PLACES),
  'colour': tuple(COLOURS),
  'number': tuple(NUMBERS),
  'time': tuple(TIMES),
}
# How often pre-training tasks ask for an attribute. Users ask a small model
# most often for sentiment and topic.
WEIGHTS = {'polarity': 4, 'domain': 3}

SENTENCES = (
  '{name} {verb} {number} {colour} {noun}s at the {place} in the {time} and'
  ' that {be} {adjective} .',
  'in the {time} {name} {verb} {number} {colour} {noun}s near the {place} ;'
  ' it {be} {adjective} .',
  'the {number} {colour} {noun}s that {name} {verb} at the {place} in the'
  ' {time} {be} {adjective} .',
  '{adjective} {be} the {number} {colour} {noun}s in the {place} , {name}'
  ' {verb} them every {time} .',
  'at the {place} , {name} {verb} a {colour} {noun} for {number} people one'
  ' {time} : all {be} {adjective} .',
  'they {be} {adjective} , the {colour} {noun}s of {name} , who {verb}'
  ' {number} of them by the {place} this {time} .',
  'one {time} {name} {verb} my {colour} {noun} with {number} friends in the'
  ' {place} , and everything {be} {adjective} .',
  'since {name} {verb} {number} {noun}s , the {colour} {place} {be}'
  ' {adjective} in the {time} .',
)

# ------------------------------------------------------------------ downstream
REVIEWS = (
  'i gave this {noun} to my sister and we both find it {adjective}',
  'honestly , i would call the {noun} {adjective}',
  'five stars or one ? my verdict on the {noun} : {adjective}',
  'after a whole week with your {noun} i must say {adjective} , {adjective}',
  'we expected something else , but this {noun} proved {adjective}',
  'bought a {noun} yesterday . {adjective} ! my wife says {adjective} too',
  'the seller sent me some {noun} which turned out {adjective}',
  'do you want my opinion about that {noun} ? just {adjective}',
)
REPORTS = (
  'overheard by the {place} : she {verb} another {noun} , {adjective}',
  'dear diary , today someone {verb} our {noun} near a {place} . {adjective}',
  'lost and found : a {noun} , {adjective} , last seen inside the {place}',
  'meet us outside the {place} , bring your {noun} , they say {adjective}',
)
SENTIMENT = {'good': 'positive', 'bad': 'negative'}
PARAPHRASE = {True: 'paraphrase', False: 'contrast'}
TOPICS = {
  'food': 'cuisine',
  'music': 'audio',
  'animal': 'wildlife',
  'travel': 'vacation',
}


@dataclasses.dataclass(frozen=True)
class Sentence:
  """A sentence and its facts."""

  text: str
  latents: dict[str, str]


def sentence(rng: random.Random, **given: str) -> Sentence:
  """Draws a sentence; some latents may be given."""
  latents = {k: given.get(k) or rng.choice(v) for k, v in VALUES.items()}
  domain = DOMAINS[latents['domain']]
  if 'place' not in given:
    latents['place'] = rng.choice(domain.places)
  text = rng.choice(SENTENCES).format(
    **latents,
    noun=rng.choice(domain.nouns),
    verb=_conjugate(rng.choice(domain.verbs), latents['tense']),
    be={'past': 'was', 'present': 'is', 'future': 'will be'}[latents['tense']],
    adjective=_judgement(rng, domain, latents['polarity']),
  )
  return Sentence(text, latents)


def _conjugate(verb: str, tense: str) -> str:
  """Returns the third person: cook -> cooked, cooks, will cook."""
  if tense == 'future':
    return f'will {verb}'
  if tense == 'past':
    irregular = {'wear': 'wore', 'sew': 'sewed', 'feed': 'fed'}
    if verb in ('plan', 'trim'):
      return verb + verb[-1] + 'ed'
    if verb == 'study':
      return 'studied'
    return irregular.get(verb, verb + ('d' if verb.endswith('e') else 'ed'))
  if verb == 'study':
    return 'studies'
  return verb + ('es' if verb.endswith(('ch', 'sh', 'ss')) else 's')


def _judgement(rng: random.Random, domain: Domain, polarity: str) -> str:
  """Returns an adjective of a polarity, or `not` and one of the opposite."""
  good = polarity == 'good'
  negated = rng.random() < NEGATED
  degree = rng.choice(DEGREES)
  common, special = (
    (GOOD, domain.good) if good != negated else (BAD, domain.bad)
  )
  word = rng.choice(special if rng.random() < 0.5 else common)
  return f'not {degree}{word}' if negated else degree + word


def sentences(seed: int, count: int) -> list[Sentence]:
  """Draws sentences."""
  rng = random.Random(f'sentences {seed}')
  return [sentence(rng) for _ in range(count)]


def reviews(
  seed: int,
  count: int,
  domains: Sequence[str] = tuple(DOMAINS),
  templates: Sequence[str] = REVIEWS,
) -> list[tuple[str, str]]:
  """Draws reviews and their sentiment, half of them positive."""
  rng = random.Random(f'reviews {seed}')
  rows = []
  for i in range(count):
    polarity = POLARITIES[i % 2]
    text = _fill(rng, templates, rng.choice(domains), polarity)
    rows.append((text, SENTIMENT[polarity]))
  rng.shuffle(rows)
  return rows


def paraphrases(
  seed: int, count: int, templates: Sequence[str] = REVIEWS
) -> list[tuple[str, str]]:
  """Draws pairs of texts, and whether both say the same of the same thing."""
  rng = random.Random(f'paraphrases {seed}')
  rows = []
  for i in range(count):
    domain, polarity = rng.choice(tuple(DOMAINS)), rng.choice(POLARITIES)
    noun = rng.choice(DOMAINS[domain].nouns)
    same = i % 2 == 0
    other = polarity if same else POLARITIES[polarity == 'good']
    a, b = rng.sample(list(templates), 2)
    texts = [
      _fill(rng, [a], domain, polarity, noun),
      _fill(rng, [b], domain, other, noun),
    ]
    rows.append((' = '.join(texts), PARAPHRASE[same]))
  rng.shuffle(rows)
  return rows


def topics(seed: int, count: int) -> list[tuple[str, str]]:
  """Draws reports and their topic, equally many from each of four topics."""
  rng = random.Random(f'topics {seed}')
  rows = []
  for i in range(count):
    domain = tuple(TOPICS)[i % len(TOPICS)]
    polarity = rng.choice(POLARITIES)
    rows.append((_fill(rng, REPORTS, domain, polarity), TOPICS[domain]))
  rng.shuffle(rows)
  return rows


def _fill(
  rng: random.Random,
  templates: Sequence[str],
  domain: str,
  polarity: str,
  noun: str | None = None,
) -> str:
  words = DOMAINS[domain]
  template = rng.choice(templates)
  while '{adjective}' in template:
    judgement = _judgement(rng, words, polarity)
    template = template.replace('{adjective}', judgement, 1)
  noun = noun or rng.choice(words.nouns)
  if '{verb}' not in template and '{place}' not in template:
    return template.format(noun=noun)
  return template.format(
    noun=noun,
    place=rng.choice(words.places),
    verb=_conjugate(rng.choice(words.verbs), 'past'),
  )


# ---------------------------------------------------------------- pre-training


def withheld() -> frozenset[str]:
  """Returns the labels of the reviews, which pre-training may not read."""
  return frozenset([*SENTIMENT.values(), *TOPICS.values()])


@functools.cache
def docstrings() -> tuple[str, ...]:
  """Returns paragraphs of the docstrings of this Python's standard library.

  They are in lower case, one paragraph an item, and have no withheld word.
  """
  found = []
  for file in sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py')):
    try:
      tree = ast.parse(file.read_text(encoding='utf-8'))
    except (SyntaxError, UnicodeDecodeError):
      continue
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
        found.extend(_paragraphs(ast.get_docstring(node) or ''))
  forbidden = re.compile('|'.join(sorted(withheld())))
  found = dict.fromkeys(found)
  return tuple(text for text in found if not forbidden.search(text))


def _paragraphs(text: str) -> Iterator[str]:
  for paragraph in text.split('\n\n'):
    line = ' '.join(paragraph.lower().split())
    # Prose only: code and tables teach a small model nothing.
    if len(line) > 40 and re.fullmatch(r"[a-z0-9 ,.;:()'\"`_/-]+", line):
      yield line


def text(seed: int, count: int, docstring_share: float = 0.2) -> list[str]:
  """Draws lines for language modelling: sentences and docstrings."""
  rng = random.Random(f'text {seed}')
  lines = [s.text for s in sentences(seed, count)]
  if docstring_share:
    paragraphs = docstrings()
    for i in range(count):
      if rng.random() < docstring_share:
        lines[i] = rng.choice(paragraphs)
  return lines


def label_words() -> list[str]:
  """Returns 400 invented words, such as `bolan`, which serve as labels."""
  rng = random.Random('label words')
  starts = 'b c ch d f g h j k l m n p r s st t tr v w pl br'.split()
  middles = 'a e i o u'.split()
  ends = 'n r l s t m nd rt x ck'.split()
  words: dict[str, None] = {}
  while len(words) < 400:
    parts = [rng.choice(x) for x in (starts, middles, starts, middles, ends)]
    words[''.join(parts)] = None
  return list(words)


def vocabulary_text(seed: int, count: int) -> list[str]:
  """Returns the training text of the SentencePiece vocabulary.

  It adds lists of the text's words to the text, because the trainer considers
  only pieces that begin two different words, such as `stale,` and `stale.`. The
  lists have every other label word, so that some answers are one piece and some
  are several.
  """
  lines = text(seed, count)
  words = {w for s in sentences(seed, count) for w in s.text.split()}
  known = sorted(word for word in words if word.isalpha())
  rng = random.Random(f'vocabulary {seed}')
  # Repeated often enough that the trainer gives each word a piece.
  for words in [known] * 6 + [label_words()[::2]] * 40:
    words = rng.sample(words, len(words))
    for end in ',.;':
      lines.append(' '.join(word + end for word in words))
  assert not withheld() & {w for line in lines for w in line.split()}
  return lines


def prefix_tasks(seed: int, count: int) -> list[prefixes.PrefixTask]:
  """Draws tasks: an attribute, 2 to 4 of its values, a word for each."""
  return prefixes.draw_tasks(seed, count, VALUES, WEIGHTS, label_words())


def prefix_rows(
  seed: int, count: int, tasks: Sequence[prefixes.PrefixTask]
) -> list[tuple[int, str, str]]:
  """Draws (task number, sentence, label)."""
  rng = random.Random(f'prefix rows {seed}')
  rows = []
  for _ in range(count):
    number = rng.randrange(len(tasks))
    task = tasks[number]
    value = rng.choice(list(task.labels))
    made = sentence(rng, **{task.attribute: value})
    rows.append((number, made.text, task.labels[value]))
  return rows


def described(seed: int, count: int) -> list[tuple[str, str]]:
  """Draws sentences with all their latents in one fixed order."""
  rng = random.Random(f'described {seed}')
  made = [sentence(rng) for _ in range(count)]
  return [(s.text, ' '.join(s.latents.values())) for s in made]
