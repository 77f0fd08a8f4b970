"""Models of every family from transformers give the same answers in ptune.

They need `pip install -e '.[test,interop]'`.
"""

import dataclasses
import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ptune import methods
from ptune.convert import open_checkpoint, prompts
from ptune.convert.conversion import convert
from ptune.convert.export import export
from ptune.convert.source import Leaf
from ptune.convert.t5x import write_t5x
from ptune.methods import prompt
from ptune.model import frozen_weights, parameters, partitioning, structure
from ptune.model.models import Decoding, EncoderDecoderModel
from ptune.model.network import Transformer
from ptune.model.sizes import TokenIds
from tests import layouts

WHY = "not installed; pip install -e '.[test,interop]' brings it"
torch = pytest.importorskip('torch', reason=f'torch is {WHY}')
transformers = pytest.importorskip(
  'transformers', reason=f'transformers is {WHY}'
)

# These libraries warn about each other's deprecations.
pytestmark = pytest.mark.filterwarnings('ignore')

PROMPT = 3
DECODED = 8
BEAMS = 3


@dataclasses.dataclass(frozen=True)
class Kind:
  """A model of transformers.

  Attributes:
    name: Its class, without ForConditionalGeneration.
    ids: Its special tokens.
    head: Whether the output layer has its own weights.
    own: Whether the decoder has its own embedding.
    config: Settings that differ from those of the other models.
    seed: Seed of its weights; some answers end, at different lengths.
  """

  name: str = 'T5'
  ids: TokenIds = TokenIds()
  head: bool = True
  own: bool = False
  config: tuple = (('feed_forward_proj', 'gated-gelu'),)
  seed: int = 1

  def make(self, path):
    """Makes the model and saves it at `path`."""
    torch.manual_seed(self.seed)
    config = getattr(transformers, f'{self.name}Config')(
      **{
        'vocab_size': 96,
        'd_model': 16,
        'd_kv': 6,
        'num_heads': 3,
        'd_ff': 24,
        'num_layers': 2,
        'num_decoder_layers': 3,
        'initializer_factor': 1.0,
        'pad_token_id': self.ids.pad,
        'eos_token_id': self.ids.eos,
        'decoder_start_token_id': self.ids.start,
        **dict(self.config),
      }
    )
    kind = getattr(transformers, f'{self.name}ForConditionalGeneration')
    model = kind(config).eval()
    shape = (config.vocab_size, config.d_model)
    if self.head:
      model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(*shape))
    if self.own:
      embedding = torch.nn.Embedding(*shape)
      model.decoder.set_input_embeddings(embedding)
    with torch.no_grad():
      model.lm_head.weight[self.ids.eos] *= 4  # Some answers end.
      # Different values in each layer, so that a mix-up of layers shows.
      for name, value in model.named_parameters():
        if 'relative_attention_bias' in name:
          value.copy_(torch.randn(*value.shape))
        if 'global_input_layer_norm' in name:
          value.copy_(1 + 0.5 * torch.randn(*value.shape))
    model.save_pretrained(path)
    return model


UNSCALED = (('feed_forward_proj', 'gated-gelu'), ('tie_word_embeddings', False))
KINDS = {
  'madlad': Kind(ids=TokenIds(pad=1, eos=2), config=UNSCALED),
  'codet5': Kind(
    ids=TokenIds(eos=2), head=False, config=(('feed_forward_proj', 'relu'),)
  ),
  'ul2': Kind(config=(('feed_forward_proj', 'gated-silu'), *UNSCALED[1:])),
  'umt5': Kind('UMT5', config=UNSCALED),
  'pile_t5': Kind('UMT5', ids=TokenIds(pad=1, eos=2), config=UNSCALED),
  'scaled head': Kind(),
  'embedding of the decoder': Kind(own=True, config=UNSCALED),
  'tied but not scaled': Kind(head=False, config=UNSCALED),
  'long_t5 local': Kind(
    'LongT5',
    config=(
      *UNSCALED,
      ('encoder_attention_type', 'local'),
      ('local_radius', 2),
    ),
    seed=17,
  ),
  'long_t5 global': Kind(
    'LongT5',
    config=(
      *UNSCALED,
      ('encoder_attention_type', 'transient-global'),
      ('local_radius', 2),
      ('global_block_size', 4),
    ),
    seed=17,
  ),
  'tied mt5': Kind('MT5', head=False),
}
# For these models, SCAN computes the layers.
SCANNED = ('pile_t5', 'long_t5 global')


