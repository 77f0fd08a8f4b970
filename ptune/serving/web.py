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
from collections.abc import Callable, Sequence
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
from ptune.serving.batching import Batcher, Full
from ptune.serving.hosts import LOCAL, Hosts


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
  """

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

  @app.post('/predict')
  async def predict(question: Question):
    inputs = question.inputs
    texts = [inputs] if isinstance(inputs, str) else inputs
    if len(texts) > batcher.max_queue:
      return _problem(
        413, f'{len(texts)} inputs; at most {batcher.max_queue} at once'
      )
    rows = []
    for i, text in enumerate(texts):
      try:
        text.encode()
      except UnicodeEncodeError:
        return _problem(422, f'input {i} is no text: it has lone surrogates')
      rows.append(np.asarray(encode(text), np.int32))
      if len(rows[-1]) > batcher.input_length:
        return _problem(
          413,
          f'input {i} has {len(rows[-1])} tokens; at most'
          f' {batcher.input_length} are read',
        )
    try:
      async with asyncio.timeout(limits.timeout):
        answers = await batcher.ask(question.prompt, rows)
    except Full:
      return _problem(
        429, 'too many inputs wait; try again', {'Retry-After': '1'}
      )
    except TimeoutError:
      return _problem(504, f'no answer within {limits.timeout:g} seconds')
    return {
      'prompt': question.prompt,
      'predictions': [decode(tokens.tolist()) for tokens, _ in answers],
      'scores': [score for _, score in answers],
    }

  @app.get('/prompts')
  async def prompts():
    return {
      'prompts': [
        {'name': name, 'length': length}
        for name, length in bank.lengths.items()
      ]
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
    return responses.HTMLResponse(PAGE)

  return app


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


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>ptune</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 40rem;
  margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
select, textarea, button { font: inherit; box-sizing: border-box }
textarea { width: 100%; height: 6rem; margin: .5rem 0 }
output { display: block; margin-top: 1rem; white-space: pre-wrap }
</style>
<h1>One model, many prompts</h1>
<form>
<label>Prompt <select required></select></label>
<label><textarea aria-label="Inputs" placeholder="one input a line" required>
</textarea></label>
<button>Predict</button>
</form>
<output></output>
<script>
const one = name => document.querySelector(name);
fetch('prompts').then(r => r.json()).then(({prompts}) => {
  for (const {name} of prompts) one('select').add(new Option(name));
});
one('form').onsubmit = async event => {
  event.preventDefault();
  one('output').textContent = '...';
  const inputs = one('textarea').value.split('\\n').filter(t => t.trim());
  const response = await fetch('predict', {
    method: 'POST',
    headers: {'Content-Type': 'application/json'},
    body: JSON.stringify({prompt: one('select').value, inputs}),
  });
  const said = await response.json();
  one('output').textContent = response.ok
    ? said.predictions.map((text, i) =>
        `${text}    (${said.scores[i].toFixed(2)})`).join('\\n')
    : said.detail;
};
</script>
</html>
"""
