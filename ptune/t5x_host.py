"""Runs ptune's modules inside T5X's own programs (`python -m t5x.train`).

T5X keeps its programs, trainer, partitioner and checkpoints. The files of
`gin/t5x/` add ptune's network, methods, prompt initialisers and optimizers,
the same objects that `ptune train` uses. This module connects the two:

    Model              the network with T5X's loss, metrics and decoding
    logical_axis_rules rules for axes that T5X does not know
    factor_rules       the same, for T5X's own Adafactor
    Trained            an optimizer that sees only what the method trains
    Initializer        restores the base, initialises the adapter
    save_adapter       saves the trained parameters beside each checkpoint
    Reader             reads a checkpoint, or a base and PROMPT_FILE

Only this module imports T5X, and no other module imports this one, because T5X
is not on the package index (the package `t5x` there is an empty placeholder).
"""

try:
  from t5x import adafactor as t5x_adafactor
  from t5x import checkpoints as t5x_checkpoints
  from t5x import decoding as t5x_decoding
  from t5x import models as t5x_models
  from t5x import optimizers as t5x_optimizers
  from t5x import partitioning as t5x_partitioning
  from t5x import utils as t5x_utils
except ImportError as error:
  raise ImportError(
    'ptune.t5x_host needs T5X; install it from'
    ' https://github.com/google-research/t5x (the package t5x of the package'
    f' index is an empty placeholder): {error}. Without T5X, use `ptune train`'
  ) from error

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import serialization
from flax.core import freeze, unfreeze
from jax.sharding import NamedSharding, PartitionSpec

from ptune.convert import open_checkpoint, restore
from ptune.convert.prompts import npy
from ptune.convert.trained import dump as dump_trained
from ptune.data import seqio_task
from ptune.errors import UserError
from ptune.host.files import write_atomically
from ptune.model import models as models_lib
from ptune.model import network as network_lib
from ptune.model import parameters, partitioning, sizes
from ptune.model.adapters import Method
from ptune.serving import trained_model
from ptune.training import optim, settings, start
from ptune.training import state as state_lib

Rules = list[tuple[str, str | None]]


# ---------------------------------------------------------------------- model


class Model(t5x_models.EncoderDecoderModel):
  """ptune's network as a T5X encoder-decoder model.

  Attributes:
    config: The network's sizes.
    method: Adds trainable parameters to the network.
    task: The SeqIO task, which provides the vocabulary.
  """

  def __init__(
    self,
    config: sizes.T5Config,
    method: Method,
    mixture_or_task_name: str,
    mixture_or_task_module: str | Sequence[str] | None = None,
    optimizer_def: t5x_optimizers.OptimizerDef | None = None,
    loss: Callable[..., Any] = models_lib.EncoderDecoderModel,
    decoding: models_lib.Decoding = models_lib.Decoding(),
  ):
    """Builds the model.

    Args:
      config: The network's sizes.
      method: Adds trainable parameters to the network.
      mixture_or_task_name: The SeqIO task or mixture.
      mixture_or_task_module: The module that registers the task; it is imported
        first.
      optimizer_def: The optimizer; training needs it.
      loss: ptune's model class; T5X gets its loss settings.
      decoding: Decoding settings; T5X's own settings override them.
    """
    if config.scan:
      raise UserError(
        'SCAN works only with ptune train: under T5X each layer has its own'
        ' parameters. Remove it'
      )
    if config.ids.pad or config.ids.start:
      raise UserError(
        'T5X pads with the token 0 and starts decoding from it; this model has'
        f' {config.ids}. Train it with ptune train'
      )
    self.config = config
    self.method = method
    self.task = seqio_task.load(mixture_or_task_name, mixture_or_task_module)
    seqio_task.check_vocabulary(self.task, config.vocab_size, config.ids)
    vocabulary = seqio_task.vocabulary(self.task)
    network = network_lib.Transformer(config, method.placements)
    settings = loss(network)
    if settings.objective is not None:
      raise UserError(
        'T5X minimises the cross entropy; remove the file of losses/, or'
        ' train with ptune train'
      )
    super().__init__(
      module=network,
      input_vocabulary=vocabulary,
      output_vocabulary=vocabulary,
      optimizer_def=optimizer_def,
      decode_fn=_decode_fn(decoding),
      z_loss=settings.z_loss,
      label_smoothing=settings.label_smoothing,
      loss_normalizing_factor=settings.loss_normalizing_factor,
      default_decoder_params=t5x_models.DecoderParams(
        num_decodes=decoding.num_beams
      ),
    )

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """Initialises with integer tokens, because t5x.eval gives no types."""
    types = input_types or dict.fromkeys(input_shapes, jnp.int32)
    return super().get_initial_variables(rng, input_shapes, types)

  def _compute_kv_cache(
    self,
    params,
    encoded_inputs,
    encoder_input_tokens,
    decoder_input_tokens,
    prefill_decoder_prompt=False,
  ):
    """Makes the cache from the encoded inputs; T5X would pass tokens of 1.

    A decoder prompt is in the cache and has attended to the input.
    """
    assert not prefill_decoder_prompt  # T5X asks only networks that support it.
    tokens = jnp.ones_like(decoder_input_tokens)
    _, made = self.module.apply(
      {'params': params},
      encoded_inputs,
      encoder_input_tokens,
      tokens,
      tokens,
      enable_dropout=False,
      decode=True,
      mutable=['cache'],
      method=self.module.decode,
    )
    return made['cache'], None


