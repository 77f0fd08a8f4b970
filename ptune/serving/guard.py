"""Checks the host, size and time of every request, and counts requests."""

import asyncio
import dataclasses
import time

import prometheus_client
from fastapi import responses
from starlette import datastructures

from ptune.serving.hosts import Hosts


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits of a request.

  Attributes:
    prompt_length: The most tokens of an uploaded prompt.
    body: The most bytes of a request.
    timeout: Seconds after which a request fails.
  """

  prompt_length: int = 256
  body: int = 8_000_000
  timeout: float = 30.0


class Metrics:
  """The metrics that /metrics shows, in Prometheus' format."""

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
    """Records a batch."""
    self.rows.observe(rows)
    self.batch_seconds.observe(seconds)


class Guard:
  """An ASGI middleware that refuses other hosts and limits the body."""

  def __init__(self, app, limits: Limits, metrics: Metrics, hosts: Hosts):
    self._app, self._limits, self._metrics = app, limits, metrics
    self._hosts = hosts

  async def __call__(self, scope, receive, send):
    """Handles one request; see the ASGI specification."""
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
      # We count known paths only: anyone can invent any number of others.
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
      return await problem(403, refusal)(scope, receive, send)
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
      late = problem(408, 'the request did not arrive in time')
      return await late(scope, receive, send)
    if len(body) > self._limits.body:
      large = problem(413, f'a body has at most {self._limits.body} bytes')
      return await large(scope, receive, send)
    whole = [{'type': 'http.request', 'body': bytes(body), 'more_body': False}]

    async def replay():
      return whole.pop() if whole else await receive()

    await self._app(scope, replay, send)


def problem(status: int, what: str) -> responses.JSONResponse:
  """An error response with a message."""
  return responses.JSONResponse({'detail': what}, status)
