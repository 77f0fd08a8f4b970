"""The host names that a service answers to.

A web page can make its own domain resolve to 127.0.0.1 (DNS rebinding). The
browser then treats the service as part of that page and lets the page read the
responses. The Host header still has the page's domain, so a service is safe if
it answers only to its own names.
"""

import dataclasses
import ipaddress
import re
import socket
from collections.abc import Iterable

from ptune.errors import UserError

LOOPBACK = frozenset({'localhost', '127.0.0.1', '::1'})
ANY = '*'


@dataclasses.dataclass(frozen=True)
class Hosts:
  """The Host headers that a service accepts, with any port.

  Attributes:
    names: The names and addresses that the service listens on.
    addresses: Whether to accept any IP address, which nobody can rebind.
    allowed: The names that the user added; '*' accepts every name.
  """

  names: frozenset[str] = LOOPBACK
  addresses: bool = False
  allowed: frozenset[str] = frozenset()

  def refusal(self, host: str, origin: str | None) -> str:
    """Why a request is refused; '' if it is accepted.

    Args:
      host: Its Host header.
      origin: Its Origin header, which browsers send for requests from a page
        that may belong to another site.
    """
    if ANY in self.allowed:
      return ''
    name, _ = place = _place(host)
    if name not in self.names | self.allowed and not (
      self.addresses and _is_address(name)
    ):
      return (
        f'the Host header is {host!r}, and this service answers to'
        f' {", ".join(sorted(self.names | self.allowed))}; start it with'
        f' --allowed_hosts={name or "NAME"} to add it'
      )
    page = (origin or '').partition('://')[2]
    if origin is not None and (
      _place(page) != place and _place(page)[0] not in self.allowed
    ):
      return (
        f'the request comes from a page of {origin}; only pages of this service'
        ' or of hosts in --allowed_hosts may send requests'
      )
    return ''


LOCAL = Hosts()


def of(host: str, allowed: Iterable[str] = ()) -> Hosts:
  """The hosts of a service.

  Args:
    host: The address it listens on, such as 127.0.0.1, or 0.0.0.0 for all.
    allowed: Further names, without scheme and port; '*' for all.

  Raises:
    UserError: If one of `allowed` is not a host name.
  """
  allowed = frozenset(name.lower() for name in allowed)
  wrong = sorted(
    name
    for name in allowed - {ANY}
    if _place(name)[0] != name and not _is_address(name)
  )
  if wrong:
    raise UserError(
      f'--allowed_hosts has {wrong}; expected names without scheme and port,'
      ' such as prompts.example.org'
    )
  name, _ = _place(f'[{host}]' if ':' in host else host)
  if name in LOOPBACK:
    return Hosts(LOOPBACK, allowed=allowed)
  if name in ('', '0.0.0.0', '::'):
    own = frozenset({socket.gethostname().lower(), socket.getfqdn().lower()})
    return Hosts(LOOPBACK | own, addresses=True, allowed=allowed)
  return Hosts(frozenset({name}), allowed=allowed)


def _place(host: str) -> tuple[str, int | None]:
  """The name in a Host header, in lower case, and its port.

  The name is '' if the header is malformed. The port is None if it is missing,
  80 or 443.
  """
  match = re.fullmatch(r'(?:\[([^\[\]]+)\]|([^\[\]:/@]+))(?::(\d+))?', host)
  if not match:
    return '', None
  name = (match[1] or match[2]).lower().rstrip('.')
  port = int(match[3]) if match[3] else None
  return name, None if port in (80, 443) else port


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True