def _decode_fn(decoding: models_lib.Decoding) -> Callable[..., Any]:
  """Returns T5X's decoding function with ptune's decoding settings."""
  if decoding.num_beams > 1:
    return functools.partial(t5x_decoding.beam_search, alpha=decoding.alpha)
  return functools.partial(
    t5x_decoding.temperature_sample,
    temperature=decoding.temperature or 1.0,
    # T5X is greedy if top_k is 1, ptune if temperature is 0.
    topk=decoding.top_k if decoding.temperature else 1,
    topp=decoding.top_p if decoding.temperature else 0.0,
    # Scores are log probabilities; rescaled, they are 0 for a greedy choice.
    rescale_log_probs=False,
  )


# ---------------------------------------------------------------------- rules


def logical_axis_rules() -> Rules:
  """Returns the rules that T5X's standard rules lack; all axes are replicated.

  Bind it to `partitioning.standard_logical_axis_rules.additional_rules`.
  """
  known = {axis for axis, _ in t5x_partitioning.standard_logical_axis_rules()}
  return [
    (axis, over)
    for axis, over in partitioning.LOGICAL_AXIS_RULES
    if axis not in known
  ]


def factor_rules() -> Mapping[str, t5x_adafactor.FactorDim]:
  """Returns T5X's factor rules, and one for each axis that they lack.

  Bind it to `adafactor.Adafactor.logical_factor_rules` if `Trained` wraps T5X's
  Adafactor. T5X needs a rule for every axis. Yet for arrays of up to two axes
  it decides by size, as ptune does: it factors a prompt of 128 or more rows.
  """
  rules = unfreeze(t5x_adafactor.standard_logical_factor_rules())
  for axis, _ in partitioning.LOGICAL_AXIS_RULES:
    rules.setdefault(axis, t5x_adafactor.FactorDim.NONE)
  return rules


# ------------------------------------------------------------------ optimizer


def optimizer(
  make: Callable[..., optax.GradientTransformation] = optim.adafactor,
  *,
  method: Method,
  initial_checkpoint_path: str | None,
) -> 'Trained':
  """Returns one of ptune's optimizers, for the parameters that a method trains.

  Args:
    make: One of `optim` (OPTIMIZER); called with `initial_step=`.
    method: The method.
    initial_checkpoint_path: The base model, whose step the optimizer starts
      from; None for step 0.
  """
  tx = make(initial_step=_step(initial_checkpoint_path))
  return Trained(Optax(tx), method)


def learning_rate(
  schedule: optim.Schedule, *, initial_checkpoint_path: str | None
) -> Callable[[jax.Array], Any]:
  """Returns a schedule for T5X, whose steps continue from the base model's.

  ptune's schedules count only the run's own steps. Bind it to
  `trainer.Trainer.learning_rate_fn`, for T5X's log and T5X's own optimizers.
  """
  first = _step(initial_checkpoint_path)
  return lambda step: schedule(step - first)


