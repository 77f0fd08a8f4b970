"""`ptune serve` with many clients, many prompts and malformed requests."""

import argparse
import asyncio
import html
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import httpx
import jax
import numpy as np
import pytest
import uvicorn

import ptune
from ptune.convert.vocabulary import vocabulary_of
from ptune.data import bucketing, seqio_task
from ptune.methods import prompt
from ptune.model import parameters, partitioning
from ptune.model.models import EncoderDecoderModel
from ptune.serving import batching, hosts, serve, web
from ptune.serving.predictor import Predictor
from tests import tiny

TOKEN = 'secret'
SIGNED = {'Authorization': f'Bearer {TOKEN}'}
OUTPUT = 4
LENGTHS = {'short': 2, 'long': 7}
TEXTS = [
  'the kitchen was warm',
  'not a guitar',
  'a',
  'we both find it so very insightful , said the man',
  '',
]


def npy(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  """Writes prompts that all make the model answer with some text."""
  folder = tmp_path_factory.mktemp('prompts')
  base = ptune.load('ptune://tiny')
  table = np.asarray(base.weights['token_embedder/embedding'])
  draw = np.random.default_rng(0)
  for name, length in LENGTHS.items():
    rows = table[draw.integers(300, len(table) - 100, length)]
    np.save(folder / f'{name}.npy', 3 * rows)
  assert rows.shape[1] == base.config.emb_dim
  return folder


def flags(*more):
  parser = argparse.ArgumentParser()
  serve.add_arguments('serve', parser)
  return parser.parse_args(
    [
      '--base=ptune://tiny',
      f'--output_length={OUTPUT}',
      '--input_length=32',
      '--batch_size=16',
      *more,
    ]
  )


@pytest.fixture(scope='module')
def service(prompts, tmp_path_factory):
  """Returns the address of a running service."""
  file = tmp_path_factory.mktemp('token') / 'token'
  file.write_text(f'{TOKEN}\n')
  args = flags(
    f'--prompts={prompts}',
    f'--token_file={file}',
    '--max_body=100000',
    '--max_queue=1000',
    '--prompt_length=7',
  )
  with tiny.one_device():
    app = serve.make(args, web)
  listening = serve.listen('127.0.0.1', 0)
  server = uvicorn.Server(uvicorn.Config(app, log_config=None))
  thread = threading.Thread(target=server.run, args=([listening],))
  thread.start()
  yield f'http://127.0.0.1:{listening.getsockname()[1]}'
  server.should_exit = True
  thread.join()


def alone_with(prompts, name):
  """Returns a model with only one of the prompts, and its parameters."""
  method = prompt.prompt(LENGTHS[name])
  with tiny.one_device():
    base = ptune.load('ptune://tiny')
    plan = parameters.plan(base.config, method, partitioning.make_mesh())
    weights = base.weights
  alone = Predictor(plan, EncoderDecoderModel(plan.network), OUTPUT)
  own = {prompt.PATH: np.load(prompts / f'{name}.npy')}
  return alone, parameters.unflatten({**weights, **own})


@pytest.fixture(scope='module')
def expected(prompts):
  """Returns the model's answer to each text with each prompt."""
  vocabulary = vocabulary_of('ptune://tiny')
  tokens = np.zeros((len(TEXTS), 32), np.int32)
  for row, text in zip(tokens, TEXTS, strict=True):
    ids = [*vocabulary.encode(text), vocabulary.eos_id]
    row[: len(ids)] = ids
  found = {}
  for name in LENGTHS:
    alone, params = alone_with(prompts, name)
    said, scores = alone.predict(
      (params,), {'encoder_input_tokens': tokens}, np.arange(len(TEXTS))
    )
    for text, ids, score in zip(TEXTS, said, scores, strict=True):
      found[name, text] = vocabulary.decode(ids.tolist()), float(score)
  assert len({text for text, _ in found.values()}) > len(LENGTHS)
  return found


def assert_answers(response, name, texts, expected):
  assert response.status_code == 200, response.text
  said = response.json()
  assert said['prompt'] == name
  for text, answer, score in zip(
    texts, said['predictions'], said['scores'], strict=True
  ):
    assert (answer, pytest.approx(score, rel=1e-4)) == expected[name, text]


# A wrong request, and the error message.
LONG = 'word ' * 40
FORM = {'Content-Type': 'application/x-www-form-urlencoded'}  # As with curl -d.
WRONG = [
  ({'json': {'prompt': 'shart', 'inputs': 'a'}}, 404, 'did you mean short'),
  ({'json': {'prompt': 'short', 'inputs': LONG}}, 413, 'tokens; at most 32'),
  ({'json': {'prompt': 'short', 'inputs': []}}, 422, 'inputs'),
  ({'json': {'prompt': 'short', 'inputs': ['a', 3]}}, 422, 'inputs'),
  ({'json': {'prompt': 'short'}}, 422, 'inputs: Field required'),
  ({'json': {'prompt': 'short', 'inputs': 'a\0'}}, 422, 'is NUL'),
  ({'json': {'prompt': 'short', 'inputs': 'a', 'x': 1}}, 422, 'x: Extra'),
  ({'json': {'prompt': 'short', 'inputs': ['a'] * 1001}}, 413, 'at most 1000'),
  ({'content': b'{"prompt": '}, 422, 'JSON'),
  ({'content': b'\xff\xfe'}, 422, 'JSON'),
  ({'content': b'{}', 'headers': FORM}, 422, 'Content-Type: application/json'),
  ({'content': b'[' * 90_000}, 400, 'parsing'),
  ({'content': b'x' * 100_001}, 413, 'at most 100000 bytes'),
  (
    {'content': b'{"prompt": "short", "inputs": "\\ud800"}'},
    422,
    'not valid text',
  ),
]


async def send_wrong(client, i):
  request, status, message = WRONG[i % len(WRONG)]
  sent = {'headers': {'Content-Type': 'application/json'}, **request}
  response = await client.post('/predict', **sent)
  assert response.status_code == status, (request, response.text)
  assert message in response.json()['detail']


def test_64_clients_get_the_answers_of_single_prompts(
  service, prompts, expected
):
  draw = np.random.default_rng(1)
  done = []

  async def client_of(i, client):
    for round_ in range(3):
      name = list(LENGTHS)[draw.integers(2)]
      texts = [TEXTS[k] for k in draw.integers(5, size=draw.integers(1, 4))]
      inputs = texts[0] if len(texts) == 1 else texts
      response = await client.post(
        '/predict', json={'prompt': name, 'inputs': inputs}
      )
      assert_answers(response, name, texts, expected)
      done.append(len(texts))
      if i % 4 == 0:
        await send_wrong(client, i // 4 + round_)
      if i % 16 == 1:  # Adds and removes a prompt.
        own = f'own-{i}'
        body = (prompts / 'short.npy').read_bytes()
        path = f'/prompts/{own}'
        made = await client.post(path, content=body, headers=SIGNED)
        assert made.status_code == 201, made.text
        response = await client.post(
          '/predict', json={'prompt': own, 'inputs': texts}
        )
        said = response.json()['predictions']
        assert said == [expected['short', text][0] for text in texts]
        gone = await client.delete(path, headers=SIGNED)
        assert gone.status_code == 204

  async def everyone():
    limits = httpx.Limits(max_connections=80)
    async with httpx.AsyncClient(
      base_url=service, timeout=120, limits=limits
    ) as client:
      await asyncio.gather(*(client_of(i, client) for i in range(72)))

  asyncio.run(everyone())
  assert len(done) == 72 * 3
  text = httpx.get(f'{service}/metrics').text
  batches = float(re.search(r'ptune_batch_rows_count (\S+)', text)[1])
  rows = float(re.search(r'ptune_batch_rows_sum (\S+)', text)[1])
  assert rows >= sum(done) and rows > 3 * batches  # Requests were batched.
  assert 'ptune_requests_total{path="/predict",status="200"}' in text
  assert 'status="500"' not in text


def test_every_wrong_request_is_told_what_is_wrong(service, expected):
  async def one_by_one():
    async with httpx.AsyncClient(base_url=service, timeout=60) as client:
      for i in range(len(WRONG)):
        await send_wrong(client, i)

  asyncio.run(one_by_one())
  good = {'prompt': 'long', 'inputs': TEXTS[:2]}
  response = httpx.post(f'{service}/predict', json=good, timeout=60)
  assert_answers(response, 'long', TEXTS[:2], expected)


def test_prompts_are_changed_by_those_who_have_the_token(service, prompts):
  good = (prompts / 'long.npy').read_bytes()
  width = np.load(prompts / 'long.npy').shape[1]
  post = lambda name, body, headers=SIGNED: httpx.post(
    f'{service}/prompts/{name}', content=body, headers=headers, timeout=60
  )
  for headers in ({}, {'Authorization': 'Bearer secre'}):
    assert post('x', good, headers).status_code == 401
    gone = httpx.delete(f'{service}/prompts/long', headers=headers)
    assert gone.status_code == 401
  pickled = io.BytesIO()
  np.save(pickled, np.array([{}]), allow_pickle=True)
  for name, body, message in (
    ('x', b'', 'not a NumPy array'),
    ('x', pickled.getvalue(), 'pickled'),
    ('x', npy(np.ones((2, width + 1), np.float32)), f'[prompt, {width}]'),
    ('x', npy(np.full((2, width), np.nan)), 'NaN'),
    ('x', npy(np.ones((8, width), np.float32)), 'at most 7'),
    ('.x', good, 'a name has'),
    ('x' * 65, good, 'a name has'),
  ):
    response = post(name, body)
    assert response.status_code == 422 and message in response.text
    assert '/tmp' not in response.text
  gone = httpx.delete(f'{service}/prompts/x', headers=SIGNED)
  assert gone.status_code == 404
  listed = httpx.get(f'{service}/prompts').json()['prompts']
  assert listed == [
    {'name': name, 'length': LENGTHS[name]} for name in sorted(LENGTHS)
  ]


LABELS = ['good', 'not so good']


@pytest.fixture(scope='module')
def scored(prompts):
  """Returns the labels' log probabilities, {prompt: [text, label]}."""
  vocabulary = vocabulary_of('ptune://tiny')

  def ids(text):
    return np.array([*vocabulary.encode(text), vocabulary.eos_id], np.int32)

  found = {}
  for name in LENGTHS:
    alone, params = alone_with(prompts, name)
    rows = [
      seqio_task.model_features(np.pad(ids(t), (0, 20))[:20], ids(label))
      for t in TEXTS
      for label in LABELS
    ]
    found[name] = np.reshape(
      [
        float(alone.score((params,), {k: v[None] for k, v in row.items()})[0])
        for row in rows
      ],
      (len(TEXTS), len(LABELS)),
    )
  return found


def test_labels_are_scored_as_by_the_prompt_alone(service, scored):
  for name in LENGTHS:
    response = httpx.post(
      f'{service}/score',
      json={'prompt': name, 'inputs': TEXTS, 'labels': LABELS},
      timeout=60,
    )
    assert response.status_code == 200, response.text
    said = response.json()
    np.testing.assert_allclose(said['scores'], scored[name], rtol=1e-4)
    likely = np.exp(scored[name])
    likely /= likely.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(said['probabilities'], likely, atol=1e-4)


@pytest.mark.parametrize(
  ('labels', 'status', 'message'),
  [
    (['good'], 422, 'labels'),
    (['good', ' good'], 422, 'two of them to the same tokens'),
    (['good', 'word ' * 40], 413, 'label 1 has'),
  ],
)
def test_labels_that_cannot_be_scored_are_refused(
  service, labels, status, message
):
  response = httpx.post(
    f'{service}/score',
    json={'prompt': 'short', 'inputs': 'a', 'labels': labels},
  )
  assert response.status_code == status, response.text
  assert message in response.json()['detail']


def test_a_run_shows_labels_and_examples_of_its_validation(tmp_path):
  assert serve.examples_of_run(str(tmp_path)) == ([], [])
  folder = tmp_path / 'eval' / 'task'
  folder.mkdir(parents=True)
  rows = [
    {'inputs': f'text {i}', 'targets': ('no', 'yes')[i % 2]} for i in range(60)
  ]
  (folder / 'predictions-9.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  (tmp_path / 'prompts').mkdir()
  for place in (tmp_path, tmp_path / 'prompts'):
    labels, examples = serve.examples_of_run(str(place))
    assert labels == ['no', 'yes']
    assert len(examples) == 6 and set(examples) < {r['inputs'] for r in rows}
  rows = [{**row, 'targets': f'text {i}'} for i, row in enumerate(rows)]
  (folder / 'predictions-9.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  assert serve.examples_of_run(str(tmp_path))[0] == []  # All differ.


BROWSER = shutil.which('chromium')


def browsed(address, tmp_path):
  """Returns the page in a browser after all its requests."""
  done = subprocess.run(
    [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom']
    + ['--disable-background-networking', '--disable-component-update']
    + ['--disable-sync', '--no-first-run', '--virtual-time-budget=15000']
    + [f'--user-data-dir={tmp_path}', address],
    capture_output=True,
    text=True,
    timeout=120,
  )
  return done.stdout


@pytest.mark.skipif(BROWSER is None, reason='chromium is not installed')
def test_the_page_asks_prompts_side_by_side(service, expected, tmp_path):
  text = TEXTS[3]
  query = urllib.parse.urlencode(
    {'prompt': list(LENGTHS), 'inputs': text, 'labels': ','.join(LABELS)}, True
  )
  page = browsed(f'{service}/?{query}', tmp_path)
  for name in LENGTHS:
    assert f'<h3>{name}</h3>' in page
    assert html.escape(expected[name, text][0]) in page
  assert page.count('class="bar"') == 2 * len(LABELS)
  assert 'curl http://127.0.0.1' in page and 'urllib.request' in page
  assert f'long + short: {text[:5]}' in page  # In the history.
  page = browsed(f'{service}/?prompt=short&inputs={"word+" * 40}', tmp_path)
  assert 'tokens; at most 32 are read' in page  # A sentence, not a status.


def test_the_page_and_the_health_are_there(service):
  page = httpx.get(service)
  assert page.headers['content-type'].startswith('text/html')
  assert 'One model, many prompts' in page.text
  assert "default-src 'none'" in page.headers['content-security-policy']
  assert not re.findall(r'(?:src|href)="(?!data:)', page.text)  # All inline.
  health = httpx.get(f'{service}/health').json()
  assert health == {'status': 'ok', 'prompts': 2}


def test_a_client_that_sends_half_a_request_holds_up_no_other(service):
  port = int(service.rpartition(':')[2])
  with socket.create_connection(('127.0.0.1', port)) as slow:
    slow.sendall(
      b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n'
    )
    assert httpx.get(f'{service}/health').status_code == 200
  with socket.create_connection(('127.0.0.1', port)) as wild:
    wild.sendall(b'\x00\xff nothing\r\n\r\n')
    assert b'400' in wild.recv(100)
  assert httpx.get(f'{service}/health').status_code == 200


def test_pages_of_other_hosts_reach_nothing(service):
  host = service.removeprefix('http://')
  port = host.rpartition(':')[2]
  ask = {'prompt': 'short', 'inputs': 'a'}
  for headers, status in (
    ({}, 200),
    ({'Host': f'localhost:{port}'}, 200),
    ({'Host': 'evil.example'}, 403),  # It resolves to 127.0.0.1.
    ({'Host': f'evil.example:{port}'}, 403),
    ({'Host': f'{host}.evil.example'}, 403),
    ({'Host': '10.0.0.1'}, 403),
    ({'Origin': service}, 200),  # Its own page.
    ({'Origin': 'http://evil.example'}, 403),
    ({'Origin': f'http://evil.example:{port}'}, 403),
    ({'Origin': 'null'}, 403),  # A file or a sandboxed frame.
    ({'Origin': f'http://localhost:{int(port) + 1}'}, 403),
  ):
    for method, path, body in (
      ('GET', 'prompts', None),
      ('GET', 'metrics', None),
      ('POST', 'predict', ask),
    ):
      response = httpx.request(
        method, f'{service}/{path}', headers=headers, json=body, timeout=60
      )
      assert response.status_code == status, (headers, response.text)
      if status != 200:
        assert 'allowed_hosts' in response.json()['detail']
  # No page may read an answer across origins.
  response = httpx.get(f'{service}/health')
  assert not any('access-control' in name for name in response.headers)


def test_a_service_answers_to_the_names_it_listens_on():
  for host, allowed, yes, no in (
    ('127.0.0.1', (), ['localhost:1', '127.0.0.1', '[::1]:8'], ['a', '', '::']),
    ('::1', (), ['localhost', '[::1]'], ['[::2]', '0.0.0.0']),
    ('localhost', ['A.org'], ['a.org', 'A.ORG.:9'], ['b.a.org', 'a.org.b']),
    ('10.0.0.7', (), ['10.0.0.7:80'], ['localhost', '10.0.0.8']),
    ('gpu.lan', (), ['GPU.lan:80'], ['localhost', 'lan']),
    ('0.0.0.0', (), ['1.2.3.4', '[fe80::1]:2', 'localhost'], ['x.y', '1.2.3']),
    ('0.0.0.0', ['*'], ['whatever', ''], []),
  ):
    answered = hosts.of(host, allowed)
    for name in yes:
      assert answered.refusal(name, None) == '', (host, name)
    for name in no:
      assert 'Host header' in answered.refusal(name, None), (host, name)
  # A page at another address may belong to anybody. A page with an allowed name
  # belongs to the service, which may be behind a proxy.
  everywhere = hosts.of('0.0.0.0', ['a.org'])
  assert everywhere.refusal('1.2.3.4', 'http://6.6.6.6')
  assert not everywhere.refusal('1.2.3.4:8000', 'https://a.org')
  assert not everywhere.refusal('a.org', 'https://a.org:443')


# ------------------------------------------------------------------ the queue


class Bank:
  """A bank that waits for `go` and then answers with the first token."""

  def __init__(self):
    self.names = ['a', 'b']
    with tiny.one_device():
      mesh = partitioning.make_mesh()
    self.plan = parameters.plan(tiny.CONFIG, prompt.prompt(1), mesh)
    self.go, self.asked = threading.Event(), []
    self.fail = False

  @property
  def lengths(self):
    return dict.fromkeys(self.names, 1)

  def predict(self, names, tokens):
    self.go.wait()
    self.asked.append(list(names))
    for name in names:
      if name not in self.names:
        raise batching.UnknownPrompt(name)
    if self.fail:
      raise jax.errors.JaxRuntimeError('no memory')
    return tokens[:, :1], tokens[:, 0]


def row(i):
  return np.array([i, 1], np.int32)


def in_loop(test, **settings):
  """Runs a test with a bank and a running batcher."""

  async def main():
    bank = Bank()
    batcher = batching.Batcher(
      bank, 4, 4, **{'batch_size': 4, 'max_wait': 0.01, **settings}
    )
    running = asyncio.create_task(batcher.run())
    try:
      await test(bank, batcher)
    finally:
      bank.go.set()
      running.cancel()

  asyncio.run(main())


def test_a_full_queue_refuses_at_once_and_goes_on():
  async def test(bank, batcher):
    first = asyncio.create_task(batcher.ask('a', [row(5)]))
    await asyncio.sleep(0.1)  # The batch is running.
    some = asyncio.create_task(batcher.ask('a', [row(6), row(7)]))
    await asyncio.sleep(0)
    with pytest.raises(batching.Full):
      await batcher.ask('a', [row(8), row(9)])
    assert batcher.waiting == 2
    bank.go.set()
    assert [score for _, score in await first] == [5]
    assert [score for _, score in await some] == [6, 7]
    assert [s for _, s in await batcher.ask('b', [row(8)] * 3)] == [8, 8, 8]

  in_loop(test, max_queue=3)


def test_rows_of_those_who_gave_up_are_not_computed():
  async def test(bank, batcher):
    first = asyncio.create_task(batcher.ask('a', [row(5)]))
    await asyncio.sleep(0.1)
    with pytest.raises(TimeoutError):
      async with asyncio.timeout(0.05):
        await batcher.ask('b', [row(6)])
    bank.go.set()
    assert len(await first) == 1
    assert len(await batcher.ask('a', [row(7)])) == 1
    assert bank.asked == [['a'], ['a']]

  in_loop(test)


def test_a_removed_prompt_or_a_failure_harms_only_its_own_rows():
  async def test(bank, batcher):
    first = asyncio.create_task(batcher.ask('a', [row(5)]))
    await asyncio.sleep(0.1)
    asked = [asyncio.create_task(batcher.ask(n, [row(6)])) for n in 'aba']
    await asyncio.sleep(0)
    bank.names = ['a']
    bank.go.set()
    await first
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers[1], batching.UnknownPrompt)
    assert answers[0][0][1] == answers[2][0][1] == 6
    bank.fail = True
    with pytest.raises(jax.errors.JaxRuntimeError):
      await batcher.ask('a', [row(7)])
    bank.fail = False
    assert (await batcher.ask('a', [row(8)]))[0][1] == 8

  in_loop(test)


# ---------------------------------------------------------------- the command


def test_sigterm_answers_what_was_asked_and_leaves(prompts):
  process = tiny.Command(
    [
      'serve',
      '--base=ptune://tiny',
      f'--prompts={prompts}',
      '--port=0',
      '--input_length=32',
      f'--output_length={OUTPUT}',
      '--max_wait=1.5',
    ]
  )
  process.wait_for('http://', 120)
  url = re.search(r'http://\S+', process.output)[0]

  async def main():
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
      asked = [
        asyncio.create_task(
          client.post('/predict', json={'prompt': name, 'inputs': 'a'})
        )
        for name in ('short', 'long') * 4
      ]
      while 'ptune_queue_rows 8.0' not in (await client.get('/metrics')).text:
        await asyncio.sleep(0.02)
      process.send(signal.SIGTERM)
      return [response.status_code for response in await asyncio.gather(*asked)]

  assert asyncio.run(main()) == [200] * 8
  assert process.wait() == 0
  assert 'all requests were answered' in process.output


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--batch_size=0', '--batch_size is 0'),
    ('--timeout=0', '--timeout 0.0'),
    ('--prompts=none.npy', 'none.npy'),
    ('--base=ptune://huge', 'ptune://huge does not come'),
    ('--timeout=nan', '--timeout nan; expected seconds'),
    ('--timeout=inf', '--timeout inf; expected seconds'),
    ('--token_file=/dev/null', 'which is a device; expected a file'),
    ('--allowed_hosts=http://a', 'without scheme and port'),
  ],
)
def test_a_wrong_flag_is_said_before_anything_is_served(flag, message):
  with tiny.one_device(), pytest.raises((ValueError, OSError), match=message):
    serve.make(flags(flag), web)


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'uvicorn', None)
  with pytest.raises(ValueError, match=r'pip install "ptune\[serve\]"'):
    serve.run(flags())


def test_a_port_that_is_taken_is_said():
  with serve.listen('127.0.0.1', 0) as taken:
    with pytest.raises(OSError, match='choose another port'):
      serve.listen('127.0.0.1', taken.getsockname()[1])
  with pytest.raises(ValueError, match='--port is 70000; expected 0 to 65535'):
    serve.listen('127.0.0.1', 70000)
  assert bucketing.BUCKET_MULTIPLE == 32  # Inputs of 32 tokens need this.