@functools.cache
def made(kind, directory):
  path = directory / kind.replace(' ', '_')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    KINDS[kind].make(path)
    # Loads it as users would.
    load = transformers.AutoModelForSeq2SeqLM.from_pretrained
    return path, load(path, dtype=torch.float32).eval()


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('families')


def case_of(ids: TokenIds) -> dict[str, np.ndarray]:
  """Returns rows of unequal length that include other models' special ids."""
  rng = np.random.default_rng(0)
  inputs, targets = (rng.integers(0, 96, (3, n), np.int32) for n in (7, 5))
  for tokens in (inputs, targets):
    tokens[tokens == ids.pad] = 50
    tokens[:, 1] = [t for t in (0, 1, 2, 3) if t != ids.pad]
    tokens[1, 4:] = ids.pad
    tokens[0, -1] = tokens[1, 3] = ids.eos
  shifted = np.pad(targets, ((0, 0), (1, 0)), constant_values=ids.start)
  return {
    'encoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_input_tokens': shifted[:, :-1],
    'decoder_loss_weights': (targets != ids.pad).astype(np.int32),
  }


def rows_of_a_prompt() -> np.ndarray:
  return np.random.default_rng(1).normal(size=(PROMPT, 16)).astype(np.float32)


def theirs(model, case, rows, ids):
  """Returns the inputs of a torch model: the prompt before the embeddings."""
  tokens = torch.tensor(case['encoder_input_tokens'], dtype=torch.long)
  embedded = model.encoder.embed_tokens(tokens)
  prompts = rows[None].expand(len(tokens), -1, -1)
  mask = torch.nn.functional.pad(
    (tokens != ids.pad).long(), (PROMPT, 0), value=1
  )
  return {
    'inputs_embeds': torch.cat([prompts, embedded], 1),
    'attention_mask': mask,
  }


def ours(path, scan=False):
  """Reads the model in ptune, with a prompt; returns model and parameters."""
  config, arrays = layouts.restored(path)
  config = dataclasses.replace(config, scan=scan)
  net = Transformer(config, prompt.prompt(PROMPT).placements)
  return EncoderDecoderModel(net, z_loss=0.0), arrays


@pytest.mark.parametrize('kind', KINDS)
def test_loss_and_gradient_of_a_prompt_are_those_of_transformers(
  directory, kind
):
  path, model = made(kind, directory)
  ids = KINDS[kind].ids
  case, value = case_of(ids), rows_of_a_prompt()
  rows = torch.tensor(value, requires_grad=True)
  labels = torch.tensor(case['decoder_target_tokens'], dtype=torch.long)
  want = model(
    **theirs(model, case, rows, ids),
    decoder_input_ids=torch.tensor(case['decoder_input_tokens']).long(),
  ).logits
  want_loss = torch.nn.functional.cross_entropy(
    want.flatten(0, 1),
    labels.flatten(),
    ignore_index=ids.pad,
    reduction='sum',
  )
  want_loss.backward()

  asked, arrays = ours(path, scan=kind in SCANNED)
  assert asked.network.config.ids == ids

  def loss(rows):
    params = layouts.nested({**arrays, prompt.PATH: rows})
    return asked.loss(params, case)[0], asked.logits(params, case)

  (got_loss, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    jnp.asarray(value)
  )
  layouts.assert_logits(np.asarray(got), want.detach().numpy(), case, atol=1e-4)
  np.testing.assert_allclose(got_loss, want_loss.item(), rtol=1e-5)
  np.testing.assert_allclose(
    gradient, rows.grad.numpy(), atol=1e-4 * float(np.abs(rows.grad).max())
  )


@pytest.mark.parametrize(
  'kind',
  ['umt5', 'embedding of the decoder', 'long_t5 local', 'long_t5 global'],
)
def test_eight_devices_equal_one(directory, kind):
  path, _ = made(kind, directory)
  asked, arrays = ours(path)
  # Rows for four devices, with two devices for each row.
  case = {k: np.repeat(x, 4, axis=0) for k, x in case_of(TokenIds()).items()}
  arrays = {**arrays, prompt.PATH: jnp.asarray(rows_of_a_prompt())}
  want, _ = jax.jit(asked.loss)(layouts.nested(arrays), case)
  plan = parameters.plan(
    asked.network.config, prompt.prompt(PROMPT), partitioning.make_mesh(2)
  )
  placed = {
    name: jax.device_put(np.asarray(x), plan.params[name].sharding)
    for name, x in arrays.items()
  }
  assert not placed['token_embedder/embedding'].sharding.is_fully_replicated
  with plan.scope():
    got, _ = jax.jit(asked.loss)(layouts.nested(placed), case)
  np.testing.assert_allclose(got, want, rtol=1e-5)