def _step(initial_checkpoint_path: str | None) -> int:
  if initial_checkpoint_path is None:
    return 0
  return open_checkpoint(initial_checkpoint_path).step or 0


class Trained(t5x_optimizers.OptimizerDef):
  """A T5X optimizer that sees only the trained parameters.

  Its state has no entries for frozen parameters, not even None, because T5X's
  Orbax checkpoints can save None but not restore it:

      params        {encoder: {prompt: p, layers_0: ...}, decoder: ...}
      param_states  {encoder: {prompt: v}}
  """

  def __init__(self, inner: t5x_optimizers.OptimizerDef, method: Method):
    super().__init__(inner.hyper_params)
    self.inner = inner
    self._method = method

  def _trained(self, tree: Any) -> dict[str, Any]:
    """Returns the trained part of a tree shaped like the parameters."""
    flat = parameters.flatten(unfreeze(tree))
    return parameters.unflatten(
      {path: x for path, x in flat.items() if self._method.trains(path)}
    )

  def update_hyper_params(self, **overrides):
    return self.inner.update_hyper_params(**overrides)

  def set_param_axes(self, param_logical_axes):
    if hasattr(self.inner, 'set_param_axes'):
      self.inner.set_param_axes(self._trained(param_logical_axes))

  def init_state(self, params):
    return self.inner.init_state(self._trained(params))

  def apply_gradient(self, hyper_params, params, state, grads):
    trained, state = self.inner.apply_gradient(
      hyper_params, self._trained(params), state, self._trained(grads)
    )
    merged = parameters.merge(unfreeze(params), trained)
    frozen = isinstance(params, flax.core.FrozenDict)
    return freeze(merged) if frozen else merged, state

  def state_dict(self, target, state):
    tree = self.inner.state_dict(self._trained(target), state)
    return tree | {'target': serialization.to_state_dict(target)}

  def restore_state(self, opt_target, opt_state, state_dict):
    target = serialization.from_state_dict(opt_target, state_dict['target'])
    _, state = self.inner.restore_state(
      self._trained(opt_target),
      opt_state,
      {
        'target': self._trained(state_dict['target']),
        'state': state_dict['state'],
      },
    )
    # T5X's Orbax mode restores counters in the parameters' dtype.
    state = jax.tree.map(_like, opt_state, state)
    return target, state

  def derive_logical_axes(self, optimizer, param_logical_axes):
    trained = t5x_optimizers.Optimizer(
      self.inner, optimizer.state, self._trained(optimizer.target)
    )
    axes = self.inner.derive_logical_axes(
      trained, self._trained(param_logical_axes)
    )
    return t5x_optimizers.Optimizer(
      optimizer.optimizer_def, axes.state, param_logical_axes
    )


def _like(template: Any, x: Any) -> Any:
  """Casts an array to the dtype of another; returns other values unchanged."""
  if hasattr(x, 'dtype') and hasattr(template, 'dtype'):
    return x if x.dtype == template.dtype else x.astype(template.dtype)
  return x


class Optax(t5x_optimizers.OptaxWrapper):
  """An optax optimizer in T5X, with any state.

  T5X supports the states of only some optimizers, not Adafactor's.
  """

  def derive_logical_axes(self, optimizer, param_logical_axes):
    def moment(leaf, p, axes):
      if state_lib.is_masked(leaf):
        return leaf
      # A factored moment has fewer axes than its parameter; we replicate it.
      return axes if leaf.shape == p.shape else None

    param_states = optax.tree_utils.tree_map_params(
      self.optax_optimizer,
      moment,
      optimizer.state.param_states,
      optimizer.target,
      param_logical_axes,
      transform_non_params=lambda _: None,
      is_leaf=state_lib.is_masked,
    )
    return t5x_optimizers.Optimizer(
      optimizer.optimizer_def,
      t5x_optimizers.OptimizerState(None, param_states),
      param_logical_axes,
    )


# ---------------------------------------------------------------- checkpoints


