"""What follows from the time that has passed and from any event, whatever it was. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shimpy.scheduler import policy
from shimpy.scheduler.books import Books
from shimpy.scheduler.effects import Effect, LimitParked, SetThreads
from shimpy.scheduler.ledger import Ledger
from shimpy.scheduler.states import Phase
from shimpy.units import format_duration


def deadlines(books: Books) -> Iterator[float]:
    """Yield the times at which `expire` or `lose_patience` will have something to do."""
    for resident in books.residents.values():
        if resident.is_idle and not books.has_waiting(resident):
            yield resident.expires_s
    for _, expires_s in books.expiring_moves():
        yield expires_s
    for queue in books.queues.values():
        if queue.blocked_since_s is not None and not queue.is_impatient:
            yield queue.blocked_since_s + policy.PATIENCE_S


def lose_patience(books: Books, now: float) -> bool:
    """Let busy residents take no newer requests for whom loads have waited long; say if any."""
    has_changed = False
    for queue in books.queues.values():
        since = queue.blocked_since_s
        if since is not None and now >= since + policy.PATIENCE_S and not queue.is_impatient:
            queue.is_impatient = has_changed = True
    return has_changed


def end_yielding(books: Books, now: float) -> list[Effect]:
    """Let residents serve again whose memory nobody waits for any more."""
    effects: list[Effect] = []
    for resident in books.residents.values():
        if resident.yields_to is None:
            continue
        queue = books.waiting.get(resident.yields_to)
        other = queue.resident if queue is not None else None
        has_room = other is not None and other.phase is Phase.LOADING
        if queue is None or has_room:
            resident.yields_to = None
            effects += books.grant_waiting(books.queues[resident.key], now)
    return effects


def expire(books: Books, now: float, *, is_draining: bool) -> list[Effect]:
    """Stop idle residents whose keep_alive is over; every idle one when the daemon stops."""
    effects: list[Effect] = []
    for queue, expires_s in books.expiring_moves():
        if now >= expires_s:
            reason = "its keep_alive was over before it was loaded again"
            effects += books.drop_move(queue, reason, now, kind="unload", cause="keep_alive")
    for resident in books.residents.values():
        if not resident.is_idle or books.has_waiting(resident):
            continue
        if is_draining:
            effects += books.stop(resident, "shimpy is stopping", now, cause="stopping")
        elif now >= resident.expires_s:
            kept = format_duration(resident.keep_alive_s)
            reason = f"idle for its keep_alive of {kept}"
            effects += books.stop(resident, reason, now, cause="keep_alive")
    return effects


def share_threads(books: Books) -> list[Effect]:
    """Let busy residents share the cores, unless the number of threads is set."""
    if books.limits.n_threads is not None:
        return []
    busy = [r for r in books.residents.values() if r.phase is Phase.READY and r.leases]
    effects: list[Effect] = []
    for worker, n_threads in policy.share_threads(books.n_cores, busy).items():
        resident = books.residents[worker]
        if resident.n_threads != n_threads:
            resident.n_threads = n_threads
            effects.append(SetThreads(worker=worker, n_threads=n_threads))
    return effects


def share_parking(books: Books, ledger: Ledger) -> list[Effect]:
    """Let the loaded models share the RAM for parked caches; whoever has more gives it back."""
    limit = books.parked_limit(ledger.spare_ram)
    effects: list[Effect] = []
    for resident in books.residents.values():
        if resident.parks and resident.phase is Phase.READY and resident.parked_limit != limit:
            resident.parked_limit = limit
            effects.append(LimitParked(worker=resident.worker, n_bytes=limit))
    return effects
