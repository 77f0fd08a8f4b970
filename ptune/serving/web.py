"""The HTTP interface of a bank of prompts; docs/serving.md describes it.

A wrong request gets an error response and never affects other requests.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import fastapi
import numpy as np
import prometheus_client
import pydantic
from fastapi import exceptions, responses
from starlette.concurrency import run_in_threadpool

from ptune.convert.prompts import read_prompt
from ptune.errors import UserError
from ptune.serving import predictor
from ptune.serving.bank import NAME, PromptBank, UnknownPrompt
from ptune.serving.batching import Answer, Batcher, Full
from ptune.serving.guard import Guard, Limits, Metrics, problem
from ptune.serving.hosts import LOCAL, Hosts
from ptune.tasks.rows import nul

# The page loads nothing from elsewhere and talks to this server only.
POLICY = (
  "default-src 'none'; connect-src 'self'; img-src data:;"
  " script-src 'unsafe-inline'; style-src 'unsafe-inline';"
  " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Question(pydantic.BaseModel, extra='forbid'):
  """The body of POST /predict."""

  prompt: Annotated[str, pydantic.Field(max_length=64)]
  inputs: str | Annotated[list[str], pydantic.Field(min_length=1)]


class Options(pydantic.BaseModel, extra='forbid'):
  """The body of POST /score."""

  prompt: Annotated[str, pydantic.Field(max_length=64)]
  inputs: str | Annotated[list[str], pydantic.Field(min_length=1)]
  labels: Annotated[list[str], pydantic.Field(min_length=2, max_length=64)]


@dataclasses.dataclass(frozen=True)
class Shown:
  """The facts about a prompt that the page shows.

  Attributes:
    labels: The labels that it chooses from; empty if it writes free text.
    examples: Inputs to try it with.
  """

  labels: Sequence[str] = ()
  examples: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Service:
  """The bank behind the application, and the endpoints that ask it.

  Attributes:
    bank: The prompts and the model.
    batcher: The queue of the bank.
    metrics: The batcher calls its `observe_batch`.
    encode: Turns a text into tokens, EOS included.
    decode: Turns tokens into a text.
    limits: The limits of a request.
    token: The token that may change prompts; if None, nobody may.
    hosts: The host names that the service answers to.
    base: The name of the frozen model.
    shown: The facts about each prompt that the page shows, by name.
  """

  bank: PromptBank
  batcher: Batcher
  metrics: Metrics
  encode: Callable[[str], Sequence[int]]
  decode: Callable[[list[int]], str]
  limits: Limits = dataclasses.field(default_factory=Limits)
  token: str | None = None
  hosts: Hosts = LOCAL
  base: str = ''
  shown: Mapping[str, Shown] = dataclasses.field(default_factory=dict)

  # ---------------------------------------------------------------- endpoints

  async def predict(self, question: Question):
    """POST /predict: the model's answer to each input."""
    rows = self._encoded(
      _texts(question.inputs), 'input', self.batcher.input_length
    )
    answers = await self._ask(question.prompt, rows)
    return {
      'prompt': question.prompt,
      'predictions': [self.decode(tokens.tolist()) for tokens, _ in answers],
      'scores': [score for _, score in answers],
    }

  async def score(self, options: Options):
    """POST /score: how likely each label is for each input."""
    rows = self._encoded(
      _texts(options.inputs), 'input', self.batcher.input_length
    )
    labels = self._encoded(options.labels, 'label', self.batcher.output_length)
    if len({tuple(label.tolist()) for label in labels}) < len(labels):
      raise fastapi.HTTPException(
        422, 'labels: the vocabulary encodes two of them to the same tokens'
      )
    answers = await self._ask(
      options.prompt,
      [row for row in rows for _ in labels],
      [label for _ in rows for label in labels],
    )
    scores = np.array([s for _, s in answers]).reshape(len(rows), len(labels))
    return {
      'prompt': options.prompt,
      'labels': options.labels,
      'scores': scores.tolist(),
      'probabilities': predictor.probabilities(scores).tolist(),
    }

  async def prompts(self):
    """GET /prompts: the prompts in the bank."""
    return {
      'base': self.base,
      'prompts': [
        {
          'name': name,
          'length': length,
          **(
            dataclasses.asdict(self.shown[name]) if name in self.shown else {}
          ),
        }
        for name, length in self.bank.lengths.items()
      ],
    }

  async def upload(self, name: str, request: fastapi.Request):
    """POST /prompts/{name}: adds or replaces a prompt; the body is a .npy."""
    if not NAME.fullmatch(name):
      return problem(
        422,
        'a name has up to 64 letters, digits, _ . -, and starts with one'
        ' of the first two',
      )
    body = await request.body()
    try:
      length = await run_in_threadpool(self._add, name, body)
    except ValueError as error:
      return problem(422, str(error))
    return {'name': name, 'length': length}

  async def remove(self, name: str):
    """DELETE /prompts/{name}."""
    self.bank.remove(name)

  async def health(self):
    """GET /health."""
    return {'status': 'ok', 'prompts': len(self.bank.names)}

  async def show_metrics(self):
    """GET /metrics."""
    self.metrics.waiting.set(self.batcher.waiting)
    self.metrics.prompts.set(len(self.bank.names))
    text = prometheus_client.generate_latest(self.metrics.registry)
    return responses.Response(
      text, media_type=prometheus_client.CONTENT_TYPE_LATEST
    )

  def check_token(self, authorization: Annotated[str, fastapi.Header()] = ''):
    """Refuses a request that may not change prompts."""
    if self.token is None:
      raise fastapi.HTTPException(
        403,
        'prompts cannot be changed: the service was started without a token',
      )
    expected = f'Bearer {self.token}'.encode()
    if not hmac.compare_digest(authorization.encode(), expected):
      raise fastapi.HTTPException(
        401,
        'expected the header Authorization: Bearer TOKEN',
        {'WWW-Authenticate': 'Bearer'},
      )

  # -------------------------------------------------------------------- inside

  def _encoded(
    self, texts: Sequence[str], what: str, most: int
  ) -> list[np.ndarray]:
    """The tokens of each text, EOS included.

    Raises:
      HTTPException: If a text is too long, or is not valid text.
    """
    rows = []
    for i, text in enumerate(texts):
      try:
        text.encode()
      except UnicodeEncodeError:
        raise fastapi.HTTPException(
          422, f'{what} {i} is not valid text: it has lone surrogates'
        ) from None
      if '\0' in text:
        raise fastapi.HTTPException(422, f'{what} {i}: {nul(text)}')
      rows.append(np.asarray(self.encode(text), np.int32))
      if len(rows[-1]) > most:
        raise fastapi.HTTPException(
          413, f'{what} {i} has {len(rows[-1])} tokens; at most {most} are read'
        )
    return rows

  async def _ask(self, name: str, rows, targets=None) -> list[Answer]:
    if len(rows) > self.batcher.max_queue:
      raise fastapi.HTTPException(
        413, f'{len(rows)} rows; at most {self.batcher.max_queue} at once'
      )
    try:
      async with asyncio.timeout(self.limits.timeout):
        return await self.batcher.ask(name, rows, targets)
    except Full:
      raise fastapi.HTTPException(
        429, 'too many inputs wait; try again', {'Retry-After': '1'}
      ) from None
    except TimeoutError:
      raise fastapi.HTTPException(
        504, f'no answer within {self.limits.timeout:g} seconds'
      ) from None

  def _add(self, name: str, body: bytes) -> int:
    """Adds an uploaded prompt to the bank; returns its length."""
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder, f'{name}.npy')
      file.write_bytes(body)
      try:
        array = read_prompt(file).array
      except ValueError as error:
        raise UserError(str(error).replace(f'{folder}/', '')) from error
    most = self.limits.prompt_length
    if len(array) > most:
      raise UserError(f'the prompt has {len(array)} tokens; at most {most}')
    self.bank.add(name, array)
    return len(array)