class Initializer(t5x_utils.TrainStateInitializer):
  """Makes a run's first state: restores the base, initialises the adapter.

  T5X asks for a state from scratch if MODEL_DIR has no checkpoint yet. ptune's
  readers then restore the base, from T5X's two formats or Hugging Face's. They
  restore every parameter or raise an error. The step continues from the base's.
  """

  def __init__(
    self,
    optimizer_def: t5x_optimizers.OptimizerDef,
    init_fn: Callable[..., Any],
    input_shapes: Mapping[str, Any],
    partitioner: t5x_partitioning.BasePartitioner,
    input_types: Mapping[str, Any] | None = None,
    *,
    initial_checkpoint_path: str | None,
    task_feature_lengths: Mapping[str, int],
    use_cached: bool = False,
    seed: int | None = 0,
  ):
    """Computes the state's shapes; T5X provides the first five arguments.

    Args:
      optimizer_def: The optimizer.
      init_fn: Method of a `Model`.
      input_shapes: Shapes of the batch.
      partitioner: Shards the state.
      input_types: Types of the batch.
      initial_checkpoint_path: The base model. If the method trains every
        parameter, None starts from random weights.
      task_feature_lengths: Longest inputs and targets, in tokens.
      use_cached: USE_CACHED_TASKS.
      seed: Seed of the initialisation.
    """
    super().__init__(
      optimizer_def, init_fn, input_shapes, partitioner, input_types
    )
    self._optimizer_def = optimizer_def
    self._model: Model = init_fn.__self__
    self._path = initial_checkpoint_path
    self._feature_lengths = task_feature_lengths
    self._use_cached = use_cached
    self._seed = seed or 0

  def from_scratch(self, init_rng):
    """Restores the base and initialises the adapter; ignores `init_rng`."""
    task = self._model.task
    plan = _plan(
      self._model.config,
      self._model.method,
      self._partitioner,
      self.global_train_state_shape.params,
      self.train_state_axes.params,
    )
    start.check_base(plan, self._path)
    if self._path is None:
      return super().from_scratch(init_rng)
    source = open_checkpoint(self._path)
    base = restore(
      source, plan.select(plan.base), ignore=plan.params.__contains__
    )
    data = settings.Data(
      task, self._feature_lengths, use_cached=self._use_cached
    )
    adapters = start.first_adapters(plan, base, task, data, self._seed)
    params = freeze(parameters.unflatten(base | adapters))
    param_states = self._partitioner.partition(
      lambda params: self._optimizer_def.init_state(params).param_states,
      in_axis_resources=(self.train_state_axes.params,),
      out_axis_resources=self.train_state_axes.param_states,
    )(params)
    state = t5x_optimizers.OptimizerState(
      _counter(source.step, plan.mesh), param_states
    )
    return self.global_train_state_shape.restore_state(
      self._optimizer_def.state_dict(params, state)
    )


def save_adapter(
  state_dict: Mapping[str, Any],
  parameter_infos: Any,
  *,
  model_dir: str,
  method: Method,
) -> tuple[Mapping[str, Any], Any]:
  """Writes the trained parameters alone, as `ptune train` does in prompts/.

      MODEL_DIR/numpy_checkpoints/checkpoint_N/encoder.prompt.prompt.prompt

  holds the prompt as a NumPy file, at the path that the paper's implementation
  uses. A method that is not a single prompt writes adapter.safetensors and
  adapter.json there instead. PROMPT_FILE accepts both. If the method trains the
  whole model, nothing is written.

  Bind it to `utils.SaveCheckpointConfig.state_transformation_fns`. T5X calls it
  when it saves checkpoint N, in both of its modes.

  Args:
    state_dict: The state that T5X is about to save; returned unchanged.
    parameter_infos: Returned unchanged.
    model_dir: MODEL_DIR.
    method: The method.

  Raises:
    ValueError: If a trained parameter is not finite; T5X then saves nothing.
  """
  flat = parameters.flatten(unfreeze(state_dict['target']))
  # All processes take part, because they share the arrays.
  trained = {
    path: np.asarray(parameters.to_host(x), np.float32)
    for path, x in flat.items()
    if method.trains(path)
  }
  step = int(t5x_checkpoints.get_local_data(state_dict['state']['step']))
  wrong = [path for path, x in trained.items() if not np.isfinite(x).all()]
  if wrong:
    raise UserError(
      f'at step {step} these are not finite: {wrong}; lower LEARNING_RATE.'
      f' Checkpoint {step} is not saved'
    )
  table = (
    parameters.to_host(flat[parameters.EMBEDDING]) if method.fold else None
  )
  if len(trained) == len(flat) or jax.process_index() != 0:
    return state_dict, parameter_infos
  if method.fold:
    rows = np.asarray(table, np.float32)
    trained = method.fold(trained, lambda ids: rows[[*ids]])
  directory = epath.Path(model_dir, 'numpy_checkpoints', f'checkpoint_{step}')
  directory.mkdir(parents=True, exist_ok=True)
  if method.prompt is not None:
    file = directory / method.prompt.replace('/', '.')
    write_atomically(file, npy(trained[method.prompt]))
  else:
    facts = {'step': step, 'method': method.name}
    facts['settings'] = dict(method.settings)
    write_atomically(
      directory / 'adapter.json', json.dumps(facts, indent=2) + '\n'
    )
    write_atomically(directory / 'adapter.safetensors', dump_trained(trained))
  return state_dict, parameter_infos