OTHERWISE = ['umt5', 'embedding of the decoder', 'long_t5 local']
OTHERWISE.append('long_t5 global')


def loss_of(path, case, mesh, **how):
  """Returns the loss with frozen weights placed on a mesh, as in a run."""
  config, arrays = layouts.restored(path)
  plan = parameters.plan(
    dataclasses.replace(config, **how), prompt.prompt(PROMPT), mesh
  )
  arrays = {**arrays, prompt.PATH: rows_of_a_prompt()}
  placed = {
    name: parameters.place(np.asarray(arrays[name]), x)
    for name, x in plan.params.items()
  }
  trained = layouts.nested({prompt.PATH: placed.pop(prompt.PATH)})
  frozen = layouts.nested(frozen_weights.freeze(plan, placed))
  model = EncoderDecoderModel(plan.network, z_loss=0.0)

  def loss(trained, frozen):
    return model.loss(parameters.merge(trained, frozen), case)[0]

  with plan.scope():
    found = jax.jit(jax.value_and_grad(loss))(trained, frozen)
  return jax.device_get(found)


@pytest.mark.slow
@pytest.mark.parametrize('kind', OTHERWISE)
def test_loss_and_gradient_are_the_same_however_it_is_computed(directory, kind):
  path, _ = made(kind, directory)
  case = {k: np.repeat(x, 8, axis=0) for k, x in case_of(TokenIds()).items()}
  one = partitioning.make_mesh(1, jax.devices()[:1])
  want, slope = loss_of(path, case, one)
  slope = slope['encoder']['prompt']['prompt']['prompt']
  for parts, how in (
    (1, {'fsdp': True, 'scan': True, 'remat': True}),
    (2, {'fsdp': True}),
    (8, {'scan': True}),
    (4, {'length_multiple': 16}),
  ):
    got, found = loss_of(path, case, partitioning.make_mesh(parts), **how)
    np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=str(how))
    found = found['encoder']['prompt']['prompt']['prompt']
    limit = 1e-4 * np.abs(slope).max()
    np.testing.assert_allclose(found, slope, atol=limit, err_msg=str(how))
  for how in ({'frozen_dtype': 'int8', 'fsdp': True}, {'dtype': 'bfloat16'}):
    got, _ = loss_of(path, case, partitioning.make_mesh(2), **how)
    np.testing.assert_allclose(got, want, rtol=0.05, err_msg=str(how))
    assert got != want, 'nothing was rounded'


# Arguments of methods whose defaults are too large for a vocabulary of 96, or
# causal, which transient-global attention does not allow.
SMALL = {
  'superpos': {'tokens': 8, 'population': 90},
  'multitask': {'tasks': 2, 'vocab_size': 96, 'causal': False},
}


@pytest.mark.slow
@pytest.mark.parametrize('method', sorted(methods.functions()))
@pytest.mark.parametrize('kind', ['umt5', 'long_t5 global'])
def test_every_method_learns(directory, kind, method):
  path, _ = made(kind, directory)
  config, arrays = layouts.restored(path)
  how = methods.functions()[method](**SMALL.get(method, {}))
  net = Transformer(config, how.placements)
  rng = np.random.default_rng(3)
  params = {
    name: rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    for name, x in structure.parameters(net).items()
  } | arrays
  trained = {name: params.pop(name) for name in [*params] if how.trains(name)}
  case = case_of(TokenIds())
  if method == 'multitask':  # Row begins with its task token.
    case['encoder_input_tokens'][:, 0] = 95
  asked = EncoderDecoderModel(net)

  def loss(trained):
    return asked.loss(layouts.nested({**params, **trained}), case)[0]

  gradients = jax.jit(jax.grad(loss))(trained)
  assert trained
  for name, x in gradients.items():
    assert np.isfinite(x).all(), name
  moved = [name for name, x in gradients.items() if np.abs(x).max() > 0]
  assert len(moved) > len(trained) // 2


