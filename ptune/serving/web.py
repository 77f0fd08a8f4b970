"""The HTTP interface of a bank of prompts; docs/serving.md describes it.

What is wrong with a request is said to its sender, and touches no other one.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import fastapi
import numpy as np
import prometheus_client
import pydantic
from fastapi import exceptions, responses
from starlette import datastructures
from starlette.concurrency import run_in_threadpool

from ptune.convert.prompts import read_prompt
from ptune.errors import UserError
from ptune.serving.bank import NAME, PromptBank, UnknownPrompt
from ptune.serving.batching import Answer, Batcher, Full
from ptune.serving.hosts import LOCAL, Hosts

# The page has all in itself, and speaks with this server alone.
POLICY = (
  "default-src 'none'; connect-src 'self'; img-src data:;"
  " script-src 'unsafe-inline'; style-src 'unsafe-inline';"
  " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for.

  Attributes:
    prompt_length: Tokens of a prompt that is uploaded.
    body: Bytes of a request.
    timeout: Seconds until a request is given up.
  """

  prompt_length: int = 256
  body: int = 8_000_000
  timeout: float = 30.0


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
  """What the page shows of a prompt.

  Attributes:
    labels: The answers that it chooses from; none if it writes freely.
    examples: Inputs to try it with.
  """

  labels: Sequence[str] = ()
  examples: Sequence[str] = ()