class Reader:
  """Restores parameters for t5x.eval and t5x.infer; all of them or an error.

  Bind it to `utils.RestoreCheckpointConfig.checkpoint_manager_cls`.
  CHECKPOINT_PATH is a checkpoint of a run under T5X, which holds the base and
  the adapter. With PROMPT_FILE, it is the base model, in any format that ptune
  reads.
  """

  def __init__(
    self,
    train_state: Any,
    partitioner: t5x_partitioning.BasePartitioner,
    *,
    config: sizes.T5Config,
    method: Method,
    prompt_file: str | None = None,
    restore_dtype: Any = None,
    **unused: Any,
  ):
    """Takes T5X's arguments, including settings for its own managers.

    Args:
      train_state: Shapes of the state.
      partitioner: Shards the state.
      config: The network's sizes.
      method: The method.
      prompt_file: A file that `save_adapter` or `ptune train` wrote.
      restore_dtype: Dtype of the parameters; None keeps the checkpoint's.
      **unused: Settings of T5X's managers for saving.
    """
    del unused
    self._train_state = train_state
    self._partitioner = partitioner
    self._config = config
    self._method = method
    self._prompt_file = prompt_file
    self._dtype = restore_dtype

  def restore(self, path: str, **unused: Any) -> Any:
    """Returns the state, with the checkpoint's step."""
    del unused
    plan = _plan(
      self._config,
      self._method,
      self._partitioner,
      self._train_state.params,
      self._partitioner.get_mesh_axes(self._train_state).params,
    )
    given = {}
    if self._prompt_file is not None:
      trained_model.check(
        plan,
        settings.Trained(checkpoint_path=path, prompt_file=self._prompt_file),
      )
      given, _ = trained_model.read_prompt_file(plan, self._prompt_file)
    source = open_checkpoint(path)
    rest = restore(
      source,
      plan.select(frozenset(plan.params) - frozenset(given)),
      dtype=self._dtype,
      ignore=given.__contains__,
    )
    return self._train_state.restore_state(
      {
        'target': parameters.unflatten(rest | given),
        'state': {'step': _counter(source.step, plan.mesh)},
      }
    )


def _plan(
  config: sizes.T5Config,
  method: Method,
  partitioner: t5x_partitioning.BasePartitioner,
  shapes: Any,
  axes: Any,
) -> parameters.Plan:
  """Returns ptune's plan of all parameters, with T5X's types and sharding."""
  mesh = partitioner.mesh
  plan = parameters.plan(config, method, mesh)
  shapes = parameters.flatten(unfreeze(shapes))
  specs = parameters.flatten(unfreeze(axes))
  return dataclasses.replace(
    plan,
    rules=partitioner.logical_axis_rules,
    params={
      path: jax.ShapeDtypeStruct(
        shapes[path].shape,
        shapes[path].dtype,
        sharding=NamedSharding(mesh, specs[path]),
      )
      for path in plan.params
    },
  )


def _counter(step: int | None, mesh: jax.sharding.Mesh) -> jax.Array:
  return jax.device_put(
    np.int32(step or 0), NamedSharding(mesh, PartitionSpec())
  )
