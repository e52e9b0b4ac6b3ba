"""How models that are waited for get their memory: one pass over one snapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import partial
from typing import assert_never

from msgspec.structs import replace

from shimpy.errors import CapacityError, DoesNotFitError, LoadError, UserError
from shimpy.placement.defaults import N_CTX_LEAST
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Rung
from shimpy.scheduler import policy
from shimpy.scheduler.books import Books
from shimpy.scheduler.effects import Effect, note
from shimpy.scheduler.ledger import Ledger, rung_fits
from shimpy.scheduler.policy import describe
from shimpy.scheduler.replanning import describe_shrink, gpu_share, shrink_resident
from shimpy.scheduler.room import (
    Evict,
    Refuse,
    Room,
    RoomSearch,
    Start,
    Wait,
    describe_use,
    plan_again,
)
from shimpy.scheduler.states import ModelQueue, Move, Phase, Purpose, Request, Resident, Retry


class Placing:
    """One pass: the queues are placed one after the other, the longest waiting first.

    What an earlier one has been promised is no longer there for a later one (Ledger.claim),
    nor what a model on its way to another placement will take (Ledger.hold). Those are loaded
    last, one at a time, when nothing else loads.
    """

    def __init__(self, books: Books, ledger: Ledger, planner: policy.Planner, now: float) -> None:
        self._books = books
        self._ledger = ledger
        self._planner = planner
        self._now = now
        # Whose memory between two placements goes to the queue that is being placed.
        self._given_up: list[ModelQueue] = []
        for queue in books.moving:
            self._hold(queue)

    def place_all(self, waiting: Iterable[ModelQueue]) -> list[Effect]:
        """Place the models that are waited for, then load those that are on their way."""
        effects: list[Effect] = []
        for queue in sorted(waiting, key=lambda queue: queue.waiting[0].id):
            effects += self.place(queue)
        for queue in self._books.moving:
            effects += self._place_move(queue)
        return effects

    def place(self, queue: ModelQueue) -> list[Effect]:
        """Find room for the model that a queue waits for.

        The cases:

        1. It ran out of memory before: start the first lower rung that fits, or reject.
        2. It fits beside all others: start it, if need be once stopping workers have gone.
           Models that are on their way to another placement give it up where it does not.
        3. It fits when idle residents move their experts to RAM, or leave, its own outdated one
           among them: stop these.
        4. It fits when busy ones leave: wait; after PATIENCE_S they take no newer requests.
        5. It never fits, or an option is impossible: reject those who asked for the same.

        Cases 2 to 5 are tried with the longest context that anyone in the queue asked for; when
        that can't be had yet, with what the first one asked for.
        """
        effects = self._place(queue)
        reason = f"its memory was needed for {queue.key}"
        dropped: list[Effect] = []
        for mover in self._given_up:
            dropped += self._books.drop_move(mover, reason, self._now, kind="evict", cause="evict")
        self._given_up = []
        return dropped + effects

    def _place(self, queue: ModelQueue) -> list[Effect]:
        if queue.retry is not None:
            return self._place_retry(queue, queue.retry)
        effects: list[Effect] = []
        while self._books.needs_placing(queue):
            try:
                wish, room = self._find_room(queue)
            except UserError as error:
                effects += self._reject_first(queue, error)
                continue
            match room:
                case Start(must_wait=True):
                    self._ledger.claim(room.rung)
                    return effects
                case Start():
                    return effects + self._start(queue, room, wish)
                case Evict():
                    return effects + self._evict(queue, room)
                case Wait():
                    return effects + self._wait(queue, room)
                case Refuse():
                    message = f"{queue.key} does not fit on this machine: {room.reason}"
                    effects.append(note("refused", queue.key, message, self._now))
                    effects += self._reject_first(queue, DoesNotFitError(message))
                case _:
                    assert_never(room)
        return effects

    def preview(self, queue: ModelQueue) -> Rung | None:
        """Return the rung that `place` would take for a queue's first request; changes no queue.

        None: there is none, or it was weighed before.
        """
        if queue.retry is not None:
            return None
        try:
            _, room = self._find_room(queue)
        except UserError:
            return None
        if isinstance(room, Refuse):
            return None
        self._ledger.claim(room.rung)
        return room.rung

    def _find_room(self, queue: ModelQueue) -> tuple[policy.Wish, Room]:
        wish = policy.load_wish(queue.waiting)
        modest = policy.Wish(options=queue.waiting[0].options)
        if wish == modest:
            return modest, self._room_for(queue, modest)
        try:
            room = self._room_for(queue, wish)
        except UserError:
            room = Refuse(reason="someone further back asked for what can't be")
        if isinstance(room, Wait | Refuse):
            return modest, self._room_for(queue, modest)
        return wish, room

    def _room_for(self, queue: ModelQueue, wish: policy.Wish) -> Room:
        room = self._search(queue, wish).find()
        if not isinstance(room, Refuse) and not _is_beside(room, queue):
            return self._room_of_moves(queue, wish) or room
        return room

    def _search(self, queue: ModelQueue, wish: policy.Wish) -> RoomSearch:
        books, own = self._books, queue.resident
        return RoomSearch(
            plan=partial(wish.plan, self._planner, queue.waiting[0].model),
            ledger=self._ledger,
            own=own,
            leavers=[r for r in books.residents.values() if r is not own and books.can_leave(r)],
            planner=self._planner,
        )

    def _room_of_moves(self, queue: ModelQueue, wish: policy.Wish) -> Room | None:
        """Find room beside all residents where models between two placements give theirs up."""
        given_up: list[ModelQueue] = []
        for other in self._books.moving:
            if self._books.is_pinned(other.key):
                continue
            self._ledger.let_go(other.key)
            given_up.append(other)
            room = self._search(queue, wish).find()
            if _is_beside(room, queue):
                self._given_up = given_up
                return room
        for other in given_up:
            self._hold(other)
        return None

    def _hold(self, queue: ModelQueue) -> None:
        if queue.move is not None:
            firmly = self._books.is_pinned(queue.key)
            self._ledger.hold(queue.key, queue.move.claim, firmly=firmly)

    def _reject_first(self, queue: ModelQueue, error: CapacityError | UserError) -> list[Effect]:
        """Reject the first in a queue, and those behind it that would be told the same."""
        # A copy for each: every client's task adds its own traceback.
        effects = self._books.reject_waiting(queue, partial(copy, error), like=queue.waiting[0])
        return effects + self._books.grant_waiting(queue, self._now)

    # --- the cases ------------------------------------------------------------------------

    def _place_retry(self, queue: ModelQueue, retry: Retry) -> list[Effect]:
        for rung in retry.rungs:
            if not rung_fits(rung, self._ledger.remaining()):
                continue
            if not rung_fits(rung, self._ledger.present()):
                self._ledger.claim(rung)
                return []
            return self._begin(queue, rung, retry.purpose)
        message = (
            f"{queue.key} could not be loaded: {retry.reason}; no placement that needs less "
            "memory fits now"
        )
        error = partial(LoadError, message, out_of_memory=True)
        return [
            note("load_failed", queue.key, message, self._now),
            *self._books.reject_waiting(queue, error),
        ]

    def _start(self, queue: ModelQueue, room: Start, wish: policy.Wish) -> list[Effect]:
        first = queue.waiting[0]
        default_n_ctx = 0
        if wish.options.n_ctx is not None:
            by_default = policy.Wish(options=replace(wish.options, n_ctx=None))
            remaining = self._ledger.remaining()
            chosen = by_default.plan(self._planner, first.model, remaining).chosen
            if chosen is not None:
                default_n_ctx = min(N_CTX_LEAST, chosen.placement.n_ctx)
        purpose = Purpose(loaded_for=first.options, asked=wish.options, default_n_ctx=default_n_ctx)
        return self._begin(queue, room.rung, purpose, policy.lower_rungs(room.plan, room.rung))

    def _begin(
        self,
        queue: ModelQueue,
        rung: Rung,
        purpose: Purpose,
        lower_rungs: tuple[Rung, ...] = (),
    ) -> list[Effect]:
        start = self._books.start(queue, rung, purpose, lower_rungs, now=self._now)
        return [start, note("load", queue.key, f"asked for; {describe(rung)}", self._now)]

    def _evict(self, queue: ModelQueue, room: Evict) -> list[Effect]:
        effects: list[Effect] = []
        for victim in room.victims:
            if victim is queue.resident:
                reason = _reload_reason(victim, queue.waiting[0])
                effects += self._books.stop(victim, reason, self._now, kind="reload")
            else:
                reason = f"its memory was needed for {queue.key} ({describe_use(victim)})"
                effects += self._books.stop(victim, reason, self._now, kind="evict")
        for shrink in room.shrinks:
            reason = f"its memory was needed for {queue.key}: {describe_shrink(shrink)}"
            effects += shrink_resident(self._books, shrink, reason, self._now, cause="shrunk")
            self._ledger.hold(shrink.resident.key, shrink.rung)
        self._ledger.claim(room.rung)
        return effects

    def _wait(self, queue: ModelQueue, room: Wait) -> list[Effect]:
        effects: list[Effect] = []
        if queue.blocked_since_s is None:
            queue.blocked_since_s = self._now
            holders = ", ".join(sorted(holder.key for holder in room.holders))
            reason = f"its memory is held by {holders}" if holders else "others came first"
            effects.append(note("wait", queue.key, reason, self._now))
        if queue.is_impatient:
            self._ledger.claim(room.rung, after=room.holders)
            first = queue.waiting[0].id
            for holder in room.holders:
                if holder.yields_to is None or first < holder.yields_to:
                    holder.yields_to = first
        return effects

    # --- models that are on their way to another placement ---------------------------------

    def _place_move(self, queue: ModelQueue) -> list[Effect]:
        """Load a model again that was stopped for another placement, or leave it unloaded."""
        move = queue.move
        residents = self._books.residents.values()
        is_loading = any(resident.phase is Phase.LOADING for resident in residents)
        if move is None or queue.resident is not None or is_loading:
            return []
        self._ledger.let_go(queue.key)
        room = self._ledger.remaining()
        rung, lower = self._rung_for(move, room)
        if rung is None:
            reason = f"less memory is free than {describe(move.least)} takes"
            return self._books.drop_move(queue, reason, self._now, kind="unload", cause="no_room")
        if not rung_fits(rung, self._ledger.present()):
            self._hold(queue)
            return []
        start = self._books.start_move(queue, rung, lower, now=self._now)
        reason = f"on its way to another placement; {describe(rung)}"
        return [start, note("load", queue.key, reason, self._now, cause="move")]

    def _rung_for(self, move: Move, room: Hardware) -> tuple[Rung | None, tuple[Rung, ...]]:
        """Return the rung that a moving model gets, and those to try if it proves too large."""
        if move.rungs:
            return next((rung for rung in move.rungs if rung_fits(rung, room)), None), ()
        plan = plan_again(move.model, move.options, self._planner, room)
        if plan.chosen is None or gpu_share(plan.chosen) < gpu_share(move.least):
            return None, ()
        return plan.chosen, policy.lower_rungs(plan, plan.chosen)


def _is_beside(room: Room, queue: ModelQueue) -> bool:
    """Whether room was found without anybody's leaving but the model's own resident."""
    match room:
        case Start():
            return True
        case Evict():
            return not room.shrinks and all(v is queue.resident for v in room.victims)
        case _:
            return False


def _reload_reason(resident: Resident, request: Request) -> str:
    if resident.model.digest != request.model.digest:
        return "its file has changed"
    wanted = request.options.n_ctx or resident.purpose.default_n_ctx
    if wanted > resident.rung.placement.n_ctx:
        return f"a context of {wanted} was asked for, {resident.rung.placement.n_ctx} is loaded"
    return "other load options were asked for"