class Metrics:
  """What /metrics shows."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      'ptune_requests',
      'Requests by path and status',
      ('path', 'status'),
      registry=self.registry,
    )
    self.seconds = prometheus_client.Histogram(
      'ptune_request_seconds',
      'Seconds from a request to its answer',
      ('path',),
      registry=self.registry,
    )
    self.rows = prometheus_client.Histogram(
      'ptune_batch_rows',
      'Rows that were computed together',
      buckets=[2**i for i in range(11)],
      registry=self.registry,
    )
    self.batch_seconds = prometheus_client.Histogram(
      'ptune_batch_seconds', 'Seconds of a batch', registry=self.registry
    )
    self.waiting = prometheus_client.Gauge(
      'ptune_queue_rows', 'Rows that wait', registry=self.registry
    )
    self.prompts = prometheus_client.Gauge(
      'ptune_prompts', 'Prompts in the bank', registry=self.registry
    )

  def observe_batch(self, rows: int, seconds: float) -> None:
    """Called for each batch."""
    self.rows.observe(rows)
    self.batch_seconds.observe(seconds)


def make(
  bank: PromptBank,
  batcher: Batcher,
  metrics: Metrics,
  encode: Callable[[str], Sequence[int]],
  decode: Callable[[list[int]], str],
  limits: Limits = Limits(),
  token: str | None = None,
  hosts: Hosts = LOCAL,
  base: str = '',
  shown: Mapping[str, Shown] | None = None,
) -> fastapi.FastAPI:
  """Makes the application.

  Args:
    bank: The prompts, and the model.
    batcher: Its queue.
    metrics: Whose `observe_batch` the queue calls.
    encode: Text to tokens, EOS included.
    decode: Tokens to text.
    limits: See there.
    token: Needed to change prompts; nobody may if not given.
    hosts: The names that it answers to.
    base: The name of the frozen model.
    shown: What the page shows of prompts, by their names.
  """

  page_html = pathlib.Path(__file__).with_name('page.html').read_text('utf-8')

  @contextlib.asynccontextmanager
  async def lifespan(app):
    del app
    batches = asyncio.create_task(batcher.run())
    yield
    # By now all requests have been answered.
    batches.cancel()

  app = fastapi.FastAPI(
    title='ptune', lifespan=lifespan, docs_url=None, redoc_url=None
  )
  app.add_middleware(Guard, limits=limits, metrics=metrics, hosts=hosts)

  @app.exception_handler(exceptions.RequestValidationError)
  async def invalid(request, error):
    del request
    # Without the value, which need not be text that can be sent.
    wrong = [
      f'{".".join(map(str, e["loc"]))}: {e["msg"]}' for e in error.errors()
    ]
    return _problem(422, '; '.join(wrong))

  @app.exception_handler(UnknownPrompt)
  async def unknown(request, error):
    del request
    return _problem(404, str(error))

  def may_change(authorization: Annotated[str, fastapi.Header()] = ''):
    if token is None:
      raise fastapi.HTTPException(
        403, 'prompts cannot be changed: the service was started without a'
        ' token'
      )  # fmt: skip
    expected = f'Bearer {token}'.encode()
    if not hmac.compare_digest(authorization.encode(), expected):
      raise fastapi.HTTPException(
        401,
        'expected the header Authorization: Bearer TOKEN',
        {'WWW-Authenticate': 'Bearer'},
      )

  def encoded(texts: Sequence[str], what: str, most: int) -> list[np.ndarray]:
    """Tokens of each text, EOS included; or what is wrong with one of them."""
    rows = []
    for i, text in enumerate(texts):
      try:
        text.encode()
      except UnicodeEncodeError:
        raise fastapi.HTTPException(
          422, f'{what} {i} is no text: it has lone surrogates'
        ) from None
      rows.append(np.asarray(encode(text), np.int32))
      if len(rows[-1]) > most:
        raise fastapi.HTTPException(
          413, f'{what} {i} has {len(rows[-1])} tokens; at most {most} are read'
        )
    return rows

  async def asked(name: str, rows, targets=None) -> list[Answer]:
    if len(rows) > batcher.max_queue:
      raise fastapi.HTTPException(
        413, f'{len(rows)} rows; at most {batcher.max_queue} at once'
      )
    try:
      async with asyncio.timeout(limits.timeout):
        return await batcher.ask(name, rows, targets)
    except Full:
      raise fastapi.HTTPException(
        429, 'too many inputs wait; try again', {'Retry-After': '1'}
      ) from None
    except TimeoutError:
      raise fastapi.HTTPException(
        504, f'no answer within {limits.timeout:g} seconds'
      ) from None

  @app.post('/predict')
  async def predict(question: Question):
    texts = _texts(question.inputs)
    rows = encoded(texts, 'input', batcher.input_length)
    answers = await asked(question.prompt, rows)
    return {
      'prompt': question.prompt,
      'predictions': [decode(tokens.tolist()) for tokens, _ in answers],
      'scores': [score for _, score in answers],
    }

  @app.post('/score')
  async def score(options: Options):
    rows = encoded(_texts(options.inputs), 'input', batcher.input_length)
    labels = encoded(options.labels, 'label', batcher.output_length)
    if len({tuple(label.tolist()) for label in labels}) < len(labels):
      raise fastapi.HTTPException(
        422, 'labels: two of them are the same to the vocabulary'
      )
    answers = await asked(
      options.prompt,
      [row for row in rows for _ in labels],
      [label for _ in rows for label in labels],
    )
    scores = np.array([s for _, s in answers]).reshape(len(rows), len(labels))
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    return {
      'prompt': options.prompt,
      'labels': options.labels,
      'scores': scores.tolist(),
      'probabilities': (likely / likely.sum(axis=1, keepdims=True)).tolist(),
    }

  @app.get('/prompts')
  async def prompts():
    about = shown or {}
    return {
      'base': base,
      'prompts': [
        {
          'name': name,
          'length': length,
          **({} if name not in about else dataclasses.asdict(about[name])),
        }
        for name, length in bank.lengths.items()
      ],
    }

  @app.post(
    '/prompts/{name}',
    status_code=201,
    dependencies=[fastapi.Depends(may_change)],
  )
  async def upload(name: str, request: fastapi.Request):
    if not NAME.fullmatch(name):
      return _problem(
        422, 'a name has up to 64 letters, digits, _ . -, and starts with one'
        ' of the first two'
      )  # fmt: skip
    body = await request.body()
    try:
      length = await run_in_threadpool(add, name, body)
    except ValueError as error:
      return _problem(422, str(error))
    return {'name': name, 'length': length}

  def add(name: str, body: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder, f'{name}.npy')
      file.write_bytes(body)
      try:
        array = read_prompt(file).array
      except ValueError as error:
        raise UserError(str(error).replace(f'{folder}/', '')) from error
    if len(array) > limits.prompt_length:
      raise UserError(
        f'the prompt has {len(array)} tokens; at most {limits.prompt_length}'
      )
    bank.add(name, array)
    return len(array)

  @app.delete(
    '/prompts/{name}',
    status_code=204,
    dependencies=[fastapi.Depends(may_change)],
  )
  async def remove(name: str):
    bank.remove(name)

  @app.get('/health')
  async def health():
    return {'status': 'ok', 'prompts': len(bank.names)}

  @app.get('/metrics')
  async def show_metrics():
    metrics.waiting.set(batcher.waiting)
    metrics.prompts.set(len(bank.names))
    text = prometheus_client.generate_latest(metrics.registry)
    return responses.Response(
      text, media_type=prometheus_client.CONTENT_TYPE_LATEST
    )

  @app.get('/')
  async def page():
    return responses.HTMLResponse(
      page_html, headers={'Content-Security-Policy': POLICY}
    )

  return app


def _texts(inputs: str | list[str]) -> list[str]:
  return [inputs] if isinstance(inputs, str) else inputs


def _problem(status: int, what: str, headers=None) -> responses.JSONResponse:
  return responses.JSONResponse({'detail': what}, status, headers)


class Guard:
  """Looks at a request before anyone else, and counts it. An ASGI middleware.

  It refuses other hosts, and reads the body within limits.
  """

  def __init__(self, app, limits: Limits, metrics: Metrics, hosts: Hosts):
    self._app, self._limits, self._metrics = app, limits, metrics
    self._hosts = hosts

  async def __call__(self, scope, receive, send):
    """See the ASGI specification."""
    if scope['type'] != 'http':
      return await self._app(scope, receive, send)
    start = time.monotonic()
    status = 500

    async def sent(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      await self._guarded(scope, receive, sent)
    finally:
      # Paths that there are: others could be as many as anybody likes.
      route = scope.get('route')
      path = getattr(route, 'path', 'other')
      self._metrics.requests.labels(path, status).inc()
      self._metrics.seconds.labels(path).observe(time.monotonic() - start)

  async def _guarded(self, scope, receive, send):
    headers = datastructures.Headers(scope=scope)
    refusal = self._hosts.refusal(
      headers.get('host', ''), headers.get('origin')
    )
    if refusal:
      return await _problem(403, refusal)(scope, receive, send)
    body, more = bytearray(), True
    try:
      async with asyncio.timeout(self._limits.timeout):
        while more and len(body) <= self._limits.body:
          message = await receive()
          if message['type'] == 'http.disconnect':
            return
          body += message.get('body', b'')
          more = message.get('more_body', False)
    except TimeoutError:
      problem = _problem(408, 'the request did not arrive in time')
      return await problem(scope, receive, send)
    if len(body) > self._limits.body:
      problem = _problem(413, f'a body has at most {self._limits.body} bytes')
      return await problem(scope, receive, send)
    whole = [{'type': 'http.request', 'body': bytes(body), 'more_body': False}]

    async def replay():
      return whole.pop() if whole else await receive()

    await self._app(scope, replay, send)
