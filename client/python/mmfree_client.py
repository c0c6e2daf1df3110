"""Sessions of an mmfree server from Python, over the stubs of proto/mmfree/v1 (see README.md).

    client = Client("127.0.0.1:50051")
    session = client.create_session("tale", system_prompt="Once upon a time")
    for text in session.stream(" there was", max_new_tokens=40, temperature=0.8):
        print(text, end="", flush=True)
    other = session.fork("other", turn=0)

A session is a context that the server keeps. A turn is a transaction: it is committed when its last
text has come, or the session stays as it was. Each turn names the one that it follows, so that one
which somebody else took in between, or whose answer was lost, is found out (ABORTED). Calls raise
grpc.RpcError; proto/mmfree/v1/session.proto says which codes and when. Objects are used by one
thread at a time.
"""

import dataclasses
import datetime

import grpc
from google.protobuf import duration_pb2
from mmfree.v1 import inference_pb2, inference_pb2_grpc, session_pb2, session_pb2_grpc

_OPTIONS = {"sampling": inference_pb2.SamplingOptions,
            "stopping": inference_pb2.StoppingOptions,
            "response": inference_pb2.ResponseOptions,
            "constraint": inference_pb2.Constraint}
# What a turn says itself, or has no use for.
_OWN_FIELDS = {"text", "token_ids", "session_id", "state", "expected_turn", "candidates", "best_of"}


def _set_options(request, options):
    """Puts each option where the field of its name is: temperature into request.sampling."""
    for name, value in options.items():
        target = request
        for field, message in _OPTIONS.items():
            if name in message.DESCRIPTOR.fields_by_name:
                target = getattr(request, field)
        if target is request and (name not in request.DESCRIPTOR.fields_by_name or
                                  name in _OWN_FIELDS):
            raise TypeError(f"a turn has no option {name!r}")
        target.MergeFrom(type(target)(**{name: value}))


def _ttl(seconds):
    if seconds is None:
        return None
    duration = duration_pb2.Duration()
    duration.FromTimedelta(datetime.timedelta(seconds=seconds))
    return duration


@dataclasses.dataclass(frozen=True)
class Turn:
    """A committed turn."""

    text: str
    number: int
    finished: inference_pb2.GenerationFinished  # finish reason, usage, timings


class Session:
    """A session on the server; made by Client."""

    def __init__(self, client, info):
        self._client = client
        self.info = info  # the session as the server last described it (session_pb2.Session)
        self._turn = info.turn
        self.last = None  # the last Turn that this object took

    @property
    def id(self):
        return self.info.id

    @property
    def turn(self):
        """The number of turns, as this object knows it: what its next turn follows."""
        return self._turn

    def refresh(self):
        """Asks the server for the session as it is now, turns of others included."""
        self._update(self._client.sessions_stub.GetSession(
            session_pb2.GetSessionRequest(session_id=self.id),
            timeout=self._client.timeout).session)
        return self.info

    def stream(self, text, timeout=None, **options):
        """Takes a turn and yields its text as it comes; `last` is the turn once that has ended.

        Options are the fields of SamplingOptions, StoppingOptions, ResponseOptions, Constraint and
        GenerateRequest by their own names. A generator that is closed early cancels the turn, which
        is then not committed.
        """
        request = inference_pb2.GenerateRequest(session_id=self.id, text=text,
                                                expected_turn=self._turn)
        _set_options(request, options)
        return self._run(request, timeout)

    def generate(self, text, timeout=None, **options):
        """Takes a turn and returns it."""
        for _ in self.stream(text, timeout, **options):
            pass
        return self.last

    def _run(self, request, timeout):
        call = self._client.inference_stub.Generate(request, timeout=timeout)
        parts = []
        try:
            for event in call:
                if event.delta.text:
                    parts.append(event.delta.text)
                    yield event.delta.text
                if event.HasField("finished"):
                    self._turn = event.finished.session_turn
                    self.last = Turn("".join(parts), self._turn, event.finished)
        finally:
            call.cancel()

    def fork(self, new_id="", turn=None, ttl=None):
        """A new session that goes on from the end of a turn that is kept; by default the last one."""
        request = session_pb2.ForkSessionRequest(session_id=self.id, new_session_id=new_id,
                                                 turn=turn, ttl=_ttl(ttl))
        return Session(self._client, self._client.sessions_stub.ForkSession(
            request, timeout=self._client.timeout).session)

    def rewind(self, turn):
        """Goes back to the end of an earlier turn that is kept, and forgets those after it."""
        self._update(self._client.sessions_stub.RewindSession(
            session_pb2.RewindSessionRequest(session_id=self.id, turn=turn),
            timeout=self._client.timeout).session)

    def export(self, turn=None, dtype="f32"):
        """The state as bytes, for Client.import_session of any server with this model; the format of
        `mmfree sessions export`. dtype: "f32", exact; "f16" or "bf16", half as large and rounded."""
        request = session_pb2.ExportSessionRequest(
            session_id=self.id, turn=turn,
            dtype=session_pb2.StateDtype.Value(f"STATE_DTYPE_{dtype.upper()}"))
        return self._client.sessions_stub.ExportSession(
            request, timeout=self._client.timeout).checkpoint.SerializeToString()

    def delete(self):
        """Deletes it and all that is kept for it; a turn that is running ends with ABORTED."""
        self._client.sessions_stub.DeleteSession(
            session_pb2.DeleteSessionRequest(session_id=self.id), timeout=self._client.timeout)

    def _update(self, info):
        self.info = info
        self._turn = info.turn


class Client:
    """A server. `target`: HOST:PORT, or a grpc.Channel (TLS, interceptors), which stays the caller's.

    `timeout`: seconds that calls may take but for turns, which have their own.
    """

    def __init__(self, target, timeout=30):
        self._owned = grpc.insecure_channel(target) if isinstance(target, str) else None
        channel = self._owned if self._owned is not None else target
        self.timeout = timeout
        self.inference_stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.sessions_stub = session_pb2_grpc.SessionServiceStub(channel)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self._owned is not None:
            self._owned.close()

    def create_session(self, id="", system_prompt="", model="", ttl=None):
        """Makes a session. No id: the server gives one. `ttl`: seconds without a turn after which
        it goes; by default the server's."""
        request = session_pb2.CreateSessionRequest(session_id=id, model=model, ttl=_ttl(ttl))
        if system_prompt:
            request.text = system_prompt
        return Session(self, self.sessions_stub.CreateSession(request, timeout=self.timeout).session)

    def session(self, id):
        """A session that is there."""
        request = session_pb2.GetSessionRequest(session_id=id)
        return Session(self, self.sessions_stub.GetSession(request, timeout=self.timeout).session)

    def sessions(self, model="", page_size=0):
        """Yields the caller's sessions, the most recently used first."""
        request = session_pb2.ListSessionsRequest(model=model, page_size=page_size)
        while True:
            page = self.sessions_stub.ListSessions(request, timeout=self.timeout)
            for info in page.sessions:
                yield Session(self, info)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def import_session(self, state, id="", model="", ttl=None):
        """Makes a session from what Session.export gave."""
        request = session_pb2.ImportSessionRequest(
            checkpoint=session_pb2.SessionCheckpoint.FromString(state), session_id=id, model=model,
            ttl=_ttl(ttl))
        return Session(self, self.sessions_stub.ImportSession(request, timeout=self.timeout).session)