@pytest.mark.parametrize(
  'kind',
  [
    'madlad',
    'codet5',
    'ul2',
    'umt5',
    'pile_t5',
    'long_t5 local',
    'long_t5 global',
  ],
)
@pytest.mark.parametrize('beams', [1, BEAMS])
def test_answers_are_those_of_transformers(directory, kind, beams):
  path, model = made(kind, directory)
  ids = KINDS[kind].ids
  case, value = case_of(ids), rows_of_a_prompt()
  with torch.no_grad():
    want = model.generate(
      **theirs(model, case, torch.tensor(value), ids),
      max_new_tokens=DECODED,
      do_sample=False,
      num_beams=beams,
      length_penalty=0.0,
      early_stopping='never' if beams > 1 else False,
      # Its cache assumes that the decoder is as deep as the encoder.
      use_cache=False,
    )[:, 1:].numpy()
  want = np.pad(
    want, ((0, 0), (0, DECODED - want.shape[1])), constant_values=ids.pad
  )
  # transformers pads with EOS if the padding id is 0.
  over = np.cumsum(want == ids.eos, axis=1) - (want == ids.eos) > 0
  want = np.where(over, ids.pad, want)
  ended = (want == ids.eos).any(axis=1)
  assert ended.any()
  asked, arrays = ours(path, scan=kind in SCANNED)
  params = layouts.nested({**arrays, prompt.PATH: jnp.asarray(value)})
  how = Decoding(num_beams=beams, alpha=0.0)
  predict = jax.jit(lambda p, x: asked.predict(p, x, DECODED, how))
  tokens, scores = predict(params, case['encoder_input_tokens'])
  # ptune ranks an unfinished answer last, transformers by its score.
  same = np.all(tokens == want, axis=1)
  assert same[ended].any()
  score = jax.jit(asked.score)

  def scored(tokens):
    shifted = np.pad(tokens, ((0, 0), (1, 0)), constant_values=ids.start)
    answers = {
      'encoder_input_tokens': case['encoder_input_tokens'],
      'decoder_target_tokens': tokens.astype(np.int32),
      'decoder_input_tokens': shifted[:, :-1].astype(np.int32),
      'decoder_loss_weights': (tokens != ids.pad).astype(np.int32),
    }
    return score(params, answers)

  # A score is the log probability of its answer.
  np.testing.assert_allclose(scores, scored(np.asarray(tokens)), atol=1e-4)
  if beams == 1:
    assert same.all()
  # transformers ends a beam only if it is among the best; ptune and T5X do not
  # require this. So if our answer differs from theirs, ours must score higher.
  other = ended & ~same
  assert (scores > scored(want) + 1e-3)[other].all()