def make(service: Service) -> fastapi.FastAPI:
  """Makes the application of a service."""
  page = pathlib.Path(__file__).with_name('page.html').read_text('utf-8')

  @contextlib.asynccontextmanager
  async def lifespan(app):
    del app
    batches = asyncio.create_task(service.batcher.run())
    yield
    # The server has answered every request by now.
    batches.cancel()

  app = fastapi.FastAPI(
    title='ptune', lifespan=lifespan, docs_url=None, redoc_url=None
  )
  app.add_middleware(
    Guard, limits=service.limits, metrics=service.metrics, hosts=service.hosts
  )

  @app.exception_handler(exceptions.RequestValidationError)
  async def invalid(request, error):
    # Without the value, which may be text that cannot be encoded.
    wrong = [
      f'{".".join(map(str, e["loc"]))}: {e["msg"]}' for e in error.errors()
    ]
    if 'json' not in request.headers.get('content-type', 'json'):
      wrong.append("send the header 'Content-Type: application/json'")
    return problem(422, '; '.join(wrong))

  @app.exception_handler(UnknownPrompt)
  async def unknown(request, error):
    del request
    return problem(404, str(error))

  app.post('/predict')(service.predict)
  app.post('/score')(service.score)
  app.get('/prompts')(service.prompts)
  may_change = [fastapi.Depends(service.check_token)]
  one = '/prompts/{name}'
  app.post(one, status_code=201, dependencies=may_change)(service.upload)
  app.delete(one, status_code=204, dependencies=may_change)(service.remove)
  app.get('/health')(service.health)
  app.get('/metrics')(service.show_metrics)

  @app.get('/')
  async def index():
    return responses.HTMLResponse(
      page, headers={'Content-Security-Policy': POLICY}
    )

  return app


def _texts(inputs: str | list[str]) -> list[str]:
  return [inputs] if isinstance(inputs, str) else inputs