def test_answers_end_with_any_of_several_tokens(directory, tmp_path):
  made_at, model = made('ul2', directory)
  path, other = tmp_path / 'several', tmp_path / 'again'
  shutil.copytree(made_at, path)
  case, value = case_of(KINDS['ul2'].ids), rows_of_a_prompt()

  def answers(ends):
    with torch.no_grad():
      found = model.generate(
        **theirs(model, case, torch.tensor(value), KINDS['ul2'].ids),
        max_new_tokens=DECODED,
        do_sample=False,
        eos_token_id=ends,
        use_cache=False,
      )[:, 1:].numpy()
    return [row[: _end(row, ends)].tolist() for row in found]

  plain = answers([1])
  end = plain[0][len(plain[0]) // 2]
  want = answers([1, end])
  assert want != plain
  file = path / 'generation_config.json'
  told = json.loads(file.read_text()) | {'eos_token_id': [1, end]}
  file.write_text(json.dumps(told))

  convert(path, 'huggingface', other)
  assert json.loads((other / file.name).read_text())['eos_token_id'] == [1, end]
  asked, arrays = ours(other)
  assert asked.network.config.ids.also_ends == (end,)
  params = layouts.nested({**arrays, prompt.PATH: jnp.asarray(value)})
  tokens, _ = asked.predict(params, case['encoder_input_tokens'], DECODED)
  got = [row[: _end(row, [1])].tolist() for row in np.asarray(tokens)]
  assert got == [[1 if x == end else x for x in row] for row in want]


def _end(row, ends):
  """Returns the length of an answer, including its end token."""
  found = np.isin(row, ends)
  return int(np.argmax(found)) + 1 if found.any() else len(row)


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_written_is_read_by_transformers_as_it_was(
  directory, tmp_path, kind
):
  path, model = made(kind, directory)
  convert(path, 'huggingface', tmp_path / 'again')
  load = transformers.AutoModelForSeq2SeqLM.from_pretrained
  again = load(tmp_path / 'again').eval()
  case = case_of(KINDS[kind].ids)
  inputs = {
    'input_ids': torch.tensor(case['encoder_input_tokens']).long(),
    'decoder_input_ids': torch.tensor(case['decoder_input_tokens']).long(),
  }
  with torch.no_grad():
    got, want = (m(**inputs).logits.numpy() for m in (again, model))
  np.testing.assert_allclose(got, want, atol=1e-5)
  for name in ('pad_token_id', 'eos_token_id', 'decoder_start_token_id'):
    assert getattr(again.config, name) == getattr(model.config, name)
    assert getattr(again.generation_config, name) == getattr(
      model.generation_config, name
    )


@pytest.mark.parametrize('kind', ['madlad', 'codet5', 'umt5', 'long_t5 global'])
def test_an_exported_prompt_answers_the_same_in_peft(directory, tmp_path, kind):
  peft = pytest.importorskip('peft', reason=f'peft is {WHY}')
  path, _ = made(kind, directory)
  case, rows = case_of(KINDS[kind].ids), rows_of_a_prompt()
  np.save(tmp_path / 'prompt.npy', rows)
  read = prompts.read_prompt(tmp_path / 'prompt.npy')
  export(read, 'peft', tmp_path / 'peft', base=str(path))
  load = transformers.AutoModelForSeq2SeqLM.from_pretrained
  model = peft.PeftModel.from_pretrained(load(path), tmp_path / 'peft').eval()
  tokens = torch.tensor(case['encoder_input_tokens']).long()
  with torch.no_grad():
    got = model(
      input_ids=tokens,
      attention_mask=(tokens != KINDS[kind].ids.pad).long(),
      decoder_input_ids=torch.tensor(case['decoder_input_tokens']).long(),
    ).logits.numpy()
  want = layouts.logits(path, case, rows)
  layouts.assert_logits(got, want, case, atol=1e-4)


@pytest.mark.parametrize(
  'kind, why',
  [
    ('scaled head', 'logits are scaled, and not tied'),
    ('tied mt5', 'logits are not scaled, and tied'),
    ('embedding of the decoder', 'its own embedding'),
    ('long_t5 local', 'attention is local'),
  ],
)
def test_what_t5x_has_no_network_for_is_refused(directory, tmp_path, kind, why):
  path, _ = made(kind, directory)
  with pytest.raises(ValueError, match=why):
    convert(path, 't5x', tmp_path / 't5x')
  np.save(tmp_path / 'prompt.npy', rows_of_a_prompt())
  read = prompts.read_prompt(tmp_path / 'prompt.npy')
  with pytest.raises(ValueError, match=why):
    export(read, 't5x', tmp_path / 't5x', base=str(path))
  assert not (tmp_path / 't5x').exists()


def test_a_t5x_checkpoint_of_an_umt5_is_the_same_model(directory, tmp_path):
  path, _ = made('umt5', directory)
  convert(path, 't5x', tmp_path / 't5x')
  assert (
    open_checkpoint(tmp_path / 't5x').shapes == open_checkpoint(path).shapes
  )
  layouts.assert_same(layouts.read(tmp_path / 't5x'), layouts.read(path))


@pytest.mark.parametrize('kind', ['madlad', 'codet5', 'umt5', 'long_t5 global'])
@pytest.mark.parametrize('heads', [None, 3])
def test_scanned_layers_of_t5x_are_the_same_model(
  directory, tmp_path, kind, heads
):
  path, _ = made(kind, directory)
  params = layouts.read(path)
  stacked = layouts.scanned(params, heads)
  assert stacked['decoder/decoder/mlp/wo/kernel'].ndim == 3
  leaves = {
    name: Leaf(array.shape, array.dtype, array.__getitem__)
    for name, array in stacked.items()
  }
  write_t5x(epath.Path(tmp_path), leaves, 5)
  layouts.assert_same(layouts.read(tmp_path), params)
